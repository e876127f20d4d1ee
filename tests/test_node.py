"""The hall: what depends on a term or a vote waits for the disk, notes go round, and four nodes make a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from random import Random
from typing import Literal

import pytest

from piclusterd import node as module
from piclusterd.cluster import reconfigure
from piclusterd.cluster.timings import PRESETS
from piclusterd.cluster.voter_config import config_id
from piclusterd.errors import Unavailable, UserError
from piclusterd.events import (
    Activated,
    Answer,
    Append,
    Appended,
    ChangeVoters,
    CloseHub,
    Damaged,
    DeadlineReached,
    Deny,
    Deposed,
    Diverged,
    Durable,
    Effect,
    Elected,
    EntriesRead,
    Event,
    FactsChanged,
    HardState,
    HardStateSaved,
    HookArrived,
    HookTaken,
    LedgerAlarm,
    LedgerGrew,
    LinkDown,
    LinkUp,
    LoopLagged,
    NewEpoch,
    Noted,
    OpenHub,
    Read,
    Received,
    Recovered,
    RemoveNode,
    SaveHardState,
    Send,
    Shutdown,
    Snapshot,
    Stopped,
    Store,
    Stored,
    WhoServes,
)
from piclusterd.ids import NodeId
from piclusterd.ledger import store
from piclusterd.node import BOUND_TO_HARD_STATE, INCARNATION_SHIFT, Node, Setup
from piclusterd.sim.keys import SimKey, verify
from piclusterd.views import Choice, View
from piclusterd.wire import (
    BATCH_BYTES_MAX,
    BATCH_ENTRIES_MAX,
    Ack,
    Facts,
    ForwardHook,
    Gossip,
    Head,
    Heartbeat,
    Held,
    Hook,
    Member,
    ModelFacts,
    PeerMessage,
    Ping,
    Push,
    RequestVote,
    Span,
    Vote,
    Voters,
    Want,
)

A, B, C = (NodeId(letter * 16) for letter in "abc")
ABC = Voters(1, 0, (A, B, C))
PI = PRESETS["pi"]


def alone(hard: HardState | None = None) -> Node:
    setup = Setup(A, "home", Facts(name="pi-a"), PI, hard or HardState(voters=ABC))
    node = Node(setup, Random(1), 0.0)
    for peer in (B, C):
        node.handle(LinkUp(peer), 0.0)
    return node


def messages(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def notes(effects: list[Effect]) -> list[object]:
    return [effect.note for effect in effects if isinstance(effect, Noted)]


def token_of(effects: list[Effect]) -> int:
    return [effect.token for effect in effects if isinstance(effect, SaveHardState)][-1]


# persist before you promise --------------------------------------------------------------------------------------
def test_a_vote_leaves_only_after_it_is_saved() -> None:
    """Raft §5.1"""
    node = alone()
    effects = node.handle(Received(B, RequestVote(1, False, ABC)), 0.0)
    assert not any(isinstance(message, Vote) for message in messages(effects))
    token = token_of(effects)
    assert messages(node.handle(HardStateSaved(token), 0.1)) == [Vote(1, False, True)]
    assert messages(node.handle(HardStateSaved(token), 0.2)) == [], "once"


def test_a_candidate_asks_for_votes_only_after_its_own_is_saved() -> None:
    node = alone()
    node.handle(DeadlineReached(), 10.0)
    effects = node.handle(Received(B, Vote(1, True, True)), 10.0)
    assert not any(isinstance(message, RequestVote) for message in messages(effects))
    sent = messages(node.handle(HardStateSaved(token_of(effects)), 10.1))
    assert sent == [RequestVote(1, False, ABC)] * 2


def test_everything_that_promises_a_term_waits_in_order_and_everything_else_goes_on() -> None:
    node = alone()
    effects = node.handle(Received(B, Heartbeat(4, b"other", ABC)), 0.0)
    assert not any(isinstance(message, BOUND_TO_HARD_STATE) for message in messages(effects))
    assert any(isinstance(message, Ack) for message in messages(node.handle(Received(B, Ping(1, b"")), 0.0)))
    node.handle(Received(C, RequestVote(4, True, ABC)), 0.0)
    released = messages(node.handle(HardStateSaved(token_of(effects)), 0.1))
    assert [type(message) for message in released[:1]] == [Held]
    assert Vote(4, True, False) in released
    assert all(message.term == 4 for message in released if isinstance(message, Held))


def test_only_the_newest_save_releases_what_waits() -> None:
    node = alone()
    first = token_of(node.handle(Received(B, RequestVote(1, False, ABC)), 0.0))
    second = token_of(node.handle(Received(C, RequestVote(2, False, ABC)), 0.0))
    assert messages(node.handle(HardStateSaved(first), 0.1)) == []
    assert Vote(2, False, True) in messages(node.handle(HardStateSaved(second), 0.2))


def test_what_a_stalled_disk_holds_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BACK_MAX", 5)
    node = alone()
    token = token_of(node.handle(Received(B, RequestVote(1, False, ABC)), 0.0))
    for _ in range(20):
        node.handle(Received(C, Heartbeat(0, b"other", ABC)), 0.0)
    assert node.held_back == 5
    assert len(messages(node.handle(HardStateSaved(token), 1.0))) == 5
    assert node.held_back == 0


def test_a_promise_in_the_newest_term_answers_a_push_of_that_term() -> None:
    """Election sees a message first, so that the ledger's deciders answer in the newest term."""
    node = alone()
    effects = node.handle(Received(B, Push(7, ())), 0.0)
    (order,) = [effect for effect in effects if isinstance(effect, Store)]
    node.handle(HardStateSaved(token_of(effects)), 0.1)
    (held,) = messages(node.handle(Stored(order.token, (), ()), 0.2))
    assert isinstance(held, Held)
    assert held.term == 7


