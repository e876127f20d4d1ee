"""When a node ends what is closed of its log, and when it forgets what a checkpoint has replaced."""

from __future__ import annotations

import itertools

import pytest

from piclusterd import config
from piclusterd.events import (
    AddCheckpoint,
    Appended,
    AppendFailed,
    DeadlineReached,
    Fact,
    Forget,
    Forgot,
    LinkUp,
    Output,
    Received,
    Rules,
)
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger.entry import CHECKPOINT
from piclusterd.ledger.pruning import PUT_OFF_CHECKS, Company, Ours, Pruning, Retention
from piclusterd.wire import Ack, Head, Held, Ping

A, B, C, D = (NodeId(letter * 16) for letter in "abcd")
MINE, THEIRS = LogId(A, 1), LogId(B, 1)
KEEP = Retention(entries=16, bodies_s=100.0, rows_s=200.0, lapse_s=1000.0, check_s=1.0, gap_s=50.0)
SAME, OTHER = b"same", b"other"


class House:
    """One node's pruning, and what it may look at."""

    def __init__(self, facts: tuple[Fact, ...] = (), rules: Rules | None = None, held: int = 20) -> None:
        self.held = {MINE: held}
        self.here: list[NodeId] = [B, C]
        self.listed: list[NodeId] = [B, C]
        self.voters: tuple[NodeId, ...] = (A, B, C)
        self.log: LogId | None = MINE
        self.whole, self.damaged = True, False
        self.now = self.spoke = 0.0
        ours = Ours(self.held, self.heads, lambda: SAME, lambda: self.log, lambda: self.whole, lambda: self.damaged)
        company = Company(lambda: self.here, lambda: dict.fromkeys(self.listed, self.spoke), lambda: self.voters)
        self.pruning = Pruning(A, KEEP, ours, company, itertools.count(1), rules or Rules(), 0.0, facts)

    def heads(self) -> tuple[Head, ...]:
        return tuple(Head(*log, seq) for log, seq in sorted(self.held.items()))

    def look(self, after: float = 1.0) -> list[Output]:
        self.now += after
        return self.pruning.handle(DeadlineReached(), self.now)

    def all_hold_the_same(self, *nodes: NodeId) -> None:
        for node in nodes or (B, C):
            self.pruning.handle(Received(node, Ping(1, SAME)), self.now)

    def heard(self, *nodes: NodeId) -> House:
        """They said what they hold: nothing."""
        for node in nodes:
            self.pruning.handle(Received(node, Held(0, OTHER, ())), self.now)
        return self

    def answer(self, effect: Output, more: bool = False, why: str = "") -> list[Output]:
        assert isinstance(effect, Forget)
        return self.pruning.handle(Forgot(effect.token, more, why), self.now)


def fact(seq: int, second: float, kind: str = "x", log: LogId = MINE) -> Fact:
    return Fact(log, seq, 0, kind, {}, int(second * 1000) << 16)


def history(until: float, *checkpoints: tuple[int, float], log: LogId = MINE) -> tuple[Fact, ...]:
    """An entry every ten seconds, and these checkpoints."""
    steps = [fact(1 + at, 10.0 * at, log=log) for at in range(int(until / 10) + 1)]
    return (*steps, *(fact(seq, second, CHECKPOINT, log) for seq, second in checkpoints))


def done(effect: Output) -> tuple[int, str]:
    assert isinstance(effect, Forget)
    return effect.checkpoint, effect.level


# ending ----------------------------------------------------------------------------------------------------------
def test_what_is_old_and_enough_is_ended_once() -> None:
    house = House(history(100)).heard(B)
    assert house.look() == [AddCheckpoint(1, MINE, 19, 8)], "the newest stays"
    assert house.look(100.0) == [], "the first is still with the disk"
    house.pruning.handle(Appended(1, (), ()), house.now)
    house.pruning.grew([fact(21, 101, CHECKPOINT)])
    house.held[MINE] = 50
    assert house.look() == [], "what follows is young"
    house.pruning.grew([fact(22, 150), fact(23, 200), fact(24, 201)])
    assert house.look() == [AddCheckpoint(2, MINE, 49, 8)]


