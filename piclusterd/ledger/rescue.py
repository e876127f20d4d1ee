"""What stands beside the ledger's file, and what a start does about a file that is damaged, gone, or put back.

    ledger.db.lock           flock: one writer a ledger; also what a backup's restore and `recover` ask for
    ledger.db.mark           {origin, epoch, seq, hash}: written at start and at a clean stop only
    ledger.db.new-epoch      a restore left it: the next start opens a new log
    ledger.db.convalescent   why this ledger may lack entries it once acknowledged; stays until `recovered`
    ledger.db.damaged        the last file that was moved aside
    ledger.db.rescuing       why: a file is being moved aside and taken over; a start that finds this goes on with it

    start ─┬ quick_check finds fault ──────────▶ moved aside, what is readable is taken over, the rest refetched
           ├ not a database any more ──────────▶ the same
           ├ gone, but a mark or a vote stands ▶ convalescent
           └ the mark is not in the file ──────▶ an older file was put back: new epoch, convalescent

Every start looks, also one after a clean stop: cards lose pages while they lie in a drawer, and a page that nobody
looked at keeps the node from starting for ever. It costs a tenth of the replay, which reads the same pages.

It refuses to guess: a database of another program or of a newer release is not ours to move (`database.open_database`
says so). Nothing is deleted but the file that an earlier start had moved aside: it was one ledger's worth of disk.
The hash chain, not SQLite, says what is true: what is taken over from a damaged file is verified like a stranger's.

Invariant. A rescue may be cut short at any step, by the power or a full disk, and the next start loses nothing that the
damaged file could still tell.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from ..board.private import sync_directory, write_private
from ..errors import Broken, Refused
from ..ids import LogId, NodeId
from ..wire import Entry
from . import rows, scrub, store
from .database import transaction
from .entry import Verify, entry_hash

SALVAGE_BATCH = 256
"""Entries taken over from a damaged file in one transaction."""
_SUFFIXES = ("-wal", "-shm", "")
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Mark(msgspec.Struct, frozen=True):
    """How far this node's own log was, at the last start or stop. `hash`: of that entry's header."""

    origin: str
    epoch: int
    seq: int
    hash: bytes


def beside(path: Path, suffix: str) -> Path:
    """The file that stands beside the ledger at `path`."""
    return path.with_name(f"{path.name}.{suffix}")


def lock(path: Path) -> int:
    """Be the one writer of the ledger at `path`; close the file descriptor to stop. Raises Broken, Refused."""
    try:
        handle = os.open(beside(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        raise Broken(f"the ledger at {path} cannot be locked", str(fault), "Check the folder and its owner.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise Refused(
            f"the ledger at {path} is in use", "a piclusterd runs on it", "Stop it: sudo systemctl stop piclusterd"
        ) from None
    return handle


# at start --------------------------------------------------------------------------------------------------------
def open_checked(path: Path, verify: Verify, ran_before: bool) -> sqlite3.Connection:
    """The ledger at `path`, sound or begun anew. Raises Broken, sqlite3.Error or OSError where it cannot be used.

    `ran_before`: this node has voted, so a ledger that is missing was lost. What was found is in `convalescent`.
    """
    if under_way := _text(beside(path, "rescuing")):
        return _rescue(path, under_way, verify)
    mark = load_mark(path)
    if not path.exists():
        if mark is not None or ran_before:
            set_convalescent(path, "the ledger's file is gone")
        return store.open_database(path)
    try:
        conn = store.open_database(path)
    except Broken as fault:
        if _code(fault.__cause__) not in _CORRUPT:
            raise
        return _begin_anew(path, f"the ledger's file is no database any more ({fault.__cause__})", verify)
    try:
        finding = _quick_check(conn)
        if not finding and mark is not None and not _holds(conn, mark, verify):
            set_convalescent(path, "the ledger's file was put back to an older state")
            want_new_epoch(path)
    except BaseException:
        conn.close()
        raise
    if not finding:
        return conn
    conn.close()
    return _begin_anew(path, f"the ledger's file is damaged ({finding})", verify)


def _begin_anew(path: Path, why: str, verify: Verify) -> sqlite3.Connection:
    for suffix in _SUFFIXES:
        Path(f"{beside(path, 'damaged')}{suffix}").unlink(missing_ok=True)
    write_private(beside(path, "rescuing"), why.encode())  # from here on every start goes on with it
    return _rescue(path, why, verify)


def _rescue(path: Path, why: str, verify: Verify) -> sqlite3.Connection:
    """Move the damaged file aside and take over what it can tell. Raises as `open_checked` does."""
    aside = beside(path, "damaged")
    set_convalescent(path, f"{why}; it was moved to {aside.name}")
    if aside.exists():
        for suffix in _SUFFIXES:  # what a rescue cut short had taken over: less than what is taken over now
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    else:
        _move(path, aside)
    conn = store.open_database(path)
    try:
        salvage(aside, conn, verify)
    except BaseException:
        conn.close()
        raise
    beside(path, "rescuing").unlink()
    sync_directory(path.parent)
    return conn


def _move(path: Path, aside: Path) -> None:
    """Rename the ledger with its WAL. The database last: where it stands at its new place, the WAL is there too."""
    for suffix in _SUFFIXES:
        if (old := Path(f"{path}{suffix}")).exists():
            old.rename(f"{aside}{suffix}")
            sync_directory(path.parent)


def salvage(source: Path, conn: sqlite3.Connection, verify: Verify) -> int:
    """Take over what can still be read of the ledger at `source` and verifies; the number of entries.

    Raises sqlite3.Error where `conn` cannot take it; that `source` cannot be read any further is no error.
    """
    with closing(sqlite3.connect(source, isolation_level=None)) as old:
        try:
            logs = rows.logs(old).values()
        except sqlite3.Error:
            return 0  # what it cannot tell any more, the other nodes can
        batches = (batch for row in logs for batch in _readable(old, row))
        return sum(len(store.apply(conn, batch, verify, resets=True).facts) for batch in batches)


def _readable(old: sqlite3.Connection, row: rows.Log) -> Iterator[list[Entry]]:
    """The log's entries in batches that end signed, up to the first page that cannot be read."""
    batch: list[Entry] = []
    try:
        for _, entry in rows.entries(old, row, _begins(old, row)):
            batch.append(entry)
            if entry.signature and len(batch) >= SALVAGE_BATCH:
                yield batch
                batch = []
    except sqlite3.Error:
        pass  # a torn page: the log is kept up to here
    yield batch


