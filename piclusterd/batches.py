"""Batches at work: the service that the workflow of that name calls, and what is told of one.

    POST /v1/batches ─▶ create ─▶ record on the shelf, event in the ledger ─▶ the coordinator's run
    run ─▶ perform("lines")  ─▶ input file ─▶ some lines at a time over all nodes ─▶ a part on the shelf ─▶ result
        ─▶ perform("finish") ─▶ parts in order ─▶ output and error file, the last record ─▶ parts forgotten
    GET ─▶ the shelf's record, and the run's progress from this node's ledger

Answers are out of the coordinator's hands before the ledger hears of them, so nothing that is recorded is lost with it.
A line is given up where its fault is its own; where no node can answer, the step ends with the lines before it, and
goes on there later. Ids of files are made of the batch's, so finishing twice makes the same files. A few lines ask for
the droplet first, as work that nobody waits for does; the others go where they would be done first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from .errors import NotFound, Overloaded, PiclusterError, Unavailable, UserError
from .events import HookTaken
from .ids import RunId, run_id
from .inference.answering import Answering
from .inference.placement import ANY_MODEL
from .inference.unhurried import Unhurried, droplet_places
from .integrations.outcome import CallFailed
from .shelf import Gone, Record, Shelf
from .views import RunView
from .web import batch_lines as lines
from .web.admin import JobWish
from .web.files import KEEP_S_MAX as KEEP_S
from .web.files import BatchBody
from .web.keys import caller, visible
from .wire import Hook
from .workflows import batch
from .workflows.batch import Wish
from .workflows.journal import Journal

log = logging.getLogger("piclusterd")

NODE_WIDTH = 4
"""Lines asked at a time for each node that serves: the slots of a model as configured, unless it says otherwise."""
WIDTH_MAX = 32
"""Of one batch. Two of them fill half the queue of a single node (`[inference] queue_max`)."""
STEP_LINES_MAX = 64
"""A coordinator that falls leaves at most so many to be answered again."""
STEP_S = 60.0
"""After which a step begins no more lines; with the last line's time it stays below a run's patience for one act."""
LINE_S = 200.0
"""A line that takes longer is given up: a Pi 4 reads and writes some thousand tokens in it."""
RETRY_S = 5.0
OPEN_MAX = 32
"""Batches that are not over; the coordinator works on a few, the oldest first (`workflows.run.BATCHES_MAX`)."""
WINDOW_S = 24 * 3600
BLOCK_BYTES = 256 * 1024
PURPOSE, PART = "batch-object", "batch-part"

Json = dict[str, Any]


class Batches:
    def __init__(
        self,
        shelf: Shelf,
        serving: Answering,
        take: Callable[[Hook], Awaitable[HookTaken]],
        change: Callable[[JobWish], Awaitable[RunView]],
        models: Callable[[], Awaitable[Mapping[str, int]]],
        journal: Callable[[], Journal],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`models()`: what is served now, and by how many nodes. `journal()`: this node's fold of the ledger."""
        self._shelf, self._serving, self._take, self._change = shelf, serving, take, change
        self._models, self._journal, self._wall = models, journal, wall
        self._droplet = droplet_places()

    # for clients -------------------------------------------------------------------------------------------------
    async def create(self, wanted: BatchBody) -> Json:
        """A batch, on several disks. Raises `UserError` for a file that is none, `Unavailable`."""
        endpoint, file_id = wanted.endpoint, wanted.input_file_id
        file = await self._shelf.find(file_id, everywhere=True)
        path = await self._shelf.open(owned(file))
        total, models = await asyncio.to_thread(check_file, path, endpoint)
        await self._check_models(models)
        running = self._open()
        if len(running) >= OPEN_MAX:
            raise Overloaded(f"{len(running)} batches are under way", f"At most {OPEN_MAX} are.", retry_after_s=60)
        now = int(self._wall())
        wish = Wish(
            f"batch_{secrets.token_hex(12)}", endpoint, file_id, total, now, now + WINDOW_S, owner_name(),
            wanted.output_expires_after.seconds if wanted.output_expires_after else KEEP_S,
        )  # fmt: skip
        record = Record(
            id=wish.id, purpose=PURPOSE, created_at=now, expires_at=now + KEEP_S, owner=wish.owner,
            told={"wish": msgspec.to_builtins(wish), "metadata": wanted.metadata, "window": wanted.completion_window},
        )  # fmt: skip
        try:
            await self._shelf.keep(record)
            await self._take(batch.hook_of(wish))
        except PiclusterError:
            await self._withdraw(record)
            raise
        return self._object(record)

    async def _withdraw(self, record: Record) -> None:
        """Its client is told that it has not begun. If it began all the same, its run finds out by this."""
        try:
            await self._shelf.remove(record)
        except PiclusterError as fault:
            log.info("%s is withdrawn here, and not known to be elsewhere: %s", record.id, fault)

    async def _check_models(self, named: Collection[str]) -> None:
        there, who = await self._models(), caller.get()
        for model in sorted(named):
            if who is not None:
                who.check(model)
            if model not in there and model not in ANY_MODEL:
                fix = f"There are: {', '.join(sorted(filter(visible, there))) or 'none'}."
                raise NotFound(f"no node serves the model {model[:128]!r}", fix=fix, param="model")

    async def show(self, id: str) -> Json:
        """Raises `NotFound`. A batch whose run was cancelled gets its files now, of what was answered."""
        record = await self._record(id)
        run = self._journal().runs.get(_run(id))
        if run is not None and run.state == "cancelled" and "ended" not in record.told:
            at = batch.progress(run.values())
            counted = {"parts": list(at.parts), "completed": at.completed, "failed": at.failed, "next": at.next}
            await self._finish({**record.told["wish"], **counted}, "cancelled")
            record = await self._record(id)
        return self._object(record)

    async def all(self) -> list[Json]:
        return [self._object(record) for record in await self._shelf.all(PURPOSE) if is_ours(record)]

    async def cancel(self, id: str) -> Json:
        """What was answered so far makes its files. One that has ended stays as it is."""
        if "ended" not in (await self._record(id)).told:
            try:
                await self._change(JobWish(run=_run(id), what="cancel"))
            except UserError as fault:
                log.info("batch %s is not cancelled: %s", id, fault)
        return await self.show(id)

    async def _record(self, id: str) -> Record:
        try:
            record = await self._shelf.find(id)
            if record.purpose == PURPOSE and "ended" not in record.told:
                record = await self._shelf.find(id, everywhere=True)  # it may have ended elsewhere
        except NotFound:
            record = None
        if record is None or record.purpose != PURPOSE:
            raise NotFound(f"there is no batch {id[:128]!r}", param="batch_id")
        return owned(record)

    def _open(self) -> list[RunId]:
        journal = self._journal()
        return [run for run in journal.open_runs() if journal.runs[run].workflow == batch.NAME]

    def _results(self, id: str) -> Mapping[str, Mapping[str, Any]]:
        run = self._journal().runs.get(_run(id))
        return run.values() if run is not None else {}

    def _object(self, record: Record) -> Json:
        """OpenAI's batch object."""
        told, wish = record.told, _wish(record)
        run = self._journal().runs.get(_run(wish.id))
        at, ended = batch.progress(self._results(wish.id)), told.get("ended", {})
        lost = run is None and self._wall() > wish.expires_at + WINDOW_S  # the ledger let go of a run that had failed
        state = run.state if run is not None else "failed" if lost else "open"
        status = ended.get("status") or _status(state, at, wish)
        counts = {"total": wish.total, "completed": at.completed, "failed": at.failed}
        made: Json = {
            "id": wish.id, "object": "batch", "endpoint": wish.endpoint, "errors": None, "input_file_id": wish.file,
            "completion_window": told.get("window", "24h"), "status": status, "output_file_id": None,
            "error_file_id": None, "created_at": wish.created_at, "in_progress_at": wish.created_at,
            "expires_at": wish.expires_at, "finalizing_at": None, "completed_at": None, "failed_at": None,
            "expired_at": None, "cancelling_at": None, "cancelled_at": None, "request_counts": counts,
            "metadata": told.get("metadata") or None,
        }  # fmt: skip
        if run is not None and run.state == "failed" and run.done is not None:
            made["errors"] = {"object": "list", "data": [{"code": "failed", "message": run.done[2]}]}
        made.update(ended)
        return made

    # for the run -------------------------------------------------------------------------------------------------
    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """A step of the run. Raises `CallFailed`."""
        try:
            await self._shelf.find(str(arguments["id"]))  # withdrawn?
            if operation == "lines":
                return await self._lines(arguments)
            await self._finish(arguments, "expired" if arguments.get("expired") else "completed")
            return {"finished": True}
        except Gone as fault:
            raise CallFailed("the batch, or its file, was deleted:", str(fault), retryable=False) from None
        except (NotFound, Unavailable) as fault:  # the ledger names it: a node that is away has it
            retry_after_s = fault.retry_after_s if isinstance(fault, Unavailable) else RETRY_S
            raise CallFailed(str(fault), retryable=True, retry_after_s=retry_after_s) from None
        except PiclusterError as fault:
            raise CallFailed(str(fault), retryable=fault.status >= 500) from None

    async def _lines(self, told: Mapping[str, Any]) -> Json:
        wish, start = msgspec.convert({name: told[name] for name in Wish.__struct_fields__}, Wish), int(told["next"])
        if self._wall() >= wish.expires_at:
            return {"next": start, "completed": 0, "failed": 0, "expired": True}
        path = await self._shelf.open(await self._shelf.find(wish.file))
        some = await asyncio.to_thread(_slice, path, start)
        answers = await self._answers(some, wish, start)
        sha256, size = await self._shelf.receive(_stream(map(lines.encode, answers)))
        part = f"{wish.id}-{start}-{sha256[:16]}"  # another coordinator's answers are another part
        await self._shelf.keep(
            Record(
                id=part, purpose=PART, created_at=int(self._wall()), expires_at=wish.expires_at + 2 * WINDOW_S,
                sha256=sha256, bytes=size,
            )
        )  # fmt: skip
        good = sum(map(lines.is_good, answers))
        return {"next": start + len(answers), "completed": good, "failed": len(answers) - good, "part": part}

    async def _answers(self, some: list[bytes], wish: Wish, start: int) -> list[Json]:
        """Those of the first lines, in order, as far as it went. Raises `Unavailable` where not even one was."""
        ends = asyncio.get_running_loop().time() + STEP_S
        nodes = max((await self._models()).values(), default=1)
        places = asyncio.Semaphore(min(NODE_WIDTH * nodes, WIDTH_MAX))
        stuck: list[Unavailable] = []
        serving = Unhurried(self._serving, wish.owner, self._droplet)

        async def one(number: int, raw: bytes) -> Json | None:
            async with places:
                while not stuck and self._wanted(wish.id, start) and asyncio.get_running_loop().time() < ends:
                    line = lines.read(raw, number)
                    try:
                        async with asyncio.timeout(LINE_S):
                            return await lines.answered(serving, line)
                    except TimeoutError:
                        slow = Unavailable("the request took too long", f"It had {LINE_S:g} s.")
                        return lines.failure(line.custom_id, slow)
                    except Unavailable as fault:  # a model that nobody has is waited for, too: its node may start again
                        if fault.retry_after_s + asyncio.get_running_loop().time() >= ends:
                            stuck.append(fault)
                        else:
                            await asyncio.sleep(min(fault.retry_after_s, RETRY_S))
                    except PiclusterError as fault:
                        return lines.failure(line.custom_id, fault)
            return None

        told = await asyncio.gather(*(one(start + number, raw) for number, raw in enumerate(some, 1)))
        done = list(itertools.takewhile(lambda answer: answer is not None, told))
        if not done:
            raise stuck[0] if stuck else Unavailable("no line was answered in time", retry_after_s=RETRY_S)
        return [answer for answer in done if answer is not None]

    def _wanted(self, id: str, start: int) -> bool:
        """Is the step that begins at line `start` still to be done? Not where it was cancelled, or done by another."""
        run = self._journal().runs.get(_run(id))
        return run is not None and run.open and batch.step_of(start) not in run.values()

    async def _finish(self, told: Mapping[str, Any], status: str) -> None:
        """Output and error file from the parts, and the batch's last record. Once done it stays as it is."""
        wish = msgspec.convert({name: told[name] for name in Wish.__struct_fields__}, Wish)
        record, now = await self._shelf.find(wish.id, everywhere=True), int(self._wall())
        if "ended" in record.told:
            return  # a coordinator did it, and fell before it was recorded
        parts = [await self._shelf.find(part) for part in told["parts"]]
        paths = [await self._shelf.open(part) for part in parts]
        missed: Iterable[bytes] = ()
        if status == "expired":
            path = await self._shelf.open(await self._shelf.find(wish.file))
            missed = await asyncio.to_thread(_expired, path, int(told["next"]))
        made = {}
        for kind, good in (("output", True), ("error", False)):
            chosen = _chosen(paths, good, () if good else missed)
            made[f"{kind}_file_id"] = await self._made(wish, kind, chosen, now)
        failed = int(told["failed"]) + (wish.total - int(told["next"]) if status == "expired" else 0)
        ended = {
            "status": status, **made, "finalizing_at": now, f"{status}_at": now,
            "request_counts": {"total": wish.total, "completed": int(told["completed"]), "failed": failed},
        }  # fmt: skip
        after = msgspec.structs.replace(record, told={**record.told, "ended": ended}, version=record.version + 1)
        await self._shelf.keep(after)
        await self._shelf.forget([part.id for part in parts])

    async def _made(self, wish: Wish, kind: str, chosen: Iterator[bytes], now: int) -> str | None:
        sha256, size = await self._shelf.receive(_stream(chosen))
        if not size:
            return None
        record = Record(
            id=f"file-{wish.id}-{kind}", purpose="batch_output", created_at=now, expires_at=now + wish.keep_s,
            sha256=sha256, bytes=size, filename=f"{wish.id}_{kind}.jsonl", owner=wish.owner,
        )  # fmt: skip
        await self._shelf.keep(record)
        return record.id


