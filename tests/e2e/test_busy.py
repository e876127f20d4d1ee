"""All boards infer at full load, as long as `PICLUSTER_BUSY_S` says (`make e2e BUSY=600`): nobody is taken for dead.

crowd of chats ──▶ pi-1, pi-2, pi-3 (each with the model)      webhooks ──▶ hub      all are asked: who has failed?
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from piclusterd.demo.sites import Place

from .village import SLOW, Village, ask, states, village

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow_lane, pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(SLOW), reason=SLOW or "-"),
]  # fmt: skip

BUSY_S = float(os.environ.get("PICLUSTER_BUSY_S") or 20.0)
NAMES = ("pi-1", "pi-2", "pi-3")
CROWD = 4
"""Chats under way at each node: more than this machine has cores."""
LONG = "it rains in, and " * 60
"""A prompt that takes time to read; each is another, so that none is remembered."""
WEBHOOK_EVERY_S = 5.0
"""Two writes each: in ten minutes less than half of what a node writes to Linear in an hour."""
LOOK_S = 0.5
BUSY_MIN = 90.0
"""Percent of all cores."""


async def test_boards_at_full_load_bury_nobody_and_keep_their_coordinator(tmp_path: Path) -> None:
    places = tuple(Place(name, cable={}) for name in NAMES)
    async with village(tmp_path, places, with_model=(0, 1, 2)) as home:
        boss = await home.cluster.until(home.cluster.coordinator, "a coordinator", 60)
        term = (await home.picture(boss.name))["term"]
        psutil.cpu_percent()
        async with crowds(home) as answered, home.webhooks(WEBHOOK_EVERY_S):
            looks = await nobody_is_buried(home, BUSY_S)
        load = psutil.cpu_percent()
        seen = await home.picture(boss.name)
        assert (seen["role"], seen["term"]) == ("leader", term), "the coordinator is the same"
        assert load > BUSY_MIN, "the boards were busy"
        assert min(answered.values()) > 0, "and each answered"
        assert await home.audited() == ()
        told = f"{BUSY_S:.0f} s at {load:.0f} % of all cores: {sum(answered.values())} chats, {looks} looks"
        sys.stderr.write(f"{told}, {len(home.promised)} webhooks, term {term} all along\n")


@asynccontextmanager
async def crowds(home: Village) -> AsyncIterator[dict[str, int]]:
    """Chats at every node all the while; how many each answered."""
    answered = dict.fromkeys(NAMES, 0)

    async def visitor(name: str, number: int) -> None:
        asked = 0
        while True:
            asked += 1
            status, _ = await ask(home, name, f"{name} {number} {asked} {LONG}")
            answered[name] += status == 200

    visitors = [asyncio.create_task(visitor(name, number)) for name in NAMES for number in range(CROWD)]
    try:
        yield answered
        assert not any(task.done() for task in visitors), "every request was answered"
    finally:
        for task in visitors:
            task.cancel()
        await asyncio.gather(*visitors, return_exceptions=True)


async def nobody_is_buried(home: Village, seconds: float) -> int:
    """How often all were asked whom they list as failed; each time it was nobody."""
    ends, looks = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        for name in NAMES:
            assert "failed" not in (await states(home, name)).values()
        looks += 1
        await asyncio.sleep(LOOK_S)
    return looks
