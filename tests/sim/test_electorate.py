"""Whose disk may forget: a minority of every config that may still matter, and nobody while voters change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from piclusterd.ids import NodeId
from piclusterd.sim.electorate import in_force, may_forget, window_s
from piclusterd.sim.world import Actor, Plan, World
from piclusterd.wire import Voters


@pytest.fixture
def world() -> Iterator[World]:
    with closing(World(Plan(seed=1, minutes=1.25, preset="lan"))) as world:
        world.calm()
        world.open()
        world.play(20.0)
        yield world


def store(actor: Actor, config: Voters) -> None:
    actor.disk.hard = replace(actor.disk.hard, voters=config)


def newest(world: World) -> Voters:
    return max((actor.disk.hard.voters for actor in world.actors), key=lambda config: (config.term, config.version))


def nodes(world: World) -> tuple[NodeId, ...]:
    return tuple(actor.disk.node for actor in world.actors)


def test_one_of_three_voters_may_forget_and_then_no_other(world: World) -> None:
    one, two, three, learner = world.actors
    assert all(may_forget(world, actor) for actor in world.actors)
    world.lose_disk(one)
    assert not may_forget(world, two)
    assert not may_forget(world, three)
    assert may_forget(world, learner)


def test_a_config_that_one_voter_alone_has_may_still_win_and_so_may_the_one_before(world: World) -> None:
    before = newest(world)
    ids = nodes(world)
    following = Voters(before.version + 1, before.term, tuple(sorted(ids)))
    world.checks.config_made(following)
    store(world.actors[0], following)
    assert in_force(world) == (before, following)
    for actor in world.actors[1:3]:
        store(actor, following)
    assert in_force(world) == (following,)


def test_nobody_forgets_while_a_change_is_asked_for_and_nothing_is_changed_just_after(world: World) -> None:
    voter, learner = world.actors[0], world.actors[3]
    assert world.owner.ask(voter, "add", learner.disk.node) is not None
    busy = world.owner.busy
    assert busy
    assert not may_forget(world, learner)
    world.play(25.0)
    busy = world.owner.busy
    assert not busy
    assert newest(world).voters == tuple(sorted(nodes(world)))
    world.lose_disk(voter)
    assert world.owner.ask(learner, "remove", voter.disk.node) is None
    world.play(30.0 + window_s(world))
    assert world.owner.ask(learner, "remove", world.actors[1].disk.node) is not None
