"""Rot: found in slices in the background, quarantined, and replaced by a peer's copy.

    scrub(cursor) ─▶ rotten groups ─▶ damaged(id) ─▶ not served, not folded ─▶ Want to a peer ─▶ repair ─▶ row replaced

A group (the entries up to a signed one) is checked from its end: the signature vouches for the last header's hash, each
header for the hash of the one before it and of its own payload. A rotten payload therefore spoils its own entry only;
a rotten header or signature also all before it in its group, as nothing vouches for them any more.

Invariants. What is put in place of a damaged entry is covered by the origin's signature *and* hangs on the sound
neighbours, so a repair never swaps one branch of a fork for the other. A slice is bounded: it ends at the first signed
entry past `ENTRIES_MAX`. Where SQLite itself cannot read a page the file is beyond this room: see `rescue`.

Sources: TigerBeetle's grid scrubber; Protocol-Aware Recovery (Alagappan et al., FAST 2018): a damaged entry is fetched
again, never truncated away as if it had not been acknowledged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..events import Fact
from ..ids import LogId
from ..wire import Dropped, Entry, Span
from . import rows
from .branches import vouched
from .database import transaction
from .entry import SEQ_MAX, Header, Verify, decode_fact, decode_header, entry_hash, is_signed
from .rows import Log, Run

ENTRIES_MAX = 256
"""Entries of one slice: appends wait for it, an estimated 50 ms on a Pi 4."""

Group = list[tuple[int, Entry]]
"""(seq, entry) up to a signed one."""


class Slice(NamedTuple):
    """`cursor`: where the next slice begins (0: the whole ledger has been seen). `damaged`: what this one found."""

    cursor: int
    checked: int
    damaged: tuple[Span, ...]


def scrub(conn: sqlite3.Connection, cursor: int, verify: Verify, entries_max: int = ENTRIES_MAX) -> Slice:
    """Check the entries after `cursor` (an entry id; 0: from the beginning) and quarantine what is rotten."""
    checked = 0
    found: list[Span] = []
    with transaction(conn):
        for log, row in rows.logs(conn).items():
            if cursor >= row.last:
                continue
            expected = max(cursor - row.first + 1, rows.begins(conn, row))
            for group in groups(conn, row, expected):
                bad = rotten(log, row.key, expected, group, verify)
                found += mark(conn, log, row, bad)
                checked += len(group)
                expected = group[-1][0] + 1
                if checked >= entries_max:
                    return Slice(row.first + expected - 1, checked, tuple(found))
            cursor = row.last
    return Slice(0, checked, tuple(found))


def damaged(conn: sqlite3.Connection) -> tuple[Span, ...]:
    """What is quarantined, as the fewest spans."""
    spans: list[Span] = []
    if conn.execute("SELECT 1 FROM damaged LIMIT 1").fetchone() is None:
        return ()
    for log, row in rows.logs(conn).items():
        spans += rows.spans_of(log, rows.damaged_seqs(conn, row))
    return tuple(spans)


def groups(conn: sqlite3.Connection, row: Log, first: int) -> Iterator[Group]:
    """The log's entries from seq `first`, cut after each signed one; the last group may end unsigned (rot)."""
    group: Group = []
    for item in rows.entries(conn, row, first):
        group.append(item)
        if item[1].signature:
            yield group
            group = []
    if group:
        yield group


def rotten(log: LogId, key: bytes, first: int, group: Group, verify: Verify) -> frozenset[int]:
    """Seqs of `group`, which should begin at seq `first`, that nothing vouches for or that are missing from it."""
    last, end = group[-1]
    vouched_hash = entry_hash(end.header)
    if not end.signature or not is_signed(key, vouched_hash, end.signature, verify):
        return frozenset(range(first, last + 1))
    held = dict(group)
    bad: set[int] = set()
    for seq in range(last, first - 1, -1):
        entry = held.get(seq)
        header = None if entry is None else decode_header(entry.header)
        if entry is None or entry_hash(entry.header) != vouched_hash or not _is_at(header, log, seq):
            return frozenset(bad | set(range(first, seq + 1)))
        assert isinstance(header, Header)
        if not header.describes(entry.payload):
            bad.add(seq)
        vouched_hash = header.prev
    return frozenset(bad)


