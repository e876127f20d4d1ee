"""The sockets of the hub for machines without workerd: one coordinator's link, its window, its retries, its terms.

    hello {term} ──► fence ──► welcome, rows from the first unacked one, in order          (older sockets: close 4000)
              lower term ──► refused + close 4001
    ack {seq} ──► rows <= seq leave, the window moves        nack {seq, retry_after_s} ──► alarm ──► that row again
                                                             the HUB_NACK_LIMITth      ──► dead {seq}

Owns the links and the one alarm; at most one link is `current`, and only that one is heard. Each link has a queue and a
task that empties it, so everything here is synchronous and happens in one order, as in the Durable Object. Nothing is
queued for a client before the outbox has committed what it says.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from piclusterd.demo.hub_checks import TEXT_MAX, Refusal, is_count, is_plain, reason_of
from piclusterd.demo.hub_hints import Hints
from piclusterd.demo.hub_outbox import FLIGHT_MAX, WINDOW, Outbox
from piclusterd.integrations.signatures import body_object

PROTO = 1
MESSAGE_MAX = 4096  # bytes from the client; acks are tiny
SOCKETS_MAX = 16  # the current one, those being superseded, and a few lost ones
RETRY_MAX_S = 3600.0  # a nack may not park a row for longer
RETRY_DEFAULT_S = 5.0
SWEEP_MS = 3_600_000  # hourly is plenty for limits counted in days
CLOSE_WAIT_S = 1.0  # for the peer's half of a closing handshake; it may be gone
SUPERSEDED, STALE, PROTOCOL, TOO_BIG, GOING_AWAY = 4000, 4001, 4002, 1009, 1001


class Timer(Protocol):
    def cancel(self) -> object: ...


class Clock:
    """The wall's. A test that plays a day of outage brings its own."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return int(time.time() * 1000)

    def call_at(self, ms: float, ring: Callable[[], None]) -> Timer:
        """Ring once, at `ms` or soon after."""
        return asyncio.get_running_loop().call_later(max(0.0, ms / 1000 - time.time()), ring)


