"""The ledger's rows: plain functions over one `sqlite3.Connection`, each whole transaction in one call.

    append(records) ─▶ chained, signed ─┐
                                        ├─▶ entries ─▶ read(spans), facts(after), heads, counts, verify_all
    apply(entries) ──▶ verified ────────┘

The same functions run under the simulator (":memory:") and under `writer`.

Invariants. A log's entries are 1..n without a gap (or c..n, where c is a checkpoint), and n is signed: what a signature
does not cover yet is never kept, so a head always ends on a signed entry, and so does every batch that `read` gives. Of
two branches of a log the first to arrive stays in `entries`, the others in `branches`; both are served and told. Junk
from a peer is reported in `Applied.dropped`, never raised. Bytes are stored as they arrived.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import Broken, Unavailable
from ..events import Fact, Record
from ..ids import LogId, NodeId, node_id
from ..wire import HEADS_MAX, Dropped, Entry, Head, Span
from . import branches, rows, scrub
from .checkpoint import kept_facts
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
    extend_pruned,
)
from .rows import Log
from .taking import Taking


class Applied(NamedTuple):
    """What `apply` changed: facts that are new, heads of every log it was given that is held, and what it refused.

    `forks`: spans of ours that a fork just found contradicts; whoever sent the other branch should be given them.
    `missing`: spans to ask for, so that every branch comes to hang on the rest (see `branches`).
    """

    facts: tuple[Fact, ...]
    heads: tuple[Head, ...]
    dropped: tuple[Dropped, ...]
    forks: tuple[Span, ...] = ()
    missing: tuple[Span, ...] = ()


class Counts(NamedTuple):
    """`size`: of the database's pages, in bytes (without the WAL)."""

    logs: int
    entries: int
    size: int


class Verdict(NamedTuple):
    """What `verify_all` found: how many entries verify, and the first fault of each log that has one."""

    entries: int
    faults: tuple[str, ...]


# writing ---------------------------------------------------------------------------------------------------------
def open_log(conn: sqlite3.Connection, signer: Signer, name: str, epoch: int, wall_ms: int) -> LogId:
    """This node's log of `epoch`, begun with a signed log.open entry if missing; it is then the current one."""
    log = LogId(node_id(signer.public_key), epoch)
    with transaction(conn):
        if log not in rows.logs(conn):
            row = rows.insert_log(conn, log, signer.public_key)
            entries = chain(log, EMPTY, [draft_open(signer, name)], signer, rows.last_hlc(conn), wall_ms)
            rows.insert(conn, row, rows.with_headers(entries))
        if current_log(conn, log.origin) != log:
            latest = "(SELECT max(opened) FROM logs)"
            conn.execute(f"UPDATE logs SET opened = {latest} + 1 WHERE origin = ? AND epoch = ?", log)
    return log


def opening(conn: sqlite3.Connection, log: LogId) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """The first entry of a log of ours, and its fact."""
    entry = next(entry for _, entry in rows.entries(conn, rows.logs(conn)[log], 1, 1))
    return (entry,), (_sound_fact(entry),)


def inspect_end(conn: sqlite3.Connection, log: LogId, verify: Verify) -> tuple[Span, ...]:
    """Check the last commit group of `log` for rot, before more is chained to it; what is found is in quarantine."""
    row = rows.logs(conn)[log]
    with transaction(conn):
        return scrub.inspect(conn, log, row, rows.tip(conn, row).seq, verify)


def current_log(conn: sqlite3.Connection, origin: NodeId) -> LogId | None:
    """The log of `origin` opened last on this database; one that only came from peers is not ours to extend."""
    sql = "SELECT origin, epoch FROM logs WHERE origin = ? AND opened ORDER BY opened DESC LIMIT 1"
    row = conn.execute(sql, (origin,)).fetchone()
    return None if row is None else LogId(NodeId(row[0]), row[1])


