"""W copies, the fence and the recovery barrier (flexible quorums: Howard et al., 2016)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from piclusterd.cluster.election import majority
from piclusterd.events import (
    Activated,
    Append,
    Appended,
    AppendFailed,
    CloseHub,
    Deposed,
    Durable,
    Elected,
    Event,
    Fact,
    HardStateSaved,
    LeaderChanged,
    LinkDown,
    LinkUp,
    OpenHub,
    Output,
    Received,
    Rules,
    Send,
    Store,
    Stored,
)
from piclusterd.ids import LogId, NodeId, Term
from piclusterd.ledger.entry import digest
from piclusterd.ledger.reconcile import Reconcile
from piclusterd.ledger.replicate import Replicate, copies_needed
from piclusterd.wire import Entry, Head, Heartbeat, Held, Nack, Push, Voters

A, B, C, D, E = (NodeId(letter * 16) for letter in "abcde")
LEARNER = NodeId("f" * 16)
LOG, OLD = LogId(A, 1), LogId(B, 1)
ENTRY = Entry(b"header", b"payload", b"signature")


class Desk:
    """One node's replicate over its reconcile, as the hall wires them; the disk answers when the test says so."""

    def __init__(self, voters: Sequence[NodeId] = (A, B, C), held: dict[LogId, int] | None = None, **rules: bool):
        heads = [Head(*log, seq) for log, seq in (held or {}).items()]
        tokens = itertools.count(1)
        self.term: Term = 0
        self.leader: NodeId | None = None
        self.may_vote = True
        self.config_stored = True
        self.voters = tuple(voters)
        self.ledger = Reconcile(heads, 1.0, tokens)
        self.machine = Replicate(
            A, self.ledger, Rules(**rules), lambda: self.leader, tokens,
            lambda: self.config_stored, lambda: self.may_vote,
        )  # fmt: skip

    def handle(self, event: Event) -> list[Output]:
        self.ledger.handle(event, 0.0, self.term)
        return self.machine.handle(event, 0.0, self.term)

    def lead(self, term: Term = 1) -> list[Output]:
        self.term, self.leader = term, A
        return self.machine.note(Elected(term, self.voters))

    def held_by(self, node: NodeId, held: dict[LogId, int], term: Term | None = None, life: int = 0) -> list[Output]:
        heads = tuple(Head(*log, seq) for log, seq in sorted(held.items()))
        said = Held(self.term if term is None else term, digest(heads), heads, life=life)
        return self.handle(Received(node, said))

    def appended(self, token: int, seq: int) -> list[Output]:
        return self.handle(Appended(token, (ENTRY,), (fact(LOG, seq),)))

    def activate(self, term: Term = 1) -> None:
        """Recovered from B with nothing lacking, the opening on A and B as seq 1 of our log."""
        self.lead(term)
        (append,) = self.held_by(B, {})
        assert isinstance(append, Append)
        self.appended(append.token, 1)
        assert Activated(term) in self.held_by(B, {LOG: 1})


def fact(log: LogId, seq: int) -> Fact:
    return Fact(log, seq, 1, "note", {})


def durable(out: list[Output]) -> list[tuple[int, int]]:
    return [(note.token, note.copies) for note in out if isinstance(note, Durable)]


def kinds(out: list[Output]) -> list[type]:
    return [type(o) for o in out]


# how many copies -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("voters", "elect", "copies"), [(1, 1, 1), (2, 2, 2), (3, 2, 2), (4, 3, 2), (5, 3, 3)])
def test_the_quorum_table(voters: int, elect: int, copies: int) -> None:
    """W + E > N; never one copy where there is a second disk (research: quorums and small clusters)."""
    assert (majority(voters), copies_needed(voters)) == (elect, copies)
    assert elect + copies > voters


@pytest.mark.parametrize("voters", [(A, B), (A, B, C), (A, B, C, D), (A, B, C, D, E)])
def test_an_append_is_durable_with_the_last_copy_needed_and_not_before(voters: tuple[NodeId, ...]) -> None:
    desk = Desk(voters)
    desk.lead()
    for other in voters[1:]:
        desk.held_by(other, {})
    desk.appended(1, 1)
    for other in voters[1:]:
        desk.held_by(other, {LOG: 1})
    assert desk.machine.active
    assert durable(desk.appended(7, 2)) == []
    told: list[tuple[int, int]] = []
    for copies, other in enumerate(voters[1:], start=2):
        told += durable(desk.held_by(other, {LOG: 2}))
        assert bool(told) == (copies >= copies_needed(len(voters)))
    assert told == [(7, copies_needed(len(voters)))]


