"""One SQLite connection and the thread it lives on: whole functions run there, never single statements.

A caller that is cancelled loses only the answer: what was begun on the thread ends there. (A task cancelled between an
awaited BEGIN and its COMMIT would leave a transaction open that nobody ends, and others' rows in it.)
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from ..errors import Broken, PiclusterError
from .database import BUSY_TIMEOUT_MS, broken

CHECKPOINT_WAIT_MS = 200
"""How long a forced checkpoint waits for readers while appends wait for it."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]


class Connection:
    """A connection and its thread."""

    def __init__(self, path: Path, opener: Callable[[Path], sqlite3.Connection]) -> None:
        self._path, self._opener = path, opener
        self._raw: sqlite3.Connection
        self._connection: aiosqlite.Connection

    async def open(self) -> None:
        """Raises Broken. Opens first and starts the thread then: aiosqlite leaves its thread where opening fails."""
        with in_our_words(self._path):
            self._raw = await asyncio.to_thread(self._opener, self._path)
        self._connection = await aiosqlite.Connection(lambda: self._raw, iter_chunk_size=64)

    async def run(self, work: Work[T]) -> T:
        """`work` on the connection's thread, to its end even where the caller is cancelled. Raises Broken.

        aiosqlite has no public call for a function of one's own, and its public ones are single statements, between
        which a cancellation leaves the transaction open: `_execute` is what all of them are made of.
        """
        with in_our_words(self._path):
            result: T = await self._connection._execute(work, self._raw)  # type: ignore[no-untyped-call]
        return result

    async def close(self) -> None:
        await self._connection.close()


@contextmanager
def in_our_words(path: Path) -> Iterator[None]:
    """Faults of SQLite, and of the files beside the ledger, as Broken."""
    try:
        yield
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault
    except OSError as fault:
        raise Broken(f"the ledger at {path} cannot be used", str(fault), "Check the disk (dmesg shows why).") from fault


def checkpoint_wal(conn: sqlite3.Connection) -> bool:
    """Move the WAL into the database and truncate it. False: readers were in the way."""
    conn.execute(f"PRAGMA busy_timeout={CHECKPOINT_WAIT_MS}")
    try:
        busy, _, _ = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        conn.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    return not busy


def touch(conn: sqlite3.Connection) -> None:
    """A write that changes nothing: the file's first page, durable on return."""
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    conn.execute(f"PRAGMA user_version={version}")


def is_corrupt(fault: PiclusterError) -> bool:
    """Did SQLite find a page that it cannot make sense of?"""
    return _code(fault) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_full(fault: Broken) -> bool:
    """Is it for lack of space that a transaction failed?"""
    return _code(fault) == sqlite3.SQLITE_FULL


def _code(fault: PiclusterError) -> int:
    """SQLite's primary result code behind `fault`; 0 where SQLite did not say one."""
    return getattr(fault.__cause__, "sqlite_errorcode", 0) & 0xFF


def size_of(path: Path) -> int:
    """Bytes in the file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def resolve(done: asyncio.Future[T], value: T) -> None:
    """Answer a caller, if it still waits."""
    if not done.done():  # its caller was cancelled
        done.set_result(value)


def settle(done: asyncio.Future[T], came: T | Exception) -> None:
    """Answer a caller with what came of it, if it still waits."""
    if isinstance(came, Exception):
        fail([done], came)
    else:
        resolve(done, came)


def fail(callers: Iterable[asyncio.Future[Any]], fault: Exception) -> None:
    """Answer those callers with a fault that still wait."""
    for done in callers:
        if not done.done():
            done.set_exception(fault)
