"""The ledger's rows, one step above SQL: logs, entries by (log, seq), tips, heads. No policy, no verification.

    logs ──id──▶ entries.id = logs.id << 40 | seq        damaged(id): rows the scrub found rotten
                                                        branches: the other branches of a forked log
                                                        pruned: where a log begins that is cut at a checkpoint

Shared by `store`, `taking`, `branches`, `scrub` and `prune`, so that each says only what it decides. A log that holds a
branch is frozen: the rows of `branches` *are* that fact, so no flag can disagree with them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..ids import LogId, NodeId
from ..wire import Dropped, Entry, Span
from .entry import EMPTY, SEQ_MAX, Header, Tip, decode_header, entry_hash

SEQ_BITS = SEQ_MAX.bit_length()

OF_LOG = f"id BETWEEN logs.id << {SEQ_BITS} AND logs.id << {SEQ_BITS} | {SEQ_MAX}"
"""Of `entries`, inside a query over `logs`."""

Run = list[tuple[Header, Entry]]
"""Entries of one log with their headers, by seq."""


class Log(NamedTuple):
    """A row of `logs`. `key`: raw public key."""

    id: int
    key: bytes

    @property
    def first(self) -> int:
        """The entry id that seq 0 would have."""
        return self.id << SEQ_BITS

    @property
    def last(self) -> int:
        return self.first | SEQ_MAX


def logs(conn: sqlite3.Connection) -> dict[LogId, Log]:
    """Every log, in the order they arrived here."""
    rows = conn.execute("SELECT origin, epoch, id, key FROM logs ORDER BY id")
    return {LogId(NodeId(origin), epoch): Log(row, bytes(key)) for origin, epoch, row, key in rows}


def find(conn: sqlite3.Connection, log: LogId) -> Log | None:
    """The row of `log`; None where nothing of it is held."""
    found = conn.execute("SELECT id, key FROM logs WHERE origin = ? AND epoch = ?", log).fetchone()
    return None if found is None else Log(*found)


def insert_log(conn: sqlite3.Connection, log: LogId, key: bytes) -> Log:
    row = conn.execute("INSERT INTO logs (origin, epoch, key) VALUES (?, ?, ?)", (*log, key)).lastrowid
    assert row is not None
    return Log(row, key)


def insert(conn: sqlite3.Connection, row: Log, run: Run, *, replace: bool = False) -> None:
    verb = "REPLACE" if replace else "INSERT"
    conn.executemany(
        f"{verb} INTO entries (id, hlc, header, payload, signature) VALUES (?, ?, ?, ?, ?)",
        [(row.first + header.seq, header.hlc, entry.header, entry.payload, entry.signature) for header, entry in run],
    )


def by_log(entries: Iterable[Entry]) -> tuple[dict[LogId, Run], list[Dropped]]:
    """`entries` by log, in order of seq, and what is not an entry at all."""
    runs: dict[LogId, Run] = {}
    dropped: list[Dropped] = []
    for entry in entries:
        header = decode_header(entry.header)
        if isinstance(header, Dropped):
            dropped.append(header)
        else:
            runs.setdefault(header.log, []).append((header, entry))
    for run in runs.values():
        run.sort(key=lambda item: item[0].seq)
    return runs, dropped


def with_headers(entries: Sequence[Entry]) -> Run:
    """`entries`, which are ours and of one log, with their headers."""
    runs, dropped = by_log(entries)
    assert not dropped, "our own entries decode"
    return [item for run in runs.values() for item in run]


def entries(conn: sqlite3.Connection, row: Log, first: int, last: int = SEQ_MAX) -> Iterator[tuple[int, Entry]]:
    """(seq, entry) of a log from seq `first` to `last`."""
    sql = "SELECT id, header, payload, signature FROM entries WHERE id BETWEEN ? AND ? ORDER BY id"
    for place, header, payload, signature in conn.execute(sql, (row.first + first, row.first + last)):
        yield place - row.first, Entry(header, payload, signature)


def header_at(conn: sqlite3.Connection, row: Log, seq: int) -> bytes | None:
    """The header's bytes of one entry; None where it is not held."""
    found = conn.execute("SELECT header FROM entries WHERE id = ?", (row.first + seq,)).fetchone()
    return None if found is None else bytes(found[0])


def begins(conn: sqlite3.Connection, row: Log) -> int:
    """The seq the log begins with here: 1, or that of the checkpoint which replaced what was before it."""
    found = conn.execute("SELECT below FROM pruned WHERE log = ?", (row.id,)).fetchone()
    return 1 if found is None else int(found[0])


def set_begins(conn: sqlite3.Connection, row: Log, checkpoint: int) -> None:
    """From now on the log begins with the checkpoint at that seq: nothing before it is told, served, or mended."""
    conn.execute("REPLACE INTO pruned VALUES (?, ?)", (row.id, max(checkpoint, begins(conn, row))))
    conn.execute("DELETE FROM damaged WHERE id BETWEEN ? AND ?", (row.first, row.first + checkpoint - 1))


def tip(conn: sqlite3.Connection, row: Log) -> Tip:
    """Where the log ends; `EMPTY` where it has no entry."""
    sql = "SELECT id, header FROM entries WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1"
    last = conn.execute(sql, (row.first, row.last)).fetchone()
    return EMPTY if last is None else Tip(row.key, last[0] - row.first, entry_hash(last[1]))


def last_hlc(conn: sqlite3.Connection) -> int:
    """The latest hybrid clock at the end of any log; 0 in an empty ledger."""
    sql = f"SELECT max((SELECT hlc FROM entries WHERE {OF_LOG} ORDER BY id DESC LIMIT 1)) FROM logs"
    return conn.execute(sql).fetchone()[0] or 0


def damaged_seqs(conn: sqlite3.Connection, row: Log) -> frozenset[int]:
    """Seqs of the log that the scrub found rotten and that are not mended yet."""
    sql = "SELECT id FROM damaged WHERE id BETWEEN ? AND ?"
    return frozenset(place - row.first for (place,) in conn.execute(sql, (row.first, row.last)))


def is_blemished(conn: sqlite3.Connection) -> bool:
    """Is there any rot or fork at all? Almost never: what looks closer need not then."""
    sql = "SELECT EXISTS (SELECT 1 FROM damaged) OR EXISTS (SELECT 1 FROM branches)"
    return bool(conn.execute(sql).fetchone()[0])


def spans_of(log: LogId, seqs: Iterable[int]) -> tuple[Span, ...]:
    """`seqs` as the fewest spans that cover exactly them."""
    spans: list[Span] = []
    for seq in sorted(seqs):
        if spans and spans[-1].last == seq - 1:
            spans[-1] = spans[-1]._replace(last=seq)
        else:
            spans.append(Span(*log, seq, seq))
    return tuple(spans)
