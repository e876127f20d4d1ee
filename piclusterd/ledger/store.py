"""The ledger's rows: plain functions over one `sqlite3.Connection`, each whole transaction in one call.

    append(records) ─▶ chained, signed ─┐
                                        ├─▶ entries ─▶ read(spans), facts(after), heads, counts, verify_all
    apply(entries) ──▶ verified ────────┘

The same functions run under the simulator (":memory:") and under `writer`. Of `database` they know the two tables.

Invariants. A log's entries are 1..n without a gap, and n is signed: what a signature does not cover yet is never kept,
so a head always ends on a signed entry, and so does every batch that `read` gives. Of two branches of a log the first
to arrive stays. Junk from a peer is reported in `Applied.dropped`, never raised. Bytes are stored as they arrived.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import Broken
from ..events import Fact, Record
from ..ids import LogId, NodeId, node_id
from ..wire import HEADS_MAX, Dropped, Entry, Head, Span
from .database import open_database as open_database
from .database import pragma, transaction
from .entry import (
    EMPTY,
    SEQ_MAX,
    Draft,
    Header,
    Signer,
    Tip,
    Verify,
    chain,
    decode_fact,
    decode_header,
    draft,
    draft_open,
    entry_hash,
    extend,
    is_signed,
)

SEQ_BITS = SEQ_MAX.bit_length()


class Applied(NamedTuple):
    """What `apply` changed: facts that are new, heads of every log it was given that is held, and what it refused."""

    facts: tuple[Fact, ...]
    heads: tuple[Head, ...]
    dropped: tuple[Dropped, ...]


class Counts(NamedTuple):
    """`size`: of the database's pages, in bytes (without the WAL)."""

    logs: int
    entries: int
    size: int


class Verdict(NamedTuple):
    """What `verify_all` found: how many entries verify, and the first fault of each log that has one."""

    entries: int
    faults: tuple[str, ...]


class _Log(NamedTuple):
    id: int
    key: bytes

    @property
    def first(self) -> int:
        """The entry id that seq 0 would have."""
        return self.id << SEQ_BITS

    @property
    def last(self) -> int:
        return self.first | SEQ_MAX


_Run = list[tuple[Header, Entry]]
"""Entries of one log with their headers, by seq."""


# writing ---------------------------------------------------------------------------------------------------------
def open_log(conn: sqlite3.Connection, signer: Signer, name: str, epoch: int, wall_ms: int) -> LogId:
    """This node's log of `epoch`, begun with a signed log.open entry if missing; it is then the current one."""
    log = LogId(node_id(signer.public_key), epoch)
    with transaction(conn):
        if log not in _logs(conn):
            row = _insert_log(conn, log, signer.public_key)
            entries = chain(log, EMPTY, [draft_open(signer, name)], signer, _last_hlc(conn), wall_ms)
            _insert(conn, row, _with_headers(entries))
        if current_log(conn, log.origin) != log:
            latest = "(SELECT max(opened) FROM logs)"
            conn.execute(f"UPDATE logs SET opened = {latest} + 1 WHERE origin = ? AND epoch = ?", log)
    return log


def current_log(conn: sqlite3.Connection, origin: NodeId) -> LogId | None:
    """The log of `origin` opened last on this database; one that only came from peers is not ours to extend."""
    sql = "SELECT origin, epoch FROM logs WHERE origin = ? AND opened ORDER BY opened DESC LIMIT 1"
    row = conn.execute(sql, (origin,)).fetchone()
    return None if row is None else LogId(NodeId(row[0]), row[1])