def test_a_single_voter_needs_nobody() -> None:
    desk = Desk((A,))
    (append,) = desk.lead()
    assert isinstance(append, Append)
    out = desk.appended(append.token, 1)
    assert kinds(out) == [Activated, OpenHub, Durable]
    assert durable(desk.appended(9, 2)) == [(9, 1)]


def test_learners_and_strangers_are_no_copies() -> None:
    desk = Desk()
    desk.activate()
    desk.appended(7, 2)
    assert desk.held_by(LEARNER, {LOG: 2}) == []
    assert not desk.machine.is_durable(LOG, 2)
    assert durable(desk.held_by(C, {LOG: 2})) == [(7, 2)]


def test_what_a_voter_said_before_is_known_while_nothing_waits_for_it() -> None:
    desk = Desk()
    desk.lead()
    desk.held_by(B, {})
    again = Held(1, desk.ledger.digest)
    assert not desk.machine.knows(B, again), "recovering: its next word may begin the term"
    desk.appended(1, 1)
    desk.held_by(B, {LOG: 1})
    again = Held(1, desk.ledger.digest)
    assert desk.machine.active
    assert desk.machine.knows(B, again)
    assert not desk.machine.knows(C, again), "its first word"
    assert not desk.machine.knows(B, Held(1, desk.ledger.digest, desk.ledger.heads()))
    assert not desk.machine.knows(B, Held(2, desk.ledger.digest))
    assert not desk.machine.knows(B, Held(1, b"other"))
    assert not desk.machine.knows(B, Held(1, desk.ledger.digest, life=1)), "it may have forgotten since"
    desk.appended(7, 2)
    assert not desk.machine.knows(B, Held(1, desk.ledger.digest)), "it said that of the ledger before"
    desk.handle(Received(C, Held(1, digest(desk.ledger.heads()), None)))
    desk.appended(8, 3)
    desk.machine._said[C] = desk.ledger.heads()
    assert not desk.machine.knows(C, Held(1, desk.ledger.digest)), "an append waits for what anybody says"
    desk.machine.note(Deposed(1, "why"))
    assert not desk.machine.knows(B, Held(1, desk.ledger.digest))


def test_one_voter_counts_once_however_often_it_says_so() -> None:
    desk = Desk((A, B, C, D, E))
    desk.lead()
    for _ in range(5):
        desk.held_by(B, {LOG: 1})
    assert desk.machine.copies(LOG, 1) == 1


def test_our_own_copy_counts_only_once_it_is_on_disk() -> None:
    desk = Desk()
    desk.lead()
    desk.held_by(B, {LOG: 5})
    assert desk.machine.copies(LOG, 5) == 1
    desk.handle(Stored(99, (), (Head(*LOG, 5),)))
    assert desk.machine.copies(LOG, 5) == 2


def test_what_a_voter_once_held_it_holds_though_messages_overtake() -> None:
    desk = Desk()
    desk.activate()
    desk.held_by(B, {LOG: 9})
    desk.held_by(B, {LOG: 3})
    assert desk.machine.copies(LOG, 9) == 1


def test_what_a_voter_held_before_it_restarted_it_may_have_forgotten() -> None:
    """A disk put back: one copy less, though it said so in this very term, and though its old word comes late."""
    desk = Desk((A, B, C, D, E))
    desk.lead()
    desk.held_by(B, {LOG: 2}, life=4)
    assert desk.machine.copies(LOG, 2) == 1
    desk.handle(Received(B, Held(1, b"another", None, life=5)))
    assert desk.machine.copies(LOG, 2) == 0
    desk.held_by(B, {LOG: 1}, life=5)
    desk.held_by(B, {LOG: 2}, life=4)
    assert (desk.machine.copies(LOG, 1), desk.machine.copies(LOG, 2)) == (1, 0)
    desk.held_by(B, {LOG: 2}, life=5)
    assert desk.machine.copies(LOG, 2) == 1


def test_a_digest_equal_to_ours_stands_for_our_heads() -> None:
    desk = Desk()
    desk.activate()
    desk.appended(7, 2)
    assert durable(desk.handle(Received(B, Held(1, b"another", None)))) == []
    assert durable(desk.handle(Received(B, Held(1, desk.ledger.digest, None)))) == [(7, 2)]


# the recovery barrier --------------------------------------------------------------------------------------------
def test_a_new_coordinator_waits_for_a_majoritys_heads() -> None:
    desk = Desk((A, B, C, D, E))
    assert desk.lead() == []
    assert desk.held_by(B, {}) == []
    (append,) = desk.held_by(C, {})
    assert isinstance(append, Append)
    (record,) = append.records
    assert (record.kind, record.term, record.body["coordinator"]) == ("term", 1, A)


