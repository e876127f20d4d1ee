"""Leadership given up in a whole cluster: whoever takes over holds everything, and nobody who could not keep it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import msgspec
import pytest

from piclusterd.cluster.fitness import BOARD_S
from piclusterd.errors import Unavailable
from piclusterd.events import FactsChanged, LeaderChanged, MoveLeadership
from piclusterd.node import Node
from piclusterd.sim.storm import Storm
from piclusterd.sim.world import Actor, Plan, World


@pytest.fixture(params=range(3))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with closing(World(Plan(request.param, minutes=3.0, preset="pi"))) as world:
        world.calm()
        world.open()
        world.every(1.0, world.hands.pump_hub)
        world.every(2.0, world.hands.webhook, 60.0)
        until(world, lambda: bool(leaders(world)), 30.0)
        yield world


def until(world: World, holds: Callable[[], bool], within: float) -> float:
    """Seconds until it holds."""
    began = world.now
    while not holds():
        assert world.now < began + within, f"not within {within} s"
        world.play(world.now + 0.1)
    return world.now - began


def leaders(world: World) -> list[Actor]:
    return [actor for actor in world.actors if actor.node is not None and actor.node.replicate.active]


def running(actor: Actor) -> Node:
    assert actor.node is not None
    return actor.node


def at_rest(world: World) -> None:
    world.settle(60.0)
    world.checks.at_rest()
    assert world.checks.taken


def test_moved_by_hand_the_heir_serves_within_two_seconds(world: World) -> None:
    (old,) = leaders(world)
    heir = next(actor for actor in world.actors[:3] if actor is not old)
    ticket = world.hands.ask(old, partial(MoveLeadership, to=heir.disk.node))
    assert until(world, lambda: leaders(world) == [heir], 10.0) < 2.0
    assert world.hands.answers[ticket] == LeaderChanged(running(heir).election.term, heir.disk.node)
    assert running(old).view(world.now).handovers == 1
    at_rest(world)


def test_a_leader_whose_disk_fills_is_relieved_neither_leads_nor_inherits_and_is_well_again(world: World) -> None:
    (old,) = leaders(world)
    old.disk.failing_until = world.now + 20.0
    until(world, lambda: bool(leaders(world)) and leaders(world) != [old], 10.0)
    (heir,) = leaders(world)
    shown = next(m for m in running(heir).view(world.now).members if m.node == old.disk.node)
    until(world, lambda: running(heir).membership.facts(old.disk.node) != shown.facts or bool(shown.facts.trouble), 5.0)
    told = running(heir).membership.facts(old.disk.node)
    assert told is not None
    assert (told.flags, told.trouble) == (("disk",), "no space left on device")
    ticket = world.hands.ask(heir, partial(MoveLeadership, to=old.disk.node))
    until(world, lambda: ticket in world.hands.answers, 1.0)
    assert isinstance(world.hands.answers[ticket], Unavailable)
    world.crash(heir)
    until(world, lambda: bool(leaders(world)) or world.now > old.disk.failing_until, 30.0)
    assert leaders(world) != [old] or world.now > old.disk.failing_until
    world.boot(heir)
    until(world, lambda: not running(old).handover.fitness.trouble, 30.0)
    at_rest(world)


def test_a_disk_that_hangs_is_trouble_and_stretches_the_patience_of_its_node(world: World) -> None:
    (old,) = leaders(world)
    old.disk.stalled_until = world.now + 12.0
    until(world, lambda: bool(leaders(world)) and leaders(world) != [old], 11.0)
    until(world, lambda: not running(old).handover.fitness.trouble, 30.0)
    view = running(old).view(world.now)
    assert view.slowest_write_s > 5.0
    assert view.stretch > 3.0
    at_rest(world)


def test_a_hot_leader_is_relieved_once_however_long_all_stay_hot(world: World) -> None:
    (old,) = leaders(world)

    def heat(actor: Actor) -> None:
        hot = msgspec.structs.replace(running(actor).membership.own_facts, flags=("hot",))
        world.deliver_in(0.0, actor, FactsChanged(hot))

    heat(old)
    assert until(world, lambda: bool(leaders(world)) and leaders(world) != [old], 30.0) >= BOARD_S
    for actor in world.actors:
        heat(actor)
    (heir,) = leaders(world)
    term = running(heir).election.term
    world.play(world.now + 120.0)
    assert (leaders(world), running(heir).election.term) == ([heir], term), "leadership does not wander"
    assert [running(actor).handover.count for actor in world.actors].count(1) == 1
    at_rest(world)


def test_who_lost_its_votes_never_votes_again_and_the_others_go_on(world: World) -> None:
    storm = Storm(world, world._rng)
    (old,) = leaders(world)
    storm._forget_votes(old)
    until(world, lambda: old.node is not None and bool(leaders(world)), 40.0)
    world.play(world.now + 30.0)
    assert running(old).election.term >= 1, "it follows"
    assert old.disk.hard.voted_for is None
    assert running(old).election.role == "follower"
    at_rest(world)
