"""What the end-to-end tests share: clusters of real daemons for a module, single commands, and a look for leftovers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from piclusterd.demo.cluster import Cluster, Member
from piclusterd.demo.linear_double import LinearDouble
from piclusterd.demo.notion_double import NotionDouble
from piclusterd.demo.outside import World
from piclusterd.events import Fact
from piclusterd.ledger import trail
from tests.cli.command import Result, environment

LIMIT_S = 60.0
"""Any one command; a busy machine starts a daemon in a few seconds."""


@dataclass(slots=True)
class Rig:
    world: World
    cluster: Cluster

    @property
    def member(self) -> Member:
        return self.cluster.members[0]


@asynccontextmanager
async def running(
    root: Path,
    *,
    secret: str = "",
    hub: str = "python",
    linear_key: str = "",
    linear: LinearDouble | None = None,
    notion: NotionDouble | None = None,
    **options: Any,
) -> AsyncIterator[Rig]:
    """A hub, a Linear and the daemons of `Cluster(**options)`, until left. `secret`: Linear's, as the nodes know it."""
    rig = Rig(World(root, hub), Cluster(root, **options))
    rig.world.linear = linear or rig.world.linear
    rig.world.notion = notion or rig.world.notion
    rig.world.linear.key = linear_key or rig.world.linear.key
    try:
        await rig.world.start()
        outside = rig.world.told_to_nodes()
        rig.cluster.outside = replace(outside, linear_secret=secret or outside.linear_secret)
        await rig.cluster.found()
        if rig.cluster.with_model:
            await rig.cluster.until_served()
        else:
            await rig.cluster.until(rig.cluster.coordinator, "a coordinator", LIMIT_S)
        yield rig
    finally:
        await rig.cluster.close()
        await rig.world.close()


async def recorded(cluster: Cluster, run: str) -> dict[str, Any]:
    """The results of a run's steps in the first node's ledger, by name and in their order, once its end is there."""
    path = cluster.members[0].state / "ledger.db"

    async def ended() -> list[Fact]:
        facts = await asyncio.to_thread(trail.speaking_of, path, (run,))
        return facts if any(fact.kind == "run.done" for fact in facts) else []

    facts = await cluster.until(ended, f"the end of {run} in the ledger", LIMIT_S)
    return {str(fact.body["step"]): fact.body["value"] for fact in facts if fact.kind == "run.result"}


async def run(module: str, *words: str, **environ: str) -> Result:
    """`python -m module words`, to its end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *words, env=environment(**environ),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return Result(child.returncode or 0, out.decode(), err.decode())


async def daemon(config: Path, **environ: str) -> Result:
    """A daemon that is expected to end by itself."""
    return await run("piclusterd.daemon", "--config", str(config), **environ)


async def alarm(cluster: Cluster, member: Member, about: str) -> str:
    """The node's first alarm whose text holds `about`, waited for."""
    url = f"{member.url}/events?format=jsonl&after=0"
    async with asyncio.timeout(LIMIT_S), cluster.http.get(url) as stream:
        async for line in stream.content:
            event = json.loads(line) if line.startswith(b"{") else {}
            if event.get("kind") == "alarm" and about in event["data"]["text"]:
                return str(event["data"]["text"])
    raise AssertionError(f"{member.name} raised no alarm about {about}")


def descendants(pid: int) -> set[psutil.Process]:
    """All processes that `pid` and its children started and that still have it above them."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def living(processes: set[psutil.Process]) -> list[str]:
    """Which of them still run, as `pid command`; a zombie is dead already."""
    return [text for process in processes if (text := _described(process))]


def _described(process: psutil.Process) -> str:
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.NoSuchProcess:
        pass
    return ""


async def gone(processes: set[psutil.Process], within_s: float = 10.0) -> list[str]:
    """Those of `processes` that do not end in time: none, if all is well."""
    for _ in range(int(within_s / 0.05)):
        if not living(processes):
            break
        await asyncio.sleep(0.05)
    return living(processes)