# the rest of the hall --------------------------------------------------------------------------------------------
def test_a_boot_outranks_every_incarnation_of_the_life_before() -> None:
    node = alone(HardState(voters=ABC, incarnation=3))
    assert node.membership.mine.incarnation == 3 << INCARNATION_SHIFT


def test_a_boot_forwards_under_tickets_that_no_life_before_used() -> None:
    """An answer to the life before may still be under way; it must not call another webhook taken."""
    tickets = []
    for incarnation in (1, 2):
        node = alone(HardState(voters=ABC, incarnation=incarnation))
        node.handle(Received(B, Heartbeat(1, b"", ABC)), 0.0)
        effects = node.handle(HookArrived(1, Hook("sim", "k", "create", b"{}")), 0.0)
        tickets += [m.ticket for m in messages(effects) if isinstance(m, ForwardHook)]
    assert len(tickets) == 2
    assert tickets[1] - tickets[0] == 1 << 32


def test_the_deadline_is_the_earliest_of_all_deciders() -> None:
    node = alone()
    assert node.deadline() == min(node.membership.deadline(), node.election.deadline())
    assert node.deadline() <= PI.probe_s


def test_a_spurious_deadline_changes_nothing_that_others_see() -> None:
    assert messages(alone().handle(DeadlineReached(), 0.01)) == []


EXTREMES: tuple[PeerMessage, ...] = (
    Gossip(()),
    Ping(2**60, b""),
    Held(0, b"", ()),
    Push(0, ()),
    Vote(2**60, True, True),
    Vote(2**60, False, False),
    RequestVote(0, True, Voters()),
    RequestVote(2**60, False, Voters(2**60, 0, ())),
    Heartbeat(2**60, b"", Voters(2**61, 0, ())),
)


@pytest.mark.parametrize("sender", [A, B, NodeId("f" * 16)], ids=["itself", "a peer", "a stranger"])
def test_what_peers_send_never_raises(sender: NodeId) -> None:
    node = alone()
    for message in EXTREMES:
        node.handle(Received(sender, message), 0.0)
    for _ in range(5):
        node.handle(DeadlineReached(), node.deadline())


def test_no_model_no_choice() -> None:
    (answer,) = alone().handle(WhoServes(9, "llama"), 0.0)
    assert isinstance(answer, Answer)
    assert answer.ticket == 9
    assert isinstance(answer.value, Exception)


