"""The ledger's file: how it is opened, what is in it, and what its faults mean to a person.

    open_database ─▶ the one connection that writes and checkpoints      open_reader ─▶ any that only read
    transaction   ─▶ BEGIN IMMEDIATE … COMMIT, or nothing changed        broken      ─▶ sqlite3.Error → errors.Broken

`entries.id` is logs.id << 40 | seq: one B-tree and no second index, so a commit writes the rightmost page of each log
it extends and little else (flash wears by the page). Heads, counts and hashes are derived, not stored: there is no
second copy that could disagree, and no row that every commit rewrites. `hlc` alone is copied out of the header.

`damaged` and `branches` are empty on a sound ledger (see `scrub` and `branches`).

Durability: WAL with synchronous=FULL (NORMAL may lose committed transactions at a power cut; sqlite.org/wal.html).
BEGIN IMMEDIATE, since a deferred transaction that upgrades to a write ignores the busy timeout (aiosqlite#251).
auto_vacuum=INCREMENTAL before the first table, since VACUUM needs the file's size again (zeek#4577).
It refuses another program's database and one that a newer release wrote.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ..errors import Broken

SCHEMA_VERSION = 2
APPLICATION_ID = 0x70636C31
"""`pcl1` in the file's header: another program's database is not opened by mistake."""
BUSY_TIMEOUT_MS = 5000
"""Only another process (a backup, a curious person) can hold the lock; five seconds outlast its short reads."""

SCHEMA = """
CREATE TABLE logs (
    id INTEGER PRIMARY KEY,
    origin TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    key BLOB NOT NULL,       -- raw public key, from the log's first entry
    opened INTEGER NOT NULL DEFAULT 0, -- 0: from peers; else the n-th that open_log opened on this database
    UNIQUE (origin, epoch)
) STRICT;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,  -- logs.id << 40 | seq
    hlc INTEGER NOT NULL,
    header BLOB NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT;
"""

SINCE_2 = """
CREATE TABLE damaged (
    id INTEGER PRIMARY KEY,  -- of an entry that the scrub found rotten or gone
    why TEXT NOT NULL
) STRICT;
CREATE TABLE branches (      -- of forked logs: all but the branch that is in entries
    log INTEGER NOT NULL,    -- logs.id
    seq INTEGER NOT NULL,
    hash BLOB NOT NULL,      -- of the header
    header BLOB NOT NULL,
    payload BLOB NOT NULL,
    signature BLOB NOT NULL,
    PRIMARY KEY (log, seq, hash)
) STRICT, WITHOUT ROWID;
CREATE TABLE pruned (
    log INTEGER PRIMARY KEY, -- logs.id
    below INTEGER NOT NULL   -- seq of the checkpoint that replaces all before it; what is left of that is not told
) STRICT;
"""
"""What version 2 added: an older file gets it when it is opened."""


def open_database(path: Path | str) -> sqlite3.Connection:
    """The ledger at `path` (made if missing), ready to write. Raises Broken where it cannot be used; nothing changed.

    For the one connection that writes and checkpoints: two that did could corrupt the file before SQLite 3.51.3
    (sqlite.org/wal.html#walresetbug), which Raspberry Pi OS does not have. Any thread may use it, one at a time.
    """
    conn = _connect(path)
    try:
        _check_owner(conn, path)
        conn.execute("PRAGMA auto_vacuum=INCREMENTAL")  # writes: what a killed daemon left unsynced is synced with it
        conn.execute("PRAGMA journal_mode=WAL")
        conn.execute("PRAGMA synchronous=FULL")
        _migrate(conn)
    except sqlite3.Error as fault:
        conn.close()
        raise broken(fault, path) from fault
    except Broken:
        conn.close()
        raise
    return conn


def open_reader(path: Path | str) -> sqlite3.Connection:
    """A second connection to an existing ledger; it neither writes nor checkpoints. Raises Broken."""
    conn = _connect(path)
    conn.execute("PRAGMA wal_autocheckpoint=0")
    conn.execute("PRAGMA query_only=1")
    return conn


def broken(fault: sqlite3.Error, path: Path | str) -> Broken:
    """`fault` in the words of errors.Broken: what could not be done, SQLite's reason, and what helps."""
    fixes = {
        sqlite3.SQLITE_FULL: "Free space on the disk; the ledger goes on by itself.",
        sqlite3.SQLITE_READONLY: "Make the file and its folder writable (a failing SD card turns read-only).",
        sqlite3.SQLITE_CANTOPEN: "Check that the folder exists and that the daemon's user may write in it.",
        sqlite3.SQLITE_BUSY: "Close the other program that holds the ledger open.",
        sqlite3.SQLITE_IOERR: "Check the disk and its cable (dmesg shows why).",
        sqlite3.SQLITE_CORRUPT: "Move the file away: the node fetches the ledger from the others again.",
        sqlite3.SQLITE_NOTADB: "Move the file away: the node fetches the ledger from the others again.",
    }
    code = getattr(fault, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary code, the rest its detail
    why = f"SQLite says: {fault}. The transaction was rolled back."
    return Broken(f"the ledger at {path} cannot be used", why, fixes.get(code, "See the log; restart the daemon."))


def _connect(path: Path | str) -> sqlite3.Connection:
    try:
        conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault
    conn.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    return conn


def _check_owner(conn: sqlite3.Connection, path: Path | str) -> None:
    version = pragma(conn, "user_version")
    empty = conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if not empty and pragma(conn, "application_id") != APPLICATION_ID:
        raise Broken(f"{path} is not a piclusterd ledger", "another program made it", "Choose another state_dir.")
    if version > SCHEMA_VERSION:
        why = f"its schema is version {version}, this release knows {SCHEMA_VERSION}"
        raise Broken(f"the ledger at {path} was written by a newer release", why, "Upgrade piclusterd on this node.")


def _migrate(conn: sqlite3.Connection) -> None:
    """Bring the schema up to date in one transaction; each step only adds."""
    found = pragma(conn, "user_version")
    if found == SCHEMA_VERSION:
        return
    steps = (SCHEMA, SINCE_2)
    with transaction(conn):
        for statement in "".join(steps[found:]).split(";\n")[:-1]:
            conn.execute(statement)
        conn.execute(f"PRAGMA application_id={APPLICATION_ID}")
        conn.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def pragma(conn: sqlite3.Connection, name: str) -> int:
    """The value of a setting that is a number."""
    value: int = conn.execute(f"PRAGMA {name}").fetchone()[0]
    return value


class transaction:
    """All of the block or none of it: committed on the way out, rolled back on any exception."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    def __enter__(self) -> None:
        self._conn.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._conn.execute("COMMIT")
        finally:
            if self._conn.in_transaction:  # a full disk may have rolled back already
                self._conn.execute("ROLLBACK")