def test_a_new_coordinator_pulls_what_a_voter_holds_before_it_serves() -> None:
    desk = Desk()
    desk.lead()
    assert desk.held_by(B, {OLD: 4}) == []
    assert desk.machine.phase == "recovering"
    assert desk.handle(Stored(50, (fact(OLD, 3),), (Head(*OLD, 3),))) == []
    assert kinds(desk.handle(Stored(51, (fact(OLD, 4),), (Head(*OLD, 4),)))) == [Append]


def test_a_voter_we_already_cover_opens_the_way() -> None:
    desk = Desk(held={OLD: 4})
    desk.lead()
    assert desk.held_by(B, {OLD: 9}) == []
    assert kinds(desk.held_by(C, {OLD: 2})) == [Append], "A and C are a majority; B's tail was on fewer than W"


def test_what_was_held_in_an_older_term_does_not_open_the_way() -> None:
    desk = Desk()
    desk.lead(term=5)
    assert desk.held_by(B, {}, term=4) == []
    assert desk.machine.phase == "recovering"


def test_a_learners_heads_do_not_open_the_way() -> None:
    """It may lack what a majority of the voters acknowledged."""
    desk = Desk()
    desk.lead()
    assert desk.held_by(LEARNER, {}) == []
    assert desk.machine.phase == "recovering"


def test_a_new_coordinator_serves_only_when_its_opening_is_on_w_ledgers() -> None:
    desk = Desk()
    desk.lead()
    (append,) = desk.held_by(B, {})
    assert isinstance(append, Append)
    out = desk.appended(append.token, 1)
    assert not desk.machine.active
    assert durable(out) == []
    assert kinds(desk.held_by(C, {LOG: 1})) == [Activated, OpenHub, Durable]


def test_without_the_barrier_it_would_serve_at_once() -> None:
    """The ablation that the simulator must catch."""
    assert kinds(Desk(recovery_barrier=False).lead()) == [Append]


# deposed ---------------------------------------------------------------------------------------------------------
def test_the_deposed_forget_what_waited_for_copies() -> None:
    desk = Desk()
    desk.activate()
    desk.appended(7, 2)
    assert desk.machine.note(Deposed(1, "why")) == [CloseHub()]
    desk.term = 2
    assert desk.held_by(B, {LOG: 2}) == []
    assert desk.held_by(C, {LOG: 2}, term=1) == []
    assert not desk.machine.is_durable(LOG, 2)


def test_an_append_of_an_older_term_is_never_counted_in_the_next() -> None:
    desk = Desk()
    desk.activate()
    desk.machine.note(Deposed(1, "why"))
    assert desk.appended(7, 2) == [], "it was under way to the disk"
    desk.lead(term=3)
    assert durable(desk.held_by(B, {LOG: 2})) == []


def test_what_waited_in_an_earlier_term_is_not_called_durable_in_the_next() -> None:
    """Its callers were told to come again."""
    desk = Desk()
    desk.activate()
    desk.appended(7, 2)
    desk.machine.note(Deposed(1, "why"))
    desk.lead(term=3)
    (append,) = desk.held_by(B, {LOG: 2})
    assert isinstance(append, Append)
    desk.appended(append.token, 3)
    assert durable(desk.held_by(B, {LOG: 3})) == [(append.token, 2)]


def test_what_a_voter_said_in_an_earlier_term_is_forgotten() -> None:
    desk = Desk(held={LOG: 5})
    desk.activate()
    desk.held_by(C, {LOG: 5})
    desk.machine.note(Deposed(1, "why"))
    desk.lead(term=2)
    assert desk.machine.copies(LOG, 5) == 1


# pushing ---------------------------------------------------------------------------------------------------------
def test_a_coordinator_pushes_what_it_has_on_disk_to_every_link() -> None:
    desk = Desk()
    for peer in (B, C, LEARNER):
        desk.handle(LinkUp(peer))
    desk.activate()
    desk.handle(LinkDown(C))
    pushes = [o for o in desk.appended(7, 2) if isinstance(o, Send)]
    assert pushes == [Send(peer, Push(1, (ENTRY,))) for peer in (B, LEARNER)]


def test_a_follower_pushes_nothing_of_its_own() -> None:
    desk = Desk()
    desk.handle(LinkUp(B))
    assert desk.appended(7, 1) == []