def test_a_request_goes_to_members_that_are_linked_with_this_node() -> None:
    node = alone()

    def asked() -> object:
        (answer,) = node.handle(WhoServes(9, "llama"), 0.0)
        assert isinstance(answer, Answer)
        return answer.value

    node.handle(LinkDown(C), 0.0)
    told = Gossip((Member(C, 1, "alive", Facts(version=1, name="pi-c", models=(ModelFacts("llama"),))),))
    node.handle(Received(B, told), 0.0)
    assert "pi-c: no link from here" in str(asked())
    node.handle(LinkUp(C), 0.0)
    choice = asked()
    assert isinstance(choice, Choice)
    assert choice.node == C


def test_a_snapshot_is_one_consistent_picture() -> None:
    (answer,) = alone().handle(Snapshot(5), 1.0)
    assert isinstance(answer, Answer)
    view = answer.value
    assert isinstance(view, View)
    assert (answer.ticket, view.me, view.name, view.cluster, view.role) == (5, A, "pi-a", "home", "follower")
    assert (view.term, view.leader, view.voters, view.quorum) == (0, None, (A, B, C), 3)
    assert [member.node for member in view.members] == [A, B, C]


def test_who_has_no_vote_is_shown_as_learner() -> None:
    node = alone(HardState(voters=Voters(1, 0, (B, C))))
    assert node.view(0.0).role == "learner"


def test_who_asks_for_votes_is_shown_as_candidate() -> None:
    node = alone()
    node.handle(DeadlineReached(), 10.0)
    assert node.view(10.0).role == "candidate"


def test_notes_that_would_go_round_for_ever_are_a_bug_and_named_with_their_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = alone()
    monkeypatch.setattr(module, "NOTES_MAX", 1)
    event = Received(B, Heartbeat(1, b"other", ABC))
    with pytest.raises(AssertionError, match="notes without end after Received"):
        node.handle(event, 0.0)


def test_stopping_says_goodbye_and_then_stops() -> None:
    effects = alone().handle(Shutdown(), 1.0)
    assert [type(message) for message in messages(effects)] == [Gossip, Gossip]
    assert effects[-1] == Stopped()


def test_a_stall_is_told_to_membership() -> None:
    node = alone()
    node.handle(LoopLagged(5.0), 5.0)
    assert node.membership.health == 1


# a cluster of one, on a real ledger ------------------------------------------------------------------------------
def test_a_lone_node_elects_itself_recovers_and_takes_a_webhook() -> None:
    with ExitStack() as stack:
        house = House(1, stack)
        (one,) = house.actors
        house.run_until(lambda: one.node.replicate.active, within=10)
        assert [type(note) for note in one.noted if not isinstance(note, LedgerGrew)][-3:] == [
            Elected,
            Activated,
            Durable,
        ]
        house.tell(one, HookArrived(1, Hook("linear", "k", "create", b"{}")))
        assert one.answers == {1: HookTaken(None, duplicate=False)}
        assert one.node.view(house.now).hooks == 1


def test_an_answer_that_says_nothing_new_keeps_its_sender_heard_and_nothing_else() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        house.run_until(lambda: any(actor.node.replicate.active for actor in house.actors), within=20)
        settled = house.now + 2.0
        house.run_until(lambda: house.now >= settled, within=5)
        (leader,) = (actor for actor in house.actors if actor.node.replicate.active)
        node, (other, *_) = leader.node, (actor for actor in house.actors if actor is not leader)
        peer, config = other.log.origin, config_id(node.election.voters)
        said = Held(node.election.term, node.reconcile.digest, None, config)
        quiet = Received(peer, said)
        later = house.now + PI.election_max_s + 1.0
        assert not node.election.hears(peer, later)
        before = node.deadline()
        assert node._repeats(peer, said)
        assert node.handle(quiet, later) == []
        assert node.election.hears(peer, later)
        assert node.deadline() == before
        other.node.handle(quiet, later)  # a follower makes nothing of it, and looks at it all the same


