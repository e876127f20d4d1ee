"""The ledger's health: what is asked of whom, what the owner is told, and when the node may vote."""

from __future__ import annotations

import itertools

import pytest

from piclusterd.events import (
    Appended,
    Damaged,
    DeadlineReached,
    Diverged,
    EntriesRead,
    Fact,
    LedgerAlarm,
    LinkDown,
    LinkUp,
    NewEpoch,
    Output,
    Read,
    Received,
    Recovered,
    Rules,
    Send,
    Shutdown,
    Stored,
)
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger.care import Care
from piclusterd.ledger.mending import ASK_AGAIN_S
from piclusterd.wire import Batch, Entry, Head, Held, Span, Want

ME, B, C = (NodeId(letter * 16) for letter in "abc")
LOG, THEIRS = LogId(ME, 1), LogId(B, 1)
DIGEST = b"digest.."


class House:
    """A Care with what it looks at, and three voters."""

    def __init__(self, lost: str = "", damaged: tuple[Span, ...] = (), **rules: bool) -> None:
        self.held = {LOG: 5, THEIRS: 3}
        self.care = Care(ME, LOG, self.held, lambda: DIGEST, itertools.count(1), lost, damaged, Rules(**rules))

    def on(self, event: object, now: float = 0.0) -> list[Output]:
        return self.care.handle(event, now, (ME, B, C), 2)  # type: ignore[arg-type]

    def told(self, sender: NodeId, **heads: int) -> list[Output]:
        logs = {"ours": LOG, "theirs": THEIRS}
        return self.on(Received(sender, Held(1, b"", tuple(Head(*logs[n], seq) for n, seq in heads.items()))))

    def may_stand(self, now: float = 0.0) -> bool:
        return self.care.may_stand((ME, B, C), 2, now)


def alarms(outputs: list[Output]) -> list[str]:
    return [output.text for output in outputs if isinstance(output, LedgerAlarm)]


def test_a_sound_node_says_nothing() -> None:
    house = House()
    assert house.told(B, ours=5, theirs=9) == []
    assert house.on(Stored(1, (), ())) == house.on(DeadlineReached()) == house.on(Shutdown()) == []
    assert house.on(EntriesRead(77, ())) == []
    assert (house.care.may_vote, house.may_stand(), house.care.deadline()) == (True, True, float("inf"))


def test_a_disk_put_back_opens_a_new_log_and_votes_again_when_it_holds_what_others_do() -> None:
    house = House()
    (epoch, alarm) = house.told(B, ours=7, theirs=3)
    assert isinstance(epoch, NewEpoch)
    assert isinstance(alarm, LedgerAlarm)
    assert (house.care.may_vote, house.may_stand()) == (False, False)
    house.on(Appended(epoch.token, (), (Fact(LogId(ME, 2), 1, 0, "log.open", {}),)))
    assert house.told(B, ours=7, theirs=3) == []
    house.held[LOG] = 7
    assert house.on(Stored(1, (), ())) == [], "one of two others has been heard"
    out = house.on(Received(C, Held(1, DIGEST)))
    assert out[0] == Recovered()
    assert "whole again" in alarms(out)[0]
    assert (house.care.may_vote, house.may_stand()) == (True, True)


def test_without_the_rule_of_epochs_it_goes_on_in_its_old_log() -> None:
    house = House(epoch_bump=False)
    (alarm,) = house.told(B, ours=7, theirs=3)
    assert isinstance(alarm, LedgerAlarm)
    assert not house.care.may_vote
    assert not house.care.rewind.suspended


def test_who_lost_its_ledger_does_not_vote_until_then() -> None:
    house = House(lost="the file is gone")
    assert not house.care.may_vote
    assert house.on(Received(B, Held(1, b"another", None))) == [], "says nothing of what it holds"
    house.told(B, theirs=4)
    assert house.told(C, theirs=1) == []
    house.held[THEIRS] = 4
    assert Recovered() in house.on(Stored(1, (), ()))


def test_rot_is_told_asked_for_in_turns_and_told_when_it_is_mended() -> None:
    house, rot = House(), (Span(*THEIRS, 2, 3),)
    house.on(LinkUp(B))
    out = house.on(Damaged(rot), 1.0)
    assert "2 entries" in alarms(out)[0]
    assert out[1:] == [Send(B, Want(rot))]
    assert not house.may_stand(1.0)
    assert house.care.may_vote
    assert house.on(LinkUp(C), 2.0) == []
    assert house.on(DeadlineReached(), 1.0 + ASK_AGAIN_S) == [Send(C, Want(rot))]
    assert house.on(LinkDown(B)) == []
    assert "mended" in alarms(house.on(Damaged(()), 20.0))[0]
    assert house.may_stand(20.0)


def test_rot_known_at_the_start_is_asked_for_as_soon_as_somebody_is_there() -> None:
    rot = (Span(*THEIRS, 2, 3),)
    house = House(damaged=rot)
    assert house.on(LinkUp(B)) == [Send(B, Want(rot))]
    assert house.on(Damaged(rot), 1.0) == [], "told before"


@pytest.mark.parametrize("own", [True, False])
def test_a_forks_branches_are_exchanged_with_everybody(own: bool) -> None:
    house = House()
    house.on(LinkUp(B))
    house.on(LinkUp(C))
    log = LOG if own else THEIRS
    ours, missing = Span(*log, 2, 3), Span(*log, 1, 1)
    out = house.on(Diverged((ours,), (missing,)))
    read = out[0]
    assert isinstance(read, Read)
    assert read.spans == (ours,)
    assert out[1:3] == [Send(B, Want((missing,))), Send(C, Want((missing,)))]
    assert [type(output) for output in out[3:]] == ([NewEpoch, LedgerAlarm] if own else [])
    entries = (Entry(b"h", b"p"),)
    assert house.on(EntriesRead(read.token, entries)) == [Send(B, Batch(entries)), Send(C, Batch(entries))]
    assert [type(o) for o in house.on(Diverged((ours,), ()))] == [Read], "a new log is asked for once"


def test_who_forgot_asks_those_who_have_not_said_what_they_hold() -> None:
    house = House(lost="the file is gone")
    house.on(LinkUp(B))
    house.on(LinkUp(C))
    house.told(B, theirs=9)
    assert house.care.deadline() == 0.0
    assert house.on(DeadlineReached(), 1.0) == [Send(C, Held(0, DIGEST))]
    assert house.care.deadline() == 1.0 + ASK_AGAIN_S
    assert house.on(DeadlineReached(), 2.0) == []


def test_a_lone_voter_that_lost_its_ledger_goes_on() -> None:
    care = Care(ME, LOG, {LOG: 1}, lambda: DIGEST, itertools.count(1), lost="the file is gone")
    assert Recovered() in care.handle(DeadlineReached(), 0.0, (ME,), 1)
    assert care.deadline() == float("inf")


def test_missing_pieces_of_a_branch_are_asked_for_now_and_then_only() -> None:
    house, diverged = House(), Diverged((), (Span(*THEIRS, 1, 1),))
    house.on(LinkUp(B))
    wanted = [Send(B, Want(diverged.missing))]
    assert house.on(diverged, 0.0) == wanted
    assert house.on(diverged, 1.0) == [], "the answer had none"
    assert house.on(diverged, ASK_AGAIN_S) == wanted
