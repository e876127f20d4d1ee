"""Rot: one flipped bit anywhere in an entry is found, not served, and mended from a peer."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.ledger import branches, rows, scrub, store
from piclusterd.wire import Span

from .keys import Key, verify
from .rig import KEY, LOG, add, everything, fresh, give, image, reasons, spoil, texts

GROUPS = ((1, 1), (2, 4), (5, 5), (6, 9))
"""First and last seq of each commit group of `ours`."""


@pytest.fixture
def ours() -> Iterator[sqlite3.Connection]:
    with closing(house()) as conn:
        yield conn


@pytest.fixture
def peer(ours: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    with closing(image(ours)) as conn:
        yield conn


def house() -> sqlite3.Connection:
    conn = fresh(KEY)
    add(conn, "a", "b", "c")
    add(conn, "d")
    add(conn, "e", "f", "g", "h")
    return conn


def whole_scrub(conn: sqlite3.Connection, entries_max: int = 256) -> tuple[Span, ...]:
    cursor = 0
    found: list[Span] = []
    for _ in range(100):
        part = scrub.scrub(conn, cursor, verify, entries_max)
        found += part.damaged
        cursor = part.cursor
        if cursor == 0:
            return tuple(found)
    raise AssertionError("the scrub does not end")


def test_a_sound_ledger_has_no_damage_in_any_size_of_slice(ours: sqlite3.Connection) -> None:
    with closing(fresh(Key(2))) as other:
        give(other, ours)
    for size in (1, 2, 5, 1000):
        assert whole_scrub(ours, size) == ()
    part = scrub.scrub(ours, 0, verify, 3)
    assert part.checked == 4, "a slice ends with the group in which it is full"
    assert part.cursor & (2**40 - 1) == 4


@pytest.mark.parametrize("entries_max", [1, 256])
@pytest.mark.parametrize(
    ("column", "damage"),
    [("payload", Span(*LOG, 7, 7)), ("header", Span(*LOG, 6, 7)), ("signature", Span(*LOG, 2, 4))],
)
def test_rot_is_found_and_mended(
    ours: sqlite3.Connection, peer: sqlite3.Connection, column: str, damage: Span, entries_max: int
) -> None:
    spoil(ours, 4 if column == "signature" else 7, column)
    assert whole_scrub(ours, entries_max) == scrub.damaged(ours) == (damage,)
    assert whole_scrub(ours) == (), "told once"
    applied = give(peer, ours, damage)
    assert [fact.seq for fact in applied.facts] == list(range(damage.first, damage.last + 1))
    assert scrub.damaged(ours) == ()
    assert everything(ours) == everything(peer)
    assert store.verify_all(ours, verify).faults == ()


def test_what_is_in_quarantine_is_neither_served_nor_told(ours: sqlite3.Connection) -> None:
    spoil(ours, 7, "payload")
    whole_scrub(ours)
    assert len(everything(ours)) == 5, "up to the last signed entry before the rot"
    assert texts(ours) == ["a", "b", "c", "d", "e", "g", "h"]


@pytest.mark.parametrize("column", ["header", "payload"])
def test_rot_is_not_served_even_before_the_scrub_found_it(ours: sqlite3.Connection, column: str) -> None:
    spoil(ours, 7, column)
    assert len(everything(ours)) == 5


def test_an_entry_that_is_gone_is_found_and_mended(ours: sqlite3.Connection, peer: sqlite3.Connection) -> None:
    ours.execute("DELETE FROM entries WHERE id & 1023 = 7")
    assert whole_scrub(ours) == (Span(*LOG, 6, 7),)
    give(peer, ours, Span(*LOG, 6, 7))
    assert everything(ours) == everything(peer)


@pytest.mark.parametrize("column", ["header", "payload", "signature"])
def test_a_rotten_end_is_mended_and_the_log_goes_on(
    ours: sqlite3.Connection, peer: sqlite3.Connection, column: str
) -> None:
    spoil(ours, 9, column)
    add(peer, "later")
    whole_scrub(ours)
    assert reasons(give(peer, ours, Span(*LOG, 10, 10))) == ["damaged"]
    give(peer, ours)
    assert everything(ours) == everything(peer)


@pytest.mark.parametrize("victim", [4, 9])
def test_rot_of_ours_is_never_taken_for_a_fork_of_the_origin(
    ours: sqlite3.Connection, peer: sqlite3.Connection, victim: int
) -> None:
    spoil(ours, victim, "header")
    add(peer, "later")
    assert reasons(give(peer, ours)) == ["damaged"]
    assert branches.frozen(ours) == ()
    give(peer, ours)
    assert everything(ours) == everything(peer)


def test_a_repair_takes_only_what_the_origin_signed(ours: sqlite3.Connection, peer: sqlite3.Connection) -> None:
    spoil(ours, 7, "payload")
    whole_scrub(ours)
    spoil(peer, 9, "signature")
    raw = [entry for _, entry in rows.entries(peer, rows.logs(peer)[LOG], 6)]
    assert store.apply(ours, raw, verify).facts == ()
    assert scrub.damaged(ours) == (Span(*LOG, 7, 7),)


def test_a_repair_does_not_swap_branches(ours: sqlite3.Connection) -> None:
    with closing(fresh(KEY)) as other:
        add(other, *range(8))
        spoil(ours, 3, "payload")
        whole_scrub(ours)
        give(other, ours)
        assert scrub.damaged(ours) == (Span(*LOG, 3, 3),)


def test_a_span_is_mended_as_far_as_copies_come(ours: sqlite3.Connection, peer: sqlite3.Connection) -> None:
    for seq in (4, 5, 9):
        spoil(ours, seq, "header")
    whole_scrub(ours)
    assert scrub.damaged(ours) == (Span(*LOG, 2, 9),)
    give(peer, ours, Span(*LOG, 2, 4))
    assert scrub.damaged(ours) == (Span(*LOG, 5, 9),)
    give(peer, ours, Span(*LOG, 5, 9))
    assert everything(ours) == everything(peer)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["header", "payload", "signature"])), max_size=4))
def test_whatever_rots_a_peer_mends_it(rot: list[tuple[int, str]]) -> None:
    with closing(house()) as ours, closing(house()) as peer:
        for seq, column in rot:
            row = rows.logs(ours)[LOG]
            length = f"SELECT length({column}) FROM entries WHERE id = ?"
            if ours.execute(length, (row.first + seq,)).fetchone()[0]:
                spoil(ours, seq, column)
        whole_scrub(ours)
        for _ in range(3):
            give(peer, ours, *scrub.damaged(ours))
        assert scrub.damaged(ours) == ()
        assert everything(ours) == everything(peer)