@pytest.mark.parametrize(
    ("facts", "held"), [(history(90), 20), (history(100), 15), (history(100, (15, 50)), 30), ((), 20)]
)
def test_what_is_young_or_little_is_not_ended(facts: tuple[Fact, ...], held: int) -> None:
    assert House(facts, held=held).heard(B).look() == []


def test_it_looks_no_more_often_than_it_should() -> None:
    house = House(history(100)).heard(B)
    assert house.pruning.deadline() == 1.0
    assert house.look(0.5) == []
    assert house.look(0.5) != []
    assert house.pruning.deadline() == 2.0


def test_a_node_without_a_log_or_with_rot_or_that_forgot_ends_nothing() -> None:
    house = House(history(100)).heard(B)
    house.log = None
    assert house.look() == []
    house.log, house.damaged = MINE, True
    assert house.look() == []
    house.damaged, house.whole = False, False
    assert house.look() == []
    house.whole = True
    assert house.look() != []


def test_a_checkpoint_that_is_refused_is_tried_again_later() -> None:
    house = House(history(100)).heard(B)
    house.look()
    house.pruning.handle(AppendFailed(1, "too much is open"), house.now)
    house.pruning.handle(AppendFailed(99, "somebody else's"), house.now)
    assert house.look(PUT_OFF_CHECKS - 1) == []
    assert house.look() == [AddCheckpoint(2, MINE, 20, 8)], "without the newest, as they may be too large"
    house.pruning.handle(AppendFailed(2, "still"), house.now)
    assert house.look(PUT_OFF_CHECKS) == [AddCheckpoint(3, MINE, 19, 8)]


def test_a_clock_that_jumps_ages_nothing_by_more_than_a_gap() -> None:
    house = House((fact(1, 0), fact(2, 1_000_000))).heard(B)
    house.pruning.grew([fact(3, 9_000_000)])
    assert house.look() != [], "two gaps of 50 s"
    house = House((fact(1, 0), fact(2, 1_000_000))).heard(B)
    house.pruning.grew([fact(3, 500), fact(4, 1_000_040)])
    assert house.look() == []


def test_nothing_is_ended_before_a_majority_of_the_voters_said_what_it_holds() -> None:
    """An older image of the card might end its log where it went on long ago."""
    house = House(history(100))
    house.voters = (A, B, C, D)
    assert house.look() == []
    assert house.heard(B).look() == []
    assert house.heard(C).look() != []
    house = House(history(100))
    house.voters = (B,)
    assert house.look() == []
    assert house.heard(B).look() != []


# forgetting ------------------------------------------------------------------------------------------------------
def test_bodies_go_first_and_rows_when_they_are_older() -> None:
    house = House(history(110, (5, 10)), held=5)
    house.all_hold_the_same()
    (bodies,) = house.look()
    assert done(bodies) == (5, "bodies")
    assert house.look() == [], "one at a time"
    (rest,) = house.answer(bodies, more=True)
    assert done(rest) == (5, "bodies")
    assert house.answer(rest) == []
    assert house.look() == [], "the rows are young"
    house.pruning.grew([fact(5, 150), fact(5, 200), fact(5, 210)])
    (rows,) = house.look()
    assert done(rows) == (5, "rows")
    assert house.answer(rows) == []
    assert house.look() == [], "that was all"
    assert house.answer(rows) == [], "an answer to nothing"


def test_the_newest_checkpoint_that_is_old_enough_is_used_and_younger_ones_wait() -> None:
    house = House(history(300, (5, 10), (8, 50), (12, 250)), held=12)
    house.all_hold_the_same()
    (rows,) = house.look()
    assert done(rows) == (8, "rows")
    house.answer(rows)
    house.pruning.grew([fact(13, 340), fact(14, 350)])
    (bodies,) = house.look()
    assert done(bodies) == (12, "bodies")


