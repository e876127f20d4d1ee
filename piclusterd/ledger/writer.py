"""The one owner of the ledger's file: callers queue whole transactions, it runs them one after another.

    append ─┐                 ┌ group of appends ─▶ one transaction, one signature, one fsync ─▶ each caller its slice
    apply  ─┼─▶ queue ─▶ owner┤
    others ─┘                 └ one transaction ─▶ its caller
    read, replay, heads, counts, verify ─▶ a second connection, query_only

It refuses more than `QUEUE_MAX` waiting transactions, and any work after `close`.

Invariants. One task owns the writing connection; it alone begins, commits and checkpoints. A transaction is one
function on the connection's thread, so a caller that is cancelled can neither leave it open nor take it back: it loses
only the answer (a task cancelled between awaited BEGIN and COMMIT leaves others' rows in a transaction nobody ends).
A fault of the disk is answered with `Broken` and nothing of that transaction is kept; the next one tries again, so the
ledger refuses work exactly as long as the fault lasts.

Group commit: the appends that wait together are one group, until it is `commit_entries_max` entries or BATCH_BYTES_MAX
bytes, or the oldest has waited `commit_delay_s` (DeWitt et al., SIGMOD 1984; the fsync is what costs on an SD card).
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from .. import config
from ..errors import Broken, Overloaded, Unavailable
from ..events import Fact, Record
from ..ids import LogId, node_id
from ..wire import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, Entry, Head, Span
from . import store
from .database import BUSY_TIMEOUT_MS, broken, open_database, open_reader
from .entry import Draft, Signer, Verify, draft, draft_bytes

QUEUE_MAX = 1024
"""Transactions waiting: as many as the mailbox lets callers wait for."""
WAL_BYTES_MAX = 16 * 1024 * 1024
"""SQLite checkpoints by itself every 4 MB; a WAL past this had readers in the way and is truncated by force."""
CHECKPOINT_WAIT_MS = 200
"""How long a forced checkpoint waits for readers while appends wait for it."""
EPOCH_BITS = 48
"""A new log's epoch is random, as a node that lost its disk cannot know which it used; exact in JavaScript too."""

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Appended = tuple[tuple[Entry, ...], tuple[Fact, ...]]


@dataclass(frozen=True, slots=True)
class _Append:
    drafts: tuple[Draft, ...]
    size: int
    """Bytes in a batch, at most."""
    since: float
    """Event loop's time when it was queued."""
    done: asyncio.Future[Appended]


@dataclass(frozen=True, slots=True)
class _Job:
    work: Work[Any]
    done: asyncio.Future[Any]


class _Desk:
    """A connection and its thread."""

    def __init__(self, path: Path, opener: Callable[[Path], sqlite3.Connection]) -> None:
        self._path, self._opener = path, opener
        self._raw: sqlite3.Connection
        self._connection: aiosqlite.Connection

    async def open(self) -> None:
        """Raises Broken. Opens first and starts the thread then: aiosqlite leaves its thread where opening fails."""
        self._raw = await asyncio.to_thread(self._opener, self._path)
        self._connection = await aiosqlite.Connection(lambda: self._raw, iter_chunk_size=64)

    async def run(self, work: Work[T]) -> T:
        """`work` on the connection's thread, to its end even where the caller is cancelled. Raises Broken.

        aiosqlite has no public call for a function of one's own, and its public ones are single statements, between
        which a cancellation leaves the transaction open: `_execute` is what all of them are made of.
        """
        try:
            result: T = await self._connection._execute(work, self._raw)  # type: ignore[no-untyped-call]
        except sqlite3.Error as fault:
            raise broken(fault, self._path) from fault
        return result

    async def close(self) -> None:
        await self._connection.close()


