"""Forgetting: a checkpoint in one's own log, and the removal of what it replaces, on every node that holds it.

    plan ─▶ add_checkpoint ─▶ replicated like any entry ─▶ frontier[log] >= its seq ─▶ prune(bodies) ─▶ prune(rows)

    level 1  bodies   payloads go, headers and signatures stay: the chain still verifies from the log's first entry
    level 2  rows     the log begins with the checkpoint; who asks for less gets checkpoint and tail (`store.read`)

It refuses to prune at anything but a checkpoint of the log's own, and a forked log at all: its branches are evidence.
Bounded: `ROWS_MAX` rows a call, as a delete of a year's log would hold up appends (and fill the WAL) for minutes.
The plan reads the whole ledger, so it is made on another connection; what is appended meanwhile is kept as it is.
When what is to be done is `pruning`'s to decide.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Literal

from ..errors import UserError
from ..events import Fact
from ..ids import LogId
from ..wire import Entry
from . import branches, frontier, rows
from .checkpoint import KEEP_MAX, draft_checkpoint, kept_entries
from .database import transaction
from .entry import CHECKPOINT, Header, Signer, decode_fact, decode_header
from .frontier import Meaning, Plan
from .rows import Log
from .store import append_drafts, current_log, facts

ROWS_MAX = 1024
"""Rows of one call: appends wait for it, an estimated 100 ms on an SD card."""
Level = Literal["bodies", "rows"]

VACUUM_PAGES = 1024
"""Pages given back to the file system after a call: 4 MB."""


def make_plan(conn: sqlite3.Connection, log: LogId, upto: int, least: int, meaning: Meaning) -> Plan:
    """What a checkpoint of `log`, this node's own, would keep of all up to seq `upto`.

    Raises UserError where it would let go of fewer than `least` entries. Reads the whole ledger.
    """
    made = frontier.plan(facts(conn), log, upto, meaning)
    if made.replaced < least:
        raise UserError("no checkpoint is worth it now", f"only {made.replaced} entries are closed")
    return made


def add_checkpoint(
    conn: sqlite3.Connection, log: LogId, made: Plan, signer: Signer, name: str, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """End what `made` lets go of `log`, this node's own. Answered like an append.

    Raises UserError where what is kept does not fit one entry, or is not all here to be kept, or this node goes on in
    another log; nothing changed.
    """
    if current_log(conn, log.origin) != log:
        raise UserError("no checkpoint is made", "this node goes on in another log")
    row = rows.logs(conn)[log]
    since = range(made.upto + 1, rows.tip(conn, row).seq + 1)
    wanted = sorted({*made.keep, *since[: KEEP_MAX + 1]})
    kept = _held(conn, row, wanted)
    if len(kept) < len(wanted):
        raise UserError(
            "no checkpoint can be made now", "an entry that must be kept is damaged", "Wait for its repair."
        )
    return append_drafts(conn, log, [draft_checkpoint(signer, name, kept, made.seen)], signer, wall_ms)


def _held(conn: sqlite3.Connection, row: Log, wanted: Sequence[int]) -> list[Entry]:
    """The entries `wanted`, from rows, or from the checkpoint that the log begins with: it kept what was before it."""
    damaged = rows.damaged_seqs(conn, row)
    begins = rows.begins(conn, row)
    before = {seq: entry for _, first in rows.entries(conn, row, begins, begins) for seq, entry in _kept_by(first)}
    found: list[Entry] = []
    for seq in wanted:
        entries = [entry for _, entry in rows.entries(conn, row, seq, seq) if seq >= begins and seq not in damaged]
        found += entries or ([before[seq]] if seq in before else [])
    return found


def _kept_by(entry: Entry) -> list[tuple[int, Entry]]:
    fact = decode_fact(entry)
    if not isinstance(fact, Fact) or fact.kind != CHECKPOINT:
        return []
    headers = [(decode_header(kept.header), kept) for kept in kept_entries(fact)]
    return [(header.seq, kept) for header, kept in headers if isinstance(header, Header)]


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
    conn.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")  # a page a step, and `execute` makes only one
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
