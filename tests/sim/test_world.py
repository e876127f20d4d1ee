"""The rehearsal room: it plays what its seed says, and its checks see what they are there to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from random import Random

import pytest

from piclusterd.events import (
    Append,
    Appended,
    AppendFailed,
    Event,
    Fact,
    HardState,
    HardStateSaved,
    LoopLagged,
    Record,
    Rules,
    SaveHardState,
    Store,
    Stored,
)
from piclusterd.ids import LogId, NodeId, RunId
from piclusterd.ledger import store
from piclusterd.sim.ablations import ablated, play
from piclusterd.sim.checks import Checks
from piclusterd.sim.disk import Disk
from piclusterd.sim.hands import of_newer_release
from piclusterd.sim.keys import SimKey, verify
from piclusterd.sim.network import CALM, Network, Weather, draw_weather
from piclusterd.sim.outside import WINDOW, Hub, Line, Service
from piclusterd.sim.rest import Violation
from piclusterd.sim.world import Plan, World
from piclusterd.wire import Heartbeat, Hook, Voters

A, B = (NodeId(letter * 16) for letter in "ab")
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
        shown = [view.state for actor in world.actors if actor.node for view in actor.node.journal.views(1000)]
        assert world.checks.taken
        assert set(shown) <= {"done"}, "what a checkpoint ended is not shown any more"
        assert set(world.service.effects().values()) == {1}


def test_an_ablation_switches_one_rule_off() -> None:
    assert ablated(SHORT, None) == SHORT
    assert ablated(SHORT, "term-fencing").rules == Rules(term_fencing=False)
    assert ablated(SHORT, "recovery-barrier").rules == Rules(recovery_barrier=False)
    assert ablated(SHORT, "vote-fsync").lies == ("vote-fsync",)


# the checks ------------------------------------------------------------------------------------------------------
@pytest.fixture
def world() -> Iterator[World]:
    with closing(World(SHORT)) as world:
        yield world


def landed(checks: Checks, node: NodeId, key: str, seq: int = 1) -> None:
    """The webhook `key` is on the disk of `node`, as entry `seq` of somebody's log."""
    checks.landed(node, Fact(LogId(NodeId("f" * 16), 1), seq, 1, "hook", {"key": key}))


def test_two_leaders_of_one_term_are_seen(world: World) -> None:
    checks = world.checks
    checks.elected(A, 1)
    checks.elected(A, 1)
    checks.elected(B, 2)
    with pytest.raises(Violation, match=r"^I1"):
        checks.elected(B, 1)


def test_two_active_coordinators_of_one_term_are_seen(world: World) -> None:
    world.checks.elected(A, 1)
    world.checks.activated(world.actors[0], 1)
    with pytest.raises(Violation, match=r"^I1"):
        world.checks.activated(world.actors[1], 1)


@pytest.mark.parametrize("hard", [HardState(4), HardState(5, B), HardState(5, A, incarnation=0)])
def test_hard_state_that_goes_back_is_seen(world: World, hard: HardState) -> None:
    actor = world.actors[0]
    actor.disk.hard = HardState(5, A, incarnation=1)
    world.checks.booted(actor)
    actor.disk.hard = hard
    with pytest.raises(Violation, match=r"^I2"):
        world.checks.booted(actor)


def test_a_gap_on_a_disk_is_seen(world: World) -> None:
    landed(world.checks, A, "k", 1)
    with pytest.raises(Violation, match=r"^I4"):
        landed(world.checks, A, "l", 3)


def test_two_entries_in_one_place_are_seen(world: World) -> None:
    landed(world.checks, A, "k")
    with pytest.raises(Violation, match=r"^I4"):
        landed(world.checks, B, "another")


def test_a_webhook_called_taken_with_too_few_copies_is_seen(world: World) -> None:
    one, two, _ = world.voters.voters
    landed(world.checks, one, "k")
    landed(world.checks, world.actors[3].disk.node, "k")
    with pytest.raises(Violation, match=r"^I5"):
        world.checks.called_taken("k", world.voters)
    landed(world.checks, two, "k")
    world.checks.called_taken("k", world.voters)


