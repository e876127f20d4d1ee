"""Ten thousand requests of every kind: neither the child nor its caller grows. And what a child held goes with it."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import aclosing

import msgspec
import psutil
import pytest

from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Field, GenerateRequest

from .rig import GREEDY, NAME, collected, pool_of, spec

WHOLE = os.environ.get("PICLUSTER_E2E") == "all"
REQUESTS, WARM, SIDE_BY_SIDE = 10_000, 2_000, 8
"""Until `WARM`, the allocators and caches fill; from there on memory is flat within `DRIFT`."""
DRIFT = 0.05
SCHEMA = '{"type": "object", "properties": {"type": {"enum": ["bug", "chore"]}, "n": {"type": "integer"}}}'
FIELDS = (Field("type", ("bug", "feature", "question")), Field("priority", ("P0", "P1", "P2", "P3")))


async def test_what_a_child_held_goes_with_it() -> None:
    async with pool_of([spec()]) as pool:
        await collected(pool.generate(NAME, GREEDY))
        child = psutil.Process(pool.pid(NAME))
        assert child.memory_info().rss > 0
        await pool.drop(NAME)
        assert not child.is_running()
        assert pool.names == ()


@pytest.mark.slow_lane
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not WHOLE, reason="ten thousand requests take minutes")
async def test_ten_thousand_requests_leave_memory_flat() -> None:
    draw, here = random.Random(1), psutil.Process()
    async with pool_of([spec(slots=SIDE_BY_SIDE)], queue_max=64) as pool:
        child = psutil.Process(pool.pid(NAME))
        await _asked(pool, draw, WARM)
        before = (child.memory_info().rss, here.memory_info().rss)
        await _asked(pool, draw, REQUESTS - WARM)
        after = (child.memory_info().rss, here.memory_info().rss)
        assert pool.pid(NAME) == child.pid, "one child answered all of them"
    print("child and caller, bytes:", before, after)  # noqa: T201
    for first, last in zip(before, after, strict=True):
        assert abs(last - first) <= DRIFT * first


async def _asked(pool: Pool, draw: random.Random, count: int) -> None:
    async def client(share: int) -> None:
        for _ in range(share):
            await _one(pool, draw)

    async with asyncio.TaskGroup() as group:
        for _ in range(SIDE_BY_SIDE):
            group.create_task(client(count // SIDE_BY_SIDE))


async def _one(pool: Pool, draw: random.Random) -> None:
    prompt = f"Title: {draw.getrandbits(64):x}\n\n" + "The editor crashes on save. " * draw.randint(1, 8)
    request = GenerateRequest(prompt=prompt, max_tokens=8, temperature=draw.choice((0.0, 0.9)), seed=1)
    match draw.randrange(5):
        case 0:
            request = msgspec.structs.replace(request, json_schema=SCHEMA, max_tokens=40)
        case 1:
            request = msgspec.structs.replace(request, choices=FIELDS)
        case 2:
            await pool.embed(NAME, [prompt, prompt[::-1]])
            return
        case 3:
            async with aclosing(pool.generate(NAME, request)) as answer:
                await anext(answer)  # and go away
            return
        case _:
            pass
    await collected(pool.generate(NAME, request))