@dataclass(slots=True, eq=False)
class Link:
    """One socket as the hub sees it: what still has to go out, and how far it has been served."""

    out: asyncio.Queue[str | tuple[int, str]] = field(default_factory=asyncio.Queue)  # filled within the window only
    current: bool = False
    node: str = ""
    over: bool = False  # we have closed it; what was on its way does not count, not even a hello
    cursor: int = 0  # the highest seq pushed on this socket

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; it leaves after what stands before it."""
        self.out.put_nowait(json.dumps(message))

    def close(self, code: int, why: str) -> None:
        """Queue a close."""
        self.current, self.over = False, True
        self.out.put_nowait((code, why))


class Sockets:
    """The links, and what happens on them."""

    def __init__(self, outbox: Outbox, ttl_ms: int, clock: Clock, hints: Hints) -> None:
        self._outbox = outbox
        self._ttl_ms = ttl_ms
        self._clock = clock
        self._hints = hints
        self._hinting: asyncio.Task[None] | None = None
        self._links: list[Link] = []
        self._alarm: Timer | None = None
        self._alarm_ms = math.inf

    def start(self) -> None:
        """Sweep once and set the alarm."""
        self._on_alarm()

    def stop(self) -> None:
        """Say goodbye to every link."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._hinting is not None:
            self._hinting.cancel()
        for link in self._links:
            link.close(GOING_AWAY, "the hub is stopping")

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One link from its upgrade to its end."""
        if len(self._links) >= SOCKETS_MAX:
            raise Refusal(503, "too many sockets", f"{SOCKETS_MAX} are open", "close some")
        ws = web.WebSocketResponse(max_msg_size=MESSAGE_MAX, timeout=CLOSE_WAIT_S, compress=False)
        await ws.prepare(request)
        link = Link()
        self._links.append(link)
        writer = asyncio.create_task(_write(ws, link))
        try:
            async for message in ws:
                self._on_message(link, message.type, message.data)
        finally:
            self._links.remove(link)
            if link.current:
                self.note_here()
            if link.over:  # the reader wakes first when we close: the close frame must still go out
                await asyncio.wait([writer], timeout=2 * CLOSE_WAIT_S)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        return ws

    # --- terms

    def fence(self, term: int) -> None:
        """Lower terms are refused; a newer one is persisted and the sockets of older ones are closed."""
        highest = self._outbox.term
        if term < highest:
            why = f"term {highest} was seen, you are at {term}"
            raise Refusal(409, "stale term", why, "stop: another coordinator leads", term=highest)
        if term > highest:
            self._outbox.set_meta("term", term)
            self._supersede()

    def _supersede(self, spare: Link | None = None) -> None:
        for link in self._links:
            if link.current and link is not spare:
                link.close(SUPERSEDED, "superseded")

    def note_here(self) -> None:
        """A coordinator is here: decides when the model at the edge may help."""
        self._outbox.set_meta("here_ms", self._clock.now_ms())

    # --- messages

    def _on_message(self, link: Link, kind: WSMsgType, text: object) -> None:
        if link.over:
            return None
        if kind is not WSMsgType.TEXT or not isinstance(text, str):
            return link.close(TOO_BIG, "message too large or not text")
        if text == "ping":
            return link.out.put_nowait("pong")
        message = body_object(text.encode("utf-8", "replace"))
        kind_of, seq = message.get("type"), message.get("seq")
        if kind_of == "hello":
            return self._hello(link, message)
        if not link.current:
            return None  # superseded, or no hello yet: it has no say
        if is_count(seq) and seq <= link.cursor and kind_of == "ack":
            return self.acked(seq)
        if is_count(seq) and seq <= link.cursor and kind_of == "nack":
            return self._nacked(seq, message)
        why = "unknown type, or a seq that was never handed out"
        error = {"what": "message ignored", "why": why, "fix": "see worker.js, protocol v1"}
        return link.send({"type": "error", "error": error})

    def _hello(self, link: Link, message: dict[str, Any]) -> None:
        node, term, acked = message.get("node"), message.get("term"), message.get("acked")
        if message.get("proto") != PROTO or not is_plain(node, TEXT_MAX) or not is_count(term):
            return self._refuse(link, PROTOCOL, f"malformed hello; this hub speaks proto {PROTO}")
        try:
            self.fence(term)
        except Refusal:
            return self._refuse(link, STALE, "stale term")
        self._supersede(spare=link)
        here = self._outbox.hub_id
        if message.get("hub") == here and is_count(acked):
            self._outbox.ack_to(acked, self._clock.now_ms())
        self._outbox.clear_retries()
        link.current, link.node, link.cursor = True, node, 0
        self.note_here()
        pending = self._outbox.depth()
        link.send({"type": "welcome", "proto": PROTO, "pending": pending, "window": WINDOW, "hub": here})
        return self.push()

    def _refuse(self, link: Link, code: int, why: str) -> None:
        link.send({"type": "refused", "why": why, "term": self._outbox.term})
        link.close(code, why)

    def current(self) -> Link | None:
        """The link that is heard."""
        return next((link for link in self._links if link.current), None)

    def acked(self, seq: int) -> None:
        """A cumulative ack, from whichever door."""
        self._outbox.ack_to(seq, self._clock.now_ms())
        self.push()

    def _nacked(self, seq: int, message: dict[str, Any]) -> None:
        if self._outbox.waits(seq):
            return
        outcome = self._outbox.nack(seq, reason_of(message.get("why")), self._clock.now_ms())
        if outcome is None:
            return
        if outcome.dead:
            self.tell_dead([seq])
            return
        wait_s = message.get("retry_after_s")
        if not isinstance(wait_s, int | float) or isinstance(wait_s, bool) or not wait_s >= 0:
            wait_s = RETRY_DEFAULT_S
        due = math.ceil(self._clock.now_ms() + min(wait_s, RETRY_MAX_S) * 1000)
        self._outbox.retry_at(seq, due)
        self.wake_by(due)

    def tell_dead(self, seqs: list[int]) -> None:
        """These rows are dead letters now: the client shall not wait for them."""
        link = self.current()
        for seq in seqs:
            if link is not None and seq <= link.cursor:
                link.send({"type": "dead", "seq": seq})
        self.push()

    def push(self) -> None:
        """Rows above the socket's cursor, in order, as far as the window reaches."""
        link = self.current()
        if link is None:
            return
        flying, size = self._outbox.in_flight(link.cursor)
        for frame in self._outbox.frames(above=link.cursor, limit=max(0, WINDOW - flying), room=FLIGHT_MAX - size):
            link.cursor = frame["seq"]
            link.send(frame)

    # --- time: one alarm for retries, the sweep and the model

    def wake_for_hints(self) -> None:
        """Let the alarm ring when the model has something to look at."""
        if self.current() is None:
            self.wake_by(self._hints.due(self._clock.now_ms()))

    def wake_by(self, ms: float) -> None:
        """Let the alarm ring at `ms` at the latest."""
        if ms >= self._alarm_ms:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_ms = ms
        self._alarm = self._clock.call_at(ms, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm_ms = math.inf
        try:
            expired = self._outbox.sweep(self._clock.now_ms(), self._ttl_ms)
            if expired:
                self.tell_dead(expired)
            link = self.current()
            for frame in self._outbox.take_due(self._clock.now_ms()):
                if link is not None:
                    link.send(frame)
            if link is None and self._hints.due(self._clock.now_ms()) <= self._clock.now_ms():
                self._hinting = asyncio.get_running_loop().create_task(self._hints.classify(self._clock.now_ms()))
                self._hinting.add_done_callback(lambda _: self.wake_for_hints())
        finally:
            self.wake_for_hints()
            retry = self._outbox.next_retry()
            self.wake_by(min(self._clock.now_ms() + SWEEP_MS, math.inf if retry is None else retry))


async def _write(ws: web.WebSocketResponse, link: Link) -> None:
    """Empty one link's queue into its socket; ends with the close."""
    try:
        while True:
            match await link.out.get():
                case str() as text:
                    await ws.send_str(text)
                case (code, why):
                    await ws.close(code=code, message=why.encode())
                    return
    except ConnectionError:
        pass  # the reader sees the same broken socket and ends the link