def append(
    conn: sqlite3.Connection, log: LogId, records: Sequence[Record], signer: Signer, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """Make `records` durable at the end of `log` in one transaction; `wall_ms`: Unix time, milliseconds.

    Raises UserError for a record no node would accept, Unavailable where the log was closed by a fork, sqlite3.Error
    where the disk fails; nothing changed then.
    """
    return append_drafts(conn, log, [draft(record) for record in records], signer, wall_ms)


def append_drafts(
    conn: sqlite3.Connection, log: LogId, drafts: Sequence[Draft], signer: Signer, wall_ms: int
) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
    """As `append`, for records that were checked and encoded before."""
    with transaction(conn):
        row = rows.find(conn, log)
        assert row is not None, "a log is opened before it is extended"
        assert row.key == signer.public_key, "a log is extended only with the key it was opened with"
        if branches.is_frozen(conn, row):
            raise Unavailable("this node's log is closed", "two branches of it were seen", "Another one is opened now.")
        entries = chain(log, rows.tip(conn, row), drafts, signer, rows.last_hlc(conn), wall_ms)
        run = rows.with_headers(entries)
        rows.insert(conn, row, run)
    told = zip(run, drafts, strict=True)
    return entries, tuple(Fact(log, head.seq, head.term, head.kind, item.body, head.hlc) for (head, _), item in told)


def apply(conn: sqlite3.Connection, entries: Sequence[Entry], verify: Verify, resets: bool = False) -> Applied:
    """Store what verifies of `entries` (any mix of logs, any order) in one transaction; idempotent.

    Per log it stops at the first entry that does not hang on the chain and keeps what a signature before it covers.
    Entries that are in quarantine here are replaced by the sound copies among `entries`. `resets`: these are the answer
    to a request of ours, so a checkpoint among them may replace what we lack before it.
    Reasons in `dropped` start with `gap`, `fork` (two branches, both signed by the origin), `damaged` (our own copy is
    rotten), or another of `entry`'s. Raises sqlite3.Error where the disk fails, nothing else; nothing changed then.
    """
    runs, dropped = rows.by_log(entries)
    facts: list[Fact] = []
    heads: list[Head] = []
    forks: list[Span] = []
    with transaction(conn):
        blemished = rows.is_blemished(conn)
        for log, run in runs.items():
            row = rows.find(conn, log)
            if row is None and len(rows.logs(conn)) >= HEADS_MAX:
                dropped.append(Dropped(f"junk: {log.origin}/{log.epoch} would be log {HEADS_MAX + 1}, over the cap"))
                continue
            facts += scrub.repair(conn, log, row, run, verify) if row and blemished else []
            taken = Taking(conn, log, row, verify, resets, blemished)
            fault = taken.take(run)
            dropped += [fault] if fault else []
            row = _keep(conn, log, row, taken)
            facts += taken.facts
            facts += [kept for fact in taken.facts if taken.begins for kept in kept_facts(fact)]
            if row is not None and (taken.branch or taken.frozen):
                new = branches.keep(conn, row, taken.branch, verify)
                facts += new
                forks += taken.ours() if new else ()
                heads.append(_forked_head(conn, log, row))
            elif taken.signed.seq:
                heads.append(Head(*log, taken.signed.seq))
        missing = branches.missing(conn) if blemished or forks else ()
    return Applied(tuple(facts), tuple(sorted(heads)), tuple(dropped), tuple(forks), missing)


def _keep(conn: sqlite3.Connection, log: LogId, row: Log | None, taken: Taking) -> Log | None:
    """Write what was found sound; the log's row, None where nothing of it is held."""
    if not taken.sound:
        return row
    row = row or rows.insert_log(conn, log, taken.signed.key)
    if taken.begins is not None:
        conn.execute("DELETE FROM entries WHERE id BETWEEN ? AND ?", (row.first, row.first + taken.begins - 1))
        rows.set_begins(conn, row, taken.begins)
    rows.insert(conn, row, taken.sound)
    return row


# reading ---------------------------------------------------------------------------------------------------------
def read(conn: sqlite3.Connection, spans: Sequence[Span], bytes_max: int, entries_max: int) -> tuple[Entry, ...]:
    """Entries of `spans`, in order, until a cap is passed; what is not held is left out.

    The caps are soft: a batch closes at the first signed entry that reaches one, and a span that ends inside a commit
    group is read to the group's end, as what no signature covers would not be accepted. A span that begins before a
    checkpoint whose past was pruned is read from the checkpoint on. Rot is not served: its span ends before it.
    Of a frozen log all branches are read.
    """
    logs = rows.logs(conn)  # the spans are a peer's: their numbers may be none that SQLite could look for
    batch: list[Entry] = []
    size = 0
    for span in spans:
        row = logs.get(span.log)
        first, last = max(span.first, 1), min(span.last, SEQ_MAX)
        if row is None or first > last:
            continue
        for group in _servable(conn, row, first):
            batch += group
            size += sum(len(entry.header) + len(entry.payload) + len(entry.signature) for entry in group)
            if size >= bytes_max or len(batch) >= entries_max:
                return tuple(batch)
            if _seq(group[-1]) >= last:
                break
        batch += branches.entries(conn, row, first, last)
    return tuple(batch)


def _servable(conn: sqlite3.Connection, row: Log, first: int) -> Iterator[list[Entry]]:
    """The log's groups from seq `first` on, up to the first entry that a peer would refuse."""
    quarantined = rows.damaged_seqs(conn, row)
    group: list[Entry] = []
    expected, hashed = 0, b""
    for seq, entry in rows.entries(conn, row, max(first, rows.begins(conn, row))):
        header = decode_header(entry.header)
        if seq in quarantined or isinstance(header, Dropped) or not header.describes(entry.payload):
            return
        if header.seq != seq or (hashed and (header.prev != hashed or seq != expected)):
            return
        expected, hashed = seq + 1, entry_hash(entry.header)
        group.append(entry)
        if entry.signature:
            yield group
            group = []


def _seq(entry: Entry) -> int:
    header = decode_header(entry.header)
    assert isinstance(header, Header), "was decoded a moment ago"
    return header.seq


def heads(conn: sqlite3.Connection) -> tuple[Head, ...]:
    """Where each log ends, sorted; of a frozen log the end of its longest branch."""
    sql = (
        f"SELECT origin, epoch, (SELECT max(id) FROM entries WHERE {rows.OF_LOG}) - (logs.id << {rows.SEQ_BITS})"
        " FROM logs"
    )
    ends = {LogId(NodeId(origin), epoch): seq or 0 for origin, epoch, seq in conn.execute(sql)}
    for log in branches.frozen(conn):
        ends[log] = _forked_head(conn, log, rows.logs(conn)[log]).seq
    return tuple(Head(*log, seq) for log, seq in sorted(ends.items()))


def _forked_head(conn: sqlite3.Connection, log: LogId, row: Log) -> Head:
    return Head(*log, max(rows.tip(conn, row).seq, branches.head(conn, row)))


def facts(conn: sqlite3.Connection, after: Sequence[Head] = ()) -> Iterator[Fact]:
    """What the ledger says, beyond the heads `after`: streamed log by log, each in order of seq.

    The logs come in the order they arrived here: folds rank by `Fact.order`. A checkpoint is followed by the facts that
    it kept of what it replaced. What is in quarantine is left out; raises Broken at rot that is not there yet.
    """
    known = {head.log: head.seq for head in after}
    for log, row in rows.logs(conn).items():
        quarantined = rows.damaged_seqs(conn, row)
        for seq, entry in rows.entries(conn, row, max(known.get(log, 0) + 1, rows.begins(conn, row))):
            if seq in quarantined:
                continue
            fact = _sound_fact(entry)
            yield fact
            yield from kept_facts(fact)
        yield from (fact for fact in branches.facts(conn, row) if fact.seq > known.get(log, 0))


def headers(conn: sqlite3.Connection) -> dict[bytes, None]:
    """The header of every entry held, in whichever branch: what tells two ledgers apart where heads do not."""
    return {bytes(raw): None for (raw,) in conn.execute("SELECT header FROM entries UNION SELECT header FROM branches")}


def counts(conn: sqlite3.Connection) -> Counts:
    ends = heads(conn)
    size = pragma(conn, "page_count") * pragma(conn, "page_size")
    return Counts(len(ends), sum(head.seq for head in ends), size)


def verify_all(conn: sqlite3.Connection, verify: Verify) -> Verdict:
    """Hash everything again and verify every signature. A scrub: reads the whole ledger."""
    sound = 0
    faults: list[str] = []
    for log, row in rows.logs(conn).items():
        seq, fault = _verify_log(conn, log, row, verify)
        sound += seq
        faults += [fault] if fault else []
    return Verdict(sound, tuple(faults))


def _verify_log(conn: sqlite3.Connection, log: LogId, row: Log, verify: Verify) -> tuple[int, str]:
    """How many entries verify, and the first fault ("": none); also those left below a checkpoint, without bodies."""
    tip, signed, sound, begins = EMPTY, False, 0, rows.begins(conn, row)
    for seq, entry in rows.entries(conn, row, 1):
        header = decode_header(entry.header)
        if isinstance(header, Header) and not sound and seq <= begins:
            tip = Tip(row.key, seq - 1, header.prev)
        following = header if isinstance(header, Dropped) else _following(tip, header, entry, verify, begins)
        if isinstance(following, Dropped) or isinstance(header, Dropped) or header.log != log:
            reason = following.reason if isinstance(following, Dropped) else "broken chain: an entry of another log"
            return sound, f"{log.origin}/{log.epoch} after seq {tip.seq}: {reason}"
        tip, signed, sound = following, bool(entry.signature), sound + 1
    fault = "" if signed and tip.key == row.key else f"{log.origin}/{log.epoch}: its end is not signed by its key"
    return sound, fault


def _following(tip: Tip, header: Header, entry: Entry, verify: Verify, begins: int) -> Tip | Dropped:
    if not entry.payload and header.seq < begins:
        return extend_pruned(tip, header, entry, verify)
    link = extend(tip, header, entry, verify)
    return link if isinstance(link, Dropped) else link.tip


def _sound_fact(entry: Entry) -> Fact:
    """The fact of an entry that was verified when it was stored."""
    fact = decode_fact(entry)
    if isinstance(fact, Dropped):
        raise Broken(
            "an entry of the ledger cannot be read", fact.reason, "Check the disk; restore or rebuild the file."
        )
    return fact