# the voter's side ------------------------------------------------------------------------------------------------
def test_a_push_is_answered_only_after_it_is_on_disk() -> None:
    desk = Desk()
    desk.term, desk.leader = 4, B
    (order,) = desk.handle(Received(B, Push(4, (ENTRY,))))
    assert isinstance(order, Store)
    (reply,) = desk.handle(Stored(order.token, (fact(OLD, 1),), (Head(*OLD, 1),)))
    assert reply == Send(B, Held(4, desk.ledger.digest, (Head(*OLD, 1),)))


def test_a_push_of_an_older_term_is_refused_and_not_stored() -> None:
    """The fence: whoever reported heads in term 4 acknowledges nothing of term 3."""
    desk = Desk()
    desk.term = 4
    (reply,) = desk.handle(Received(B, Push(3, (ENTRY,))))
    assert isinstance(reply, Send)
    assert isinstance(reply.message, Held)
    assert reply.message.term == 4


def test_a_push_that_was_on_its_way_to_the_disk_is_answered_in_the_newer_term() -> None:
    desk = Desk()
    desk.term = 3
    (order,) = desk.handle(Received(B, Push(3, (ENTRY,))))
    assert isinstance(order, Store)
    desk.term = 4
    (reply,) = desk.handle(Stored(order.token, (fact(OLD, 1),), (Head(*OLD, 1),)))
    assert isinstance(reply, Send)
    assert isinstance(reply.message, Held)
    assert (reply.to, reply.message.term) == (B, 4)


def test_without_the_fence_an_old_coordinator_would_get_its_copy() -> None:
    """The ablation that the simulator must catch."""
    desk = Desk(term_fencing=False)
    desk.term = 4
    (order,) = desk.handle(Received(B, Push(3, (ENTRY,))))
    assert isinstance(order, Store)


def test_a_heartbeat_is_answered_with_heads_only_where_they_differ() -> None:
    desk = Desk(held={OLD: 2})
    desk.term = 4
    same = Heartbeat(4, desk.ledger.digest, Voters())
    assert desk.handle(Received(B, same)) == [Send(B, Held(4, desk.ledger.digest, None))]
    other = Heartbeat(4, b"other", Voters())
    assert desk.handle(Received(B, other)) == [Send(B, Held(4, desk.ledger.digest, (Head(*OLD, 2),)))]


def test_an_old_leaders_heartbeat_is_answered_in_our_term() -> None:
    desk = Desk()
    desk.term = 9
    (reply,) = desk.handle(Received(B, Heartbeat(3, desk.ledger.digest, Voters())))
    assert isinstance(reply, Send)
    assert isinstance(reply.message, Held)
    assert reply.message.term == 9


def test_entries_that_came_by_reconciliation_are_told_to_the_leader() -> None:
    desk = Desk()
    desk.term, desk.leader = 4, C
    grown = Stored(50, (fact(OLD, 1),), (Head(*OLD, 1),))
    (reply,) = desk.handle(grown)
    assert isinstance(reply, Send)
    assert reply.to == C
    assert desk.handle(Stored(51, (), (Head(*OLD, 1),))) == [], "nothing new, nothing to say"


# commit groups and full disks ------------------------------------------------------------------------------------
def test_what_no_signature_covers_yet_is_pushed_with_the_rest_of_its_commit_group() -> None:
    desk = Desk()
    desk.activate()
    desk.handle(LinkUp(B))
    unsigned = Entry(b"header", b"payload")
    assert desk.handle(Appended(7, (unsigned,), (fact(LOG, 2),))) == []
    assert desk.appended(8, 3) == [Send(B, Push(1, (unsigned, ENTRY)))]


def test_an_opening_that_the_disk_refused_is_tried_again_with_the_next_answer() -> None:
    desk = Desk()
    desk.lead()
    (append,) = desk.held_by(B, {})
    assert isinstance(append, Append)
    assert desk.handle(AppendFailed(append.token, "disk full")) == []
    (again,) = desk.held_by(B, {})
    assert isinstance(again, Append)
    assert desk.handle(AppendFailed(append.token, "disk full")) == []
    desk.appended(again.token, 1)
    assert Activated(1) in desk.held_by(B, {LOG: 1})


def test_without_the_rule_the_coordinators_own_copy_is_called_enough() -> None:
    desk = Desk(enough_copies=False)
    desk.lead()
    (append,) = desk.held_by(B, {})
    assert isinstance(append, Append)
    assert Activated(1) in desk.appended(append.token, 1)
    assert durable(desk.appended(7, 2)) == [(7, 1)]


