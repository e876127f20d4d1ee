"""A day of outage at the hub on a stepped clock: hourly alarms, a crash in the middle, the drain, and the days to live.

The hub is the Python one in this process, its sockets and its file real; only its clock is the test's. What its file
survives is shown with real processes in tests/e2e/test_outage.py and tests/integrations/test_hub_contract.py.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from piclusterd.demo.hub_double import Hub
from piclusterd.demo.hub_outbox import Outbox
from piclusterd.demo.hub_socket import Clock
from piclusterd.demo.signing import sign
from piclusterd.integrations.hub import HubClient
from piclusterd.integrations.hub_frames import HubHook

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
NOON_MS = 1_790_000_000_000
TOKEN, SECRET = "hub-token", "linear-secret"
ENV = {"HUB_TOKEN": TOKEN, "LINEAR_SECRET": SECRET, "HUB_TTL_DAYS": "14"}
COUNT = 5000 if os.environ.get("PICLUSTER_E2E") == "all" else 300


class Ring:
    """One timer of the stepped clock."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.ring, self.off = ring, False

    def cancel(self) -> None:
        self.off = True


class SteppedClock(Clock):
    """Stands still until it is stepped; rings what falls due on the way, in order."""

    def __init__(self) -> None:
        self.ms = float(NOON_MS)
        self.rung = 0
        self._due: list[tuple[float, int, Ring]] = []
        self._numbers = itertools.count()

    def now_ms(self) -> int:
        return int(self.ms)

    def call_at(self, ms: float, ring: Callable[[], None]) -> Ring:
        timer = Ring(ring)
        heapq.heappush(self._due, (ms, next(self._numbers), timer))
        return timer

    def step(self, ms: float) -> None:
        ends = self.ms + ms
        while self._due and self._due[0][0] <= ends:
            due, _, timer = heapq.heappop(self._due)
            if not timer.off:
                self.ms = max(self.ms, due)
                self.rung += 1
                timer.ring()
        self.ms = ends


@asynccontextmanager
async def serving(path: Path, clock: SteppedClock) -> AsyncIterator[str]:
    """The hub on the outbox in `path`; its URL."""
    outbox = Outbox(path, nack_limit=20)
    runner = web.AppRunner(Hub(outbox, ENV, clock).app(), shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
        outbox.close()


async def post(http: aiohttp.ClientSession, url: str, clock: SteppedClock, number: int) -> None:
    body = json.dumps({"n": number, "webhookTimestamp": clock.now_ms()}).encode()
    async with http.post(f"{url}/hooks/linear", data=body, headers=sign("linear", body, SECRET)) as answer:
        assert answer.status == 200, await answer.text()


async def health(http: aiohttp.ClientSession, url: str) -> dict[str, object]:
    async with http.get(f"{url}/health") as answer:
        found: dict[str, object] = await answer.json()
        return found


async def drain(url: str, count: int) -> list[HubHook]:
    """What a real client is given until `count` hooks are there."""
    found: list[HubHook] = []
    enough = asyncio.Event()

    async def deliver(hook: HubHook) -> bool:
        found.append(hook)
        if len(found) >= count:
            enough.set()
        return True

    client = HubClient(
        url, TOKEN, node="pi-1", term=1, deliver=deliver, on_refused=lambda term: None, rng=random.Random(1)
    )
    running = asyncio.create_task(client.run())
    try:
        async with asyncio.timeout(120):
            await enough.wait()
            async with aiohttp.ClientSession() as http:
                while (await health(http, url))["depth"]:
                    pass
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return found


async def test_a_day_of_webhooks_waits_and_is_drained_in_order(tmp_path: Path) -> None:
    clock, path = SteppedClock(), tmp_path / "hub.sqlite"
    half = COUNT // 2
    async with aiohttp.ClientSession() as http:
        for numbers in (range(half), range(half, COUNT)):  # another hub in between, on the same file
            async with serving(path, clock) as url:
                for number in numbers:
                    await post(http, url, clock, number)
                    clock.step(DAY_MS / COUNT)
        assert clock.now_ms() - NOON_MS >= DAY_MS - 1000
        assert clock.rung >= 23, "the hourly alarm rang"
        async with serving(path, clock) as url:
            seen = await health(http, url)
            assert (seen["depth"], seen["dead"]) == (COUNT, 0)
            assert float(str(seen["oldest_unacked_s"])) >= 86_000
            hooks = await drain(url, COUNT)
    assert [json.loads(hook.body)["n"] for hook in hooks] == list(range(COUNT))
    assert not any(hook.stale for hook in hooks), "freshness is judged when they arrive, not when they leave"


async def test_a_hook_lives_fourteen_days_and_is_a_dead_letter_then(tmp_path: Path) -> None:
    clock = SteppedClock()
    async with aiohttp.ClientSession() as http, serving(tmp_path / "hub.sqlite", clock) as url:
        await post(http, url, clock, 1)
        clock.step(14 * DAY_MS - HOUR_MS)
        assert [(await health(http, url))[name] for name in ("depth", "dead")] == [1, 0]
        clock.step(3 * HOUR_MS)
        assert [(await health(http, url))[name] for name in ("depth", "dead")] == [0, 1]
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with http.post(f"{url}/dead/1/replay", headers=headers) as answer:
            assert answer.status == 200
        [hook] = await drain(url, 1)
        assert json.loads(hook.body)["n"] == 1
        clock.step(6 * DAY_MS)
        assert (await health(http, url))["depth"] == 0


@pytest.mark.parametrize("days", [6, 8])
async def test_a_redelivery_is_known_for_seven_days_and_refused_from_then_on(tmp_path: Path, days: int) -> None:
    clock = SteppedClock()
    body = json.dumps({"webhookTimestamp": clock.now_ms()}).encode()
    async with aiohttp.ClientSession() as http, serving(tmp_path / "hub.sqlite", clock) as url:
        headers = sign("linear", body, SECRET)
        async with http.post(f"{url}/hooks/linear", data=body, headers=headers) as answer:
            assert (await answer.json())["duplicate"] is False
        await drain(url, 1)
        clock.step(days * DAY_MS)
        async with http.post(f"{url}/hooks/linear", data=body, headers=headers) as answer:
            answered = await answer.json()
            assert answered.get("duplicate") is (True if days < 7 else None), answered
            assert answer.status == (200 if days < 7 else 401)