def test_a_webhook_called_taken_behind_the_newest_coordinators_back_is_seen(world: World) -> None:
    world.calm()
    world.open()
    world.play(20.0)
    for actor in world.actors:
        if actor.node is not None and not actor.node.replicate.active:
            landed(world.checks, actor.disk.node, "k")
    with pytest.raises(Violation, match=r"^I3"):
        world.checks.called_taken("k", world.voters)


def test_a_coordinator_that_serves_without_a_taken_webhook_is_seen(world: World) -> None:
    one, two, three = world.voters.voters
    for node in (one, two):
        landed(world.checks, node, "k")
    world.checks.called_taken("k", world.voters)
    world.checks.elected(two, 2)
    world.checks.activated(world.by_id[two], 2)
    with pytest.raises(Violation, match=r"^I6"):
        world.checks.activated(world.by_id[three], 3)


def test_a_coordinator_whose_journal_does_not_know_a_taken_webhook_is_seen(world: World) -> None:
    world.open()
    one, two, _ = world.voters.voters
    for node in (one, two):
        landed(world.checks, node, "k")
    world.checks.called_taken("k", world.voters)
    world.checks.elected(one, 1)
    with pytest.raises(Violation, match=r"^I6 .*journal"):
        world.checks.activated(world.by_id[one], 1)


def test_a_config_whose_voters_lack_what_was_taken_is_seen(world: World) -> None:
    one, two, three = world.voters.voters
    for node in (one, two):
        landed(world.checks, node, "k")
    world.checks.called_taken("k", world.voters)
    world.checks.config_made(Voters(1, 2, world.voters.voters))
    with pytest.raises(Violation, match=r"^I5"):
        world.checks.config_made(Voters(2, 2, (one, three)))
    world.checks.config_made(Voters(3, 2, (one, two)))


def test_a_log_that_two_cards_wrote_may_say_two_things_from_where_they_part(world: World) -> None:
    log = LogId(NodeId("f" * 16), 1)
    world.checks.cloned(log, 3)
    for node in (A, B):
        for seq in (1, 2, 3):
            landed(world.checks, node, f"{seq}" if seq < 3 else f"{node}", seq)
    world.checks.cloned(log, 4)
    with pytest.raises(Violation, match=r"^I4"):
        landed(world.checks, NodeId("d" * 16), "another", 1)


def test_one_effect_tried_under_two_keys_is_seen(world: World) -> None:
    run = RunId("r" * 32)
    world.checks.acted(run, "comment", "key")
    world.checks.acted(run, "comment", "key")
    with pytest.raises(Violation, match=r"^I7"):
        world.checks.acted(run, "comment", "another")


# machines and links ----------------------------------------------------------------------------------------------
def test_a_stalled_node_is_told_of_its_stall_before_it_hears_anything_else(world: World) -> None:
    heard: list[Event] = []
    actor = world.actors[0]
    world.calm()
    world.open()
    world.play(5.0)
    world.watch = lambda who, event, _: heard.append(event) if who is actor else None
    world.pause(actor, 3.0)
    world.play(7.99)
    assert heard == []
    world.play(8.01)
    assert heard[0] == LoopLagged(3.0)
    assert len(heard) > 3


def test_a_link_that_one_end_takes_for_closed_carries_nothing_and_is_dialled_again(world: World) -> None:
    one, other = world.actors[:2]
    world.calm()
    world.open()
    world.play(5.0)
    assert world.links.linked(one, other)
    world.links.half_open(one, other)
    assert not world.links.linked(other, one)
    world.play(30.0)
    assert world.links.linked(one, other)


def test_a_node_that_lost_its_disk_comes_back_as_another_and_gets_the_ledger(world: World) -> None:
    victim = world.actors[0]
    world.calm()
    world.open()
    world.play(20.0)
    before = victim.disk.node
    world.lose_disk(victim)
    world.boot(victim)
    world.play(60.0)
    assert victim.disk.node not in (before, *world.voters.voters)
    assert victim.node is not None
    assert len({actor.node.reconcile.digest for actor in world.actors if actor.node is not None}) == 1


def test_a_later_release_is_understood(world: World) -> None:
    beat = Heartbeat(3, b"digest", Voters(1, 0, (A, B)))
    assert of_newer_release(beat) == beat


# network, disk and outside ---------------------------------------------------------------------------------------
def test_a_calm_network_loses_and_doubles_nothing() -> None:
    network = Network(Random(1), CALM)
    for _ in range(100):
        (delay,) = network.delays(A, B, 0.0)
        assert CALM.delay_min_s <= delay <= CALM.delay_max_s


