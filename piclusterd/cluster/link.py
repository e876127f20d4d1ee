"""One link: a WebSocket to one peer after the hellos, with its queues, streams and pulse. `links` owns the many.

    send ──▶ outbox ──▶ socket ⇄ socket ──▶ on_message    (control messages)
    streams ──▶                         ──▶ streams       (requests and answers)

A peer is dead when it was silent for `silent_s` *and* stays so while the loop turns freely once more: a stall of our
own (swap, SD card) leaves its frames unread in the socket and proves nothing (aiohttp's heartbeat gets this wrong).
A frame that is none ends the link with a reason; a control message this release cannot read is dropped and the link
stays, or a rolling upgrade that adds one would cut the cluster apart.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import WSMsgType, web

from .. import wire
from ..ids import NodeId
from ..wire import Dropped, PeerMessage
from . import frames
from .frames import PACK_BYTES_MAX, PING_BYTES, Frame, Hello, Kind
from .outbox import Outbox, lane_of
from .streams import Serve, Streams
from .tunnel import Tunnel

log = logging.getLogger(__name__)

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse | Tunnel

RTT_REFRESH_S = 10.0
"""Ping a busy link this often too, to know its round trip."""
RETIRE_MAX_S = 120.0
"""For an answer that still streams over a retired link."""
CLOSE_S = 1.0
"""How long a goodbye may take."""

# Private close codes (RFC 6455 §7.4.2).
VIOLATION, REFUSED, VERSION, DUPLICATE, GOING_AWAY, SILENT, CONGESTED, TWIN = range(4000, 4008)
REMOVED = "it was removed from the cluster"
"""Why a link was refused or ended, said to whoever it happens to."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. `retire_s`: how long the losing one of two links still delivers what is on its way.

    `direct_first_s`: how long a member is only dialled before a relay is looked for.
    """

    ping_idle_s: float = 1.0
    silent_s: float = 5.0
    hello_s: float = 5.0
    retire_s: float = 2.0
    backoff_first_s: float = 0.2
    backoff_max_s: float = 5.0
    direct_first_s: float = 1.0


TIMINGS = {"pi": Timing(), "lan": Timing(ping_idle_s=0.5, silent_s=2.0)}
"""By `cluster.preset`. A request that was sent to a node just cut off waits so long before it goes elsewhere."""


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`path`: who dialled whom or relays, in words; `rtt_s`: None until measured; `since`: the event loop's clock."""

    path: str
    rtt_s: float | None
    addresses: tuple[str, ...]
    since: float
    name: str
    relayed: bool


