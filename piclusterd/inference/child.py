"""The pool's end of one child process: started, spoken to, and certainly ended.

    start ──process, Load──▶ Ready ──call(Generate)──▶ Delta*, Done      any moment ──death──▶ every call: Unavailable

A child that has something to do and says nothing for `hang_s` is taken for hung, and killed.
It owns the socket and pairs answers with callers by id. How the process comes to be and ends is `process`'s.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from ..errors import PiclusterError, Unavailable, UserError
from ..wire import Dropped
from .faults import raised
from .models import ModelSpec, Parts
from .process import EXIT_GRACE_S, Activated, Process, Spawned
from .protocol import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    Cancel,
    Classified,
    Classify,
    Delta,
    Done,
    Embed,
    Embedded,
    Failed,
    Frame,
    Generate,
    GenerateRequest,
    Load,
    LoadFailed,
    Ready,
    decode,
    framed,
)
from .states import AnyFromChild, Export, Exported, Import, Imported, Look, Looked, Part, Piece, Take

HANG_S = 120.0
"""A busy child speaks every second between steps. The longest step is a pack of embeddings on a slow board."""


class LoadFault(PiclusterError):
    """The child looked at the file and refused it: trying again would not help."""


class ChildDied(Unavailable):
    """The child is gone. What it was doing is lost; nothing else changed."""


class Child:
    """One running child. Make it with `start`."""

    def __init__(self, name: str, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._name = name
        self._process = process
        self._reader, self._writer = reader, writer
        self._calls: dict[int, asyncio.Queue[AnyFromChild | PiclusterError]] = {}
        self._last_id = 0
        self._dead: ChildDied | None = None
        self._listening: asyncio.Task[None] | None = None
        self._hang_s = HANG_S
        self._silence: asyncio.Timeout | None = None
        self._doom = ""

    @classmethod
    async def start(
        cls,
        spec: ModelSpec,
        timeout_s: float,
        worker_socket: Path | None = None,
        hang_s: float = HANG_S,
        others: int = 0,
        measure: bool = False,
    ) -> tuple[Child, Ready]:
        """A child with the model loaded; from systemd where `worker_socket` is there, else a process of our own.

        Raises `LoadFault` where the file is refused, `ChildDied` where the child ended or took over `timeout_s`.
        """
        child = await cls._begin(spec, worker_socket)
        child._hang_s = hang_s
        try:
            async with asyncio.timeout(timeout_s):
                first = await child._load(spec, others, measure)
        except TimeoutError:
            await child.close(grace_s=0)
            raise ChildDied(f"loading {spec.name} took over {timeout_s:g} s") from None
        except BaseException:
            await child.close(grace_s=0)
            raise
        child._listening = asyncio.create_task(child._listen(), name=f"child of {spec.name}")
        return child, first

    @classmethod
    async def _begin(cls, spec: ModelSpec, worker_socket: Path | None) -> Child:
        try:
            if worker_socket is not None:
                try:
                    return cls(spec.name, Activated(), *await asyncio.open_unix_connection(worker_socket))
                except FileNotFoundError:
                    pass  # its unit is not installed, or not started
            return cls(spec.name, *await Spawned.start(alone=spec.parts is not None))
        except OSError as fault:
            raise ChildDied(f"no process for {spec.name} can be started", f"{fault}.") from None

    async def _load(self, spec: ModelSpec, others: int, measure: bool) -> Ready:
        asked = (spec.context, spec.slots, spec.threads, spec.batch_threads, others, spec.kind, spec.task, measure)
        adapter = str(spec.adapter) if spec.adapter is not None else ""
        load = Load(str(spec.path), *asked, adapter, spec.scale, max(0, spec.drafts), spec.shares, spec.apart)
        if spec.parts is None:
            self._send(load)
        else:
            await self._send_with(load, spec.parts)
        try:
            first = await self._receive()
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ChildDied(f"the process that loads {self._name} died", await self._epitaph()) from None
        if isinstance(first, LoadFailed):
            raise LoadFault(f"{self._name} cannot be loaded", first.why)
        assert isinstance(first, Ready), "a child answers Load first"
        return first

    async def _send_with(self, load: Load, parts: Parts) -> None:
        """The first frame, together with the sockets that lead to the parts."""
        try:
            sockets = await parts.open()
        except PiclusterError as fault:
            raise LoadFault(f"{self._name} cannot be split", str(fault)) from None
        try:
            with socket.socket(fileno=os.dup(self._writer.get_extra_info("socket").fileno())) as ours:
                socket.send_fds(ours, [framed(load)], [each.fileno() for each in sockets])
        except ConnectionError:
            pass  # `_receive` finds out why
        finally:
            for each in sockets:
                each.close()

    @property
    def pid(self) -> int | None:
        """None where systemd started it."""
        return self._process.pid

    async def died(self) -> ChildDied:
        """Returns once the child is gone, with why."""
        assert self._listening is not None
        await asyncio.shield(self._listening)
        assert self._dead is not None
        return self._dead

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta | Done, None]:
        """The answer as it comes, ending with `Done`. Closing the generator cancels the request.

        Raises the child's `PiclusterError`, or `ChildDied`.
        """
        number, answers = self._open_call()
        done = False
        try:
            self._send(Generate(number, request))
            while not done:
                frame = await self._answer(answers)
                assert isinstance(frame, Delta | Done), "a completion is answered by Delta and Done"
                done = isinstance(frame, Done)
                yield frame
        except PiclusterError:
            done = True
            raise
        finally:
            self._close_call(number, cancel=not done)

    async def embed(self, texts: tuple[str, ...]) -> Embedded:
        """One vector a text. Raises the child's `PiclusterError`, or `ChildDied`."""
        frame = await self._call(lambda number: Embed(number, texts))
        assert isinstance(frame, Embedded), "texts to embed are answered by Embedded"
        return frame

    async def classify(self, texts: tuple[str, ...]) -> Classified:
        """The labels of each text. Raises the child's `PiclusterError`, or `ChildDied`."""
        frame = await self._call(lambda number: Classify(number, texts))
        assert isinstance(frame, Classified), "texts to classify are answered by Classified"
        return frame

    # states of beginnings: see `states` ---------------------------------------------------------------------------
    async def look(self, request: GenerateRequest) -> Looked:
        """The prompt of `request` as the model reads it, and how much of it the memory holds."""
        frame = await self._call(lambda number: Look(number, request))
        assert isinstance(frame, Looked), "a look is answered by what was seen"
        return frame

    async def export(self, tokens: bytes, least: int, bytes_max: int) -> Exported:
        """A state, kept for `take` until `let_go` of its id. Raises `NotFound` where there is none such."""
        frame = await self._call(lambda number: Export(number, tokens, least, bytes_max))
        assert isinstance(frame, Exported), "an export is answered by what was exported"
        return frame

    async def take(self, of: int, at: int) -> bytes:
        """The next bytes, from `at` on, of what was exported under the id `of`."""
        frame = await self._call(lambda number: Take(number, of, at))
        assert isinstance(frame, Piece), "a piece was asked for"
        return frame.data

    def berth(self) -> int:
        """The id of a state that is to come in by `part`, until `moor` or `let_go`."""
        self._last_id += 1
        return self._last_id

    async def part(self, number: int, size: int, data: bytes) -> None:
        """The next bytes of a state of `size`; returns once the child has taken up most of what it was sent."""
        if self._dead is not None:
            raise self._dead
        self._send(Part(number, size, data))
        await self._writer.drain()

    async def moor(self, number: int, tokens: bytes, sha256: bytes) -> None:
        """All parts are there: they are the state of `tokens`. Raises `UserError` where the child does not think so."""
        frame = await self._call(lambda _: Import(number, tokens, sha256), number)
        assert isinstance(frame, Imported), "an import is answered when it is in"

    def let_go(self, number: int) -> None:
        """Nothing more is wanted of the state under this id."""
        if self._dead is None:
            self._send(Cancel(number))

    async def _call(self, asked: Callable[[int], Frame], number: int = 0) -> AnyFromChild:
        number, answers = self._open_call(number)
        done = False
        try:
            self._send(asked(number))
            frame = await self._answer(answers)
            done = True
        finally:
            self._close_call(number, cancel=not done)
        return frame

    def _open_call(self, number: int = 0) -> tuple[int, asyncio.Queue[AnyFromChild | PiclusterError]]:
        if self._dead is not None:
            raise self._dead
        number = number or self.berth()
        # Bounded by the tokens of one answer, at most the model's context.
        self._calls[number] = asyncio.Queue()
        self._expect()
        return number, self._calls[number]

    def _close_call(self, number: int, cancel: bool) -> None:
        del self._calls[number]
        self._expect()
        if cancel and self._dead is None:
            self._send(Cancel(number))

    def _expect(self) -> None:
        """From now on a frame must come within `hang_s`, while there is a call."""
        if self._silence is not None and not self._silence.expired():
            now = asyncio.get_running_loop().time()
            self._silence.reschedule(now + self._hang_s if self._calls else None)

    async def _answer(self, answers: asyncio.Queue[AnyFromChild | PiclusterError]) -> AnyFromChild:
        frame = await answers.get()
        if isinstance(frame, PiclusterError):
            raise frame
        if isinstance(frame, Failed):
            raise raised(frame)
        return frame

    def _send(self, frame: Frame) -> None:
        data = framed(frame)
        if len(data) > FRAME_BYTES_MAX:
            raise UserError("the request is too large", f"It has over {FRAME_BYTES_MAX // 2**20} MiB.")
        self._writer.write(data)  # no drain: the pool sends a few requests at a time, each capped

    async def _receive(self) -> AnyFromChild:
        length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
        if length > FRAME_BYTES_MAX:
            raise ConnectionError("a frame over the cap")
        frame: AnyFromChild | Dropped = decode(await self._reader.readexactly(length), AnyFromChild)
        if isinstance(frame, Dropped):
            raise ConnectionError(frame.reason)
        return frame

    async def _listen(self) -> None:
        """Hand answers to their callers until the child is gone; then tell them all."""
        try:
            async with asyncio.timeout(None) as self._silence:
                while True:
                    frame = await self._receive()
                    self._expect()
                    call = self._calls.get(getattr(frame, "id", 0))
                    if call is not None:  # else it was cancelled meanwhile, or is a Beat
                        call.put_nowait(frame)
        except TimeoutError:
            await self._end(grace_s=0)
            why = f"It had said nothing for {self._hang_s:g} s."
        except (asyncio.IncompleteReadError, ConnectionError):
            why = await self._epitaph()
        self._silence = None
        self._dead = ChildDied(f"the process of {self._name} died", why, "It is being started again.")
        if self._doom:
            self._dead = ChildDied(f"{self._name} has lost a part", self._doom)
        for call in self._calls.values():
            call.put_nowait(self._dead)

    async def _epitaph(self) -> str:
        """How the child ended; it is made to end if it has only stopped talking."""
        await self._end(EXIT_GRACE_S)
        return self._process.epitaph()

    async def _end(self, grace_s: float) -> None:
        self._writer.close()
        await self._process.end(grace_s)

    def doom(self, why: str) -> None:
        """It cannot go on without what it lost: however it ends now, this is why."""
        self._doom = self._doom or why

    async def close(self, grace_s: float = EXIT_GRACE_S) -> None:
        """End the child and wait until it is gone; running calls get `ChildDied`."""
        await self._end(grace_s)
        if self._listening is not None:
            await self._listening
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass
