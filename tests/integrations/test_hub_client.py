"""HubClient against the hub for machines without workerd: a real process, real sockets.

A `Desk` stands where the ledger will: it notes each delivery and answers as the test says. Its `wait` and `taken` are
events, so nothing here sleeps. The last tests meet a hub that misbehaves, played by a few lines of aiohttp.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from piclusterd.integrations.hub import HubClient, HubHook, HubTimings
from piclusterd.integrations.hub_frames import Prefix
from piclusterd.integrations.signatures import verify
from tests.integrations.rig import SECRETS, TOKEN, WAIT_S, Rig, fresh

pytestmark = pytest.mark.e2e

QUICK = HubTimings(backoff_first_s=0.01, backoff_max_s=0.05, retry_first_s=0.01, retry_max_s=0.05)


class Desk:
    """Takes deliveries. `answer` decides; `seqs` remembers every call in order."""

    def __init__(self, answer: Callable[[HubHook], Awaitable[bool]] | None = None) -> None:
        self.hooks: list[HubHook] = []
        self.refused: list[int] = []
        self._answer = answer
        self._changed = asyncio.Event()

    @property
    def seqs(self) -> list[int]:
        return [hook.seq for hook in self.hooks]

    async def deliver(self, hook: HubHook) -> bool:
        self.hooks.append(hook)
        self._changed.set()
        return True if self._answer is None else await self._answer(hook)

    async def taken(self, count: int) -> list[int]:
        """Wait until so many deliveries were begun."""
        async with asyncio.timeout(WAIT_S):
            while len(self.hooks) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.seqs

    def client(self, url: str, *, node: str = "pi-1", term: int = 1, timings: HubTimings = QUICK) -> HubClient:
        return HubClient(
            url, TOKEN, node=node, term=term, deliver=self.deliver, on_refused=self.refused.append,
            rng=random.Random(7), timings=timings,
        )  # fmt: skip


@asynccontextmanager
async def running(client: HubClient) -> AsyncIterator[asyncio.Task[None]]:
    """The client's loop, cancelled at the end; it must leave no task of its own behind."""
    task = asyncio.create_task(client.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = [str(task.get_coro()) for task in asyncio.all_tasks() if not task.done()]
        assert [coro for coro in left if "_Link." in coro or "HubClient." in coro] == []


async def test_hooks_are_delivered_as_they_were_signed_and_acknowledged(python_hub: Rig) -> None:
    body = fresh(title="one")
    await python_hub.post("linear", body, delivery="d1")
    desk = Desk()
    client = desk.client(python_hub.url)
    async with running(client):
        await python_hub.until(depth=0, connected="pi-1", term=1)
        await python_hub.accept(5)
        await python_hub.until(depth=0)
        assert (desk.seqs, client.acked, client.state) == ([1, 2, 3, 4, 5, 6], 6, "live")
    [hook, *_] = desk.hooks
    assert (hook.source, hook.delivery, hook.stale, hook.body) == ("linear", "d1", False, body)
    assert verify(hook.source, hook.headers, hook.body, [SECRETS["linear"]]).ok
    assert client.state == "stopped"


async def test_acks_never_pass_a_delivery_that_still_runs(python_hub: Rig) -> None:
    gate = asyncio.Event()

    async def answer(hook: HubHook) -> bool:
        if hook.seq == 3:
            await gate.wait()
        return True

    await python_hub.accept(40)
    desk = Desk(answer)
    client = desk.client(python_hub.url)
    async with running(client):
        await desk.taken(34)  # 32, and 2 more once the hub had the ack for 1 and 2
        await python_hub.until(depth=38)
        assert client.acked == 2
        gate.set()
        await python_hub.until(depth=0)
    assert desk.seqs == list(range(1, 41))


async def test_32_deliveries_run_at_once_and_no_more(python_hub: Rig) -> None:
    gate, running_now, most = asyncio.Event(), 0, 0

    async def answer(_: HubHook) -> bool:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        await gate.wait()
        running_now -= 1
        return True

    await python_hub.accept(50)
    desk = Desk(answer)
    async with running(desk.client(python_hub.url)):
        await desk.taken(32)
        gate.set()
        await python_hub.until(depth=0)
    assert most == 32


async def test_a_failed_delivery_is_nacked_and_comes_again(python_hub: Rig) -> None:
    failures = {2: 2, 4: 1}

    async def answer(hook: HubHook) -> bool:
        if failures.get(hook.seq, 0) > 0:
            failures[hook.seq] -= 1
            if hook.seq == 4:
                raise OSError("disk full")
            return False
        return True

    await python_hub.accept(5)
    desk = Desk(answer)
    client = desk.client(python_hub.url)
    async with running(client):
        await python_hub.until(depth=0)
    assert sorted(desk.seqs) == [1, 2, 2, 2, 3, 4, 4, 5]
    assert client.acked == 5


async def test_a_delivery_that_hangs_counts_as_failed(python_hub: Rig) -> None:
    async def answer(_: HubHook) -> bool:
        if len(desk.hooks) == 1:
            await asyncio.Event().wait()
        return True

    await python_hub.accept(1)
    desk = Desk(answer)
    timings = HubTimings(deliver_within_s=0.05, retry_first_s=0.01)
    async with running(desk.client(python_hub.url, timings=timings)):
        await python_hub.until(depth=0)
    assert desk.seqs == [1, 1]


async def test_a_dead_letter_does_not_hold_up_the_acks_behind_it(python_hub: Rig) -> None:
    await python_hub.kill()
    await python_hub.start(HUB_NACK_LIMIT="2")

    async def answer(hook: HubHook) -> bool:
        return hook.seq != 1

    await python_hub.accept(40)
    desk = Desk(answer)
    async with running(desk.client(python_hub.url)):
        await python_hub.until(depth=0, dead=1)
    assert desk.seqs.count(1) == 2


async def test_it_comes_back_after_the_hub_was_killed_and_takes_what_was_not_acknowledged(python_hub: Rig) -> None:
    gate = asyncio.Event()

    async def answer(hook: HubHook) -> bool:
        if hook.seq > 2:
            await gate.wait()
        return True

    await python_hub.accept(4)
    desk = Desk(answer)
    async with running(desk.client(python_hub.url)):
        await desk.taken(4)
        await python_hub.until(depth=2)
        await python_hub.kill()
        gate.set()
        await python_hub.start()
        await python_hub.until(depth=0, connected="pi-1")
        await python_hub.accept(1)
        await python_hub.until(depth=0)
    assert set(desk.seqs) == {1, 2, 3, 4, 5}
    assert desk.seqs.count(1) == 1


async def test_a_stale_term_stops_it_for_good(python_hub: Rig) -> None:
    newer, older = Desk(), Desk()
    async with running(newer.client(python_hub.url, node="pi-2", term=5)):
        await python_hub.until(connected="pi-2")
        client = older.client(python_hub.url, term=4)
        async with asyncio.timeout(WAIT_S):
            await client.run()
        assert (older.refused, client.state) == ([5], "refused")
        await python_hub.until(connected="pi-2")
    assert newer.refused == []


async def test_a_new_coordinator_takes_over_and_the_old_one_learns_it(python_hub: Rig) -> None:
    held = asyncio.Event()

    async def answer(_: HubHook) -> bool:
        await held.wait()
        return True

    await python_hub.accept(3)
    old, new = Desk(answer), Desk()
    async with running(old.client(python_hub.url, term=1)) as task:
        await old.taken(3)
        async with running(new.client(python_hub.url, node="pi-2", term=2)):
            async with asyncio.timeout(WAIT_S):
                await task
            await python_hub.until(depth=0, connected="pi-2", term=2)
    assert (old.refused, new.seqs) == ([2], [1, 2, 3])


# --- hubs that are not as they should be


@asynccontextmanager
async def pretender(
    connect: Callable[[web.Request], Awaitable[web.StreamResponse]], onward: str = "", port: int = 0
) -> AsyncIterator[str]:
    """An aiohttp server: /connect is the test's, everything else goes on to the real hub. Gives its URL."""

    async def forward(request: web.Request) -> web.StreamResponse:
        headers = {"Authorization": request.headers["Authorization"]}
        data = await request.read() or None
        async with (
            aiohttp.ClientSession() as http,
            http.request(request.method, onward + str(request.rel_url), headers=headers, data=data) as got,
        ):
            return web.Response(status=got.status, body=await got.read(), content_type="application/json")

    app = web.Application()
    app.add_routes([web.get("/connect", connect), web.route("*", "/{path:.*}", forward)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def no_upgrade(_: web.Request) -> web.StreamResponse:
    return web.Response(status=502, text="this proxy knows no WebSockets")


async def test_where_websockets_do_not_pass_it_pulls(python_hub: Rig) -> None:
    failures = {34: 1}

    async def answer(hook: HubHook) -> bool:
        failures[hook.seq] = failures.get(hook.seq, 0) - 1
        return failures[hook.seq] < 0

    await python_hub.accept(40)
    desk = Desk(answer)
    async with pretender(no_upgrade, python_hub.url) as url:
        client = desk.client(url)
        async with running(client):
            await python_hub.until(depth=0, connected=None, term=1)
            assert client.state == "pulling"
            await python_hub.accept(1, start=40)
            await python_hub.until(depth=0)
    assert set(desk.seqs) == set(range(1, 42))
    assert desk.seqs[:33] == [*range(1, 33), 33]
    assert desk.seqs.count(34) == 2


async def test_it_returns_to_the_websocket_as_soon_as_that_works(python_hub: Rig) -> None:
    refusals = 0

    async def connect(request: web.Request) -> web.StreamResponse:
        nonlocal refusals
        refusals += 1
        if refusals <= 4:
            return await no_upgrade(request)
        return await relay(request, python_hub.url)

    desk = Desk()
    async with pretender(connect, python_hub.url) as url, running(desk.client(url)):
        await python_hub.until(connected="pi-1")
        await python_hub.accept(1)
        await python_hub.until(depth=0)
    assert refusals == 5


async def relay(request: web.Request, url: str) -> web.StreamResponse:
    """A proxy that does know WebSockets."""
    near = web.WebSocketResponse()
    await near.prepare(request)
    headers = {"Authorization": request.headers["Authorization"]}
    async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/connect", headers=headers) as far:

        async def back() -> None:
            async for message in far:
                await near.send_str(message.data)

        answers = asyncio.create_task(back())
        async for message in near:
            await far.send_str(message.data)
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)
    return near


async def test_a_stale_term_stops_the_pulling_too(python_hub: Rig) -> None:
    assert (await python_hub.call("GET", "/pull?term=9&node=b"))[0] == 200
    desk = Desk()
    async with pretender(no_upgrade, python_hub.url) as url, asyncio.timeout(WAIT_S):
        await desk.client(url).run()
    assert desk.refused == [9]


class Script:
    """Plays a hub on /connect: `lines` are sent after each hello; what the client said and how it closed is kept."""

    def __init__(self, *lines: Any, after_ack: str | None = None, pongs: bool = True) -> None:
        self.lines, self.after_ack, self.pongs = lines, after_ack, pongs
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.closes: asyncio.Queue[int | None] = asyncio.Queue()
        self.pings: asyncio.Queue[None] = asyncio.Queue()

    async def connect(self, request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse(timeout=0.2)
        await ws.prepare(request)
        async for message in ws:
            if message.data == "ping":
                self.pings.put_nowait(None)
                if self.pongs:
                    await ws.send_str("pong")
                continue
            said = json.loads(message.data)
            await self.heard.put(said)
            for line in self.lines if said["type"] == "hello" else ():
                await ws.send_str(line if isinstance(line, str) else json.dumps(line))
            if said["type"] == "ack" and self.after_ack is not None:
                await ws.send_str(self.after_ack)
        await self.closes.put(ws.close_code)
        return ws

    async def pinged(self, times: int) -> None:
        for _ in range(times):
            await self.pings.get()

    async def next(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            said: dict[str, Any] = await self.heard.get()
        assert said["type"] == kind, said
        return said


WELCOME = {"type": "welcome", "proto": 1, "pending": 0, "window": 32, "hub": "h1"}


def frame(seq: int) -> dict[str, Any]:
    plain = {"source": "linear", "delivery": "", "received_ms": 1, "stale": False, "headers": {}, "body": "e30="}
    return {"type": "hook", "seq": seq, **plain}


async def test_a_silent_hub_is_left_and_dialled_again() -> None:
    script = Script(WELCOME, pongs=False)
    timings = HubTimings(backoff_first_s=0.01, ping_every_s=0.02, pong_within_s=0.05)
    async with pretender(script.connect) as url, running(Desk().client(url, timings=timings)):
        await script.next("hello")
        await script.next("hello")
        async with asyncio.timeout(WAIT_S):
            assert await script.closes.get() == 4003


async def test_a_hub_that_answers_pings_is_not_left() -> None:
    script = Script(WELCOME)
    timings = HubTimings(ping_every_s=0.001, pong_within_s=WAIT_S)
    async with pretender(script.connect) as url:
        client = Desk().client(url, timings=timings)
        async with running(client), asyncio.timeout(WAIT_S):
            await script.pinged(50)
            assert client.state == "live"
    assert (script.heard.qsize(), script.closes.qsize()) == (1, 1)  # one hello, one close: ours, at the end


async def test_its_hello_names_the_outbox_that_its_cursor_is_about() -> None:
    script = Script(WELCOME, frame(7), after_ack="not json")
    async with pretender(script.connect) as url, running(Desk().client(url)):
        first = await script.next("hello")
        assert await script.next("ack") == {"type": "ack", "seq": 7}
        second = await script.next("hello")
    assert (first["proto"], first["node"], first["term"], first["acked"], first["hub"]) == (1, "pi-1", 1, None, "")
    assert (second["acked"], second["hub"]) == (7, "h1")


async def test_another_outbox_makes_the_cursor_void() -> None:
    script = Script(WELCOME, frame(7), after_ack="not json")
    async with pretender(script.connect) as url, running(Desk().client(url)):
        for _ in ("hello", "ack"):
            await script.heard.get()
        script.lines = ({**WELCOME, "hub": "h2"}, "not json")
        assert (await script.next("hello"))["acked"] == 7
        fresh_start = await script.next("hello")
    assert (fresh_start["acked"], fresh_start["hub"]) == (None, "h2")


@pytest.mark.parametrize(
    "lines",
    [["not json"], [WELCOME, "not json"], [WELCOME, {"type": "hook", "seq": "1"}], [WELCOME, WELCOME],
     [{"type": "refused", "why": "malformed hello", "term": 0}], [WELCOME, *(frame(n) for n in range(1, 34))]],
    ids=["no welcome", "junk", "bad hook", "two welcomes", "refused", "window"],
)  # fmt: skip
async def test_a_hub_that_breaks_the_protocol_is_left_and_dialled_again(lines: list[Any]) -> None:
    async def never(_: HubHook) -> bool:
        return await asyncio.Event().wait()

    script, desk = Script(*lines), Desk(never)
    async with pretender(script.connect) as url, running(desk.client(url)) as task:
        for _ in range(3):
            await script.next("hello")
        assert not task.done()
    assert desk.refused == []


async def test_a_wrong_token_or_no_hub_at_all_is_tried_again_and_again(python_hub: Rig) -> None:
    timings = HubTimings(backoff_first_s=0.001, backoff_max_s=0.01)
    client = HubClient(
        python_hub.url, "wrong", node="a", term=1, deliver=Desk().deliver, on_refused=print, rng=random.Random(1),
        timings=timings,
    )  # fmt: skip
    async with running(client) as task:
        for _ in range(50):
            await python_hub.health()
        assert (task.done(), client.state) == (False, "connecting")
        await python_hub.kill()
        reached = asyncio.Event()

        async def connect(_: web.Request) -> web.StreamResponse:
            reached.set()
            return web.Response(status=503)

        async with pretender(connect, port=python_hub.port), asyncio.timeout(WAIT_S):
            await reached.wait()


def test_the_backoff_is_full_jitter_up_to_ten_seconds() -> None:
    client = Desk().client("http://hub", timings=HubTimings())
    draws = {short: [client._backoff(short) for _ in range(500)] for short in (0, 1, 3, 50)}
    for short, cap in {0: 0.2, 1: 0.4, 3: 1.6, 50: 10.0}.items():
        assert 0 <= min(draws[short]) < 0.1 * cap
        assert 0.9 * cap < max(draws[short]) <= cap


def test_a_prefix_reaches_as_far_as_nothing_is_missing() -> None:
    prefix = Prefix()
    for seq in (3, 5, 9, 12):
        prefix.offer(seq)
    assert prefix.delivered(5) is None
    assert prefix.delivered(3) == 5
    assert prefix.delivered(12) is None
    prefix.offer(9)  # sent again: it keeps its place
    assert prefix.dropped(9) == 12
    assert prefix.dropped(9) is None
    assert prefix.delivered(99) is None
