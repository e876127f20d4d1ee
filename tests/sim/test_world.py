"""The rehearsal room: it plays what its seed says, and its checks see what they are there to see."""

from __future__ import annotations

from contextlib import closing
from random import Random

import pytest

from piclusterd.events import Rules
from piclusterd.ids import NodeId, RunId
from piclusterd.sim.__main__ import ablated, play
from piclusterd.sim.checks import Checks, Violation
from piclusterd.sim.disk import Disk
from piclusterd.sim.keys import SimKey, verify
from piclusterd.sim.network import CALM, Network, Weather, draw_weather
from piclusterd.sim.outside import WINDOW, Hub, Line, Service
from piclusterd.sim.world import Plan, World
from piclusterd.wire import Hook

A, B, C = (NodeId(letter * 16) for letter in "abc")
SHORT = Plan(seed=1, minutes=1.25)


def hook(number: int) -> Hook:
    return Hook("sim", f"hook-{number}", "create", b"{}")


# the world -------------------------------------------------------------------------------------------------------
def test_one_seed_is_one_story() -> None:
    assert play(SHORT) == play(SHORT)


def test_two_seeds_are_two_stories() -> None:
    assert play(SHORT)[0] != play(Plan(seed=2, minutes=1.25))[0]


def test_whoever_watches_sees_every_event_and_changes_none() -> None:
    rows: list[str] = []
    with closing(World(SHORT, rows.append)) as world:
        watched = world.run()
    assert len(rows) >= world.events > 1000
    assert watched == play(SHORT)[0]


def test_the_work_of_the_cluster_is_done_in_a_minute_of_calm() -> None:
    with closing(World(SHORT)) as world:
        world.run()
        done = [view.state for actor in world.actors if actor.node for view in actor.node.journal.views(1000)]
        assert world.checks.taken
        assert set(done) == {"done"}


def test_an_ablation_switches_one_rule_off() -> None:
    assert ablated(SHORT, None) == SHORT
    assert ablated(SHORT, "term-fencing").rules == Rules(term_fencing=False)
    assert ablated(SHORT, "recovery-barrier").rules == Rules(recovery_barrier=False)
    assert ablated(SHORT, "vote-fsync").lying_disks


# the checks ------------------------------------------------------------------------------------------------------
def test_two_leaders_of_one_term_are_seen() -> None:
    checks = Checks((A, B, C))
    checks.elected(A, 1)
    checks.elected(A, 1)
    checks.elected(B, 2)
    with pytest.raises(Violation, match=r"^I1"):
        checks.elected(B, 1)


def test_two_active_coordinators_of_one_term_are_seen() -> None:
    checks = Checks((A, B, C))
    checks.activated(A, 1)
    with pytest.raises(Violation, match=r"^I1"):
        checks.activated(B, 1)


def test_a_webhook_called_taken_with_too_few_copies_is_seen() -> None:
    checks = Checks((A, B, C))
    checks.landed(A, "k")
    checks.landed(NodeId("d" * 16), "k")
    with pytest.raises(Violation, match=r"^I5"):
        checks.called_taken("k", A)
    checks.landed(B, "k")
    checks.called_taken("k", A)


def test_a_webhook_called_taken_behind_the_newest_coordinators_back_is_seen() -> None:
    checks = Checks((A, B, C))
    checks.landed(A, "k")
    checks.landed(B, "k")
    with pytest.raises(Violation, match=r"^I3"):
        checks.called_taken("k", C)


def test_a_coordinator_that_serves_without_a_taken_webhook_is_seen() -> None:
    checks = Checks((A, B, C))
    for node in (A, B):
        checks.landed(node, "k")
    checks.called_taken("k", None)
    checks.activated(B, 2)
    with pytest.raises(Violation, match=r"^I6"):
        checks.activated(C, 3)


def test_one_effect_tried_under_two_keys_is_seen() -> None:
    checks = Checks((A, B, C))
    run = RunId("r" * 32)
    checks.acted(run, "comment", "key")
    checks.acted(run, "comment", "key")
    with pytest.raises(Violation, match=r"^I7"):
        checks.acted(run, "comment", "another")


# network, disk and outside ---------------------------------------------------------------------------------------
def test_a_calm_network_loses_and_doubles_nothing() -> None:
    network = Network(Random(1), CALM)
    for _ in range(100):
        (delay,) = network.delays(A, B)
        assert CALM.delay_min_s <= delay <= CALM.delay_max_s


def test_a_bad_network_loses_doubles_and_delays() -> None:
    network = Network(Random(1), Weather(0.001, 0.002, loss=0.3, duplication=0.5, slow=0.1))
    copies = [network.delays(A, B) for _ in range(1000)]
    assert {len(delays) for delays in copies} == {0, 1, 2}
    assert max(delay for delays in copies for delay in delays) > 0.01


def test_a_cut_goes_one_way_until_it_heals() -> None:
    network = Network(Random(1), CALM)
    network.cut(A, B)
    assert network.delays(A, B) == []
    assert network.delays(B, A)
    assert (network.passes(A, B), network.passes(B, A)) == (False, True)
    network.heal()
    assert network.delays(A, B)


def test_seeds_draw_different_weather() -> None:
    assert len({draw_weather(Random(seed)) for seed in range(50)}) > 10


def test_writes_land_one_after_the_other() -> None:
    with closing(Disk(SimKey(1), "pi", Random(1), slow=0.5)) as disk:
        landed = [disk.lands_at(10.0) for _ in range(20)]
        assert landed == sorted(landed)
        assert landed[0] > 10.0
        disk.crash()
        assert disk.lands_at(10.0) < landed[-1]


def test_a_rehearsed_signature_verifies_under_its_own_key_only() -> None:
    one, two = SimKey(1), SimKey(2)
    signature = one.sign(b"data")
    assert verify(one.public_key, signature, b"data")
    assert not verify(two.public_key, signature, b"data")
    assert not verify(one.public_key, signature, b"other")


def test_the_hub_keeps_what_was_not_taken_and_refuses_older_terms() -> None:
    hub = Hub()
    for number in range(WINDOW + 5):
        hub.accept(hook(number))
    hub.connect(Line(A, 1, term=4))
    hub.connect(Line(B, 1, term=3))
    assert hub.line == Line(A, 1, term=4)
    assert len(hub.to_send()) == WINDOW
    assert hub.to_send() == []
    hub.answered(1, taken=True)
    hub.answered(2, taken=False)
    assert [seq for seq, _ in hub.to_send()] == [2, WINDOW + 1]
    hub.hang_up(B)
    assert hub.line == Line(A, 1, term=4)
    hub.hang_up(A)
    hub.connect(Line(B, 1, term=5))
    assert hub.line == Line(B, 1, term=5)


def test_the_service_does_one_thing_for_one_key() -> None:
    service = Service()
    run = RunId("r" * 32)
    assert service.perform(run, "comment", "key") == {"first": True}
    assert service.perform(run, "comment", "key") == {"first": False}
    service.perform(run, "update", "other")
    assert service.effects() == {run: 1}
