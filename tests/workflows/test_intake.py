"""A webhook is durable, or its sender is told to come again."""

from __future__ import annotations

import itertools

import pytest

from piclusterd.errors import Broken, Overloaded, PiclusterError, Unavailable
from piclusterd.events import (
    Answer,
    Append,
    AppendFailed,
    DeadlineReached,
    Deposed,
    Durable,
    Fact,
    HookArrived,
    HookTaken,
    LinkDown,
    Output,
    Received,
    Send,
    Stored,
)
from piclusterd.ids import LogId, NodeId, Term
from piclusterd.wire import ForwardHook, HookStored, Nack
from piclusterd.workflows import intake as module
from piclusterd.workflows.intake import FORWARD_TIMEOUT_S, Intake
from piclusterd.workflows.journal import Journal, digest_of

from .desk import LOG, ME, PEER, Ledger, ThreeSteps, hook, run_of


class Desk:
    """An intake with its journal; the test says who coordinates and what is on W ledgers."""

    def __init__(self, leader: NodeId | None = ME, active: bool = True) -> None:
        self.coordinator: tuple[NodeId | None, Term, bool] = (leader, 3, active)
        self.journal = Journal()
        self.ledger = Ledger()
        self.w_copies = True
        self.closed: set[LogId] = set()
        self.machine = Intake(
            ME, self.journal, {"three": ThreeSteps()}, itertools.count(1), lambda: self.coordinator, self._is_durable,
            lambda log: log in self.closed,
        )  # fmt: skip

    def _is_durable(self, log: LogId, seq: int) -> bool:
        return self.w_copies

    def arrives(self, ticket: int, key: str = "k", event: str = "create", now: float = 0.0) -> list[Output]:
        return self.machine.handle(HookArrived(ticket, hook(key, event)), now)

    def forwarded(self, ticket: int, key: str = "k") -> list[Output]:
        return self.machine.handle(Received(PEER, ForwardHook(ticket, hook(key))), 0.0)

    def lands(self, append: Append) -> list[Output]:
        """On disk here and on W ledgers, as the hall tells it."""
        facts = self.ledger.add(*append.records)
        self.journal.grow(facts)
        return self.machine.note(Durable(append.token, facts, 2))

    def stands(self, key: str = "k") -> None:
        self.journal.grow(self.ledger.add_hook(key))


def the_append(out: list[Output]) -> Append:
    (append,) = out
    assert isinstance(append, Append)
    return append


def refusals(out: list[Output]) -> dict[int, PiclusterError]:
    return {o.ticket: o.value for o in out if isinstance(o, Answer) and isinstance(o.value, PiclusterError)}


def test_an_event_is_taken_only_when_it_is_durable() -> None:
    desk = Desk()
    append = the_append(desk.arrives(1))
    (record,) = append.records
    assert (record.kind, record.term, record.body["workflow"], record.body["title"]) == ("hook", 3, "three", "about k")
    assert desk.lands(append) == [Answer(1, HookTaken(run_of("k"), duplicate=False))]


def test_an_event_that_no_workflow_wants_is_stored_all_the_same() -> None:
    desk = Desk()
    append = the_append(desk.arrives(1, event="skip"))
    assert append.records[0].body["workflow"] == ""
    assert desk.lands(append) == [Answer(1, HookTaken(None, duplicate=False))]


def test_a_repeat_on_the_way_to_the_disk_waits_for_the_first() -> None:
    desk = Desk()
    append = the_append(desk.arrives(1))
    assert desk.arrives(2) == []
    assert desk.forwarded(9) == []
    taken = HookTaken(run_of("k"), duplicate=False)
    assert desk.lands(append) == [
        Answer(1, taken),
        Answer(2, taken),
        Send(PEER, HookStored(9, True, run_of("k"), key="k")),
    ]


def test_a_repeat_of_what_stands_is_answered_and_not_appended() -> None:
    desk = Desk()
    desk.stands()
    assert desk.arrives(1) == [Answer(1, HookTaken(run_of("k"), duplicate=True))]


