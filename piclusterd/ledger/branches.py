"""The other branches of a forked log: kept, served and folded like the first, so that no acknowledged entry is lost.

    seq     4 ── 5 ── 6  ── 7             entries: the branch that came first
                  └── 6' ── 7' ── 8'      branches: every other one, by (log, seq, hash)
                              9' ── 10'   a floating piece: signed by the origin, what is before it not here yet

A fork is the origin signing twice at one seq: a board whose disk was put back to an older image and went on, or two
boards with one key. Neither branch is the false one, and either may hold entries that were acknowledged, so both are
kept and a log that has a branch is frozen: nothing extends its first branch any more, all that comes is a branch.
Only what a signature of the origin's covers gets in. `missing` says which spans to ask for until nothing floats;
the head of a frozen log is the highest seq of any branch that hangs together, so that heads grow equal on all nodes.

Sources: hypercore's `fork` counter and Scuttlebutt's forked feeds (both stop there); Bamboo (proof of the fork).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container, Iterator

from ..events import Fact
from ..ids import LogId
from ..wire import Dropped, Entry, Span
from . import rows
from .entry import CHECKPOINT, SEQ_MAX, Header, Verify, decode_fact, decode_header, entry_hash, is_signed
from .rows import Log, Run

LOOK_BACK = 256
"""Entries asked for before a floating piece: one batch, and more than most boards write between image and restore."""
BRANCH_ENTRIES_MAX = 65_536
"""Of one log: a stolen key must not fill every disk of the house with branches."""


def frozen(conn: sqlite3.Connection) -> tuple[LogId, ...]:
    """The logs that have branches."""
    held = {row for (row,) in conn.execute("SELECT DISTINCT log FROM branches")}
    if not held:
        return ()
    return tuple(sorted(log for log, row in rows.logs(conn).items() if row.id in held))


def is_frozen(conn: sqlite3.Connection, row: Log) -> bool:
    return conn.execute("SELECT 1 FROM branches WHERE log = ? LIMIT 1", (row.id,)).fetchone() is not None


def keep(conn: sqlite3.Connection, row: Log, branch: Run, verify: Verify) -> list[Fact]:
    """Store what the origin signed of `branch` and is not held in any branch yet; the facts that are new.

    Inside the caller's transaction.
    """
    known = conn.execute("SELECT count(*) FROM branches WHERE log = ?", (row.id,)).fetchone()[0]
    facts: list[Fact] = []
    for header, entry, fact in vouched(row, branch, verify, _roots(conn, row)):
        if known >= BRANCH_ENTRIES_MAX:
            break
        if rows.header_at(conn, row, header.seq) == entry.header:
            continue
        values = (row.id, header.seq, entry_hash(entry.header), entry.header, entry.payload, entry.signature)
        if conn.execute("INSERT OR IGNORE INTO branches VALUES (?, ?, ?, ?, ?, ?)", values).rowcount:
            known += 1
            facts.append(fact)
    return facts


def _roots(conn: sqlite3.Connection, row: Log) -> frozenset[bytes]:
    """What the entries of branches held already name as before them: their signatures cover that, too."""
    held = (
        decode_header(bytes(raw)) for (raw,) in conn.execute("SELECT header FROM branches WHERE log = ?", (row.id,))
    )
    return frozenset(header.prev for header in held if isinstance(header, Header))


def vouched(row: Log, branch: Run, verify: Verify, roots: Container[bytes] = ()) -> list[tuple[Header, Entry, Fact]]:
    """The entries of `branch` that a signature of the log's key covers; `branch` may hold several pieces mixed.

    A signature stands on the last entry of a commit only, so what is asked for before a floating piece may come without
    one: `roots` are hashes that something held and signed hangs on.
    """
    waiting: dict[bytes, tuple[Header, Entry, Fact]] = {}
    sound: dict[bytes, tuple[Header, Entry, Fact]] = {}
    for header, entry in branch:
        fact = _sound(header, entry)
        if fact is None:
            continue
        hashed = entry_hash(entry.header)
        waiting[hashed] = (header, entry, fact)
        if hashed in roots or (entry.signature and is_signed(row.key, hashed, entry.signature, verify)):
            while hashed in waiting:  # back along the chain: one signature covers all that is before it
                sound[hashed] = waiting.pop(hashed)
                hashed = sound[hashed][0].prev
    return sorted(sound.values(), key=lambda item: item[0].seq)


def _sound(header: Header, entry: Entry) -> Fact | None:
    if not header.describes(entry.payload):
        return None
    fact = decode_fact(entry)
    return None if isinstance(fact, Dropped) else fact


def entries(conn: sqlite3.Connection, row: Log, first: int, last: int) -> list[Entry]:
    """Branch entries of seq `first` to `last`, by seq."""
    sql = "SELECT header, payload, signature FROM branches WHERE log = ? AND seq BETWEEN ? AND ? ORDER BY seq, hash"
    return [Entry(*found) for found in conn.execute(sql, (row.id, first, last))]


def facts(conn: sqlite3.Connection, row: Log) -> Iterator[Fact]:
    """What the branches say: the union of all branches is what folds see."""
    for entry in entries(conn, row, 1, SEQ_MAX):
        fact = decode_fact(entry)
        if isinstance(fact, Fact):
            yield fact


def head(conn: sqlite3.Connection, row: Log) -> int:
    """The highest seq of a branch that hangs on the first one, or on a branch that does; 0 where none does."""
    return max((seq for seq, _, hangs in _pieces(conn, row) if hangs), default=0)


def missing(conn: sqlite3.Connection) -> tuple[Span, ...]:
    """What to ask the others for, so that floating pieces come to hang on the rest."""
    spans: list[Span] = []
    forked = frozen(conn)
    logs = rows.logs(conn) if forked else {}
    for log in forked:
        row = logs[log]
        pieces = _pieces(conn, row)
        held = {hashed for _, hashed, _ in pieces}
        ends = [seq for seq, hashed, hangs in pieces if not hangs and _prev(conn, row, hashed) not in held]
        spans += [Span(*log, max(seq - LOOK_BACK, 1), seq - 1) for seq in ends if seq > 1]
    return tuple(spans)


def _pieces(conn: sqlite3.Connection, row: Log) -> list[tuple[int, bytes, bool]]:
    """(seq, hash, does it hang on the rest?) of every branch entry, by seq.

    What hung on something that a checkpoint of either branch has replaced hangs on the beginning: nobody can show more.
    """
    sql = "SELECT hash, header FROM branches WHERE log = ? ORDER BY seq, hash"
    found = [(bytes(hashed), decode_header(bytes(raw))) for hashed, raw in conn.execute(sql, (row.id,)).fetchall()]
    held = [(hashed, header) for hashed, header in found if isinstance(header, Header)]
    begins = max([rows.begins(conn, row), *(header.seq for _, header in held if header.kind == CHECKPOINT)])
    hanging: set[bytes] = set()
    pieces = []
    for hashed, header in held:
        below = rows.header_at(conn, row, header.seq - 1)
        rooted = header.seq <= begins or (below is not None and entry_hash(below) == header.prev)
        if rooted or header.prev in hanging:
            hanging.add(hashed)
        pieces.append((header.seq, hashed, hashed in hanging))
    return pieces


def _prev(conn: sqlite3.Connection, row: Log, hashed: bytes) -> bytes:
    found = conn.execute("SELECT header FROM branches WHERE log = ? AND hash = ?", (row.id, hashed)).fetchone()
    header = decode_header(bytes(found[0]))
    return header.prev if isinstance(header, Header) else b""