def test_the_next_log_follows_at_once() -> None:
    house = House((*history(300, (5, 10)), *history(300, (6, 20), log=THEIRS)), held=5)
    house.held[THEIRS] = 31
    house.all_hold_the_same()
    (first,) = house.look()
    (second,) = house.answer(first)
    assert isinstance(second, Forget)
    assert (second.log, second.checkpoint) == (THEIRS, 6)


def ripe() -> House:
    house = House(history(300, (5, 10)), held=5)
    house.all_hold_the_same()
    return house


def test_what_the_disk_refuses_is_put_off() -> None:
    house = ripe()
    (refused,) = house.look()
    assert house.answer(refused, why="two branches") == []
    assert house.look() == []
    assert house.look(PUT_OFF_CHECKS) != []


def test_nothing_is_forgotten_before_everybody_here_said_that_he_holds_it() -> None:
    house = House(history(300, (5, 10)), held=5)
    assert house.look() == []
    house.pruning.handle(Received(B, Ack(1, SAME)), house.now)
    house.pruning.handle(Received(C, Ping(1, OTHER)), house.now)
    assert house.look() == []
    house.pruning.handle(Received(C, Held(0, OTHER, (Head(*MINE, 4),))), house.now)
    assert house.look() == []
    house.pruning.handle(Received(C, Held(0, SAME, None)), house.now)
    house.pruning.handle(LinkUp(C), house.now)
    assert house.look() != []


def test_what_a_member_says_last_counts() -> None:
    """It may have lost its disk since."""
    house = ripe()
    house.pruning.handle(Received(C, Held(0, OTHER, (Head(*MINE, 4),))), house.now)
    assert house.look() == []


@pytest.mark.parametrize("absent", ["voter", "listed", "origin"])
def test_an_absent_member_is_waited_for_until_it_lapses(absent: str) -> None:
    house = House((*history(300, (5, 10)),), held=5)
    if absent == "voter":
        house.here = house.listed = [B]
    elif absent == "listed":
        house.listed = [B, C, D]
    else:
        house.held[LogId(D, 1)] = 1
    house.all_hold_the_same(*house.here)
    assert house.look() == []
    assert house.look(KEEP.lapse_s - 1.0) == []
    assert house.look() != []


def test_a_member_that_was_here_lapses_from_when_it_was_here_last() -> None:
    house = House(history(300, (5, 10)), held=5)
    house.all_hold_the_same(B)
    house.look(900.0)
    house.here = [B]
    assert house.look(200.0) == []
    assert house.look(800.0) != []


def test_a_member_that_spoke_while_it_was_called_failed_lapses_from_then() -> None:
    house = House(history(300, (5, 10)), held=5)
    house.here = [B]
    house.all_hold_the_same(B)
    house.look(900.0)
    house.spoke = house.now
    assert house.look(200.0) == []
    assert house.look(800.0) != []


def test_nothing_is_forgotten_while_a_majority_of_the_voters_is_gone_for_however_long() -> None:
    house = House(history(300, (5, 10)), held=5)
    house.here = []
    assert house.look() == []
    assert house.look(2 * KEEP.lapse_s) == []


def test_a_node_that_knows_no_voters_forgets_nothing() -> None:
    house = ripe()
    house.voters = ()
    assert house.look() == []


def test_without_the_rule_the_absent_are_not_waited_for() -> None:
    house = House(history(300, (5, 10)), rules=Rules(prune_lapse=False), held=5)
    house.here = [B]
    house.all_hold_the_same(B)
    assert house.look() != []


def test_the_configured_retention_is_in_days() -> None:
    assert Retention.of(config.Ledger()) == Retention()


def test_a_node_has_what_it_told_of_and_nothing_else() -> None:
    house = House()
    assert not house.pruning.said(B, [(MINE, 1)]), "it has told nothing yet"
    assert house.pruning.said(B, [])
    house.all_hold_the_same(B)
    assert house.pruning.said(B, [(MINE, 20)])
    assert not house.pruning.said(B, [(MINE, 20), (MINE, 21)])