# a cluster with a pretend wire -----------------------------------------------------------------------------------
class Actor:
    """A node, its real ledger, and a record of what it did."""

    def __init__(self, number: int, stack: ExitStack) -> None:
        self.conn = stack.enter_context(closing(store.open_database(":memory:")))
        self.number = number
        self.lost = ""
        self.key = SimKey(number)
        self.log = store.open_log(self.conn, self.key, f"pi-{number}", 1, 0)
        self.node: Node
        self.noted: list[object] = []
        self.answers: dict[int, object] = {}
        self.hub_term: int | None = None


class House:
    """Nodes whose disks answer at once and whose wires lose nothing but what is cut."""

    def __init__(self, voters: int, stack: ExitStack, learners: int = 0) -> None:
        self.now = 100.0
        self.actors = [Actor(number, stack) for number in range(voters + learners)]
        self.by_id = {actor.log.origin: actor for actor in self.actors}
        self.queue: deque[tuple[Actor, Event]] = deque()
        self.cut: set[NodeId] = set()
        record = Voters(1, 0, tuple(sorted(actor.log.origin for actor in self.actors[:voters])))
        for actor in self.actors:
            self.boot(actor, HardState(voters=record))
        for one in self.actors:
            for other in self.actors:
                if one is not other:
                    self.tell(one, LinkUp(other.log.origin))

    def boot(self, actor: Actor, hard: HardState) -> None:
        setup = Setup(
            me=actor.log.origin,
            cluster="home",
            facts=Facts(name=f"pi-{actor.number}"),
            timings=PI,
            hard=hard,
            heads=store.heads(actor.conn),
            ledger=store.facts(actor.conn),
            log=actor.log,
            lost=actor.lost,
        )
        actor.node = Node(setup, Random(actor.number), self.now)

    def tell(self, actor: Actor, event: Event) -> None:
        self.queue.append((actor, event))
        for _ in range(10_000):
            if not self.queue:
                return
            who, what = self.queue.popleft()
            for effect in who.node.handle(what, self.now):
                self.perform(who, effect)
        raise AssertionError("they talk without end")

    def run_until(self, until: Callable[[], bool], within: float) -> None:
        ends = self.now + within
        while not until():
            due, _, actor = min((a.node.deadline(), number, a) for number, a in enumerate(self.actors))
            assert due <= ends, f"it did not happen within {within} s"
            self.now = max(self.now, due)
            self.tell(actor, DeadlineReached())

    def perform(self, actor: Actor, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                if not {to, actor.log.origin} & self.cut:
                    self.queue.append((self.by_id[to], Received(actor.log.origin, message)))
            case SaveHardState(token):
                self.queue.append((actor, HardStateSaved(token)))
            case Append(token, records):
                self.queue.append((actor, Appended(token, *store.append(actor.conn, actor.log, records, actor.key, 0))))
            case Store(token, entries, resets):
                applied = store.apply(actor.conn, entries, verify, resets)
                self.queue.append((actor, Stored(token, applied.facts, applied.heads, applied.dropped)))
                if applied.forks or applied.missing:
                    self.queue.append((actor, Diverged(applied.forks, applied.missing)))
            case NewEpoch(token, why):
                actor.lost = why
                actor.log = store.open_log(actor.conn, actor.key, f"pi-{actor.number}", actor.log.epoch + 1, 0)
                self.queue.append((actor, Appended(token, *store.opening(actor.conn, actor.log))))
            case Recovered():
                actor.lost = ""
            case Read(token, spans):
                entries = store.read(actor.conn, spans, BATCH_BYTES_MAX, BATCH_ENTRIES_MAX)
                self.queue.append((actor, EntriesRead(token, entries)))
            case Answer(ticket, value):
                actor.answers[ticket] = value
            case Noted(note):
                actor.noted.append(note)
            case OpenHub() | CloseHub():
                actor.hub_term = effect.term if isinstance(effect, OpenHub) else None
            case Deny(nodes):
                self.cut |= {node for node in nodes if node in self.by_id}
            case _:
                raise AssertionError(effect)

    @property
    def coordinators(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.node.replicate.active]

    def change(self, asked: Actor, ticket: int, what: Literal["add", "remove"], node: NodeId) -> object:
        """What `asked` answers to the owner's wish."""
        self.tell(asked, ChangeVoters(ticket, what, node))
        self.run_until(lambda: ticket in asked.answers, within=90)
        return asked.answers[ticket]

    def pass_time(self, seconds: float) -> None:
        ends = self.now + seconds
        self.run_until(lambda: self.now >= ends, within=seconds + 10)

    def coordinator(self) -> Actor:
        self.run_until(lambda: bool(self.coordinators), within=30)
        (actor,) = self.coordinators
        return actor

    def isolate(self, actor: Actor) -> None:
        self.cut.add(actor.log.origin)
        for other in self.actors:
            if other is not actor:
                self.tell(actor, LinkDown(other.log.origin))
                self.tell(other, LinkDown(actor.log.origin))


def test_three_nodes_take_a_webhook_on_any_node_and_hold_it_everywhere() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        assert [a.hub_term for a in house.actors].count(None) == 2
        assert leader.hub_term == leader.node.election.term
        for ticket, actor in enumerate(house.actors):
            house.tell(actor, HookArrived(ticket, Hook("linear", f"k{ticket}", "create", b"{}")))
            assert actor.answers == {ticket: HookTaken(None, duplicate=False)}
        assert {len(actor.node.journal.hooks) for actor in house.actors} == {3}
        assert len({actor.node.reconcile.digest for actor in house.actors}) == 1


def test_a_webhook_that_a_cut_off_coordinator_cannot_make_durable_is_never_called_taken() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        old = house.coordinator()
        house.isolate(old)
        house.tell(old, HookArrived(1, Hook("linear", "k", "create", b"{}")))
        assert old.answers == {}
        house.run_until(lambda: not old.node.replicate.active, within=30)
        assert isinstance(old.answers[1], Unavailable)
        assert any(isinstance(note, Deposed) for note in old.noted)
        assert old.hub_term is None


def test_the_next_coordinator_holds_every_webhook_that_was_called_taken() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        old = house.coordinator()
        for ticket in range(5):
            house.tell(old, HookArrived(ticket, Hook("linear", f"k{ticket}", "create", b"{}")))
        assert len(old.answers) == 5
        house.isolate(old)
        house.run_until(lambda: any(a is not old for a in house.coordinators), within=30)
        (new,) = [actor for actor in house.coordinators if actor is not old]
        assert set(new.node.journal.hooks) == {f"k{ticket}" for ticket in range(5)}
        assert new.node.election.term > 1
        house.tell(new, HookArrived(9, Hook("linear", "k0", "create", b"{}")))
        assert new.answers == {9: HookTaken(None, duplicate=True)}


# who votes -------------------------------------------------------------------------------------------------------
D = NodeId("d" * 16)
"""A node that nobody ever heard of."""


def test_a_learner_that_the_owner_makes_a_voter_counts_everywhere() -> None:
    with ExitStack() as stack:
        house = House(3, stack, learners=1)
        leader, learner = house.coordinator(), house.actors[3]
        assert learner.node.view(house.now).role == "learner"
        config = house.change(leader, 1, "add", learner.log.origin)
        assert config == Voters(2, leader.node.election.term, tuple(sorted(house.by_id)))
        house.run_until(lambda: all(a.node.election.voters == config for a in house.actors), within=10)
        assert learner.node.view(house.now).role == "follower"
        for actor in house.actors[:3]:
            if actor is not leader:
                house.isolate(actor)
        house.tell(leader, HookArrived(2, Hook("linear", "k", "create", b"{}")))
        assert leader.answers[2] == HookTaken(None, duplicate=False), "the new voter's copy is the second of W=2"
        house.pass_time(30)
        assert house.coordinators == [], "two of four voters elect nobody"


def test_the_next_config_is_told_only_when_the_coordinators_own_disk_has_it() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        other = next(actor for actor in house.actors if actor is not leader)
        effects = leader.node.handle(ChangeVoters(1, "remove", other.log.origin), house.now)
        config = leader.node.election.voters
        assert (config.version, other.log.origin in config.voters) == (2, False)
        assert [effect.state.voters for effect in effects if isinstance(effect, SaveHardState)] == [config]
        assert messages(effects) == []
        told = messages(leader.node.handle(HardStateSaved(token_of(effects)), house.now))
        assert [m.voters for m in told if isinstance(m, Heartbeat)] == [config, config], "who is removed hears it too"


def test_a_coordinator_that_the_owner_removes_answers_and_hands_over() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        old = house.coordinator()
        term = old.node.election.term
        config = house.change(old, 1, "remove", old.log.origin)
        assert config == Voters(2, term, tuple(sorted(house.by_id.keys() - {old.log.origin})))
        house.run_until(lambda: bool(house.coordinators), within=1)
        (new,) = house.coordinators
        assert new is not old
        assert new.node.election.term == term + 1, "asked to stand at once, past every silence"
        assert Deposed(term, "this node is no voter any more") in old.noted
        assert old.hub_term is None
        assert old.node.view(house.now).role == "learner"


@pytest.mark.parametrize("what", ["add", "remove"])
def test_only_the_coordinator_changes_voters(what: Literal["add", "remove"]) -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        other = next(actor for actor in house.actors if actor is not leader)
        assert isinstance(house.change(other, 1, what, D), Unavailable)
        assert {actor.node.election.voters.version for actor in house.actors} == {1}


def test_a_change_that_can_never_be_right_is_refused_at_once() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        before = house.now
        assert isinstance(house.change(leader, 1, "remove", D), UserError)
        assert house.now == before
        assert leader.node.election.voters.version == 1


def test_a_change_that_does_not_become_possible_is_answered_with_what_it_waited_for() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        answer = house.change(leader, 1, "add", D)
        assert isinstance(answer, Unavailable)
        assert f"{D} is not heard" in str(answer)
        assert leader.node.replicate.active


def test_a_change_that_waits_when_the_coordinator_is_deposed_is_answered_as_unsure() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        old = house.coordinator()
        house.tell(old, ChangeVoters(1, "add", D))
        assert old.answers == {}
        house.isolate(old)
        house.run_until(lambda: not old.node.replicate.active, within=30)
        assert isinstance(old.answers[1], Unavailable)
        assert "no longer coordinates" in str(old.answers[1])
        assert old.node.election.voters.version == 1


def test_the_seat_of_a_long_failed_voter_goes_to_a_learner_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The successor first; and only the coordinator decides, as often as it looks at its board."""
    monkeypatch.setattr(reconfigure, "DEMOTE_AFTER_S", 60.0)
    with ExitStack() as stack:
        house = House(3, stack, learners=1)
        leader, learner = house.coordinator(), house.actors[3]
        gone, other = (actor for actor in house.actors[:3] if actor is not leader)

        def look(actor: Actor) -> tuple[NodeId, ...]:
            house.tell(actor, FactsChanged(actor.node.membership.mine.facts))
            house.pass_time(2)
            return actor.node.election.voters.voters

        three = tuple(sorted(actor.log.origin for actor in house.actors[:3]))
        house.isolate(gone)
        house.pass_time(20)
        assert look(leader) == three, "not failed for long enough"
        house.pass_time(80)
        assert look(other) == three, "not the coordinator"
        assert look(leader) == tuple(sorted(house.by_id))
        assert look(leader) == tuple(sorted(house.by_id.keys() - {gone.log.origin}))
        assert look(leader) == look(learner) == look(other), "and there it stays"
        assert leader.answers == {}, "nobody asked"


# ledgers that are not whole --------------------------------------------------------------------------------------
def test_a_node_whose_disk_was_put_back_opens_a_new_log_and_votes_again_once_it_holds_what_the_others_hold() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        old = house.coordinator()
        image = stack.enter_context(closing(store.open_database(":memory:")))
        old.conn.backup(image)
        first, hard = old.log, HardState(old.node.election.term, old.log.origin, old.node.election.voters, 1)
        for ticket in range(3):
            house.tell(old, HookArrived(ticket, Hook("linear", f"k{ticket}", "create", b"{}")))
        house.isolate(old)
        old.conn, old.noted = image, []
        house.boot(old, hard)
        house.cut.clear()
        others = [actor for actor in house.actors if actor is not old]
        house.tell(old, LinkUp(others[0].log.origin))
        house.tell(others[0], LinkUp(old.log.origin))
        assert (old.log.epoch, old.log.origin) == (first.epoch + 1, first.origin)
        assert "older state" in old.lost
        assert not old.node.care.may_vote
        assert old.node.view(house.now).hooks == 3, "its own tail came back"
        house.tell(old, LinkUp(others[1].log.origin))
        house.tell(others[1], LinkUp(old.log.origin))
        house.run_until(lambda: old.node.care.may_vote and bool(house.coordinators), within=60)
        assert old.lost == ""
        house.run_until(lambda: len({a.node.reconcile.digest for a in house.actors}) == 1, within=30)
        assert not any(actor.node.journal.hooks.keys() != old.node.journal.hooks.keys() for actor in others)


def test_a_coordinator_that_finds_out_that_it_forgot_gives_up_at_once() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        head = Head(*leader.log, 99)
        effects = leader.node.handle(Received(next(n for n in house.by_id if n != leader.log.origin), Held(
            leader.node.election.term, b"", (head,))), house.now)  # fmt: skip
        assert any(isinstance(effect, NewEpoch) for effect in effects)
        assert [type(note) for note in notes(effects)][:2] == [LedgerAlarm, Deposed]
        assert not leader.node.replicate.active


@pytest.mark.parametrize("lost", ["ledger", "votes"])
def test_who_forgot_offers_its_heads_in_no_term_and_grants_no_vote(lost: str) -> None:
    setup = Setup(A, "home", Facts(name="pi-a"), PI, HardState(5, voters=ABC))
    setup = replace(setup, lost="the file is gone") if lost == "ledger" else replace(setup, votes_lost="restored")
    node = Node(setup, Random(1), 0.0)
    (held,) = [message for message in messages(node.handle(LinkUp(B), 0.0)) if isinstance(message, Held)]
    assert held.term == 0
    assert messages(node.handle(Received(B, RequestVote(6, True, ABC)), 0.0)) == [Vote(5, True, False)]
    assert not any(isinstance(m, Held) for m in messages(node.handle(Received(B, Heartbeat(5, b"", ABC)), 0.0)))
    for _ in range(50):
        node.handle(DeadlineReached(), node.deadline())
    assert node.election.role == "follower"


def test_rot_is_asked_for_and_keeps_a_node_from_standing() -> None:
    node, rot = alone(), (Span(B, 1, 2, 3),)
    effects = node.handle(Damaged(rot), 1.0)
    assert [m.spans for m in messages(effects) if isinstance(m, Want)] == [rot]
    for due in (5.0, 8.0):
        node.handle(DeadlineReached(), due)
    assert node.election.role == "follower"


# who was removed -------------------------------------------------------------------------------------------------
def test_a_learner_that_is_removed_leaves_every_list_and_its_rows_stay() -> None:
    with ExitStack() as stack:
        house = House(3, stack, learners=1)
        leader, learner = house.coordinator(), house.actors[3]
        house.run_until(lambda: len({a.node.reconcile.digest for a in house.actors}) == 1, within=10)
        gone = learner.log.origin
        house.tell(leader, RemoveNode(1, gone))
        house.run_until(lambda: all(gone in a.node.removals.denied for a in house.actors[:3]), within=10)
        assert leader.answers[1] == gone
        for actor in house.actors[:3]:
            assert gone not in [member.node for member in actor.node.view(house.now).members]
            assert gone in [head.origin for head in actor.node.view(house.now).heads]


def test_a_voter_is_removed_only_after_its_vote() -> None:
    with ExitStack() as stack:
        house = House(3, stack)
        leader = house.coordinator()
        voter = next(actor for actor in house.actors if actor is not leader)
        house.tell(leader, RemoveNode(1, voter.log.origin))
        assert "is a voter" in str(leader.answers[1])
        assert isinstance(house.change(leader, 2, "remove", voter.log.origin), Voters)
        house.tell(leader, RemoveNode(3, voter.log.origin))
        house.run_until(lambda: 3 in leader.answers, within=10)
        assert leader.answers[3] == voter.log.origin
