"""What may be forgotten."""

from __future__ import annotations

import pytest

from piclusterd.events import Fact
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger.frontier import closed_by, frontier, kept_seqs

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


def fact(seq: int, kind: str, run: str = "", log: LogId = ONE) -> Fact:
    return Fact(log, seq, 1, kind, {"run": run})


def subject(fact: Fact) -> str | None:
    known = fact.kind in ("hook", "done", "term")
    return str(fact.body["run"]) if known else None


def kept(before: list[Fact], beyond: list[Fact], closed: set[str]) -> tuple[int, ...]:
    return kept_seqs(before, beyond, subject, lambda f: f.kind == "hook", closed.__contains__)


def test_what_is_open_is_kept_and_what_is_closed_is_not() -> None:
    before = [fact(1, "term"), fact(2, "hook", "x"), fact(3, "hook", "y"), fact(4, "done", "x")]
    assert kept(before, [], {"x"}) == (3,)


def test_a_done_outlives_no_hook_and_stays_while_one_stands_elsewhere() -> None:
    done = [fact(4, "done", "x")]
    assert kept(done, [fact(2, "hook", "x", TWO)], {"x"}) == (4,)
    assert kept(done, [fact(2, "done", "x", TWO)], {"x"}) == ()


def test_a_kind_of_a_newer_release_is_kept() -> None:
    assert kept([fact(1, "novelty", "x")], [], {"x"}) == (1,)


def test_who_was_away_learns_what_ended_meanwhile() -> None:
    checkpoint = fact(9, "log.checkpoint")
    opened = {"ended": (ONE, 3), "still open": (ONE, 4), "later": (ONE, 10), "elsewhere": (TWO, 3)}
    assert closed_by(checkpoint, [fact(4, "hook", "still open")], opened, subject) == ("ended",)