class LedgerWriter:
    """The ledger of this node. Made by `start`, ended by `close`."""

    def __init__(
        self, path: Path, signer: Signer, verify: Verify, name: str, wall_ms: Callable[[], int], limits: config.Ledger
    ) -> None:
        self._signer, self._verify, self._name = signer, verify, name
        self._wall_ms, self._limits = wall_ms, limits
        self._writing = _Desk(path, open_database)
        self._reading = _Desk(path, open_reader)
        self._wal = path.with_name(path.name + "-wal")
        self._waiting: deque[_Append | _Job] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._wal_bytes = 0
        self._wal_limit = WAL_BYTES_MAX
        self._owner: asyncio.Task[None]
        self.log: LogId
        """The log this node appends to."""
        self.fault: Broken | None = None
        """Why the last transaction failed; None once one succeeds."""
        self.last_commit_s = 0.0
        """How long the last group commit took, seconds."""

    @classmethod
    async def start(
        cls,
        path: Path,
        signer: Signer,
        verify: Verify,
        name: str,
        wall_ms: Callable[[], int],
        limits: config.Ledger | None = None,
    ) -> LedgerWriter:
        """Open the ledger at `path` and this node's log in it (both made if missing). Raises Broken.

        `wall_ms()` is Unix time in milliseconds; it is called on the connection's thread, as `signer` and `verify` are.
        """
        writer = cls(path, signer, verify, name, wall_ms, limits or config.Ledger())
        await writer._writing.open()
        try:
            await writer._writing.run(writer._open_log)
            await writer._reading.open()
        except BaseException:
            await writer._writing.close()
            raise
        writer._owner = asyncio.create_task(writer._own(), name="ledger writer")
        return writer

    @property
    def healthy(self) -> bool:
        """Did the last transaction succeed?"""
        return self.fault is None

    # writing -----------------------------------------------------------------------------------------------------
    async def append(self, records: Sequence[Record]) -> Appended:
        """Make `records` durable in this node's log: their entries and facts, in order.

        Raises UserError for a record no node would accept, Broken where the disk fails, Overloaded or Unavailable
        (full, closed); nothing changed then. Where the caller is cancelled, the records may be appended all the same.
        """
        drafts = tuple(draft(record) for record in records)
        size = sum(map(draft_bytes, drafts))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Appended] = loop.create_future()
        self._enqueue(_Append(drafts, size, loop.time(), done))
        return await done

    async def apply(self, entries: Sequence[Entry]) -> store.Applied:
        """Store what verifies of other nodes' entries (see `store.apply`). Raises Broken, Unavailable."""
        return await self._do(partial(store.apply, entries=entries, verify=self._verify))

    async def new_epoch(self) -> LogId:
        """Begin a new log of this node's and append to it from now on: for a disk that was found to be rewound."""
        return await self._do(self._open_epoch)

    async def checkpoint(self) -> bool:
        """Move the WAL into the database and truncate it. False: readers were in the way, try again later."""
        return await self._do(_checkpoint)

    async def close(self) -> None:
        """Finish what is queued, then close the file. A second call does nothing."""
        self._closing = True
        self._arrived.set()
        await asyncio.shield(self._owner)

    # reading -----------------------------------------------------------------------------------------------------
    async def read(
        self, spans: Sequence[Span], bytes_max: int = BATCH_BYTES_MAX, entries_max: int = BATCH_ENTRIES_MAX
    ) -> tuple[Entry, ...]:
        """One batch of the spans' entries (see `store.read`)."""
        return await self._look(partial(store.read, spans=spans, bytes_max=bytes_max, entries_max=entries_max))

    async def replay(self) -> list[Fact]:
        """Everything the ledger says, for the folds at start."""
        return await self._look(lambda conn: list(store.facts(conn)))

    async def heads(self) -> tuple[Head, ...]:
        return await self._look(store.heads)

    async def counts(self) -> store.Counts:
        return await self._look(store.counts)

    async def verify(self) -> store.Verdict:
        """Scrub: hash everything again and verify every signature."""
        return await self._look(partial(store.verify_all, verify=self._verify))

    async def _look(self, work: Work[T]) -> T:
        if self._closing:
            raise _closed()
        return await self._reading.run(work)

    # the owner ---------------------------------------------------------------------------------------------------
    async def _do(self, work: Work[T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._enqueue(_Job(work, done))
        return await done

    def _enqueue(self, item: _Append | _Job) -> None:
        if self._closing:
            raise _closed()
        if len(self._waiting) >= QUEUE_MAX:
            raise Overloaded("the ledger has too much waiting", "its disk is slower than what comes in", "Try again.")
        self._waiting.append(item)
        self._arrived.set()

    async def _own(self) -> None:
        try:
            while await self._arrival(None):
                item = self._waiting[0]
                if isinstance(item, _Append):
                    await self._commit(await self._company(item))
                else:
                    self._waiting.popleft()
                    await self._perform(item)
                await self._relieve()
        finally:
            self._closing = True
            try:
                await self._reading.close()  # first: the last to close checkpoints, and that must be the writing one
            finally:
                await self._writing.close()

    async def _arrival(self, deadline: float | None) -> bool:
        """Wait until something waits: True. False: the loop's time passed `deadline`, or all is done at the close."""
        while not self._waiting and not self._closing:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                return False
        return bool(self._waiting)

    async def _company(self, first: _Append) -> list[_Append]:
        """Take the appends at the front of the queue that make one group, waiting for more while there is room."""
        group: list[_Append] = []
        entries = size = 0
        entries_max, until = self._limits.commit_entries_max, first.since + self._limits.commit_delay_s
        while entries < entries_max and await self._arrival(until):
            item = self._waiting[0]
            if isinstance(item, _Job):
                break
            entries, size = entries + len(item.drafts), size + item.size
            if group and (entries > entries_max or size > BATCH_BYTES_MAX):
                break
            self._waiting.popleft()
            group.append(item)
        return group

    async def _commit(self, group: list[_Append]) -> None:
        """One transaction for all of `group`; each caller gets its own slice."""
        drafts = [item for append in group for item in append.drafts]
        started = time.perf_counter()
        try:
            entries, facts = await self._run(partial(self._append_drafts, drafts))
        except Exception as fault:
            for append in group:
                _fail(append.done, fault)
            return
        self.last_commit_s = time.perf_counter() - started
        end = 0
        for append in group:
            start, end = end, end + len(append.drafts)
            _resolve(append.done, (entries[start:end], facts[start:end]))

    async def _perform(self, job: _Job) -> None:
        try:
            _resolve(job.done, await self._run(job.work))
        except Exception as fault:
            _fail(job.done, fault)

    async def _run(self, work: Work[T]) -> T:
        """`work` on the writing connection; keeps `fault` and the WAL's size. Only what wrote proves the disk well."""

        def measured(conn: sqlite3.Connection) -> tuple[T, bool, int]:
            before = conn.total_changes
            result = work(conn)
            return result, conn.total_changes != before, _size(self._wal)

        try:
            result, wrote, self._wal_bytes = await self._writing.run(measured)
        except Broken as fault:
            self.fault = fault
            raise
        if wrote:
            self.fault = None
        return result

    async def _relieve(self) -> None:
        """Truncate the WAL where it is past its limit; with readers in the way, not again before it grew by as much."""
        if self._wal_bytes <= self._wal_limit:
            return
        try:
            done = await self._run(_checkpoint)
        except Broken:
            done = False  # kept in `fault`; the rows themselves are safe in the WAL
        self._wal_limit = WAL_BYTES_MAX if done else self._wal_bytes + WAL_BYTES_MAX

    # on the connection's thread ----------------------------------------------------------------------------------
    def _append_drafts(self, drafts: Sequence[Draft], conn: sqlite3.Connection) -> Appended:
        return store.append_drafts(conn, self.log, drafts, self._signer, self._wall_ms())

    def _open_log(self, conn: sqlite3.Connection) -> None:
        """Go on with this node's log, or open its first."""
        known = store.current_log(conn, node_id(self._signer.public_key))
        if known is None:
            self._open_epoch(conn)
        else:
            self.log = known

    def _open_epoch(self, conn: sqlite3.Connection) -> LogId:
        self.log = store.open_log(conn, self._signer, self._name, secrets.randbits(EPOCH_BITS), self._wall_ms())
        return self.log


def _checkpoint(conn: sqlite3.Connection) -> bool:
    conn.execute(f"PRAGMA busy_timeout={CHECKPOINT_WAIT_MS}")
    try:
        busy, _, _ = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        conn.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    return not busy


def _size(path: Path) -> int:
    """Bytes in the file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _resolve(done: asyncio.Future[T], value: T) -> None:
    if not done.done():  # its caller was cancelled
        done.set_result(value)


def _fail(done: asyncio.Future[Any], fault: Exception) -> None:
    if not done.done():
        done.set_exception(fault)


def _closed() -> Unavailable:
    return Unavailable("the ledger is closed", "this node is stopping", "Ask another node.")