# whose it is -----------------------------------------------------------------------------------------------------
def owner_name() -> str:
    who = caller.get()
    return who.grant.name if who is not None else ""


def is_ours(record: Record) -> bool:
    """Is it the caller's? Who needs no key sees all."""
    who = caller.get()
    return who is None or record.owner == who.grant.name


def owned(record: Record) -> Record:
    """Raises `NotFound` where it is another key's: that it exists is nobody's business."""
    if not is_ours(record):
        raise NotFound(f"there is no file {record.id!r}", param="id")
    return record


# parts of it -----------------------------------------------------------------------------------------------------
def _run(id: str) -> RunId:
    return run_id(batch.NAME, id)


def _wish(record: Record) -> Wish:
    return msgspec.convert(record.told["wish"], Wish)


def _status(state: str, at: batch.Progress, wish: Wish) -> str:
    if state in ("failed", "cancelled"):
        return "failed" if state == "failed" else "cancelling"
    return "finalizing" if at.next >= wish.total or at.expired else "in_progress"


def _raw_lines(path: Path, most: int = -1) -> Iterator[bytes]:
    """Those that are not empty, each read up to `most` bytes."""
    with path.open("rb") as file:
        while line := file.readline(most):
            if line.strip():
                yield line


def check_file(path: Path, endpoint: str = "") -> tuple[int, set[str]]:
    """As `lines.check`; a file without line breaks is not read whole."""
    return lines.check(_raw_lines(path, lines.LINE_BYTES_MAX + 1), endpoint)


def _slice(path: Path, start: int) -> list[bytes]:
    return list(itertools.islice(_raw_lines(path), start, start + STEP_LINES_MAX))


def _expired(path: Path, start: int) -> list[bytes]:
    rest = enumerate(itertools.islice(_raw_lines(path), start, None), start + 1)
    return [lines.encode(lines.expired(lines.read(raw, number).custom_id)) for number, raw in rest]


def _chosen(paths: Iterable[Path], good: bool, more: Iterable[bytes]) -> Iterator[bytes]:
    for path in paths:
        for raw in _raw_lines(path):
            if lines.is_good(msgspec.json.decode(raw)) is good:
                yield raw
    yield from more


async def _stream(some: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Joined to blocks, and read in a thread: what comes may be read from a card."""
    items = iter(some)
    while block := await asyncio.to_thread(_block, items):
        yield block


def _block(items: Iterator[bytes]) -> bytes:
    block = bytearray()
    for item in items:
        block += item
        if len(block) >= BLOCK_BYTES:
            break
    return bytes(block)
