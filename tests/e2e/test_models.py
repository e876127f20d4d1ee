"""Three daemons and one hub: a model is downloaded once, answers from wherever it lies, and survives kills."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from piclusterd.demo.cluster import Cluster, Member
from piclusterd.demo.doubles import Fault
from piclusterd.demo.huggingface_double import CdnDouble, HuggingFaceDouble
from tests.cli.command import Result, picluster
from tests.inference.hub_rig import BODY, FILE, REPO, SHA256, hub_with_cdn

pytestmark = pytest.mark.e2e
LIMIT_S = 60.0
QUESTION = {"messages": [{"role": "user", "content": "Title: it rains in"}], "max_tokens": 8, "temperature": 0}


@dataclass
class Home:
    cluster: Cluster
    hub: HuggingFaceDouble
    cdn: CdnDouble

    async def run(self, at: int, *words: str) -> Result:
        return await picluster("--socket", str(self.cluster.members[at].state / "api.sock"), *words)

    async def ask(self, at: int, model: str) -> tuple[int, str, dict[str, Any]]:
        """Status, who answered, and the answer."""
        member = self.cluster.members[at]
        body = {**QUESTION, "model": model}
        async with self.cluster.http.post(f"{member.url}/v1/chat/completions", json=body) as answer:
            return answer.status, answer.headers.get("X-Picluster-Node", ""), await answer.json()

    async def until_listed(self, at: int, model: str) -> None:
        async def listed() -> bool:
            async with self.cluster.http.get(f"{self.cluster.members[at].url}/v1/models") as answer:
                return model in [one["id"] for one in (await answer.json())["data"]]

        await self.cluster.until(listed, f"{model} is known everywhere", LIMIT_S)


def blob(member: Member) -> Path:
    return member.state / "models" / "blobs" / f"sha256-{SHA256}"


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    async with hub_with_cdn() as (hub, cdn):
        extra = f'[store]\nhub_url = "{hub.url}"\ncontext = 512\nslots = 2\n'
        cluster = Cluster(tmp_path, with_model=(), extra=extra)
        try:
            await cluster.found()
            await cluster.until(cluster.coordinator, "a coordinator", LIMIT_S)
            yield Home(cluster, hub, cdn)
        finally:
            await cluster.close()


async def test_a_cluster_downloads_once_and_any_node_answers(home: Home) -> None:
    results = await asyncio.gather(*(home.run(at, "pull", REPO, "--name", "demo") for at in range(3)))
    assert [result.code for result in results] == [0, 0, 0]
    assert home.hub.served_bytes == len(BODY)
    assert all(blob(member).read_bytes() == BODY for member in home.cluster.members)
    for at in range(3):
        status, _, answer = await home.ask(at, "demo")
        assert status == 200
        assert answer["choices"][0]["message"]["content"]


async def test_a_request_finds_the_node_that_has_the_model_on_its_disk(home: Home) -> None:
    assert (await home.run(0, "pull", REPO, "--name", "demo", "--node", "pi-3")).code == 0
    assert not blob(home.cluster.members[0]).exists()
    await home.until_listed(0, "demo")
    assert "on disk" in (await home.run(0, "models")).out
    status, by, _ = await home.ask(0, "demo")
    assert (status, by) == (200, "pi-3")
    assert "ready" in (await home.run(1, "ps", "--node", "pi-3")).out
    assert (await home.run(1, "rm", "demo", "--node", "pi-3")).code == 0
    assert not blob(home.cluster.members[2]).exists()


async def test_a_node_killed_while_it_downloads_goes_on_and_so_do_those_who_wait_for_it(home: Home) -> None:
    first = home.cluster.members[0]
    home.hub.cuts[FILE] = [1_000_000]
    home.cdn.faults.extend([None, Fault("hang")])
    partial = first.state / "models" / "partial" / f"{SHA256}.part"
    pulling = asyncio.create_task(home.run(0, "pull", REPO))

    async def begun() -> bool:
        return partial.exists() and partial.stat().st_size == 1_000_000

    await home.cluster.until(begun, "a megabyte has come", LIMIT_S)
    waiting = asyncio.create_task(home.run(1, "pull", REPO))
    home.cluster.kill(first)
    assert (await pulling).code != 0
    home.cdn.faults.clear()
    assert (await waiting).code == 0
    await home.cluster.start(first)
    before = home.hub.served_bytes

    async def linked() -> bool:
        view = await home.cluster.status(first)
        return view is not None and sum(member["state"] == "alive" for member in view["members"]) == 3

    await home.cluster.until(linked, "it is back", LIMIT_S)
    assert (await home.run(0, "pull", REPO)).code == 0
    assert blob(first).read_bytes() == BODY
    assert home.hub.served_bytes - before < len(BODY)
