"""Sixteen streams through one node while the model's process, a whole node, or the node they run on goes away."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from piclusterd.demo.cluster import Cluster, Member
from piclusterd.inference.demo_model.issues import draw_issues
from piclusterd.inference.demo_model.prompt import prompt_messages
from tests.cli.command import picluster

from .rig import descendants

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

KINDS = {"type": "array", "items": {"enum": ["bug", "feature", "question", "chore"]}, "minItems": 100, "maxItems": 100}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "kinds", "schema": KINDS}}
"""A long answer. In other company llama.cpp adds up in another order, and a tie may fall otherwise
(`tests/inference/test_engine_repeat.py`), broken stream or not: so the issues are those without a close call."""
CLEAR = (380, 301, 47, 368, 316, 49, 403, 280, 392, 394, 365, 158, 95, 33, 183, 315)
"""Those of 448 in whose answers the best two tokens that the schema allows are never close: 1.3 or more between their
logits, where other company moves one by 0.27 at most."""
DRAWN = draw_issues(448, 11, "held_out")
ISSUES = [DRAWN[number] for number in CLEAR]
STREAMS = len(ISSUES)
PATIENT = aiohttp.ClientTimeout(total=120)


@dataclass(slots=True)
class Heard:
    """One stream, as far as it has come."""

    text: str = ""
    deltas: int = 0
    ended: str = ""
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def take(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        said = json.loads(line[6:])
        if "error" in said:
            self.faults.append(str(said["error"]))
            return
        for choice in said["choices"]:
            self.text += choice["delta"].get("content") or ""
            self.deltas += 1
            self.ended = choice["finish_reason"] or self.ended
        if said.get("usage"):
            self.tokens = said["usage"]["completion_tokens"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """pi-1 has no model: all it is asked goes to the others."""
    made = Cluster(Path(tmp_path_factory.mktemp("unbroken")), with_model=(1, 2))
    try:
        await made.found()
        await served_by(made, 2)
        yield made
    finally:
        await made.close()


async def served_by(cluster: Cluster, nodes: int) -> None:
    """Every node up sees the model on so many nodes."""

    async def seen() -> bool:
        views = await cluster.views()
        return all(
            sum(bool(m["facts"]["models"]) and m["state"] == "alive" for m in view["members"]) >= nodes
            for view in views
        )

    await cluster.until(seen, f"the model on {nodes} nodes", 60)


async def listen(cluster: Cluster, member: Member, number: int, heard: Heard) -> None:
    issue = ISSUES[number]
    body = {
        "messages": prompt_messages(issue.title, issue.body),
        "temperature": 0, "stream": True, "response_format": SCHEMA, "stream_options": {"include_usage": True},
    }  # fmt: skip
    url = f"{member.url}/v1/chat/completions"
    async with cluster.http.post(url, json=body, timeout=PATIENT) as answer:
        if answer.status != 200:
            heard.faults.append(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            heard.take(line)


def begin(cluster: Cluster, member: Member) -> tuple[list[Heard], asyncio.Future[list[None]]]:
    heard = [Heard() for _ in range(STREAMS)]
    return heard, asyncio.gather(*(listen(cluster, member, number, one) for number, one in enumerate(heard)))


async def until_told(cluster: Cluster, heard: list[Heard], deltas: int, streams: int) -> None:
    async def told() -> bool:
        return sum(one.deltas >= deltas for one in heard) >= streams

    await cluster.until(told, f"{streams} streams with {deltas} pieces", 60)


def child_of(member: Member) -> int:
    assert member.process is not None
    (child,) = [one for one in descendants(member.process.pid) if "piclusterd.inference.worker" in one.cmdline()]
    return child.pid


def same(heard: list[Heard], unbroken: list[Heard]) -> None:
    """No fault, and every answer whole, byte for byte."""
    assert [one.faults for one in heard] == [[] for _ in heard]
    for one in heard:
        assert (one.ended, len(json.loads(one.text))) == ("stop", 100)
    assert [(one.text, one.tokens) for one in heard] == [(one.text, one.tokens) for one in unbroken]


async def test_a_killed_child_and_a_killed_node_break_no_stream(three: Cluster) -> None:
    entry, second, third = three.members
    unbroken, ending = begin(three, entry)
    await ending
    assert all(one.text and not one.faults for one in unbroken)

    heard, ending = begin(three, entry)
    await until_told(three, heard, 5, 4)
    os.kill(child_of(second), signal.SIGKILL)
    await until_told(three, heard, 40, 6)
    three.kill(third)
    await ending
    same(heard, unbroken)

    await three.start(third)
    await served_by(three, 2)


async def test_a_node_that_is_stopped_hands_its_answers_over_and_ends_at_once(three: Cluster) -> None:
    """The clients are its own: what it relays to them goes on, and who comes meanwhile is let in."""
    _, second, third = three.members
    unbroken, ending = begin(three, third)
    await ending
    heard, ending = begin(three, second)
    await until_told(three, heard, 5, 4)
    stopping = asyncio.create_task(three.stop(second))
    late = Heard()
    await listen(three, second, 0, late)
    await ending
    assert await stopping == 0
    same([*heard, late], [*unbroken, unbroken[0]])
    await three.start(second)


async def test_where_a_request_went_is_remembered_by_who_was_asked_and_by_who_answered(three: Cluster) -> None:
    entry = three.members[0]
    body = {"messages": [{"role": "user", "content": "Title: x"}], "max_tokens": 4, "temperature": 0}
    headers = {"X-Request-Id": "why-me", "X-Picluster-Priority": "batch"}
    url = f"{entry.url}/v1/chat/completions"
    async with three.http.post(url, json=body, headers=headers, timeout=PATIENT) as answer:
        assert answer.status == 200, await answer.text()
        told = answer.headers
    assert told["X-Request-Id"] == "why-me"
    assert told["X-Picluster-Node"] in ("pi-2", "pi-3")
    assert float(told["X-Picluster-Took-Seconds"]) >= float(told["X-Picluster-Waited-Seconds"]) >= 0
    assert float(told["X-Picluster-Predicted-Seconds"]) > 0
    assert int(told["X-Picluster-Cached-Tokens"]) >= 0

    found = json.loads((await picluster("--host", entry.url, "why", "why-me", "--json")).out)
    asked, answered = found["seen"]
    assert (asked["node"], asked["priority"], asked["relayed_by"], asked["end"]) == ("pi-1", "batch", "", "length")
    assert asked["hops"][0]["node"] == answered["node"] == told["X-Picluster-Node"]
    assert answered["relayed_by"] == "pi-1"
    assert asked["completion_tokens"] == answered["completion_tokens"] == 4
    lines = (await picluster("--host", three.members[2].url, "why", "why-me")).out
    assert "pi-1: asked" in lines
    assert "predicted" in lines
    assert (await picluster("--host", entry.url, "why", "nobody")).code == 1
    async with three.http.post(url, json=body, headers={"X-Picluster-Priority": "now!"}) as answer:
        assert answer.status == 400