class Link:
    def __init__(
        self,
        socket: Socket,
        peer: Hello,
        serve: Serve,
        on_message: Callable[[PeerMessage], Awaitable[None]],
        timing: Timing,
        *,
        dialled: bool,
        path: str,
        relay: NodeId | None = None,
    ) -> None:
        """`relay`: the neighbour it goes through; None: it is a direct one."""
        self.peer, self.dialled, self.path, self.relay = peer, dialled, path, relay
        self.since = self._now()
        self.rtt_s: float | None = None
        self.ended = asyncio.Event()
        """Set by the owner once nobody finds this link any more."""
        self.socket, self._on_message, self._timing = socket, on_message, timing
        self._answered = asyncio.Event()
        self._verdict: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._outbox = Outbox(lambda: self.end(CONGESTED, "it does not take what it is sent"))
        self._streams = Streams(peer, serve, self._outbox, self._start, dialled=dialled)
        self._heard = self.since
        self._retired_at = 0.0
        self._handing = False
        self._ping, self._pinged_at = b"", self.since
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> LinkInfo:
        return LinkInfo(self.path, self.rtt_s, self.peer.addresses, self.since, self.peer.name, self.relay is not None)

    # life --------------------------------------------------------------------------------------------------------
    async def run(self) -> str:
        """Until the link ends; why it did. Requests fail before it returns; `close` must follow."""
        for part in (self._read(), self._write(), self._pulse()):
            self._start(part)
        try:
            await self._verdict
        finally:
            self.end(GOING_AWAY, "this node stops")
            for task in self._tasks:
                task.cancel()
            self._streams.finish(self._verdict.result()[1])
        return self._verdict.result()[1]

    def end(self, code: int, why: str) -> None:
        """Let `run` return. The first reason stands."""
        if not self._verdict.done():
            self._verdict.set_result((code, why))
            self._answered.set()
            self._outbox.shut()

    def retire(self) -> None:
        """Another link took over: deliver what is on its way and let the open streams finish, then end."""
        self._retired_at = self._retired_at or self._now()
        over = self._now() - self._retired_at >= (self._timing.retire_s if self._streams.idle else RETIRE_MAX_S)
        if over:
            self.end(DUPLICATE, "another link is kept")
        elif not self._verdict.done():
            asyncio.get_running_loop().call_later(self._timing.retire_s, self.retire)

    async def close(self) -> None:
        """After `run`: wait for the tasks, then say goodbye if the peer still listens."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        code, why = self._verdict.result()
        await goodbye(self.socket, code, why)

    def _start(self, part: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self._guarded(part))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, part: Awaitable[None]) -> None:
        try:
            await part
        except (ConnectionError, aiohttp.ClientError) as fault:
            self.end(GOING_AWAY, f"{type(fault).__name__}: {fault}")
        except Exception:
            log.exception("the link to %s failed", self.peer.name)
            self.end(aiohttp.WSCloseCode.INTERNAL_ERROR, "an error of ours")

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # out ---------------------------------------------------------------------------------------------------------
    def send(self, message: PeerMessage) -> bool:
        """Queue a control message. False: it will not go, because it is too long or the link is over."""
        body = wire.encode(message)
        if len(body) > wire.MESSAGE_BYTES_MAX:
            log.error("a %s of %d bytes is over the cap and was not sent", type(message).__name__, len(body))
            return False
        return self._outbox.urge(Frame(0, Kind.CONTROL, body), lane_of(message))

    def greet(self, hello: Hello) -> None:
        """The first frame of the accepting side."""
        self._outbox.urge(Frame(0, Kind.HELLO, frames.encode_body(hello)))

    def request(self, name: str, body: bytes, timeout: float) -> AsyncGenerator[bytes, None]:
        """See `Links.request`."""
        return self._streams.request(name, body, timeout)

    async def _write(self) -> None:
        await self.socket.send_bytes(await self._outbox.next())  # alone: it may be the hello
        while True:
            first = await self._outbox.next()
            more = self._outbox.more(PACK_BYTES_MAX - len(first)) if self.peer.packs else ()
            await self.socket.send_bytes(frames.pack((first, *more)))

    async def _pulse(self) -> None:
        timing = self._timing
        tick = min(timing.ping_idle_s, timing.silent_s / 4)
        while True:
            await asyncio.sleep(tick)
            now = self._now()
            if now - self._heard >= timing.silent_s and not self._handing:
                if await self._still_silent(tick):
                    self.end(SILENT, f"silent for {now - self._heard:.1f} s")
            elif now - max(self._heard, self._pinged_at) >= timing.ping_idle_s or now - self._pinged_at > RTT_REFRESH_S:
                self._ask_for_a_sign()

    def _ask_for_a_sign(self) -> None:
        self._ping, self._pinged_at = os.urandom(PING_BYTES), self._now()
        self._outbox.urge(Frame(0, Kind.PING, self._ping))

    async def answers(self) -> bool:
        """Does the peer live? Asked now, and waited for as long as silence is borne."""
        self._answered.clear()
        self._ask_for_a_sign()
        try:
            async with asyncio.timeout(self._timing.silent_s):
                await self._answered.wait()
        except TimeoutError:
            return False
        return not self._verdict.done()

    async def _still_silent(self, tick: float) -> bool:
        """One more ping and a while in which the loop turned freely: what waits in the socket gets its chance."""
        heard, before = self._heard, self._now()
        self._ask_for_a_sign()  # both may have stalled (a paused machine), and neither would speak first
        await asyncio.sleep(tick)
        stalled = self._now() - before > 2 * tick
        return self._heard == heard and not stalled and not self._handing

    # in ----------------------------------------------------------------------------------------------------------
    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message.type is not WSMsgType.BINARY:
                self.end(GOING_AWAY, closing_words(self.socket, message))
                return
            self._heard = self._now()
            if fault := await self._take_all(frames.decode_all(message.data)):
                log.warning("%s broke the protocol of links: %s", self.peer.name, fault)
                self.end(VIOLATION, fault)
                return

    async def _take_all(self, came: list[Frame] | Dropped) -> str:
        if isinstance(came, Dropped):
            return came.reason
        for frame in came:
            if fault := await self._take(frame):
                return fault
        return ""

    async def _take(self, frame: Frame) -> str:
        """Act on one frame; the fault in it, if any."""
        match frame.kind:
            case Kind.HELLO:
                return "a second hello"
            case Kind.CONTROL:
                await self._hand_over(frame.body)
            case Kind.PING:
                self._outbox.urge(Frame(0, Kind.PONG, frame.body))
            case Kind.PONG:
                if frame.body == self._ping:
                    self.rtt_s, self._ping = self._heard - self._pinged_at, b""
                    self._answered.set()
            case Kind.OPEN | Kind.CREDIT | Kind.DATA | Kind.END | Kind.RESET:
                return self._streams.take(frame)
        return ""

    async def _hand_over(self, body: bytes) -> None:
        message = wire.decode(body)
        if isinstance(message, Dropped):
            log.info("dropped a message of %s: %s", self.peer.name, message.reason)
            return
        self._handing = True  # waiting for room in the inbox is our slowness, not the peer's silence
        try:
            await self._on_message(message)
        finally:
            self._handing = False
            self._heard = self._now()


async def goodbye(socket: Socket, code: int, why: str) -> None:
    """Close `socket` within `CLOSE_S`, whatever the peer does."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await socket.close(code=code, message=why.encode()[:120])  # RFC 6455 §5.5: at most 123 bytes
    except (TimeoutError, ConnectionError, RuntimeError, aiohttp.ClientError):
        pass  # it is gone already; the transport is closed with the request


def closing_words(socket: Socket, message: aiohttp.WSMessage) -> str:
    """Why the other side closed, in words."""
    if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED):
        return f"closed by the other side ({socket.close_code}{f' {message.extra!r}' if message.extra else ''})"
    return f"not a frame but a WebSocket {message.type.name} message"
