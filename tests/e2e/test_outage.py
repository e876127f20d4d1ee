"""A cluster that is away, a hub that dies, and then everybody dies once more: no webhook is lost, none runs twice.

Real workerd where it runs (else the Python hub), three real daemons, SIGKILL only, and a wall clock that is stepped by
an hour 24 times while no node is up; the hub dies at the end of every hour. 300 webhooks; 5,000 where PICLUSTER_E2E=all
is set. The hub's days to live are played on a stepped clock in tests/demo/test_hub_clock.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from piclusterd.demo.cluster import Member
from piclusterd.demo.signing import sign
from piclusterd.folding import fold
from piclusterd.ids import run_id
from piclusterd.integrations.signatures import selftest_secret
from piclusterd.ledger import database, store
from piclusterd.workflows.journal import Journal

from .rig import Rig, running
from .stepped import HOUR_S, SteppedClock

ALL = os.environ.get("PICLUSTER_E2E") == "all"
SIZES = [300, pytest.param(5000, marks=[pytest.mark.slow_lane, pytest.mark.timeout(1800)])]
SENDERS = 4
HOURS = 24
DRAIN_S = 900.0
WINDOW = 32
"""Hooks in flight: how far two may change places when the hand they were in dies."""
WHOLE = "[ledger]\ncheckpoint_entries = 1000000\n"
"""Nothing is ended by a checkpoint, so that the test can count every entry."""

pytestmark = [pytest.mark.e2e]


@dataclass(slots=True)
class Sent:
    """What the hub has answered with 200: id → seq."""

    seqs: dict[str, int] = field(default_factory=dict)


async def send(rig: Rig, ids: list[str], sent: Sent) -> None:
    """Each id once, again where the hub did not answer, as a provider's retry does."""
    secret = selftest_secret(rig.world.hub_token)
    assert rig.world.hub is not None
    url = f"{rig.world.hub.url}/hooks/selftest"
    for id in ids:
        body = json.dumps({"id": id}).encode()
        while id not in sent.seqs:
            try:
                async with rig.cluster.http.post(url, data=body, headers=sign("selftest", body, secret)) as answer:
                    assert answer.status == 200, await answer.text()
                    sent.seqs[id] = (await answer.json())["seq"]
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.05)  # it was killed: its next life is on its way


async def kill_hub(rig: Rig) -> None:
    assert rig.world.hub is not None
    await rig.world.hub.kill()
    await rig.world.start_hub()


async def kill_node(rig: Rig, member: Member) -> None:
    rig.cluster.kill(member)
    assert member.process is not None
    await member.process.wait()


async def kill_cluster(rig: Rig) -> None:
    for member in rig.cluster.members:
        await kill_node(rig, member)


async def start_cluster(rig: Rig) -> None:
    await asyncio.gather(*(rig.cluster.start(member) for member in rig.cluster.members))


async def health(rig: Rig) -> dict[str, Any]:
    assert rig.world.hub is not None
    async with rig.cluster.http.get(f"{rig.world.hub.url}/health") as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def until_left(rig: Rig, count: int) -> None:
    async def few() -> bool:
        return int((await health(rig))["depth"]) <= count

    await rig.cluster.until(few, f"at most {count} webhooks wait at the hub", DRAIN_S)


@pytest.mark.parametrize("count", SIZES)
async def test_webhooks_of_a_day_of_outage_are_drained_in_order_and_each_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    if count > 300 and not ALL:
        pytest.skip("5,000 webhooks: minutes; set PICLUSTER_E2E=all")
    clock = SteppedClock(tmp_path, monkeypatch)
    async with running(tmp_path, hub="auto", with_model=(), extra=WHOLE) as rig:
        await kill_cluster(rig)
        sent = Sent()
        await a_day(rig, clock, count, sent)
        waiting = await health(rig)
        assert waiting["depth"] == count
        assert waiting["oldest_unacked_s"] >= (HOURS - 1) * HOUR_S
        await start_cluster(rig)
        await until_left(rig, count * 3 // 4)
        await kill_hub(rig)
        await until_left(rig, count // 2)
        leader = await rig.cluster.coordinator()
        if leader is not None:
            await kill_node(rig, leader)
            await rig.cluster.start(leader)
        await until_left(rig, count // 4)
        await kill_cluster(rig)
        await start_cluster(rig)
        await until_left(rig, 0)
        await until_closed(rig, count)
        for member in rig.cluster.members:
            check(member.state / "ledger.db", sent)


async def a_day(rig: Rig, clock: SteppedClock, count: int, sent: Sent) -> None:
    """While no node is up: every hour its share of the webhooks, and the hub killed in the middle of it."""
    ids = [f"hook-{number:05}" for number in range(count)]
    for hour in range(HOURS):
        share = ids[count * hour // HOURS : count * (hour + 1) // HOURS]
        enough = len(sent.seqs) + len(share) // 2
        async with asyncio.TaskGroup() as senders:
            for number in range(SENDERS):
                senders.create_task(send(rig, share[number::SENDERS], sent))

            async def half(enough: int = enough) -> bool:
                return len(sent.seqs) >= enough

            await rig.cluster.until(half, f"half of hour {hour}'s webhooks are stored", DRAIN_S)
            await kill_hub(rig)
        clock.step(HOUR_S)


async def until_closed(rig: Rig, count: int) -> None:
    """Every node's ledger is the same and holds no open run."""

    async def closed() -> bool:
        views = await rig.cluster.views()
        same = len(views) == 3 and len({view["digest"] for view in views}) == 1
        return same and not _read(rig.cluster.members[0].state / "ledger.db")[0].open_runs()

    await rig.cluster.until(closed, f"all ledgers hold {count} closed runs", DRAIN_S)


def _read(path: Path) -> tuple[Journal, list[tuple[tuple[object, ...], str, str]]]:
    """The fold of a ledger, and its webhooks as (order, id, key), in the cluster's order."""
    journal, hooks = Journal(), []
    with closing(database.open_reader(path)) as conn:
        for fact in store.facts(conn):
            fold(journal, (fact,))
            if fact.kind == "hook":
                hooks.append((tuple(fact.order), str(json.loads(fact.body["body"])["id"]), str(fact.body["key"])))
    return journal, sorted(hooks, key=lambda hook: hook[0])


def check(path: Path, sent: Sent) -> None:
    journal, hooks = _read(path)
    keys = {id: key for _, id, key in hooks}
    assert keys.keys() == sent.seqs.keys(), "what was answered with 200 is in the ledger, and nothing else"
    runs = [journal.runs[run_id("selftest", key)] for key in keys.values()]
    assert Counter(run.done[1] if run.done else "open" for run in runs) == {"done": len(keys)}
    assert len(journal.runs) == len(keys), "one run a webhook"
    first = list(dict.fromkeys(id for _, id, _ in hooks))
    places = [place for place, _ in sorted(enumerate(first), key=lambda pair: sent.seqs[pair[1]])]
    late = max(itertools.accumulate(places, max)) - len(places) + 1
    moved = max(abs(place - number) for number, place in enumerate(places))
    assert (late, moved < WINDOW) == (0, True), f"drained in order; the furthest moved by {moved}"