def test_a_repeat_of_what_is_on_too_few_ledgers_waits_for_w_copies() -> None:
    """Else a coordinator would call taken what an election may lose."""
    desk = Desk()
    desk.stands()
    desk.w_copies = False
    assert desk.arrives(1) == []
    assert desk.machine.handle(Stored(5, (), ()), 0.0) == []
    desk.w_copies = True
    assert desk.machine.handle(Stored(6, (), ()), 0.0) == [Answer(1, HookTaken(run_of("k"), duplicate=True))]
    assert desk.machine.handle(Stored(7, (), ()), 0.0) == []


def test_what_stands_in_a_closed_log_only_is_appended_once_more() -> None:
    """Heads tell of its longest branch: whether others hold the one that it stands in cannot be counted."""
    desk = Desk()
    desk.stands()
    desk.closed.add(LOG)
    append = the_append(desk.arrives(1))
    assert desk.arrives(2) == [], "the first one is on its way"
    desk.closed.clear()
    desk.lands(append)
    assert desk.arrives(3) == [Answer(3, HookTaken(run_of("k"), duplicate=True))]


def test_a_repeat_whose_log_is_closed_while_it_waits_is_to_come_again() -> None:
    desk = Desk()
    desk.stands()
    desk.w_copies = False
    assert desk.arrives(1) == []
    desk.closed.add(LOG)
    assert isinstance(refusals(desk.machine.handle(Stored(5, (), ()), 0.0))[1], Unavailable)
    assert desk.machine.waiting == 0


def test_a_failed_append_is_our_fault_and_can_be_tried_again() -> None:
    desk = Desk()
    append = the_append(desk.arrives(1))
    refused = refusals(desk.machine.handle(AppendFailed(append.token, "disk full"), 0.0))
    assert isinstance(refused[1], Broken)
    assert "disk full" in str(refused[1])
    desk.lands(the_append(desk.arrives(2)))


def test_too_many_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_MAX", 2)
    desk = Desk()
    first = the_append(desk.arrives(1, "a"))
    desk.arrives(2, "b")
    assert isinstance(refusals(desk.arrives(3, "c"))[3], Overloaded)
    desk.lands(first)
    the_append(desk.arrives(4, "c"))


# forwarding ------------------------------------------------------------------------------------------------------
def test_any_other_node_forwards_to_the_coordinator() -> None:
    desk = Desk(leader=PEER, active=False)
    assert desk.arrives(1) == [Send(PEER, ForwardHook(1, hook()))]
    out = desk.machine.handle(Received(PEER, HookStored(1, True, run_of("k"))), 1.0)
    assert out == [Answer(1, HookTaken(run_of("k"), duplicate=False))]
    assert desk.machine.deadline() == float("inf")


def test_what_the_coordinator_refuses_is_refused() -> None:
    desk = Desk(leader=PEER, active=False)
    desk.arrives(1)
    refused = refusals(desk.machine.handle(Received(PEER, HookStored(1, False, why="its disk is full")), 1.0))
    assert isinstance(refused[1], Unavailable)
    assert "its disk is full" in str(refused[1])


@pytest.mark.parametrize(("leader", "active"), [(None, False), (ME, False)])
def test_without_a_coordinator_that_serves_the_sender_is_told_to_come_again(
    leader: NodeId | None, active: bool
) -> None:
    error = refusals(Desk(leader, active).arrives(1))[1]
    assert isinstance(error, Unavailable)
    assert error.retry_after_s > 0


def test_an_event_is_forwarded_one_hop_only() -> None:
    (reply,) = Desk(leader=NodeId("c" * 16), active=False).forwarded(9)
    assert isinstance(reply, Send)
    assert isinstance(reply.message, HookStored)
    assert (reply.to, reply.message.ticket, reply.message.stored) == (PEER, 9, False)


def test_a_forward_that_is_not_answered_in_time_is_refused() -> None:
    desk = Desk(leader=PEER, active=False)
    desk.arrives(1, now=5.0)
    assert desk.machine.deadline() == 5.0 + FORWARD_TIMEOUT_S
    assert desk.machine.handle(DeadlineReached(), 5.0 + FORWARD_TIMEOUT_S - 0.1) == []
    assert isinstance(refusals(desk.machine.handle(DeadlineReached(), 5.0 + FORWARD_TIMEOUT_S))[1], Unavailable)
    assert desk.machine.handle(Received(PEER, HookStored(1, True)), 20.0) == [], "too late: nobody waits"


