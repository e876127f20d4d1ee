"""The coordinator is killed: how long until the next webhook is acknowledged, and is any that was acknowledged lost?

    clients ──webhooks──▶ coordinator, SIGKILL at a random moment
    one more webhook ──attempt every RETRY_S at the survivors in turn──▶ 200       measured from the kill on
    the dead one starts again; at the end every acknowledged webhook is looked for in each ledger's file

Beside it etcd's leader, killed in the same way, with a put instead, by the same client: a new attempt every RETRY_S
whatever became of those before (etcd keeps a put that came without a leader, and answers it seconds later or never).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench import ours
from bench.debian import NoPeer
from bench.etcd import DEFAULT, TUNED, Etcd, Timers
from bench.load import Client, Webhook, connect, put, until_done
from bench.load import Put as PutClient
from bench.report import Report, main, quantile
from piclusterd.demo.cluster import Cluster
from piclusterd.ledger import store
from piclusterd.ledger.database import open_reader

RETRY_S = 0.05
NEXT_S = 60.0
"""Nothing acknowledged for so long counts as so long."""
STREAM_CLIENTS = 4
PAUSE_S = 0.02
"""Between two webhooks of one client: enough that some are under way at the kill."""
ACTIVE_FOR_S = (0.2, 1.2)
"""A coordinator lives for so long after all is well again."""
EQUAL_S = 120.0
P50_MAX_S = {"lan": 1.0, "pi": 6.0}
"""DESIGN §9."""
ETCD_SETTLE_S = 0.5
"""Between a leader of etcd's and its death."""


@dataclass(frozen=True, slots=True)
class Size:
    """Kills of each."""

    lan: int
    pi: int
    etcd: int


QUICK = Size(5, 4, 4)
WHOLE = Size(50, 25, 25)


@dataclass(slots=True)
class Kills:
    """What so many kills gave."""

    took_s: list[float] = field(default_factory=list)
    acked: set[int] = field(default_factory=set)
    lost: int = 0


def measure(report: Report, quick: bool) -> None:
    size = QUICK if quick else WHOLE
    asyncio.run(_preset(report, "lan", size.lan, TUNED, size.etcd))
    asyncio.run(_preset(report, "pi", size.pi, DEFAULT, size.etcd))


async def _preset(report: Report, preset: str, kills: int, timers: Timers, etcd_kills: int) -> None:
    mine = await _in_room(lambda room: _kill_ours(room, preset, kills))
    peer, theirs, why_not = f"etcd, {timers.name}", None, ""
    try:
        theirs = await _in_room(lambda room: _kill_etcd(room, timers, etcd_kills))
    except NoPeer as fault:
        why_not = f" (no etcd: {fault})"
    for part, at_most in ((0.5, P50_MAX_S[preset]), (0.99, None)):
        report.add(
            f"{preset}: coordinator killed to next webhook acknowledged, p{part * 100:.0f} of {kills}{why_not}",
            quantile(mine.took_s, part),
            "s",
            peer=peer if theirs else None,
            peer_value=quantile(theirs.took_s, part) if theirs else None,
            at_most=at_most,
        )
    report.add(f"{preset}: acknowledged and lost, of {len(mine.acked)}", mine.lost, "webhooks", at_most=0)


async def _in_room(run: Callable[[Path], Awaitable[Kills]]) -> Kills:
    with tempfile.TemporaryDirectory(prefix="bench-failover-") as room:
        return await run(Path(room))


# ours --------------------------------------------------------------------------------------------------------------
async def _kill_ours(room: Path, preset: str, kills: int) -> Kills:
    cluster, found, numbers = ours.make(room, preset), Kills(), itertools.count()
    rng = random.Random(1)
    try:
        await cluster.found()
        for _ in range(kills):
            await ours.until_equal(cluster, EQUAL_S)
            await _kill_coordinator(cluster, found, numbers, rng)
        await ours.until_equal(cluster, EQUAL_S)
    finally:
        await cluster.close()
    held = [_events(member.state / "ledger.db") for member in cluster.members]
    found.lost = sum(any(ours.event(number) not in keys for keys in held) for number in found.acked)
    return found


async def _kill_coordinator(cluster: Cluster, found: Kills, numbers: Iterator[int], rng: random.Random) -> None:
    leader = await ours.until_led(cluster)
    streams = [asyncio.create_task(_stream(ours.door(leader), numbers, found.acked)) for _ in range(STREAM_CLIENTS)]
    await asyncio.sleep(rng.uniform(*ACTIVE_FOR_S))
    doors = [ours.door(member) for member in cluster.members if member is not leader]
    number = next(numbers)
    request = ours.hook(number)
    cluster.kill(leader)
    took_s = await until_done(Webhook, doors, request, RETRY_S, NEXT_S)
    if took_s is not None:
        found.acked.add(number)
    found.took_s.append(NEXT_S if took_s is None else took_s)
    await asyncio.gather(*streams)
    await cluster.start(leader)


async def _stream(where: tuple[str, int], numbers: Iterator[int], acked: set[int]) -> None:
    """Webhooks one after another, until the node is dead."""
    with suppress(OSError):
        client: Client = await connect(Webhook, where)
        while True:
            number = next(numbers)
            if await client.request(ours.hook(number)):
                return
            acked.add(number)
            await asyncio.sleep(PAUSE_S)


def _events(path: Path) -> set[str]:
    """The keys of the webhooks in a ledger's file."""
    with closing(open_reader(path)) as conn:
        return {str(fact.body["key"]) for fact in store.facts(conn) if fact.kind == "hook"}


# etcd --------------------------------------------------------------------------------------------------------------
async def _kill_etcd(room: Path, timers: Timers, kills: int) -> Kills:
    etcd, found = Etcd(room, timers), Kills()
    try:
        await etcd.start()
        for number in range(kills):
            leader = await etcd.until_led()
            await asyncio.sleep(ETCD_SETTLE_S)
            doors = [member.client for member in etcd.members if member is not leader]
            etcd.kill(leader)
            request = put(f"after-{number}".encode(), ours.body(number))
            took_s = await until_done(PutClient, doors, request, RETRY_S, NEXT_S)
            found.took_s.append(NEXT_S if took_s is None else took_s)
            assert leader.process is not None
            await leader.process.wait()
            await etcd.start_member(leader)  # whose answer the next look for a leader waits for
    finally:
        await etcd.close()
    return found


if __name__ == "__main__":
    main("failover", measure)
