"""What acts on the node's effects: the one `match` over `Effect` of the daemon (the simulator has the other).

    node.handle ─▶ effect ─▶ perform ─▶ link, disk, model, service … ─▶ event ─▶ mailbox ─▶ node.handle

Quick effects are done on the spot; slow ones become tasks that post exactly one event with the effect's token. Nothing
here decides: an error is told to the node, which knows what it means.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, assert_never

from .cluster import denylist, hardstate
from .cluster.links import Links
from .errors import Broken, Overloaded, PiclusterError, Unavailable, UserError
from .events import (
    AddCheckpoint,
    Answer,
    Append,
    Appended,
    AppendFailed,
    Ask,
    CallOut,
    CloseHub,
    Damaged,
    Deny,
    DiskProbed,
    Diverged,
    Effect,
    EntriesRead,
    Event,
    Forget,
    Forgot,
    HardStateSaved,
    NewEpoch,
    Note,
    Noted,
    OpenHub,
    ProbeDisk,
    Read,
    Recovered,
    SaveHardState,
    Send,
    StepFinished,
    Stopped,
    Store,
    Stored,
    Token,
)
from .folding import MEANING
from .ids import NodeId, Term
from .inference import tasks
from .inference.serving import Serving
from .integrations.outcome import CallFailed
from .ledger import queued
from .ledger.writer import LedgerWriter
from .mailbox import Mailbox
from .wire import Dropped

log = logging.getLogger("piclusterd")

MODEL_TIMEOUT_S = 280.0
"""A model's answer for a workflow; a little under the run's own patience (`workflows.run.ACT_TIMEOUT_S`)."""

SAVE_RETRY_S = 1.0
"""A disk that refuses a vote is full or failing: a second is long for it and short for an election."""


DiskEffect = SaveHardState | Store | Read | NewEpoch | AddCheckpoint | Forget | Recovered | ProbeDisk


class Service(Protocol):
    """A client of the world outside; raises `CallFailed` and nothing else."""

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]: ...


class Hands:
    def __init__(
        self,
        mailbox: Mailbox,
        links: Links,
        ledger: LedgerWriter,
        serving: Serving,
        services: Mapping[str, Service],
        votes: Path,
        hub: Callable[[Term], Coroutine[Any, Any, None]] | None,
        on_note: Callable[[Note], None],
        identity: Path,
    ) -> None:
        """`votes` is the directory of the hard state, `identity` that of keys and deny-list.

        `hub(term)` runs the hub client until cancelled; None: no hub.
        """
        self._mailbox = mailbox
        self._links = links
        self._ledger = ledger
        self._serving = serving
        self._services = services
        self._votes = votes
        self._hub = hub
        self._on_note = on_note
        self._identity = identity
        self._noting = asyncio.Lock()
        self._hub_task: asyncio.Task[None] | None = None
        self._saving = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: deque[Event] = deque()
        """Of appends, on their way to the mailbox."""
        self.stopped = asyncio.Event()

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self._links.send(to, message)
            case Append():
                self._append(effect)
            case SaveHardState() | Store() | Read() | NewEpoch() | Recovered() | ProbeDisk():
                self._start(self._on_disk(effect))
            case AddCheckpoint() | Forget():
                self._start(self._on_disk(effect))
            case Ask():
                self._start(self._ask(effect))
            case CallOut():
                self._start(self._call(effect))
            case OpenHub(term):
                self._open_hub(term)
            case CloseHub():
                self._close_hub()
            case Deny(nodes):
                self._links.deny({*self._links.denied, *nodes})
                self._start(self._note_denied(nodes))
            case Answer(ticket, value):
                self._mailbox.answer(ticket, value)
            case Noted(note):
                self._on_note(note)
            case Stopped():
                self.stopped.set()
            case _:
                assert_never(effect)

    async def close(self) -> None:
        """Cancel what is under way. The ledger finishes its own transactions when it is closed."""
        self._close_hub()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # disk ----------------------------------------------------------------------------------------------------
    def _on_disk(self, effect: DiskEffect) -> Coroutine[Any, Any, None]:
        match effect:
            case SaveHardState():
                return self._save(effect)
            case AddCheckpoint():
                return self._add_checkpoint(effect)
            case Forget():
                return self._forget(effect)
            case Store():
                return self._store(effect)
            case Read():
                return self._read(effect)
            case NewEpoch():
                return self._open_epoch(effect)
            case Recovered():
                return self._recovered()
            case ProbeDisk():
                return self._probe(effect)

    async def _save(self, effect: SaveHardState) -> None:
        """In order (a lock is first come, first served), and again until it is durable: the node waits for it."""
        async with self._saving:
            while True:
                try:
                    await asyncio.to_thread(hardstate.save, self._votes, effect.state)
                    break
                except (OSError, PiclusterError) as fault:
                    log.critical("the vote record cannot be written; no part in elections until it can: %s", fault)
                    await asyncio.sleep(SAVE_RETRY_S)
        await self._mailbox.post(HardStateSaved(effect.token))

    def _append(self, effect: Append) -> None:
        """They come in crowds, and their results by the commit group: one task for all of these."""
        tell = partial(self._appended, effect.token)
        try:
            self._ledger.append_soon(effect.records, tell)
        except PiclusterError as fault:
            tell(fault)

    def _appended(self, token: Token, came: queued.Appended | Exception) -> None:
        self._results.append(_of_append(token, came))
        if len(self._results) == 1:
            self._start(self._post_results())

    async def _post_results(self) -> None:
        """In order, whatever waits for room."""
        while self._results:
            await self._mailbox.post(self._results[0])
            self._results.popleft()

    async def _add_checkpoint(self, effect: AddCheckpoint) -> None:
        came: queued.Appended | Exception
        try:
            came = await self._ledger.add_checkpoint(effect.log, effect.upto, effect.least, MEANING)
        except PiclusterError as fault:
            came = fault
        await self._mailbox.post(_of_append(effect.token, came))

    async def _store(self, effect: Store) -> None:
        before = self._ledger.damaged
        try:
            applied = await self._ledger.apply(effect.entries, effect.resets)
        except PiclusterError as fault:
            refused = str(fault) if isinstance(fault, Broken) else ""
            await self._mailbox.post(Stored(effect.token, (), (), (Dropped(str(fault)),), refused))
            return
        await self._mailbox.post(Stored(effect.token, applied.facts, applied.heads, applied.dropped))
        if applied.forks or applied.missing:
            await self._mailbox.post(Diverged(applied.forks, applied.missing))
        if self._ledger.damaged != before:
            await self._mailbox.post(Damaged(self._ledger.damaged))

    async def _forget(self, effect: Forget) -> None:
        try:
            more = await self._ledger.forget(effect.log, effect.checkpoint, effect.level)
            event = Forgot(effect.token, more)
        except PiclusterError as fault:
            log.info("nothing forgotten: %s", fault)
            event = Forgot(effect.token, False, str(fault))
        await self._mailbox.post(event)

    async def _open_epoch(self, effect: NewEpoch) -> None:
        """Until it is open: nothing is appended before."""
        while True:
            try:
                entries, facts = await self._ledger.new_epoch(effect.why)
                break
            except (OSError, PiclusterError) as fault:
                log.critical("no new log can be opened; this node takes no part until it can: %s", fault)
                await asyncio.sleep(SAVE_RETRY_S)
        await self._mailbox.post(Appended(effect.token, entries, facts))

    async def _recovered(self) -> None:
        try:
            await self._ledger.recovered()
        except OSError as fault:
            log.error("not noted that this ledger is whole again; the next start looks again: %s", fault)

    async def _probe(self, effect: ProbeDisk) -> None:
        why = ""
        try:
            await self._ledger.probe()
        except PiclusterError as fault:
            why = str(fault)
        await self._mailbox.post(DiskProbed(effect.token, why))

    async def _read(self, effect: Read) -> None:
        try:
            entries = await self._ledger.read(effect.spans)
        except PiclusterError as fault:
            log.error("the ledger cannot be read: %s", fault)
            entries = ()
        await self._mailbox.post(EntriesRead(effect.token, entries))

    async def _note_denied(self, nodes: tuple[NodeId, ...]) -> None:
        """In force already, and in the ledger: the file is for the day on which that is lost."""
        async with self._noting:
            try:
                await asyncio.to_thread(denylist.save, self._identity, nodes)
            except (OSError, PiclusterError) as fault:
                log.error("the deny-list beside the identity is not up to date: %s", fault)

    # models and services -------------------------------------------------------------------------------------
    async def _ask(self, effect: Ask) -> None:
        async def act() -> Mapping[str, Any]:
            async with asyncio.timeout(MODEL_TIMEOUT_S):
                return await tasks.perform(self._serving, effect.request, effect.prefer)

        await self._mailbox.post(await _outcome(effect.token, act()))

    async def _call(self, effect: CallOut) -> None:
        service = self._services.get(effect.service)
        if service is None:
            why = f"{effect.service} is not configured on this node"
            await self._mailbox.post(StepFinished(effect.token, error=why, retryable=True, retry_after_s=30.0))
            return
        act = service.perform(effect.operation, effect.arguments, effect.key)
        await self._mailbox.post(await _outcome(effect.token, act))

    # hub -----------------------------------------------------------------------------------------------------
    def _open_hub(self, term: Term) -> None:
        self._close_hub()
        if self._hub is not None:
            self._hub_task = asyncio.create_task(self._hub(term), name=f"hub, term {term}")
            self._tasks.add(self._hub_task)
            self._hub_task.add_done_callback(self._tasks.discard)

    def _close_hub(self) -> None:
        if self._hub_task is not None:
            self._hub_task.cancel()
            self._hub_task = None


def _of_append(token: Token, came: queued.Appended | Exception) -> Appended | AppendFailed:
    if not isinstance(came, Exception):
        return Appended(token, *came)
    log.log(logging.INFO if isinstance(came, UserError) else logging.ERROR, "nothing appended: %s", came)
    return AppendFailed(token, str(came), disk=isinstance(came, Broken))


async def _outcome(token: int, act: Awaitable[Mapping[str, Any]]) -> StepFinished:
    """What became of one act, in the words a run understands."""
    try:
        return StepFinished(token, value=await act)
    except CallFailed as fault:
        return StepFinished(token, error=str(fault), retryable=fault.retryable, retry_after_s=fault.retry_after_s)
    except (Unavailable, Overloaded) as fault:
        return StepFinished(token, error=str(fault), retryable=True, retry_after_s=fault.retry_after_s)
    except PiclusterError as fault:
        return StepFinished(token, error=str(fault), retryable=fault.status >= 500 or fault.status == 404)
    except TimeoutError:
        return StepFinished(token, error="no answer in time", retryable=True)
