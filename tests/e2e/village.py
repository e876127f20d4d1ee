"""What the tests in namespaces share: a network with its cluster and webhooks, and the audit of what was promised.

village(places) ── network up ─▶ hub and Linear on the street ─▶ daemons in their namespaces ─▶ … ─▶ all down
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from piclusterd.demo import netns
from piclusterd.demo.cluster import MODEL, DemoFailed, Member
from piclusterd.demo.kill_audit import audit, finished
from piclusterd.demo.outside import World
from piclusterd.demo.sites import Place, SiteCluster, network, seen_from_sites

AGAIN_S = 0.2
EQUAL_S = 60.0
WHY_NOT = netns.why_not()
SLOW = "" if os.environ.get("PICLUSTER_E2E") == "all" else "a slow lane: `make e2e` runs it"


@dataclass(slots=True)
class Village:
    world: World
    cluster: SiteCluster
    promised: set[str] = field(default_factory=set)
    """Issues whose webhook got its 200."""

    @property
    def net(self) -> netns.Network:
        return self.cluster.net

    def member(self, name: str) -> Member:
        return next(member for member in self.cluster.members if member.name == name)

    async def picture(self, name: str) -> dict[str, Any]:
        """What the node says of itself and the others, waited for."""
        seen: dict[str, Any] = await self.cluster.until(
            lambda: self.cluster.status(self.member(name)), f"{name} answers", 10
        )
        return seen

    async def until_sees(self, name: str, state: str, of: str, timeout_s: float = 30.0) -> None:
        """Until `name` lists `of` as `state` ("" for: not at all)."""

        async def sees() -> bool:
            return state == (await states(self, name)).get(of, "")

        await self.cluster.until(sees, f"{name} sees {of} as {state}", timeout_s)

    async def chat(self, name: str, timeout_s: float = 30.0, about: str = "it rains in") -> str:
        """The API of node `name` answers; the node whose model did."""

        async def answered() -> str:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                status, by = await ask(self, name, about)
                return by if status == 200 else ""
            return ""

        by: str = await self.cluster.until(answered, f"{name} answers a chat request", timeout_s)
        return by

    async def promise(self, node: str = "") -> str:
        """One webhook, sent again as Linear does until someone says 200: the hub, or `node`. Its issue."""
        issue, body = self.world.new_issue("Checkout crashes", "500 on every payment")
        url = self.member(node).url if node else None
        while True:
            with contextlib.suppress(DemoFailed, aiohttp.ClientError, TimeoutError):
                await self.world.post(self.cluster.http, body, url)
                self.promised.add(issue)
                return issue
            await asyncio.sleep(AGAIN_S)

    @asynccontextmanager
    async def webhooks(self, every_s: float = 0.3) -> AsyncIterator[None]:
        """Webhooks to the hub all the while."""
        posts: list[asyncio.Task[str]] = []

        async def post() -> None:
            while True:
                posts.append(asyncio.create_task(self.promise()))
                await asyncio.sleep(every_s)

        posting = asyncio.create_task(post())
        try:
            yield
            await asyncio.sleep(every_s)
        finally:
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)
            async with asyncio.timeout(EQUAL_S):
                await asyncio.gather(*posts)

    async def settle(self, timeout_s: float = EQUAL_S) -> float:
        """Until every ledger holds all that was promised, done, and they are equal; seconds that took."""
        began = time.monotonic()
        ledgers = [member.state / "ledger.db" for member in self.cluster.members]

        async def drained() -> bool:
            await asyncio.sleep(0.1)
            return all([await asyncio.to_thread(finished, path, self.promised) for path in ledgers])

        await self.cluster.until(drained, "every promised webhook is triaged, in every ledger", timeout_s)
        await self.cluster.until_equal(timeout_s)
        return time.monotonic() - began

    async def audited(self) -> tuple[str, ...]:
        """Faults: what was promised and not kept, done twice, or differs between the ledgers."""
        await self.settle()
        ledgers = {member.name: member.state / "ledger.db" for member in self.cluster.members}
        found = await asyncio.to_thread(audit, ledgers, sorted(self.promised), self.world.linear)
        return found.faults


async def states(village: Village, name: str) -> dict[str, str]:
    view = await village.picture(name)
    return {member["facts"]["name"]: member["state"] for member in view["members"]}


async def ask(village: Village, name: str, about: str = "it rains in") -> tuple[int, str]:
    """One chat request to node `name`: the status, and who answered."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"Title: {about}"}], "max_tokens": 8}
    async with village.cluster.http.post(f"{village.member(name).url}/v1/chat/completions", json=body) as answer:
        said = json.loads(await answer.text())
        return answer.status, answer.headers.get("X-Picluster-Node", "") if "choices" in said else ""


Prepare = Callable[[Village], Awaitable[None]]


@asynccontextmanager
async def village(
    root: Path, places: tuple[Place, ...], with_model: tuple[int, ...], prepare: Prepare | None = None
) -> AsyncIterator[Village]:
    """All of it up, until left. `prepare` comes before the first daemon: disks, environments."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    sites = 1 + max(place.site or 0 for place in places)
    with network(sites) as net:
        made = Village(World(root, "python"), SiteCluster(root, places=places, with_model=with_model, net=net))
        try:
            await made.world.start()
            made.cluster.outside = seen_from_sites(made.world.told_to_nodes())
            if prepare is not None:
                await prepare(made)
            await made.cluster.found()
            await made.cluster.until_served()
            yield made
        finally:
            await made.cluster.close()
            await made.world.close()
