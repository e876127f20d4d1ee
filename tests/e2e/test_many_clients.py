"""Two hundred clients before one place of one model, on a board with 2 GB: bounded, fair, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import resource
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio

from piclusterd.demo.cluster import Cluster, Member

from .rig import descendants

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

CLIENTS, GREEDY = 200, 20
AT_ONCE = 8
"""Requests that a greedy client has under way; the others have one."""
QUEUE_MAX = 64
LIMIT = 2 * 1024**3
PATIENT = aiohttp.ClientTimeout(total=240)
MODEL = '[[models]]\nname = "one"\npath = "builtin:triage-demo"\ncontext = 1024\nslots = 1\n'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(Path(tmp_path_factory.mktemp("many")), size=1, with_model=(), extra=MODEL)
    try:
        await made.found()
        await made.until_served()
        yield made
    finally:
        await made.close()


class Crowd:
    """Clients, each from an address of its own on loopback, and what they were told."""

    def __init__(self, member: Member) -> None:
        self._url = f"{member.url}/v1/completions"
        self.statuses: Counter[int] = Counter()
        self.retry_after: list[int] = []
        self.answered: Counter[int] = Counter()
        self.waited: dict[bool, list[float]] = {False: [], True: []}
        """Seconds to each answer, of modest and of greedy ones."""
        self.all_modest = asyncio.Event()

    async def client(self, number: int) -> None:
        """Modest ones want one answer; greedy ones go on until every modest one has his."""
        address = (f"127.0.{1 + number // 250}.{1 + number % 250}", 0)
        connector = aiohttp.TCPConnector(local_addr=address, limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=PATIENT) as http:
            if number >= GREEDY:
                while not await self._ask(http, number):
                    pass
                if sum(one >= GREEDY for one in self.answered) == CLIENTS - GREEDY:
                    self.all_modest.set()
                return
            await asyncio.gather(*(self._insist(http, number) for _ in range(AT_ONCE)))

    async def _insist(self, http: aiohttp.ClientSession, number: int) -> None:
        while not self.all_modest.is_set():
            await self._ask(http, number)

    async def _ask(self, http: aiohttp.ClientSession, number: int) -> bool:
        body = {"model": "one", "prompt": f"Title: number {number}", "max_tokens": 2, "temperature": 0}
        async with http.post(self._url, json=body) as answer:
            said = await answer.text()
            assert answer.status in (200, 429), said
            self.statuses[answer.status] += 1
            if answer.status == 200:
                self.answered[number] += 1
                self.waited[number < GREEDY].append(float(answer.headers["X-Picluster-Waited-Seconds"]))
                return True
            self.retry_after.append(int(answer.headers["Retry-After"]))
        await asyncio.sleep(self.retry_after[-1])  # as an honest client does
        return False


def tree(member: Member) -> list[psutil.Process]:
    assert member.process is not None
    return [psutil.Process(member.process.pid), *descendants(member.process.pid)]


async def test_two_hundred_clients_on_one_place_are_served_fairly_within_two_gigabytes(alone: Cluster) -> None:
    (member,) = alone.members
    for process in tree(member):
        process.rlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    before = {process.pid for process in tree(member)}
    crowd = Crowd(member)
    most = [0, 0]

    async def watch() -> None:
        while not crowd.all_modest.is_set():
            view = await alone.status(member)
            assert view is not None, "it answers others meanwhile"
            (model,) = view["members"][0]["facts"]["models"]
            most[0] = max(most[0], model["queued"])
            most[1] = max(most[1], sum(process.memory_info().rss for process in tree(member)))
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for number in range(CLIENTS):
            group.create_task(crowd.client(number))

    assert crowd.statuses[429] > 0
    assert all(1 <= told <= 120 for told in crowd.retry_after)
    assert 0 < most[0] <= QUEUE_MAX
    assert most[1] < LIMIT
    assert {process.pid for process in tree(member)} == before, "nothing died"
    modest, greedy = (max(crowd.waited[kind]) for kind in (False, True))
    told = f"{dict(crowd.statuses)}, queued {most[0]}, {most[1] >> 20} MiB, waited {modest:.2f} s, {greedy:.2f} s"
    print(told)  # noqa: T201
    assert modest <= 1.5 * greedy + 1.0, "in the line, who has one request waits no longer than who has eight"