# a ledger that is not whole --------------------------------------------------------------------------------------
def test_who_may_not_vote_stores_what_is_pushed_and_promises_nothing() -> None:
    desk = Desk()
    desk.may_vote, desk.term, desk.leader = False, 1, B
    assert desk.handle(Received(B, Heartbeat(1, b"", Voters(1, 0, (A, B, C))))) == []
    assert desk.handle(Received(B, Push(0, (ENTRY,)))) == []
    (order,) = desk.handle(Received(B, Push(1, (ENTRY,))))
    assert isinstance(order, Store)
    assert desk.handle(Stored(order.token, (fact(OLD, 1),), (Head(*OLD, 1),))) == []


def test_a_coordinator_that_may_not_vote_any_more_opens_nothing_and_calls_nothing_durable() -> None:
    desk = Desk()
    desk.lead()
    desk.may_vote = False
    assert desk.held_by(B, {}) == []
    desk.may_vote = True
    desk.activate()
    desk.appended(7, 2)
    desk.may_vote = False
    assert durable(desk.held_by(B, {LOG: 2})) == []


def test_the_opening_of_a_new_log_waits_for_no_copies() -> None:
    desk = Desk()
    desk.activate()
    opening = Fact(LogId(A, 2), 1, 0, "log.open", {})
    assert desk.handle(Appended(9, (ENTRY,), (opening,))) == []
    assert desk.machine.waiting == 0


# other voters under way ------------------------------------------------------------------------------------------
def test_who_carries_holds_all_that_may_have_been_acknowledged() -> None:
    desk = Desk()
    desk.activate()
    desk.held_by(LEARNER, {LOG: 1})
    assert [desk.machine.carries(n) for n in (A, B, C, LEARNER)] == [True, True, False, True]
    desk.appended(7, 2)
    assert desk.machine.carries(LEARNER), "nobody was told that it is durable"
    assert durable(desk.held_by(B, {LOG: 2})) == [(7, 2)]
    assert [desk.machine.carries(n) for n in (A, B, LEARNER)] == [True, True, False]
    desk.held_by(LEARNER, {LOG: 2})
    assert desk.machine.carries(LEARNER)


def test_what_the_log_of_another_held_when_we_became_active_is_carried_too() -> None:
    desk = Desk(held={OLD: 4})
    desk.activate()
    assert not desk.machine.carries(B), "it said that it holds our log only"
    desk.held_by(B, {LOG: 1, OLD: 3})
    assert not desk.machine.carries(B)
    desk.held_by(B, {LOG: 1, OLD: 4})
    assert desk.machine.carries(B)


def test_what_was_said_in_an_older_term_carries_nothing() -> None:
    desk = Desk()
    desk.activate()
    assert desk.machine.carries(B)
    desk.lead(2)
    assert not desk.machine.carries(B)
    desk.held_by(B, {LOG: 1}, term=1)
    assert not desk.machine.carries(B)
    desk.held_by(B, {LOG: 1})
    assert desk.machine.carries(B)


def test_the_next_voters_carry_when_as_many_as_make_a_thing_durable_among_them_do() -> None:
    desk = Desk()
    desk.activate()
    assert desk.machine.carried((A, B, C, D)), "A and B: W of four is two"
    assert desk.machine.carried((A,))
    assert not desk.machine.carried((A, C))
    assert not desk.machine.carried((C, D))
    assert not desk.machine.carried((A, B, C, D, E)), "W of five is three"
    desk.held_by(D, {LOG: 1})
    assert desk.machine.carried((A, B, C, D, E))


def test_copies_are_counted_among_the_voters_of_the_newest_config() -> None:
    desk = Desk()
    desk.activate()
    desk.machine.change((A, C, D))
    desk.appended(7, 2)
    assert durable(desk.held_by(B, {LOG: 2})) == [], "B is no voter any more"
    assert durable(desk.held_by(D, {LOG: 2})) == [(7, 2)], "D is one now"


def test_nothing_is_durable_until_the_config_its_copies_are_counted_in_is_stored() -> None:
    """With two copies of four voters, the three of the config before could elect one that has neither."""
    desk = Desk()
    desk.activate()
    desk.appended(7, 2)
    desk.config_stored = False
    assert durable(desk.held_by(B, {LOG: 2})) == []
    assert durable(desk.handle(HardStateSaved(1))) == []
    desk.config_stored = True
    assert durable(desk.handle(HardStateSaved(2))) == [(7, 2)], "our own disk was the one that was missing"


def test_what_others_note_moves_no_phase() -> None:
    desk = Desk()
    desk.activate()
    assert desk.machine.note(LeaderChanged(1, A)) == []
    assert desk.machine.active


def test_what_a_peer_says_to_other_deciders_changes_nothing() -> None:
    assert Desk().handle(Received(B, Nack(1))) == []
