"""Forgetting: a checkpoint in one's own log, and the removal of what it replaces, on every node that holds it.

    kept_seqs ─▶ add_checkpoint ─▶ replicated like any entry ─▶ frontier[log] >= its seq ─▶ prune(bodies) ─▶ prune(rows)

    level 1  bodies   payloads go, headers and signatures stay: the chain still verifies from the log's first entry
    level 2  rows     the log begins with the checkpoint; who asks for less gets checkpoint and tail (`store.read`)

It refuses to prune at anything but a checkpoint of the log's own, and a forked log at all: its branches are evidence.
Bounded: `ROWS_MAX` rows a call, as a delete of a year's log would hold up appends (and fill the WAL) for minutes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Literal

from ..errors import UserError
from ..events import Fact
from ..ids import LogId
from ..wire import Entry
from . import branches, rows
from .checkpoint import draft_checkpoint, kept_entries
from .database import transaction
from .entry import CHECKPOINT, Header, Signer, decode_fact, decode_header
from .rows import Log
from .store import append_drafts

ROWS_MAX = 1024
"""Rows of one call: appends wait for it, an estimated 100 ms on an SD card."""
Level = Literal["bodies", "rows"]

VACUUM_PAGES = 1024
"""Pages given back to the file system after a call: 4 MB."""


def add_checkpoint(
    conn: sqlite3.Connection, log: LogId, keep: Sequence[int], signer: Signer, name: str, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """End what is before now in `log`, this node's own, but for the entries `keep`. Answered like an append.

    Raises UserError where those do not fit one entry, or are not all here to be kept; nothing changed.
    """
    held = _held(conn, rows.logs(conn)[log], frozenset(keep))
    if len(held) < len(set(keep)):
        raise UserError(
            "no checkpoint can be made now", "an entry that must be kept is damaged", "Wait for its repair."
        )
    kept = [held[seq] for seq in sorted(held)]
    return append_drafts(conn, log, [draft_checkpoint(signer, name, kept)], signer, wall_ms)


def _held(conn: sqlite3.Connection, row: Log, wanted: frozenset[int]) -> dict[int, Entry]:
    """The entries `wanted`, from rows, or from an earlier checkpoint that kept them."""
    damaged = rows.damaged_seqs(conn, row)
    found: dict[int, Entry] = {}
    for seq, entry in rows.entries(conn, row, 1):
        header = decode_header(entry.header)
        if seq in damaged or not entry.payload or not isinstance(header, Header):
            continue
        if seq in wanted:
            found[seq] = entry
        if header.kind == CHECKPOINT:
            found |= _kept_by(entry, wanted)
    return found


def _kept_by(checkpoint: Entry, wanted: frozenset[int]) -> dict[int, Entry]:
    fact = decode_fact(checkpoint)
    if not isinstance(fact, Fact):
        return {}
    headers = [(decode_header(entry.header), entry) for entry in kept_entries(fact)]
    return {header.seq: entry for header, entry in headers if isinstance(header, Header) and header.seq in wanted}


def prune(conn: sqlite3.Connection, log: LogId, checkpoint: int, level: Level) -> bool:
    """Remove some of what the checkpoint at seq `checkpoint` replaced. True: there is more to do.

    The caller has seen that the frontier has passed it. Raises UserError where there is no such checkpoint.
    """
    row = rows.logs(conn)[log]
    header = decode_header(rows.header_at(conn, row, checkpoint) or b"")
    if not isinstance(header, Header) or header.kind != CHECKPOINT:
        raise UserError(f"{log.origin}/{log.epoch} is not pruned", f"entry {checkpoint} is no checkpoint of its origin")
    if branches.is_frozen(conn, row):
        raise UserError(f"{log.origin}/{log.epoch} is not pruned", "two branches of it were seen: both are kept")
    end = row.first + checkpoint - 1
    with transaction(conn):
        rows.set_begins(conn, row, checkpoint)  # at once: a webhook must not outlive its `done` in a half-pruned log
        changed = _drop_bodies(conn, row, end)
        if level == "rows" and not changed:
            changed = _drop_rows(conn, row, end)
    conn.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
    return changed == ROWS_MAX or (level == "rows" and _remains(conn, row, end))


def _remains(conn: sqlite3.Connection, row: Log, end: int) -> bool:
    sql = "SELECT 1 FROM entries WHERE id BETWEEN ? AND ? LIMIT 1"
    return conn.execute(sql, (row.first, end)).fetchone() is not None


def _drop_bodies(conn: sqlite3.Connection, row: Log, end: int) -> int:
    pick = "SELECT id FROM entries WHERE id BETWEEN ? AND ? AND length(payload) > 0 LIMIT ?"
    done = conn.execute(f"UPDATE entries SET payload = x'' WHERE id IN ({pick})", (row.first, end, ROWS_MAX))
    return done.rowcount


def _drop_rows(conn: sqlite3.Connection, row: Log, end: int) -> int:
    """The oldest first, so that what is left still is one chain."""
    pick = "SELECT id FROM entries WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?"
    done = conn.execute(f"DELETE FROM entries WHERE id IN ({pick})", (row.first, end, ROWS_MAX))
    return done.rowcount