def _begins(old: sqlite3.Connection, row: rows.Log) -> int:
    """What is left below a checkpoint has no bodies and would be refused."""
    try:
        return rows.begins(old, row)
    except sqlite3.Error:
        return 1  # a file of an older release knows no checkpoints


def _quick_check(conn: sqlite3.Connection) -> str:
    """SQLite's first finding about the file's structure; "" where there is none. Reads every page of it."""
    try:
        found: str = conn.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as fault:
        if _code(fault) not in (*_CORRUPT, sqlite3.SQLITE_IOERR):
            raise
        return str(fault)
    return "" if found == "ok" else found


def _code(fault: BaseException | None) -> int:
    return getattr(fault, "sqlite_errorcode", 0) & 0xFF


# marks -----------------------------------------------------------------------------------------------------------
def load_mark(path: Path) -> Mark | None:
    """The mark beside the ledger; None where there is none that can be read."""
    try:
        return msgspec.json.decode(beside(path, "mark").read_bytes(), type=Mark)
    except (OSError, msgspec.DecodeError):
        return None


def save_mark(path: Path, conn: sqlite3.Connection, log: LogId) -> None:
    tip = rows.tip(conn, rows.logs(conn)[log])
    mark = Mark(log.origin, log.epoch, tip.seq, tip.hash)
    write_private(beside(path, "mark"), msgspec.json.encode(mark))


def _holds(conn: sqlite3.Connection, mark: Mark, verify: Verify) -> bool:
    """Is the marked entry in the file? Where it was pruned or rotted, the mark says nothing about the file's age."""
    log = LogId(NodeId(mark.origin), mark.epoch)
    row = rows.logs(conn).get(log)
    if row is None:
        return False
    header = rows.header_at(conn, row, mark.seq)
    if header is None:
        return rows.tip(conn, row).seq > mark.seq
    with transaction(conn):
        scrub.inspect(conn, log, row, mark.seq, verify)
    return entry_hash(header) == mark.hash or mark.seq in rows.damaged_seqs(conn, row)


def want_new_epoch(path: Path) -> None:
    """The next start of the ledger at `path` opens a new log."""
    write_private(beside(path, "new-epoch"), b"")


def wants_new_epoch(path: Path) -> bool:
    return beside(path, "new-epoch").exists()


def new_epoch_opened(path: Path) -> None:
    beside(path, "new-epoch").unlink(missing_ok=True)


def convalescent(path: Path) -> str:
    """Why the ledger at `path` may lack what it acknowledged; "" where it does not."""
    return _text(beside(path, "convalescent"))


def set_convalescent(path: Path, why: str) -> None:
    write_private(beside(path, "convalescent"), why.encode())


def set_recovered(path: Path) -> None:
    beside(path, "convalescent").unlink(missing_ok=True)


def _text(path: Path) -> str:
    """What the file says; "" where there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