def append(
    conn: sqlite3.Connection, log: LogId, records: Sequence[Record], signer: Signer, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """Make `records` durable at the end of `log` in one transaction; `wall_ms`: Unix time, milliseconds.

    Raises UserError for a record no node would accept, sqlite3.Error where the disk fails; nothing changed then.
    """
    return append_drafts(conn, log, [draft(record) for record in records], signer, wall_ms)


def append_drafts(
    conn: sqlite3.Connection, log: LogId, drafts: Sequence[Draft], signer: Signer, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """As `append`, for records that were checked and encoded before."""
    with transaction(conn):
        row = _logs(conn)[log]
        assert row.key == signer.public_key, "a log is extended only with the key it was opened with"
        entries = chain(log, _tip(conn, row), drafts, signer, _last_hlc(conn), wall_ms)
        _insert(conn, row, _with_headers(entries))
    return entries, tuple(_sound_fact(entry) for entry in entries)


def apply(conn: sqlite3.Connection, entries: Sequence[Entry], verify: Verify) -> Applied:
    """Store what verifies of `entries` (any mix of logs, any order) in one transaction; idempotent.

    Per log it stops at the first entry that does not hang on the chain and keeps what a signature before it covers.
    Reasons in `dropped` start with `gap`, `fork` (two branches, both signed by the origin), or another of `entry`'s.
    Raises sqlite3.Error where the disk fails, and nothing else; nothing changed then.
    """
    runs, dropped = _runs(entries)
    facts: list[Fact] = []
    heads: list[Head] = []
    with transaction(conn):
        logs = _logs(conn)
        for log, run in runs.items():
            row = logs.get(log)
            if row is None and len(logs) >= HEADS_MAX:
                dropped.append(Dropped(f"junk: {log.origin}/{log.epoch} would be log {HEADS_MAX + 1}, over the cap"))
                continue
            taken = _Taking(conn, row, verify)
            fault = taken.take(run)
            dropped += [fault] if fault else []
            if taken.sound:
                row = logs[log] = row or _insert_log(conn, log, taken.signed.key)
                _insert(conn, row, taken.sound)
            facts += taken.facts
            if taken.signed.seq:
                heads.append(Head(log.origin, log.epoch, taken.signed.seq))
    return Applied(tuple(facts), tuple(sorted(heads)), tuple(dropped))


class _Taking:
    """One log's share of an `apply`: follows the chain from the stored tip, keeping only what a signature covers."""

    def __init__(self, conn: sqlite3.Connection, row: _Log | None, verify: Verify) -> None:
        self._conn, self._row, self._verify = conn, row, verify
        self.signed = EMPTY if row is None else _tip(conn, row)
        self.sound: _Run = []
        self.facts: list[Fact] = []
        self._tip = self.signed
        self._unsigned: list[tuple[Header, Entry, Fact]] = []
        self._seen: dict[int, bytes] = {}

    def take(self, run: _Run) -> Dropped | None:
        """Follow `run`; the reason it stopped early, if it did. `signed`, `sound` and `facts` hold the outcome."""
        for index, (header, entry) in enumerate(run):
            if header.seq <= self._tip.seq and self._held(header.seq) == entry.header:
                continue
            if header.seq <= self._tip.seq or (header.seq == self._tip.seq + 1 and header.prev != self._tip.hash):
                return self._diverged(run[index:])
            link = extend(self._tip, header, entry, self._verify)
            if isinstance(link, Dropped):
                return link
            self._seen[header.seq] = entry.header
            self._unsigned.append((header, entry, link.fact))
            self._tip = link.tip
            if entry.signature:
                self._settle()
        return None

    def _settle(self) -> None:
        self.signed = self._tip
        self.sound += [(header, entry) for header, entry, _ in self._unsigned]
        self.facts += [fact for _, _, fact in self._unsigned]
        self._unsigned.clear()

    def _held(self, seq: int) -> bytes | None:
        if seq in self._seen or self._row is None:
            return self._seen.get(seq)
        row = self._conn.execute("SELECT header FROM entries WHERE id = ?", (self._row.first + seq,)).fetchone()
        return None if row is None else bytes(row[0])

    def _diverged(self, branch: _Run) -> Dropped:
        """`branch` is not the one followed. A fork is proven where the origin signed both; anyone can forge."""
        header = branch[0][0]
        place = f"{header.origin}/{header.epoch} seq {header.seq}"
        beyond = header.seq == self.signed.seq + 1 and header.prev != self.signed.hash
        if (header.seq <= self.signed.seq or beyond) and self._is_signed(branch):
            return Dropped(f"fork: {place} exists twice, both signed by its origin; the first is kept")
        return Dropped(f"forged: {place} exists twice, and nothing proves that its origin wrote both")

    def _is_signed(self, branch: _Run) -> bool:
        """Does a signature of the origin's cover the first entry of `branch`?"""
        hashed = branch[0][0].prev
        for header, entry in branch:
            if header.prev == hashed:
                hashed = entry_hash(entry.header)
                if entry.signature and is_signed(self.signed.key, hashed, entry.signature, self._verify):
                    return True
        return False


def _runs(entries: Sequence[Entry]) -> tuple[dict[LogId, _Run], list[Dropped]]:
    """`entries` by log, in order of seq, and what is not an entry at all."""
    runs: dict[LogId, _Run] = {}
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


def _with_headers(entries: Sequence[Entry]) -> _Run:
    runs, dropped = _runs(entries)
    assert not dropped, "our own entries decode"
    return [item for run in runs.values() for item in run]


def _insert_log(conn: sqlite3.Connection, log: LogId, key: bytes) -> _Log:
    row = conn.execute("INSERT INTO logs (origin, epoch, key) VALUES (?, ?, ?)", (*log, key)).lastrowid
    assert row is not None
    return _Log(row, key)


def _insert(conn: sqlite3.Connection, row: _Log, run: _Run) -> None:
    conn.executemany(
        "INSERT INTO entries (id, hlc, header, payload, signature) VALUES (?, ?, ?, ?, ?)",
        [(row.first + header.seq, header.hlc, entry.header, entry.payload, entry.signature) for header, entry in run],
    )


# reading ---------------------------------------------------------------------------------------------------------
def read(conn: sqlite3.Connection, spans: Sequence[Span], bytes_max: int, entries_max: int) -> tuple[Entry, ...]:
    """Entries of `spans`, in order, until a cap is passed; what is not held is left out.

    The caps are soft: a batch closes at the first signed entry that reaches one, and a span that ends inside a commit
    group is read to the group's end, as what no signature covers would not be accepted.
    """
    logs = _logs(conn)
    batch: list[Entry] = []
    size = 0
    for span in spans:
        row = logs.get(span.log)
        first, last = max(span.first, 1), min(span.last, SEQ_MAX)
        if row is None or first > last:
            continue
        for seq, entry in _entries(conn, row, first):
            batch.append(entry)
            size += len(entry.header) + len(entry.payload) + len(entry.signature)
            if entry.signature and (size >= bytes_max or len(batch) >= entries_max):
                return tuple(batch)
            if entry.signature and seq >= last:
                break
    return tuple(batch)


def heads(conn: sqlite3.Connection) -> tuple[Head, ...]:
    """Where each log ends, sorted."""
    sql = f"SELECT origin, epoch, (SELECT max(id) FROM entries WHERE {_OF_LOG}) - (logs.id << {SEQ_BITS}) FROM logs"
    return tuple(sorted(Head(NodeId(origin), epoch, seq) for origin, epoch, seq in conn.execute(sql)))


def facts(conn: sqlite3.Connection, after: Sequence[Head] = ()) -> Iterator[Fact]:
    """What the ledger says, beyond the heads `after`: streamed log by log, each in order of seq.

    The logs come in the order they arrived here: folds rank by `Fact.order`. Raises Broken at an entry that rotted.
    """
    known = {head.log: head.seq for head in after}
    for log, row in _logs(conn).items():
        for _, entry in _entries(conn, row, known.get(log, 0) + 1):
            yield _sound_fact(entry)


def counts(conn: sqlite3.Connection) -> Counts:
    ends = heads(conn)
    size = pragma(conn, "page_count") * pragma(conn, "page_size")
    return Counts(len(ends), sum(head.seq for head in ends), size)


def verify_all(conn: sqlite3.Connection, verify: Verify) -> Verdict:
    """Hash everything again and verify every signature. A scrub: reads the whole ledger."""
    sound = 0
    faults: list[str] = []
    for log, row in _logs(conn).items():
        seq, fault = _verify_log(conn, log, row, verify)
        sound += seq
        faults += [fault] if fault else []
    return Verdict(sound, tuple(faults))


def _verify_log(conn: sqlite3.Connection, log: LogId, row: _Log, verify: Verify) -> tuple[int, str]:
    tip, signed = EMPTY, False
    for _, entry in _entries(conn, row, 1):
        header = decode_header(entry.header)
        link = header if isinstance(header, Dropped) else extend(tip, header, entry, verify)
        if isinstance(link, Dropped) or link.fact.log != log:
            reason = link.reason if isinstance(link, Dropped) else "broken chain: an entry of another log"
            return tip.seq, f"{log.origin}/{log.epoch} after seq {tip.seq}: {reason}"
        tip, signed = link.tip, bool(entry.signature)
    fault = "" if signed and tip.key == row.key else f"{log.origin}/{log.epoch}: its end is not signed by its key"
    return tip.seq, fault


_OF_LOG = f"id BETWEEN logs.id << {SEQ_BITS} AND logs.id << {SEQ_BITS} | {SEQ_MAX}"


def _logs(conn: sqlite3.Connection) -> dict[LogId, _Log]:
    rows = conn.execute("SELECT origin, epoch, id, key FROM logs ORDER BY id")
    return {LogId(NodeId(origin), epoch): _Log(row, bytes(key)) for origin, epoch, row, key in rows}


def _entries(conn: sqlite3.Connection, row: _Log, first: int) -> Iterator[tuple[int, Entry]]:
    """(seq, entry) of a log from seq `first` on."""
    sql = "SELECT id, header, payload, signature FROM entries WHERE id BETWEEN ? AND ? ORDER BY id"
    for place, header, payload, signature in conn.execute(sql, (row.first + first, row.last)):
        yield place - row.first, Entry(header, payload, signature)


def _tip(conn: sqlite3.Connection, row: _Log) -> Tip:
    sql = "SELECT id, header FROM entries WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1"
    last = conn.execute(sql, (row.first, row.last)).fetchone()
    return EMPTY if last is None else Tip(row.key, last[0] - row.first, entry_hash(last[1]))


def _last_hlc(conn: sqlite3.Connection) -> int:
    """The latest hybrid clock at the end of any log; 0 in an empty ledger."""
    sql = f"SELECT max((SELECT hlc FROM entries WHERE {_OF_LOG} ORDER BY id DESC LIMIT 1)) FROM logs"
    return conn.execute(sql).fetchone()[0] or 0


def _sound_fact(entry: Entry) -> Fact:
    """The fact of an entry that was verified when it was stored."""
    fact = decode_fact(entry)
    if isinstance(fact, Dropped):
        raise Broken(
            "an entry of the ledger cannot be read", fact.reason, "Check the disk; restore or rebuild the file."
        )
    return fact
