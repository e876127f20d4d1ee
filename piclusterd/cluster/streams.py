"""Requests and their answers, multiplexed on one link.

    asker   open ──────▶ serve(peer, name, body)      the answer may be `WINDOW_BYTES` ahead of its reader
            ◀── data*    spends credit, waits at 0
            credit ────▶ given back as the reader takes
            ◀── end | reset(error)
            reset ─────▶ the reader left: the server's generator is closed

Both ends count: data beyond its credit and credit beyond the window are faults that end the link. What arrives for a
stream that was just cancelled is ignored.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ..errors import Broken, Overloaded, PiclusterError, Unavailable
from ..ids import NodeId
from ..wire import Dropped
from . import frames
from .frames import CHUNK_BYTES_MAX, RELAY, RELAYED, STREAMS_MAX, WINDOW_BYTES, Frame, Hello, Kind, Request
from .outbox import Lane, Outbox

log = logging.getLogger(__name__)

Serve = Callable[[NodeId, str, bytes], AsyncIterator[bytes]]
"""Answers (peer, request name, body) with chunks; raises a `PiclusterError` that reaches the asker as itself."""

Start = Callable[[Awaitable[None]], asyncio.Task[None]]
"""Runs something for as long as the link lives."""


@dataclass(slots=True)
class _Answer:
    """What has come of an answer we asked for. `held`: bytes received and not yet credited to the sender."""

    chunks: deque[bytes] = field(default_factory=deque)
    held: int = 0
    taken: int = 0
    done: bool = False
    error: PiclusterError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, error: PiclusterError | None) -> None:
        if not self.done:
            self.done, self.error = True, error
            self.changed.set()


@dataclass(slots=True)
class _Serving:
    """An answer we give: the bytes we may still send, and the task that makes it."""

    credit: int = WINDOW_BYTES
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def spend(self, amount: int) -> None:
        while self.credit < amount:
            self.changed.clear()
            await self.changed.wait()
        self.credit -= amount


class Streams:
    def __init__(self, peer: Hello, serve: Serve, outbox: Outbox, start: Start, *, dialled: bool) -> None:
        self._peer, self._serve, self._outbox, self._start = peer, serve, outbox, start
        self._asked: dict[int, _Answer] = {}
        self._served: dict[int, _Serving] = {}
        self._next = 1 if dialled else 2
        self._last_served = 0
        self._over = ""

    def finish(self, why: str) -> None:
        """The link is over: every answer we wait for is `Unavailable`."""
        self._over = why or "it ended"
        for answer in self._asked.values():
            answer.finish(Unavailable(f"the link to {self._peer.name} broke", self._over))

    @property
    def idle(self) -> bool:
        """No answer is on its way, in either direction."""
        return not self._asked and not self._served

    def take(self, frame: Frame) -> str:
        """Act on a frame that is on a stream; the fault in it, if any."""
        match frame.kind:
            case Kind.OPEN:
                return self._opened(frame)
            case Kind.CREDIT:
                return self._credited(frame)
            case Kind.DATA:
                return self._came(frame)
            case Kind.END:
                if answer := self._asked.get(frame.stream):
                    answer.finish(None)
            case Kind.RESET:
                if answer := self._asked.get(frame.stream):
                    answer.finish(frames.decode_reset(frame.body))
                elif (serving := self._served.get(frame.stream)) and serving.task:
                    serving.task.cancel()
            case _:
                return f"{frame.kind.name} on a stream"
        return ""

    # answers we give ---------------------------------------------------------------------------------------------
    def _opened(self, frame: Frame) -> str:
        stream, request = frame.stream, frames.decode_request(frame.body)
        if isinstance(request, Dropped):
            return request.reason
        if stream % 2 == self._next % 2 or stream <= self._last_served:
            return f"opened stream {stream}, which is not its next"
        self._last_served = stream
        if len(self._served) >= STREAMS_MAX:
            fault = Overloaded("this node answers enough already", f"{STREAMS_MAX} streams are open on the link.")
            self._outbox.urge(Frame(stream, Kind.RESET, frames.encode_reset(fault)))
            return ""
        serving = self._served[stream] = _Serving()
        serving.task = self._start(self._answer(stream, request, serving))
        serving.task.add_done_callback(lambda _: self._served.pop(stream, None))
        return ""

    async def _answer(self, stream: int, request: Request, serving: _Serving) -> None:
        last = Frame(stream, Kind.END)
        lane = Lane.RELAYED if request.name in (RELAY, RELAYED) else Lane.BULK
        try:
            async with _closing(self._serve(self._peer.node, request.name, request.body)) as chunks:
                async for chunk in chunks:
                    for start in range(0, len(chunk), CHUNK_BYTES_MAX):
                        piece = chunk[start : start + CHUNK_BYTES_MAX]
                        await serving.spend(len(piece))
                        await self._outbox.put(Frame(stream, Kind.DATA, piece), lane)
        except PiclusterError as fault:
            last = Frame(stream, Kind.RESET, frames.encode_reset(fault))
        except Exception:
            log.exception("answering %r of %s failed", request.name, self._peer.name)
            last = Frame(stream, Kind.RESET, frames.encode_reset(Broken("the answer failed", "see the node's log.")))
        await self._outbox.put(last, lane)

    def _credited(self, frame: Frame) -> str:
        amount = frames.decode_credit(frame.body)
        if isinstance(amount, Dropped):
            return amount.reason
        if serving := self._served.get(frame.stream):
            serving.credit += amount
            serving.changed.set()
            if serving.credit > WINDOW_BYTES:
                return "credit beyond the window"
        return ""

    # answers we asked for ----------------------------------------------------------------------------------------
    async def request(self, name: str, body: bytes, timeout: float) -> AsyncGenerator[bytes, None]:
        """See `Links.request`."""
        if len(self._asked) >= STREAMS_MAX or not self._outbox.has_room_for(len(body)):
            raise Overloaded(f"the link to {self._peer.name} is full", f"{len(self._asked)} streams are open.")
        stream, answer = self._next, _Answer()
        self._next += 2
        self._asked[stream] = answer
        try:
            if not self._outbox.urge(Frame(stream, Kind.OPEN, frames.encode_body(Request(name, body)))):
                raise Unavailable(f"the link to {self._peer.name} is over", self._over)
            while await self._has_more(answer, timeout):
                yield self._next_chunk(stream, answer)
            if answer.error:
                raise answer.error
        finally:
            del self._asked[stream]
            if not answer.done:
                self._outbox.urge(Frame(stream, Kind.RESET))

    async def _has_more(self, answer: _Answer, timeout: float) -> bool:
        while not answer.chunks and not answer.done:
            answer.changed.clear()
            try:
                async with asyncio.timeout(timeout):
                    await answer.changed.wait()
            except TimeoutError:
                raise Unavailable(f"{self._peer.name} does not answer", f"nothing came for {timeout:g} s.") from None
        return bool(answer.chunks)

    def _next_chunk(self, stream: int, answer: _Answer) -> bytes:
        chunk = answer.chunks.popleft()
        answer.taken += len(chunk)
        if answer.taken >= WINDOW_BYTES // 2 and not answer.done:
            self._outbox.urge(Frame(stream, Kind.CREDIT, frames.encode_credit(answer.taken)))
            answer.held -= answer.taken
            answer.taken = 0
        return chunk

    def _came(self, frame: Frame) -> str:
        answer = self._asked.get(frame.stream)
        if answer is None or answer.done:
            return ""  # cancelled here while it was on its way
        answer.held += len(frame.body)
        if not frame.body or answer.held > WINDOW_BYTES:
            return "data beyond its credit" if frame.body else "empty data"
        answer.chunks.append(frame.body)
        answer.changed.set()
        return ""


@asynccontextmanager
async def _closing(chunks: AsyncIterator[bytes]) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """As contextlib.aclosing, for iterators that may not be generators."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
