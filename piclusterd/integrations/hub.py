"""The coordinator's line to the hub: dials out, takes each webhook, acknowledges what has become durable.

    HubClient                                  hub (forwarder/worker.js)
      GET /connect, bearer       ──►
      hello {node, term, acked}  ──►   ◄── welcome | refused (stale term: this client stops for good)
                                       ◄── hook {seq, ...}     at most 32 in flight
      await deliver(hook)                      True: durable on W ledgers; False or an exception: not
      ack {seq}                  ──►           the contiguous prefix of what was delivered, never more
      nack {seq, retry_after_s}  ──►           the hub sends that one again later
                                       ◄── dead {seq}          it is a dead letter now: do not wait for it
      "ping" every 20 s          ──►   ◄── "pong"

Plain async: it decides nothing. Whether a hook is good, new or worth anything is `deliver`'s business (verify the
provider's signature again, dedupe, append, replicate). Delivery is at least once: after a lost link the hub offers
every unacked row again, also those delivered behind a failed one. hub_frames.py says why the ack may be cumulative.

Its own ping instead of aiohttp's heartbeat: that one closes healthy links after a local stall (the pong is in the
socket's buffer, unread). Here a deadline that was noticed late counts as our own stall and is granted once more.

When the upgrade fails three times in a row (a proxy that eats WebSockets), it pulls over plain HTTP between the
attempts: same outbox, same term fence, delivered in the same way.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from piclusterd.integrations.hub_frames import (
    Complaint,
    Dead,
    Fenced,
    Frame,
    HookFrame,
    HubHook,
    Prefix,
    Pulled,
    Refused,
    Welcome,
    parse,
)

__all__ = ["HubClient", "HubHook", "HubTimings"]

PROTO = 1
WINDOW = 32  # hooks delivered at once; the hub keeps to the same number
FRAME_MAX = 2 * 1024 * 1024  # bytes of one message: a 1 MiB body in base64, its headers, and room
PULL_MAX = 16 * 1024 * 1024  # bytes of one pull: the hub stops at 8 MiB of bodies, base64 adds a third
UPGRADE_TRIES = 3  # failed upgrades in a row before HTTP pull helps out
NO_PONG = 4003  # close code: the hub did not answer our ping

log = logging.getLogger("piclusterd.hub")


@dataclass(frozen=True, slots=True)
class HubTimings:
    """Every wait of the client, in seconds."""

    backoff_first_s: float = 0.2  # a deploy of the Worker drops all links: most come back at once
    backoff_max_s: float = 10.0  # also the longest between two pulls: well inside 100,000 free requests a day
    answer_within_s: float = 15.0  # an upgrade, a welcome or a pull over a home line
    ping_every_s: float = 20.0  # below the shortest NAT timeouts seen (30 s)
    pong_within_s: float = 10.0
    stall_s: float = 1.0  # a deadline noticed this late was our own stall
    deliver_within_s: float = 60.0  # several elections; then the hub shall offer the hook again
    retry_first_s: float = 1.0  # the hub's 20 nacks then span about 15 minutes before a hook is dead
    retry_max_s: float = 60.0


Deliver = Callable[[HubHook], Awaitable[bool]]


class _StaleTerm(Exception):
    def __init__(self, term: int) -> None:
        super().__init__(f"the hub has seen term {term}")
        self.term = term


class _NoLink(Exception):
    """This attempt did not lead to a live link, or the link broke the protocol."""


class HubClient:
    """One coordinator's client, for one term. Make a new one when elected again.

    `deliver(hook)` is awaited for up to 32 hooks at once; True means durable. `on_refused(term)` is called once,
    when the hub has seen a higher term; `run` then returns. `rng` gives the jitter.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        node: str,
        term: int,
        deliver: Deliver,
        on_refused: Callable[[int], None],
        rng: random.Random,
        timings: HubTimings | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._node = node
        self._term = term
        self._deliver = deliver
        self._on_refused = on_refused
        self._rng = rng
        self._timings = timings or HubTimings()
        self._hub = ""  # the outbox that `acked` is about
        self._trouble = ""  # the last complaint
        self._no_upgrade = 0  # upgrades in a row that failed
        self._failures: dict[int, int] = {}  # seq -> failed deliveries, for the growing retry; emptied by acks
        self.acked: int | None = None  # the highest seq acknowledged to this outbox
        self.state = "idle"  # idle, connecting, live, pulling, refused, stopped: for status pages

    async def run(self) -> None:
        """Stay connected until cancelled, or until the hub refuses this term."""
        headers = {"Authorization": f"Bearer {self._token}"}
        patience = aiohttp.ClientTimeout(total=None, sock_connect=self._timings.answer_within_s)
        try:
            async with aiohttp.ClientSession(headers=headers, timeout=patience) as http:
                await self._keep_connected(http)
        except _StaleTerm as refusal:
            self._enter("refused", str(refusal))
            self._on_refused(refusal.term)
        finally:
            if self.state != "refused":
                self._enter("stopped")

    async def _keep_connected(self, http: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        short = 0  # links in a row that did not last
        while True:
            started = loop.time()
            try:
                await self._link(http)
                if self._no_upgrade >= UPGRADE_TRIES:
                    await self._pull_all(http)
            except _NoLink as error:
                self._complain(f"the hub's link ended: {error}")
                self._enter("connecting")
            if self.state == "live":
                self._enter("connecting")
            if loop.time() - started > self._timings.backoff_max_s:
                short = 0
            await asyncio.sleep(self._backoff(short))
            short += 1

    def _backoff(self, short: int) -> float:
        """Full jitter: a hub that comes back must not meet everybody at once."""
        cap = min(self._timings.backoff_max_s, self._timings.backoff_first_s * 2.0 ** min(short, 30))
        return self._rng.uniform(0.0, cap)

    def _enter(self, state: str, why: str = "") -> None:
        if state != self.state:
            log.info("hub %s: %s -> %s %s", self._url, self.state, state, why)
            self.state = state

    def _complain(self, text: str) -> None:
        """A trouble that lasts is written once, not every few seconds for a day: the log is on a flash card."""
        log.log(logging.DEBUG if text == self._trouble else logging.WARNING, "%s", text)
        self._trouble = text

    # --- the WebSocket

    async def _link(self, http: aiohttp.ClientSession) -> None:
        """One link from dialling to its end; a failed upgrade is counted."""
        if self.state != "pulling":
            self._enter("connecting")
        closing = aiohttp.ClientWSTimeout(ws_close=1.0)
        try:
            async with asyncio.timeout(self._timings.answer_within_s):
                ws = await http.ws_connect(
                    f"{self._url}/connect", timeout=closing, heartbeat=None, max_msg_size=FRAME_MAX
                )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._complain(f"the hub refused the upgrade: {str(error) or type(error).__name__}")
            self._no_upgrade += 1
            return
        self._no_upgrade = 0
        link = _Link(self, ws)
        try:
            await self._greet(ws)
            self._enter("live")
            self._trouble = ""
            await link.serve()
        except (OSError, aiohttp.ClientError) as error:
            raise _NoLink(str(error)) from error
        finally:
            await ws.close(code=link.close_code)

    async def _greet(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        hello = {"type": "hello", "proto": PROTO, "node": self._node, "term": self._term, "acked": self.acked}
        await ws.send_json({**hello, "hub": self._hub})
        try:
            message = await ws.receive(timeout=self._timings.answer_within_s)
        except TimeoutError:
            raise _NoLink("no welcome in time") from None
        match parse(message.data if message.type is aiohttp.WSMsgType.TEXT else ""):
            case Welcome(hub=hub):
                self._know(hub)
            case Refused(term=term) if term > self._term:
                raise _StaleTerm(term)
            case Refused(why=why):
                raise _NoLink(f"refused: {why}")
            case _:
                raise _NoLink(f"no welcome but {message.type.name}")

    def _know(self, hub: str) -> None:
        if hub != self._hub:
            self._hub, self.acked = hub, None

    # --- for the link

    @property
    def timings(self) -> HubTimings:
        """Its waits."""
        return self._timings

    async def try_deliver(self, hook: HubHook) -> bool:
        """`deliver`, where an exception or a hung call is a no."""
        try:
            async with asyncio.timeout(self._timings.deliver_within_s):
                done = await self._deliver(hook)
        except Exception as error:
            log.warning("hook %d from %s was not delivered: %r", hook.seq, hook.source, error)
            done = False
        if not done:
            self._failures[hook.seq] = self._failures.get(hook.seq, 0) + 1
        return done

    def retry_after(self, seq: int) -> float:
        """Seconds until the hub shall offer this row again; doubles with each failure."""
        failures = min(self._failures.get(seq, 1), 30)
        return min(self._timings.retry_max_s, self._timings.retry_first_s * 2.0 ** (failures - 1))

    def note_acked(self, seq: int) -> None:
        """Everything up to here has been acknowledged."""
        self.acked = seq
        self._failures = {waiting: n for waiting, n in self._failures.items() if waiting > seq}

    # --- plain HTTP

    async def _pull_all(self, http: aiohttp.ClientSession) -> None:
        """Pull until the outbox is empty or a delivery fails. Raises _StaleTerm, _NoLink."""
        try:
            while await self._pull(http):
                pass
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise _NoLink(f"pull failed: {str(error) or type(error).__name__}") from error

    async def _pull(self, http: aiohttp.ClientSession) -> bool:
        """One pull; True when it brought hooks and all of them were delivered."""
        query = {"max": WINDOW, "term": self._term, "node": self._node}
        answer = await self._call(http, "GET", "/pull", params=query)
        self._enter("pulling")
        hooks = [frame.hook() for frame in msgspec.json.decode(answer, type=Pulled).hooks]
        results = await asyncio.gather(*(self.try_deliver(hook) for hook in hooks))
        failed = next((hook.seq for hook, ok in zip(hooks, results, strict=True) if not ok), None)
        good = [hook.seq for hook in hooks if failed is None or hook.seq < failed]
        if good:
            await self._call(http, "POST", "/ack", json=self._claim(good[-1]))
            self.note_acked(good[-1])
        if failed is not None:
            await self._call(http, "POST", "/nack", json=self._claim(failed) | {"why": "not durable"})
        return bool(hooks) and failed is None

    def _claim(self, seq: int) -> dict[str, Any]:
        return {"seq": seq, "term": self._term, "node": self._node}

    async def _call(self, http: aiohttp.ClientSession, method: str, path: str, **options: Any) -> bytes:
        async with (
            asyncio.timeout(self._timings.answer_within_s),
            http.request(method, f"{self._url}{path}", allow_redirects=False, **options) as answer,
        ):
            body = bytearray()
            async for part in answer.content.iter_any():
                body += part
                if len(body) > PULL_MAX:
                    raise _NoLink(f"{path} answered more than {PULL_MAX} bytes")
            if answer.status == 409:
                raise _StaleTerm(msgspec.json.decode(body, type=Fenced).term)
            if answer.status != 200:
                raise _NoLink(f"{path} answered {answer.status}: {body[:200].decode(errors='replace')}")
            return bytes(body)


class _Link:
    """One live WebSocket: its deliveries in flight and its ping. Leaves no task behind."""

    def __init__(self, client: HubClient, ws: aiohttp.ClientWebSocketResponse) -> None:
        self._client = client
        self._ws = ws
        self._prefix = Prefix()
        self._flying: dict[int, asyncio.Task[None]] = {}
        self._heard = asyncio.Event()
        self.close_code = aiohttp.WSCloseCode.OK.value  # with which our side ends it

    async def serve(self) -> None:
        """Read until the link ends. Raises _NoLink when the hub breaks the protocol."""
        pinger = asyncio.create_task(self._keep_alive())
        try:
            async for message in self._ws:
                self._heard.set()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    raise _NoLink(f"unexpected {message.type.name} message")
                if message.data != "pong":
                    await self._on_frame(parse(message.data))
        finally:
            tasks = [pinger, *self._flying.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        log.info("the hub's link was closed with code %s", self._ws.close_code)

    async def _on_frame(self, frame: Frame | None) -> None:
        match frame:
            case HookFrame():
                self._take(frame.hook())
            case Dead(seq=seq):
                log.error("hook %d is a dead letter now: see GET /dead on the hub", seq)
                if (task := self._flying.pop(seq, None)) is not None:
                    task.cancel()
                await self._ack(self._prefix.dropped(seq))
            case Complaint(error=error):
                log.warning("the hub complains: %s", error)
            case Refused(why=why):
                raise _NoLink(f"refused: {why}")
            case Welcome() | None:
                raise _NoLink("a message that does not belong here")

    def _take(self, hook: HubHook) -> None:
        if hook.seq in self._flying:
            return
        if len(self._flying) >= WINDOW:
            raise _NoLink(f"the hub sent more than {WINDOW} hooks at once")
        self._prefix.offer(hook.seq)
        self._flying[hook.seq] = asyncio.create_task(self._carry(hook))

    async def _carry(self, hook: HubHook) -> None:
        try:
            if await self._client.try_deliver(hook):
                self._flying.pop(hook.seq, None)
                await self._ack(self._prefix.delivered(hook.seq))
            else:
                self._flying.pop(hook.seq, None)
                wait_s = self._client.retry_after(hook.seq)
                nack = {"type": "nack", "seq": hook.seq, "retry_after_s": wait_s, "why": "not durable"}
                await self._ws.send_json(nack)
        except (OSError, aiohttp.ClientError):
            pass  # the link is gone, the reader ends it; the hub offers the hook again on the next one

    async def _ack(self, seq: int | None) -> None:
        if seq is not None:
            await self._ws.send_json({"type": "ack", "seq": seq})
            self._client.note_acked(seq)

    async def _keep_alive(self) -> None:
        timings = self._client.timings
        try:
            while True:
                await asyncio.sleep(timings.ping_every_s)
                self._heard.clear()
                await self._ws.send_str("ping")
                if not await self._hears(timings):
                    log.warning("no pong within %s s", timings.pong_within_s)
                    self.close_code = NO_PONG
                    await self._ws.close(code=NO_PONG)  # wakes the reader, which ends the link and this task
                    return
        except (OSError, aiohttp.ClientError):
            pass  # the reader sees the same

    async def _hears(self, timings: HubTimings) -> bool:
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                async with asyncio.timeout(timings.pong_within_s):
                    await self._heard.wait()
                return True
            except TimeoutError:
                if loop.time() - asked < timings.pong_within_s + timings.stall_s:
                    return False
