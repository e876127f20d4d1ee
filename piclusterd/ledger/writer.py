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

Group commit (DeWitt et al., SIGMOD 1984; fsync is what costs on an SD card): the appends that wait are one group, up to
`commit_entries_max` entries or BATCH_BYTES_MAX bytes: what comes while the disk writes is the next group. One
smaller than the last waits for as many, `commit_delay_s` at most: a crowd comes again together, and who is alone is not
kept waiting.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from .. import config
from ..errors import Broken, Overloaded, Unavailable
from ..events import Fact, Record
from ..ids import LogId, node_id
from ..wire import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, Entry, Head, Span
from . import branches, prune, rescue, scrub, store
from .ballast import Ballast
from .connection import Connection, Work, checkpoint_wal, fail, is_full, resolve, settle, size_of, touch
from .database import open_reader
from .entry import Draft, Signer, Verify, draft, draft_bytes
from .frontier import Meaning, Plan
from .queued import Appended, QueuedAppend, QueuedWork

QUEUE_MAX = 1024
"""Transactions waiting: as many as the mailbox lets callers wait for."""
WAL_BYTES_MAX = 16 * 1024 * 1024
"""SQLite checkpoints by itself every 4 MB; a WAL past this had readers in the way and is truncated by force."""
EPOCH_BITS = 48
"""A new log's epoch is random, as a node that lost its disk cannot know which it used; exact in JavaScript too."""

T = TypeVar("T")