def test_only_the_node_it_was_forwarded_to_can_call_it_taken() -> None:
    desk = Desk(leader=PEER, active=False)
    desk.arrives(1)
    assert desk.machine.handle(Received(NodeId("c" * 16), HookStored(1, True, run_of("k"))), 1.0) == []
    assert desk.machine.handle(Received(PEER, HookStored(1, True, run_of("k"))), 1.0) != []


def test_an_answer_to_an_earlier_life_s_ticket_is_not_taken_for_another_event_s() -> None:
    desk = Desk(leader=PEER, active=False)
    desk.arrives(1)
    assert desk.machine.handle(Received(PEER, HookStored(1, True, run_of("j"), key="j")), 1.0) == []
    assert desk.machine.handle(Received(PEER, HookStored(1, False, why="full", key="j")), 1.0) == []
    assert desk.machine.handle(Received(PEER, HookStored(1, True, run_of("k"), key="k")), 1.0) != []


def test_a_forward_whose_coordinator_is_gone_is_refused_at_once() -> None:
    desk = Desk(leader=PEER, active=False)
    desk.arrives(1)
    assert desk.machine.handle(LinkDown(NodeId("c" * 16)), 1.0) == []
    assert isinstance(refusals(desk.machine.handle(LinkDown(PEER), 1.0))[1], Unavailable)


def test_a_forwarded_event_is_answered_to_the_peer_that_sent_it() -> None:
    desk = Desk()
    append = the_append(desk.forwarded(9))
    assert desk.lands(append) == [Send(PEER, HookStored(9, True, run_of("k"), key="k"))]
    (reply,) = desk.machine.handle(AppendFailed(the_append(desk.forwarded(10, "l")).token, "disk full"), 0.0)
    assert isinstance(reply, Send)
    assert isinstance(reply.message, HookStored)
    assert (reply.message.ticket, reply.message.stored) == (10, False)
    assert "disk full" in reply.message.why


# deposed ---------------------------------------------------------------------------------------------------------
def test_the_deposed_tell_everybody_who_waits_and_promise_nothing() -> None:
    desk = Desk()
    desk.stands("old")
    append = the_append(desk.arrives(1))
    desk.arrives(2)
    desk.w_copies = False
    desk.arrives(3, "old")
    out = desk.machine.note(Deposed(3, "why"))
    assert sorted(refusals(out)) == [1, 2, 3]
    assert all(isinstance(error, Unavailable) for error in refusals(out).values())
    assert desk.lands(append) == []
    desk.w_copies = True
    assert desk.machine.handle(Stored(5, (), ()), 0.0) == []


def test_somebody_elses_durability_is_none_of_ours() -> None:
    desk = Desk()
    desk.arrives(1)
    assert desk.machine.note(Durable(999, (), 2)) == []
    assert desk.machine.handle(AppendFailed(999, "why"), 0.0) == []


def test_an_event_that_a_checkpoint_ended_is_not_appended_again() -> None:
    """The hub may offer one again for weeks; its rows are gone, its digest is not."""
    desk = Desk()
    desk.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), {}, [digest_of("k")])
    desk.w_copies = False
    assert desk.arrives(1) == [], "until W nodes hold the checkpoint"
    desk.w_copies = True
    assert desk.machine.handle(Stored(1, (), ()), 0.0) == [Answer(1, HookTaken(None, duplicate=True))]


def test_an_event_that_was_ended_and_forgotten_while_its_sender_waited_was_taken() -> None:
    desk = Desk()
    desk.stands()
    desk.w_copies = False
    assert desk.arrives(1) == []
    desk.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), {}, (), aged=1 << 60)
    assert desk.machine.handle(Stored(1, (), ()), 0.0) == [Answer(1, HookTaken(None, duplicate=True))]


def test_a_second_sender_is_answered_at_any_message_once_the_copies_are_there() -> None:
    """Which message tells of the last copy is not intake's business."""
    desk = Desk()
    desk.stands()
    assert desk.machine.handle(Received(PEER, Nack(1)), 0.0) == [], "nobody waits"
    desk.w_copies = False
    assert desk.arrives(7) == []
    assert desk.machine.handle(Received(PEER, Nack(1)), 0.0) == []
    desk.w_copies = True
    assert desk.machine.handle(Received(PEER, Nack(1)), 0.0) == [Answer(7, HookTaken(run_of("k"), duplicate=True))]
