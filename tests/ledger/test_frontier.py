"""What may be forgotten."""

from __future__ import annotations

import pytest

from piclusterd.events import Fact
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger.checkpoint import SEEN_BYTES, SEEN_TOTAL_MAX, Seen
from piclusterd.ledger.frontier import DAY_S, SEEN_S, LedgerTime, Meaning, frontier, plan

A, B, C = (NodeId(letter * 16) for letter in "abc")
ONE, TWO = LogId(A, 1), LogId(B, 1)


@pytest.mark.parametrize(
    ("heads", "retention", "expected"),
    [
        ({}, (), {}),
        ({A: {ONE: 5}}, (A,), {ONE: 5}),
        ({A: {ONE: 5}}, (A, B), {}),
        ({A: {ONE: 5, TWO: 7}, B: {ONE: 3}}, (A, B), {ONE: 3}),
        ({A: {ONE: 5, TWO: 7}, B: {ONE: 3, TWO: 9}, C: {}}, (A, B), {ONE: 3, TWO: 7}),
        ({A: {ONE: 5, TWO: 7}, B: {ONE: 3, TWO: 9}, C: {}}, (A, B, C), {}),
    ],
)
def test_the_frontier_is_what_every_retained_node_holds(
    heads: dict[NodeId, dict[LogId, int]], retention: tuple[NodeId, ...], expected: dict[LogId, int]
) -> None:
    assert frontier(heads, retention) == expected


def at(day: float) -> int:
    """The hybrid clock's value on that day."""
    return int(day * DAY_S * 1000) << 16


def fact(seq: int, kind: str, run: str = "", log: LogId = ONE, day: float = 0.0) -> Fact:
    return Fact(log, seq, 1, kind, {"run": run}, at(day))


def digest(run: str) -> bytes:
    return run.encode().ljust(SEEN_BYTES, b"-")


MEANING = Meaning(
    subject=lambda f: None if f.kind == "novelty" else str(f.body.get("run", "")),
    opens=lambda f: f.kind == "hook",
    ends=lambda f: f.kind == "done",
    reopens=lambda f: f.kind == "retry",
    key=lambda f: digest(str(f.body["run"])) if f.kind == "hook" else None,
)


def kept(*facts: Fact, upto: int = 100) -> tuple[int, ...]:
    return plan(facts, ONE, upto, MEANING).keep


def test_what_is_open_is_kept_and_what_is_closed_is_not() -> None:
    facts = [fact(1, "term"), fact(2, "hook", "x"), fact(3, "hook", "y"), fact(4, "done", "x"), fact(5, "step", "y")]
    assert kept(*facts) == (3, 5)
    assert plan(facts, ONE, 100, MEANING).replaced == 3


def test_what_comes_after_the_plan_is_none_of_its_business_but_ends_what_it_ends() -> None:
    facts = [fact(2, "hook", "x"), fact(3, "hook", "y"), fact(4, "done", "x")]
    assert kept(*facts, upto=3) == (3,)


def test_a_done_outlives_no_hook_and_stays_while_one_stands_elsewhere() -> None:
    facts = [fact(3, "step", "x"), fact(4, "done", "x")]
    assert kept(*facts, fact(2, "hook", "x", TWO)) == (3, 4)
    assert kept(*facts, fact(2, "step", "x", TWO)) == ()


def test_two_copies_of_a_hook_do_not_keep_each_other() -> None:
    facts = [fact(2, "hook", "x"), fact(4, "done", "x"), fact(2, "hook", "x", TWO)]
    assert kept(*facts) == (4,)
    assert plan(facts, TWO, 100, MEANING).keep == ()


def test_steps_of_a_run_whose_hook_was_ended_elsewhere_are_closed_and_those_of_an_open_one_are_not() -> None:
    assert kept(fact(3, "step", "gone")) == ()
    assert kept(fact(3, "step", "x"), fact(2, "hook", "x", TWO)) == (3,)


def test_a_kind_of_a_newer_release_is_kept() -> None:
    assert kept(fact(1, "novelty", "x")) == (1,)


def test_what_is_let_go_is_remembered_with_what_earlier_checkpoints_let_go() -> None:
    old = [[at(0), digest("a") + digest("b")], [at(-40), digest("older")]]
    facts = [
        Fact(ONE, 1, 0, "log.checkpoint", {"seen": old}, at(-50)),
        *(fact(2 + day, "step", "z", day=day) for day in range(5)),
        fact(9, "hook", "x", day=5),
        fact(10, "done", "x", day=6),
        fact(11, "hook", "open", day=7),
    ]
    assert plan(facts, ONE, 100, MEANING).seen == (
        Seen(at(-40), digest("older")), Seen(at(0), digest("a") + digest("b")), Seen(at(7), digest("x")),
    )  # fmt: skip


def test_what_was_seen_is_forgotten_after_its_window() -> None:
    days = int(SEEN_S / DAY_S) + 1
    first = Fact(ONE, 1, 0, "log.checkpoint", {"seen": [[1, digest("a")]]}, at(0))
    later = [fact(2 + day, "step", "z", day=day) for day in range(days)]
    assert plan([first, *later[:-1]], ONE, 100, MEANING).seen != ()
    assert plan([first, *later], ONE, 100, MEANING).seen == (Seen(1, b""),), "what was let go by then is forgotten"
    again = Fact(ONE, 1, 0, "log.checkpoint", {"seen": [[1, b""]]}, at(0))
    assert plan([again, *later[:-1]], ONE, 100, MEANING).seen == (Seen(1, b""),), "and is never remembered again"


def test_what_was_seen_fits_and_the_newest_stays() -> None:
    full = [[1, digest("a") * (SEEN_TOTAL_MAX // SEEN_BYTES)]]
    facts = [Fact(ONE, 1, 0, "log.checkpoint", {"seen": full}, at(0)), fact(2, "hook", "x"), fact(3, "done", "x")]
    assert plan(facts, ONE, 100, MEANING).seen == (Seen(1, b""), Seen(0, digest("x")))


def test_time_is_what_the_entries_tell_and_a_clock_that_jumps_counts_for_one_gap() -> None:
    steady = LedgerTime([at(day) for day in (0, 1, 2.5, 3)], gap_s=DAY_S)
    assert steady.age(at(1)) == pytest.approx(1.5 * DAY_S)
    assert steady.age(at(3)) == 0
    jumped = LedgerTime([at(day) for day in (0, 60, 60.1)], gap_s=DAY_S)
    assert jumped.age(at(0)) == pytest.approx(1.1 * DAY_S)
    assert LedgerTime([]).age(at(1)) == 0


def test_what_was_opened_again_is_kept_until_it_ends_again() -> None:
    facts = [fact(1, "hook", "x"), fact(2, "step", "x"), fact(3, "done", "x"), fact(4, "retry", "x")]
    assert kept(*facts) == (1, 2, 3, 4)
    assert kept(*facts, fact(5, "done", "x")) == ()
    assert kept(*reversed(facts)) == (4, 3, 2, 1), "whatever came first"