class LedgerWriter:
    """The ledger of this node. Made by `start`, ended by `close`."""

    def __init__(
        self, path: Path, signer: Signer, verify: Verify, name: str, wall_ms: Callable[[], int], limits: config.Ledger
    ) -> None:
        self._path, self._signer, self._verify, self._name = path, signer, verify, name
        self._wall_ms, self._limits = wall_ms, limits
        self._reading = Connection(path, open_reader)
        self._wal = path.with_name(path.name + "-wal")
        self._waiting: deque[QueuedAppend | QueuedWork] = deque()
        self._arrived = asyncio.Event()
        self._wal_limit = WAL_BYTES_MAX
        self._cursor, self._last_group, self._closing = 0, 1, False
        self._writing: Connection
        self._owner: asyncio.Task[None]
        self._ballast: Ballast
        self.wal_bytes = 0
        """Of the write-ahead log after the last transaction; past WAL_BYTES_MAX a reader stays open too long."""
        self.log: LogId
        """The log this node appends to."""
        self.fault: Broken | None = None
        """Why the last transaction failed; None once one succeeds."""
        self.damaged: tuple[Span, ...] = ()
        """What the scrub found rotten and no peer has mended yet: a node with any does not stand for election."""
        self.lost = ""
        """Why this ledger may lack what it acknowledged (`rewind.recovered` says until when); "" where it does not."""
        self.mended = False
        """Since the start there was damage or loss, and it was made good: the disk wants a look all the same."""
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
        ran_before: bool = False,
        ballast_bytes: int = 0,
    ) -> LedgerWriter:
        """Open the ledger at `path` and this node's log in it (both made if missing, or begun anew where damaged).

        `wall_ms()` is Unix time in milliseconds; it is called on the connection's thread, as `signer` and `verify` are.
        `ran_before`: this node has voted, so a missing file is a loss. `ballast_bytes`: given up when the disk is full
        (`ballast.BALLAST_BYTES`); none with 0. Raises Broken, and Refused where a writer runs.
        """
        writer = cls(path, signer, verify, name, wall_ms, limits or config.Ledger())
        lock = await asyncio.to_thread(rescue.lock, path)
        try:
            await writer._open(ran_before, ballast_bytes)
        except BaseException:
            os.close(lock)
            raise
        writer._owner = asyncio.create_task(writer._own(lock), name="ledger writer")
        return writer

    async def _open(self, ran_before: bool, ballast_bytes: int) -> None:
        self._writing = Connection(self._path, lambda path: rescue.open_checked(path, self._verify, ran_before))
        await self._writing.open()
        try:
            await self._writing.run(self._open_log)
            await self._reading.open()
        except BaseException:
            await self._writing.close()
            raise
        self.lost = rescue.convalescent(self._path)
        self._ballast = Ballast(rescue.beside(self._path, "ballast"), ballast_bytes)
        if ballast_bytes:
            await asyncio.to_thread(self._ballast.take)

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
        done: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        self.append_soon(records, partial(settle, done))
        return await done

    def append_soon(self, records: Sequence[Record], tell: Callable[[Appended | Exception], None]) -> None:
        """As `append`, for a caller that has more to do: `tell` hears what came of it. May raise at once."""
        drafts = tuple(map(draft, records))
        now = asyncio.get_running_loop().time()
        self._enqueue(QueuedAppend(drafts, sum(map(draft_bytes, drafts)), now, tell))

    async def apply(self, entries: Sequence[Entry], resets: bool = False) -> store.Applied:
        """Store what verifies of `entries` (see `store.apply`). Raises Broken, Unavailable."""
        applied, damaged = await self._do(partial(self._apply, entries, resets))
        self.mended |= bool(self.damaged) and not damaged
        self.damaged = damaged
        return applied

    async def new_epoch(self, lost: str = "") -> Appended:
        """Begin a new log and append to it from now on; `lost`: why one is needed, kept until `recovered`."""
        if lost:
            await asyncio.to_thread(rescue.set_convalescent, self._path, lost)
            self.lost = lost
        return await self._do(self._open_epoch)

    async def scrub_slice(self) -> scrub.Slice:
        """Check the next 256 entries or so for rot; `damaged` tells what is found. Cursor 0: the end. Raises Broken."""
        part, self.damaged = await self._do(self._scrub)
        self._cursor = part.cursor
        return part

    async def add_checkpoint(self, log: LogId, upto: int, least: int, meaning: Meaning) -> Appended:
        """End what is closed of this node's log up to seq `upto` (see `prune`). Raises UserError."""
        made = await self._look(partial(prune.make_plan, log=log, upto=upto, least=least, meaning=meaning))
        return await self._do(partial(self._add_checkpoint, log, made))

    async def forget(self, log: LogId, checkpoint: int, level: prune.Level) -> bool:
        """Remove some of what that checkpoint replaced; True: there is more (see `prune.prune`)."""
        return await self._do(partial(prune.prune, log=log, checkpoint=checkpoint, level=level))

    async def recovered(self) -> None:
        """Nothing acknowledged is missing here any more (see `rewind.recovered`)."""
        await asyncio.to_thread(rescue.set_recovered, self._path)
        self.lost, self.mended = "", True

    async def probe(self) -> None:
        """Is the disk well? There is room (the ballast's, where it was given up), and a write lands. Raises Broken."""
        await asyncio.to_thread(self._ballast.retake)
        await self._do(touch)
        self.fault = None

    async def checkpoint(self) -> bool:
        """Move the WAL into the database and truncate it. False: readers were in the way, try again later."""
        return await self._do(checkpoint_wal)

    async def close(self) -> None:
        """Finish what is queued, then close the file. A second call does nothing."""
        self._closing = True
        self._arrived.set()
        await asyncio.shield(self._owner)

    # reading -----------------------------------------------------------------------------------------------------
    async def read(
        self, spans: Sequence[Span], bytes_max: int = BATCH_BYTES_MAX, entries_max: int = BATCH_ENTRIES_MAX
    ) -> tuple[Entry, ...]:
        """One batch (see `store.read`)."""
        return await self._look(partial(store.read, spans=spans, bytes_max=bytes_max, entries_max=entries_max))

    async def replay(self) -> list[Fact]:
        """Everything the ledger says, for the folds at start. Where rot is in the way it is put in quarantine first."""
        try:
            return await self._look(lambda conn: list(store.facts(conn)))
        except Broken:
            while (await self.scrub_slice()).cursor:
                pass
            return await self._look(lambda conn: list(store.facts(conn)))

    async def heads(self) -> tuple[Head, ...]:
        return await self._look(store.heads)

    async def verify(self) -> store.Verdict:
        """Hash everything again and verify every signature."""
        return await self._look(partial(store.verify_all, verify=self._verify))

    async def _look(self, work: Work[T]) -> T:
        if self._closing:
            raise _closed()
        return await self._reading.run(work)

    # the owner ---------------------------------------------------------------------------------------------------
    async def _do(self, work: Work[T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._enqueue(QueuedWork(work, done))
        return await done

    def _enqueue(self, item: QueuedAppend | QueuedWork) -> None:
        if self._closing:
            raise _closed()
        if len(self._waiting) >= QUEUE_MAX:
            raise Overloaded("the ledger has too much waiting", "its disk is slower than what comes in", "Try again.")
        self._waiting.append(item)
        self._arrived.set()

    async def _own(self, lock: int) -> None:
        try:
            while await self._arrival(None):
                item = self._waiting[0]
                if isinstance(item, QueuedAppend):
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
                try:
                    await self._writing.run(self._leave)
                except Broken:
                    pass  # the mark of the start stands
                await self._writing.close()
                self._ballast.release()
                os.close(lock)

    async def _arrival(self, deadline: float | None) -> bool:
        """Wait until something waits: True. False: the loop's time passed `deadline`, or all is done at the close."""
        while not self._waiting and not self._closing:
            if deadline is not None and deadline <= asyncio.get_running_loop().time():
                return False
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                return False
        return bool(self._waiting)

    async def _company(self, first: QueuedAppend) -> list[QueuedAppend]:
        """Take the appends at the front of the queue that make one group, waiting for as many as made the last one."""
        group: list[QueuedAppend] = []
        entries = size = 0
        entries_max, until = self._limits.commit_entries_max, first.since + self._limits.commit_delay_s
        while entries < entries_max and await self._arrival(until if len(group) < self._last_group else 0.0):
            item = self._waiting[0]
            if isinstance(item, QueuedWork):
                break
            entries, size = entries + len(item.drafts), size + item.size
            if group and (entries > entries_max or size > BATCH_BYTES_MAX):
                break
            self._waiting.popleft()
            group.append(item)
        self._last_group = len(group)
        return group

    async def _commit(self, group: list[QueuedAppend]) -> None:
        """One transaction for all of `group`; each caller gets its own slice."""
        drafts = [item for append in group for item in append.drafts]
        started = time.perf_counter()
        try:
            entries, facts = await self._run(partial(self._append_drafts, drafts))
        except Exception as fault:
            for append in group:
                append.tell(fault)
            return
        self.last_commit_s = time.perf_counter() - started
        end = 0
        for append in group:
            start, end = end, end + len(append.drafts)
            append.tell((entries[start:end], facts[start:end]))

    async def _perform(self, job: QueuedWork) -> None:
        try:
            resolve(job.done, await self._run(job.work))
        except Exception as fault:
            fail([job.done], fault)

    async def _run(self, work: Work[T]) -> T:
        """`work` on the writing connection; keeps `fault` and the WAL's size. Only what wrote proves the disk well."""

        def measured(conn: sqlite3.Connection) -> tuple[T, bool, int]:
            before = conn.total_changes
            return work(conn), conn.total_changes != before, size_of(self._wal)

        try:
            result, wrote, self.wal_bytes = await self._writing.run(measured)
        except Broken as fault:
            self.fault = fault
            if is_full(fault):
                await asyncio.to_thread(self._ballast.give_up)
            raise
        if wrote:
            self.fault = None
        return result

    async def _relieve(self) -> None:
        """Truncate the WAL where it is past its limit; with readers in the way, not again before it grew by as much."""
        if self.wal_bytes <= self._wal_limit:
            return
        try:
            done = await self._run(checkpoint_wal)
        except Broken:
            done = False  # kept in `fault`; the rows themselves are safe in the WAL
        self._wal_limit = WAL_BYTES_MAX if done else self.wal_bytes + WAL_BYTES_MAX

    # on the connection's thread ----------------------------------------------------------------------------------
    def _append_drafts(self, drafts: Sequence[Draft], conn: sqlite3.Connection) -> Appended:
        return store.append_drafts(conn, self.log, drafts, self._signer, self._wall_ms())

    def _apply(
        self, entries: Sequence[Entry], resets: bool, conn: sqlite3.Connection
    ) -> tuple[store.Applied, tuple[Span, ...]]:
        return store.apply(conn, entries, self._verify, resets), scrub.damaged(conn)

    def _scrub(self, conn: sqlite3.Connection) -> tuple[scrub.Slice, tuple[Span, ...]]:
        return scrub.scrub(conn, self._cursor, self._verify), scrub.damaged(conn)

    def _add_checkpoint(self, log: LogId, made: Plan, conn: sqlite3.Connection) -> Appended:
        return prune.add_checkpoint(conn, log, made, self._signer, self._name, self._wall_ms())

    def _open_log(self, conn: sqlite3.Connection) -> None:
        """Go on with this node's log where it may be extended, else open another."""
        known = store.current_log(conn, node_id(self._signer.public_key))
        if known is None or rescue.wants_new_epoch(self._path) or not self._is_sound(conn, known):
            self._open_epoch(conn)
            rescue.new_epoch_opened(self._path)
        else:
            self.log = known
        self.damaged = scrub.damaged(conn)
        rescue.save_mark(self._path, conn, self.log)

    def _is_sound(self, conn: sqlite3.Connection, log: LogId) -> bool:
        """May the log be extended? Not a forked one, nor one with a rotten end: its hash would go into the next."""
        if log in branches.frozen(conn):
            return False
        store.inspect_end(conn, log, self._verify)
        return not any(span.log == log for span in scrub.damaged(conn))

    def _open_epoch(self, conn: sqlite3.Connection) -> Appended:
        self.log = store.open_log(conn, self._signer, self._name, secrets.randbits(EPOCH_BITS), self._wall_ms())
        return store.opening(conn, self.log)

    def _leave(self, conn: sqlite3.Connection) -> None:
        rescue.save_mark(self._path, conn, self.log)


def _closed() -> Unavailable:
    return Unavailable("the ledger is closed", "this node is stopping", "Ask another node.")