def inspect(conn: sqlite3.Connection, log: LogId, row: Log, seq: int, verify: Verify) -> tuple[Span, ...]:
    """Check the group that holds entry `seq`, now; what is rotten is quarantined. Inside the caller's transaction."""
    sql = "SELECT max(id) FROM entries WHERE id > ? AND id < ? AND length(signature) > 0"
    before = conn.execute(sql, (row.first, row.first + seq)).fetchone()[0]
    first = max(0 if before is None else before - row.first + 1, rows.begins(conn, row))
    for group in groups(conn, row, first):
        return mark(conn, log, row, rotten(log, row.key, first, group, verify))
    return ()


def mark(conn: sqlite3.Connection, log: LogId, row: Log, seqs: frozenset[int]) -> tuple[Span, ...]:
    """Quarantine `seqs`; those that were not yet, as spans."""
    new = seqs - rows.damaged_seqs(conn, row) if seqs else seqs
    conn.executemany("INSERT INTO damaged VALUES (?, 'rot')", [(row.first + seq,) for seq in sorted(new)])
    return rows.spans_of(log, new)


def repair(conn: sqlite3.Connection, log: LogId, row: Log, run: Run, verify: Verify) -> list[Fact]:
    """Put sound copies from `run` in place of damaged entries; the facts that can be read again.

    Inside the caller's transaction. What is left over of a damaged span stays quarantined and is asked for again.
    """
    seqs = rows.damaged_seqs(conn, row)
    if not seqs or not any(header.seq in seqs for header, _ in run):
        return []
    copies = vouched(row, run, verify)
    mended: Run = []
    for span in rows.spans_of(log, seqs):
        mended += _fitting(conn, row, span, copies)
    rows.insert(conn, row, mended, replace=True)
    conn.executemany("DELETE FROM damaged WHERE id = ?", [(row.first + header.seq,) for header, _ in mended])
    facts = [decode_fact(entry) for _, entry in mended]
    return [fact for fact in facts if isinstance(fact, Fact)]


def _fitting(conn: sqlite3.Connection, row: Log, span: Span, copies: Sequence[tuple[Header, Entry, Fact]]) -> Run:
    """Those of `copies` that fill `span`: down from its sound upper neighbour, at a log's end up from the lower one."""
    above = rows.header_at(conn, row, span.last + 1)
    if above is not None:
        header = decode_header(above)
        wanted = header.prev if isinstance(header, Header) else b""
        by_hash = {entry_hash(entry.header): (header, entry) for header, entry, _ in copies}
        fitting: Run = []
        while wanted in by_hash and by_hash[wanted][0].seq >= span.first:
            fitting.append(by_hash[wanted])
            wanted = fitting[-1][0].prev
        return fitting[::-1]
    return _from_below(conn, row, span, copies)


def _from_below(conn: sqlite3.Connection, row: Log, span: Span, copies: Sequence[tuple[Header, Entry, Fact]]) -> Run:
    below = rows.header_at(conn, row, span.first - 1)
    fitting: Run = []
    hashed = None if below is None else entry_hash(below)
    for header, entry, _ in copies:
        follows = hashed is None or header.prev == hashed
        if header.seq == span.first + len(fitting) <= span.last and follows:
            fitting.append((header, entry))
            hashed = entry_hash(entry.header)
    return fitting


def _is_at(header: Header | Dropped | None, log: LogId, seq: int) -> bool:
    return isinstance(header, Header) and header.log == log and 1 <= header.seq == seq <= SEQ_MAX
