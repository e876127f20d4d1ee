"""How long a webhook takes from its sender to W disks, and how fast a cluster catches up after an outage.

    sender ──POST──▶ hub (real workerd where it runs) ──▶ coordinator ──▶ 2 of 3 ledgers, fsynced ──▶ "hook" event

Three daemons and the hub on one machine, one disk: each of the 2 copies costs an fsync of the same device, so a real
cluster is faster. Linear events that start no run, 2 KB each, so that the path alone is measured. Latency: one sender,
one webhook after another. Drain: the cluster is down, the hub collects, the cluster is started; from the first row
acknowledged until none is left, which is until each is on two disks. No peer does this; the rows have none.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.report import Report, main, quantile
from piclusterd.demo.cluster import Cluster
from piclusterd.demo.outside import World

HOOKS, HOOKS_QUICK = 1000, 200
BACKLOG, BACKLOG_QUICK = 2000, 500
PADDING = 1800
"""Characters: a Linear event of an issue has about 2 KB."""
WARM = 10
SENDERS = 8
PATIENCE_S = 300.0


def measure(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="picluster-bench-") as scratch:
        asyncio.run(_measure(report, Path(scratch), quick))


async def _measure(report: Report, root: Path, quick: bool) -> None:
    world, cluster = World(root), Cluster(root, with_model=())
    try:
        await world.start()
        cluster.outside = world.told_to_nodes()
        await cluster.found()
        await cluster.until(cluster.coordinator, "a coordinator", 60)
        await _latency(report, world, cluster, HOOKS_QUICK if quick else HOOKS)
        await _drain(report, world, cluster, BACKLOG_QUICK if quick else BACKLOG)
    finally:
        await cluster.close()
        await world.close()


def _body(number: int) -> bytes:
    event = {"type": "Reaction", "action": "create", "data": {"id": f"r{number}", "text": "x" * PADDING}}
    return json.dumps({**event, "webhookTimestamp": int(time.time() * 1000)}).encode()


async def _latency(report: Report, world: World, cluster: Cluster, count: int) -> None:
    stored, durable, arrived = [], [], asyncio.Queue[tuple[int, float]]()
    leader = await cluster.coordinator()
    assert leader is not None
    follower = asyncio.create_task(_follow(cluster.http, leader.url, arrived))
    try:
        for number in range(-WARM, count):
            began = time.perf_counter()
            seq = (await world.post(cluster.http, _body(number)))["seq"]
            answered = time.perf_counter()
            while (told := await asyncio.wait_for(arrived.get(), PATIENCE_S))[0] != seq:
                pass
            if number >= 0:
                stored.append(answered - began)
                durable.append(told[1] - began)
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
    for what, seconds in (("POST to the hub's 200", stored), ("POST to durable on 2 of 3 ledgers", durable)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            report.add(f"{what}, {name} ({world.kind})", quantile(seconds, share) * 1000, "ms")


async def _follow(http: aiohttp.ClientSession, url: str, arrived: asyncio.Queue[tuple[int, float]]) -> None:
    """(seq, when) of each webhook that the coordinator calls durable."""
    limits = aiohttp.ClientTimeout(total=None)
    async with http.get(f"{url}/events?format=jsonl", timeout=limits) as stream:
        async for line in stream.content:
            event: dict[str, Any] = json.loads(line) if line.startswith(b"{") else {}
            if event.get("kind") == "hook":
                await arrived.put((event["data"]["seq"], time.perf_counter()))


async def _drain(report: Report, world: World, cluster: Cluster, backlog: int) -> None:
    for member in cluster.members:
        await cluster.stop(member)

    async def send(numbers: range) -> None:
        for number in numbers:
            await world.post(cluster.http, _body(number))

    offset = 1_000_000
    began = time.perf_counter()
    await asyncio.gather(*(send(range(offset + start, offset + backlog, SENDERS)) for start in range(SENDERS)))
    report.add(
        "hub takes webhooks from 8 senders",
        backlog / (time.perf_counter() - began),
        "webhooks/s",
        larger_is_better=True,
    )
    started = time.perf_counter()
    await asyncio.gather(*(cluster.start(member) for member in cluster.members))
    first, last = await _emptied(world, cluster.http, backlog)
    report.add(f"drain of {backlog} after an outage", backlog / (last - first), "webhooks/s", larger_is_better=True)
    report.add("cluster started to the first webhook acknowledged", first - started, "s")
    report.add(f"cluster started to all {backlog} acknowledged", last - started, "s")


async def _emptied(world: World, http: aiohttp.ClientSession, backlog: int) -> tuple[float, float]:
    """When the first rows left the hub, and the last."""
    assert world.hub is not None
    first = 0.0
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"{world.hub.url}/health") as answer:
                depth = (await answer.json())["depth"]
            now = time.perf_counter()
            if depth < backlog and not first:
                first = now
            if not depth:
                return first, now
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    main("webhooks", measure)