def test_a_bad_network_loses_doubles_and_delays() -> None:
    network = Network(Random(1), Weather(0.001, 0.002, loss=0.3, duplication=0.5, slow=0.1))
    copies = [network.delays(A, B, 0.0) for _ in range(1000)]
    assert {len(delays) for delays in copies} == {0, 1, 2}
    assert max(delay for delays in copies for delay in delays) > 0.01


def test_a_cut_goes_one_way_until_it_heals() -> None:
    network = Network(Random(1), CALM)
    network.cut(A, B)
    assert network.delays(A, B, 0.0) == ()
    assert network.delays(B, A, 0.0)
    assert (network.passes(A, B), network.passes(B, A)) == (False, True)
    network.heal()
    assert network.delays(A, B, 0.0)


def test_seeds_draw_different_weather() -> None:
    assert len({draw_weather(Random(seed)) for seed in range(50)}) > 10


def append(number: int) -> Append:
    return Append(number, (Record("note", {"n": number}),))


def test_writes_that_wait_together_land_together_under_one_signature() -> None:
    with closing(Disk(SimKey(1), "pi", Random(1), slow=0.5)) as disk:
        disk.queue += [append(1), append(2), SaveHardState(3, HardState(7))]
        assert 0.0 < disk.begin_sync(10.0) <= 0.5
        one, two, three = disk.land(11.0)
        assert isinstance(one, Appended)
        assert isinstance(two, Appended)
        assert (one.token, two.token, three) == (1, 2, HardStateSaved(3))
        assert (one.entries[0].signature, disk.hard.term) == (b"", 7)
        assert two.entries[0].signature
        assert [fact.seq for fact in disk.landed] == [2, 3]


def test_a_power_cut_loses_the_queue_and_tears_the_group_under_way() -> None:
    ends = set()
    for seed in range(20):
        with closing(Disk(SimKey(1), "pi", Random(seed), slow=0.5)) as disk:
            disk.queue += [append(1), append(2)]
            disk.begin_sync(0.0)
            disk.queue.append(append(3))
            disk.crash(0.1)
            assert disk.land(1.0) == []
            ends.add(store.heads(disk.conn)[0].seq)
    assert ends == {1, 2, 3}


def test_a_full_disk_refuses_in_the_words_of_the_daemons_hands_and_keeps_the_vote_for_later() -> None:
    with closing(Disk(SimKey(1), "pi", Random(1), slow=0.5)) as disk:
        disk.failing_until = 5.0
        vote = SaveHardState(3, HardState(7))
        disk.queue += [append(1), Store(2, ()), vote]
        disk.begin_sync(0.0)
        failed, dropped = disk.land(1.0)
        assert isinstance(failed, AppendFailed)
        assert isinstance(dropped, Stored)
        assert dropped.dropped
        assert (disk.queue, disk.hard) == ([vote], HardState())
        disk.begin_sync(6.0)
        assert disk.land(7.0) == [HardStateSaved(3)]


def test_a_disk_that_lies_loses_what_it_called_durable() -> None:
    with closing(Disk(SimKey(1), "pi", Random(1), 0.5, lies=("ack-fsync",))) as disk:
        assert disk.lies_about(append(1))
        (answer,), cached = disk.answer_early(append(1), 0.0)
        assert isinstance(answer, Appended)
        assert disk.landed == []
        disk.settle(cached)
        assert len(disk.landed) == 1
        disk.answer_early(append(2), 0.0)
        disk.crash(1.0)
        assert store.heads(disk.conn)[0].seq == 2


def test_what_a_clogged_path_holds_arrives_when_it_lets_go() -> None:
    network = Network(Random(1), CALM)
    network.clog(A, B, until=5.0)
    assert all(4.0 < delay < 4.1 for delay in network.delays(A, B, 1.0))
    assert all(delay < 0.1 for delay in network.delays(B, A, 1.0))
    assert all(delay < 0.1 for delay in network.delays(A, B, 6.0))


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
    assert service.perform(run, "comment", "key", {}) == {"first": True}
    assert service.perform(run, "comment", "key", {}) == {"first": False}
    service.perform(run, "update", "other", {})
    assert service.effects() == {run: 1}
