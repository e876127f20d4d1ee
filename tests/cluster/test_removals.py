"""Who was removed: told by the ledger alone, for good, whatever else is said."""

from __future__ import annotations

import itertools

import pytest

from piclusterd.cluster.removals import REMOVED, Removals
from piclusterd.errors import NotFound, Unavailable, UserError
from piclusterd.events import (
    Answer,
    Append,
    Appended,
    AppendFailed,
    DeadlineReached,
    Deny,
    Event,
    Fact,
    KeyShared,
    LedgerAlarm,
    LinkUp,
    MemberDown,
    Output,
    Received,
    RemoveNode,
)
from piclusterd.ids import LogId, NodeId
from piclusterd.wire import Twin

from .pair import A, B, C, D
from .test_membership import lone


class Owner:
    """Removals of node A, which knows B, C and D."""

    def __init__(self, *ledger: Fact, voters: tuple[NodeId, ...] = (A, C)) -> None:
        self.members, wire = lone()
        self.now = wire.now
        self.removals = Removals(self.members, lambda: voters, itertools.count(1), ledger, self.now)

    def tell(self, event: Event) -> list[Output]:
        return self.removals.handle(event, self.now)

    def grew(self, *facts: Fact) -> list[Output]:
        return self.removals.grew(facts, self.now)

    def asks(self, node: NodeId) -> Append:
        (append,) = self.tell(RemoveNode(7, node))
        assert isinstance(append, Append)
        return append


def removed(node: object, seq: int = 2) -> Fact:
    return Fact(LogId(C, 0), seq, 1, REMOVED, {"node": node, "name": "pi-x", "by": C})


def test_a_removal_is_written_before_it_is_answered() -> None:
    owner = Owner()
    append = owner.asks(B)
    assert [(r.kind, r.body) for r in append.records] == [(REMOVED, {"node": B, "name": B, "by": A})]
    assert owner.tell(Appended(append.token, (), ())) == [Answer(7, B)]
    assert owner.tell(Appended(append.token, (), ())) == [], "once"
    assert B in owner.members.peers, "what is removed is what the ledger says"


def test_a_disk_that_refuses_is_told() -> None:
    owner = Owner()
    append = owner.asks(B)
    (answer,) = owner.tell(AppendFailed(append.token, "disk full"))
    assert isinstance(answer, Answer)
    assert isinstance(answer.value, Unavailable)
    assert "disk full" in str(answer.value)
    assert owner.tell(AppendFailed(append.token, "disk full")) == owner.tell(DeadlineReached()) == []


def test_what_the_ledger_says_ends_the_links_and_the_listing_at_once_and_once() -> None:
    owner = Owner()
    out = owner.grew(removed(B), removed(B, 3))
    assert [type(o) for o in out if not isinstance(o, MemberDown)][-1] is Deny
    assert Deny((B,)) in out
    assert MemberDown(B, B, "removed", "removed, says pi-a") in out
    assert B not in owner.members.peers
    assert owner.grew(removed(B)) == []
    assert owner.grew(removed(D))[-1] == Deny((B, D)), "the whole list each time"
    assert owner.removals.denied == (B, D)


def test_a_stranger_is_denied_too_and_never_listed() -> None:
    stranger = NodeId("f" * 16)
    owner = Owner()
    assert owner.grew(removed(stranger)) == [Deny((stranger,))]
    owner.members.handle(LinkUp(stranger), owner.now)
    assert stranger not in owner.members.peers


def test_a_restart_knows_from_its_ledger() -> None:
    owner = Owner(removed(B))
    assert owner.removals.denied == (B,)
    assert B not in owner.members.peers


def test_the_removed_node_itself_is_told_why_nobody_answers() -> None:
    out = Owner().grew(removed(A))
    assert [type(o) for o in out] == [LedgerAlarm, Deny]
    assert isinstance(out[0], LedgerAlarm)
    assert "was removed" in out[0].text


@pytest.mark.parametrize("junk", [None, 7, "", "pi-2", "F" * 16, ["x"]])
def test_junk_in_an_entry_removes_nobody(junk: object) -> None:
    owner = Owner()
    assert owner.grew(removed(junk), Fact(LogId(C, 0), 3, 1, "hook", {"node": B})) == []


@pytest.mark.parametrize(
    ("node", "kind", "words"),
    [
        (A, UserError, "cannot remove itself"),
        (NodeId("f" * 16), NotFound, "no member"),
        (C, UserError, "voter remove"),
        (D, UserError, "removed already"),
    ],
)
def test_what_cannot_be_removed_is_said(node: NodeId, kind: type[UserError], words: str) -> None:
    owner = Owner(removed(D))
    (answer,) = owner.tell(RemoveNode(7, node))
    assert isinstance(answer, Answer)
    assert isinstance(answer.value, kind)
    assert words in str(answer.value)


def test_a_key_in_two_places_is_an_alarm_where_it_is_seen_and_where_it_lives() -> None:
    owner = Owner()
    for event, words in (
        (KeyShared("two machines"), "two machines"),
        (Received(B, Twin("by 10.0.0.9")), "by 10.0.0.9"),
    ):
        (alarm,) = owner.tell(event)
        assert isinstance(alarm, LedgerAlarm)
        assert words in alarm.text
