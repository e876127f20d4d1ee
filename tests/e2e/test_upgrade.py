"""A rolling upgrade of three real nodes under traffic: nobody is refused, and a broken release goes back by itself."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from piclusterd import __version__
from piclusterd.demo.cloudflare_double import ACCOUNT, CloudflareDouble
from piclusterd.demo.cluster import MODEL
from piclusterd.demo.github_double import HOOK_ID, REPOSITORY, GitHubDouble
from piclusterd.demo.outside import World
from piclusterd.ids import RunId, run_id
from piclusterd.ledger import trail

from .kept import KeptCluster, wheel
from .rig import recorded

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

GOOD, BROKEN = "0.2.0", "0.3.0"
ROLLED_S = 240.0
SHA = "a" * 40


def breaks(tree: Path) -> None:
    """Its daemon ends as soon as it is to serve; it still says its version."""
    daemon = tree / "piclusterd" / "daemon.py"
    daemon.write_text(daemon.read_text().replace("    async def start(self)", "    async def began(self)", 1))


@dataclass(slots=True)
class House:
    world: World
    cluster: KeptCluster
    github: GitHubDouble
    cloudflare: CloudflareDouble
    asked: int = 0
    failed: list[str] = field(default_factory=list)
    promised: list[str] = field(default_factory=list)

    async def releases(self) -> dict[str, str]:
        """What each alive node says that it runs, as the first node hears it."""
        view = await self.cluster.status(self.cluster.members[0])
        members = view["members"] if view else []
        return {one["facts"]["name"]: one["facts"]["release"] for one in members if one["state"] == "alive"}

    async def ended(self, run: RunId) -> str:
        """How the run ended, as the first node's ledger tells; "" while it goes on."""
        path = self.cluster.members[0].state / "ledger.db"
        facts = await asyncio.to_thread(trail.speaking_of, path, (run,))
        return next((f"{fact.body['outcome']}: {fact.body['detail']}" for fact in facts if fact.kind == "run.done"), "")

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Chat at every node in turn and webhooks at the hub, each over a connection of its own, until left."""
        tasks = [asyncio.create_task(self._chat(n)) for n in range(3)] + [asyncio.create_task(self._hooks())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _chat(self, first: int) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Title: it rains in"}], "max_tokens": 8}
        for number in itertools.count(first):
            member = self.cluster.members[number % 3]
            await asyncio.shield(self._one(f"{member.url}/v1/chat/completions", body))
            await asyncio.sleep(0.1)

    async def _one(self, url: str, body: dict[str, Any]) -> None:
        self.asked += 1
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
                http.post(url, json=body, headers={"Connection": "close"}) as answer,
            ):
                said = await answer.text()
                if answer.status != 200 or "choices" not in said:
                    self.failed.append(f"{url}: {answer.status} {said[:200]}")
        except (aiohttp.ClientError, TimeoutError) as fault:
            self.failed.append(f"{url}: {fault!r}")

    async def _hooks(self) -> None:
        for number in itertools.count():
            identifier, body = self.world.new_issue(f"Issue {number}", "Nothing answers.")
            await asyncio.shield(self.world.post(self.cluster.http, body))
            self.promised.append(identifier)
            await asyncio.sleep(2.0)


@asynccontextmanager
async def house(root: Path) -> AsyncIterator[House]:
    source = root / "source"
    (root / "nodes").mkdir()
    base = await asyncio.to_thread(wheel, source, root, __version__)
    async with GitHubDouble() as github, CloudflareDouble() as cloudflare:
        (root / "gh").write_text(github.key)
        (root / "cf").write_text(cloudflare.key)
        extra = (
            f'[upgrade]\nsource = "{source}"\ngate_s = 20.0\nsettle_s = 1.0\ndrain_s = 20.0\n'
            f'[github]\nurl = "{github.url}"\ntoken_file = "{root / "gh"}"\nhook = "{REPOSITORY}/{HOOK_ID}"\n'
            f'[deploy]\nmode = "auto"\nrepository = "{REPOSITORY}"\ncloudflare_account = "{ACCOUNT}"\n'
            f'cloudflare_token_file = "{root / "cf"}"\ncloudflare_url = "{cloudflare.url}"\n'
        )
        world = World(root)
        cluster = KeptCluster(root / "nodes", extra=extra, source=source, release=base)
        try:
            await world.start()
            cluster.outside = world.told_to_nodes()
            await cluster.found()
            await cluster.until_served()
            yield House(world, cluster, github, cloudflare)
        finally:
            await cluster.close()
            await world.close()


def workflow_run(**changes: Any) -> dict[str, Any]:
    told = {
        "id": 7, "path": ".github/workflows/ci.yml", "event": "push", "status": "completed", "conclusion": "success",
        "head_branch": "main", "head_sha": SHA, "head_repository": {"full_name": REPOSITORY, "fork": False},
    }  # fmt: skip
    return told | changes


async def from_github(house: House, **changes: Any) -> RunId:
    """The id that its run has, where it makes one."""
    event = {"action": "completed", "workflow_run": workflow_run(**changes)}
    event["repository"] = {"full_name": REPOSITORY, "default_branch": "main", "fork": False}
    body = json.dumps(event).encode()
    await house.world.post(house.cluster.http, body, source="github", event="workflow_run")
    return run_id("deploy", f"github:{hashlib.sha256(body).hexdigest()}")


async def picluster(house: House, *words: str) -> tuple[int, str]:
    """The client on the second node, to its end."""
    socket = str(house.cluster.members[1].state / "api.sock")
    command = [sys.executable, "-m", "piclusterd.cli.main", "--socket", socket, *words]
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(ROLLED_S):
            out, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return child.returncode or 0, out.decode()


async def test_three_nodes_change_their_release_under_traffic_and_a_broken_one_goes_back(tmp_path: Path) -> None:
    async with house(tmp_path) as home:
        await asyncio.to_thread(wheel, tmp_path / "source", tmp_path, GOOD)
        home.github.runs[7] = workflow_run()
        stranger = await from_github(home, head_repository={"full_name": "stranger/house", "fork": True})
        async with home.traffic():
            run = await from_github(home)
            end = await home.cluster.until(lambda: home.ended(run), "the rolling upgrade", ROLLED_S)
            assert end == f"done: 3 nodes now run {GOOD}; hub uploaded"
            assert await home.releases() == dict.fromkeys(("pi-1", "pi-2", "pi-3"), GOOD)
            steps = list(await recorded(home.cluster, run))
            turns = [step.removeprefix("node-") for step in steps if step.startswith("node-")]
            assert sorted(turns) == ["pi-1", "pi-2", "pi-3"]
            each = [f"{what}-{name}" for name in turns for what in ("leave", "node")]
            assert steps == ["confirm", "look", *each, "hub"]
            assert home.failed == []
            good = home.asked

            await asyncio.to_thread(wheel, tmp_path / "source", tmp_path, BROKEN, breaks)
            code, out = await picluster(home, "upgrade", "--rolling")
            assert code == 1, out
            assert "rolled-back" in out
            assert "nobody else was touched" in out
            await home.cluster.until_served()
            assert await home.releases() == dict.fromkeys(("pi-1", "pi-2", "pi-3"), GOOD)
        assert home.failed == []
        sys.stderr.write(f"\n{good} requests over the good upgrade, {home.asked} in all, 0 failed\n")
        (script,) = home.cloudflare.scripts.values()
        assert script.uploads == 1
        assert await home.ended(stranger) == "", "the stranger's fork made no run"
        code, out = await picluster(home, "upgrade", "--rollback")
        assert code == 0, out
        assert await home.releases() == dict.fromkeys(("pi-1", "pi-2", "pi-3"), __version__)
        code, out = await picluster(home, "upgrade")
        assert "behind" in out
        assert home.world.linear.violations == home.github.violations == home.cloudflare.violations == []
