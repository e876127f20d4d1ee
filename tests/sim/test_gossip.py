"""The crowd: many membership deciders under one clock."""

from __future__ import annotations

import pytest

from piclusterd.cluster.suspicion import Guards
from piclusterd.events import FactsChanged
from piclusterd.sim.gossip import Crowd, Gathering
from piclusterd.wire import Facts


@pytest.mark.parametrize("nodes", [4, 16, 100])
def test_a_dead_member_is_called_failed_by_everybody_and_nobody_else_is(nodes: int) -> None:
    gathering = Gathering(Crowd(nodes, loss=0.05))
    gathering.run(5.0)
    dead = gathering.people[0]
    gathering.kill(dead, links_close=False)
    gathering.run(45.0)
    failures = gathering.failures()
    assert {whom for _, _, whom in failures} == {dead.node}
    assert {by for _, by, _ in failures} == {person.node for person in gathering.people[1:]}


@pytest.mark.parametrize("nodes", [4, 100])
def test_a_new_name_is_soon_known_to_everybody(nodes: int) -> None:
    gathering = Gathering(Crowd(nodes))
    teller = gathering.people[0]
    gathering.run(1.0)
    gathering.deliver(teller, FactsChanged(Facts(name="renamed")))
    gathering.run(3.0)
    lines = [gathering.believes(person, teller.node) for person in gathering.people]
    assert {line.facts.name for line in lines if line} == {"renamed"}


def test_a_stalled_member_accuses_nobody_unless_the_rule_is_off() -> None:
    accused = {}
    for guards in (Guards(), Guards(lifeguard=False, loop_lag=False)):
        crowd = Crowd(4, guards=guards, told_of_stalls=guards.loop_lag, delay_s=(0.1, 0.2))
        gathering = Gathering(crowd)
        for number in range(35):
            gathering.at(5.0 + 17.13 * number, lambda g=gathering: g.stall(g.people[0], 12.0))  # type: ignore[misc]
        gathering.run(600.0)
        slow = gathering.people[0].node
        accused[guards] = sum(by == slow for _, by, _ in gathering.notes)
    assert accused[Guards()] < accused[Guards(lifeguard=False, loop_lag=False)]


def test_the_same_seed_gives_the_same_story() -> None:
    stories = []
    for _ in range(2):
        gathering = Gathering(Crowd(20, seed=3, loss=0.2))
        gathering.metering = True
        gathering.read_boards(restless=True)
        gathering.kill(gathering.people[4], links_close=True)
        gathering.run(30.0)
        stories.append((gathering.events, gathering.notes, [person.bytes_sent for person in gathering.people]))
    assert stories[0] == stories[1]
