"""Batches on three real nodes: 500 lines while the coordinator is killed twice, wrong lines, a cancel, the client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
from openai.types import Batch

from piclusterd.demo.cluster import MODEL, Cluster, Member
from tests.cli.command import picluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

LINES = 500
LONG = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "string", "minLength": 200}}}
"""Answers that are not over before the second coordinator can fall."""
LIMIT_S = 240.0
"""For the whole batch on a busy machine."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(Path(tmp_path_factory.mktemp("batch")), with_model=(0, 1, 2))
    try:
        await made.found()
        await made.until_served()
        yield made
    finally:
        await made.close()


def client_of(member: Member) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{member.url}/v1", api_key="unused", max_retries=3)


def line(number: int) -> bytes:
    messages = [{"role": "user", "content": f"Title: The door number {number} opens twice"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 48, "temperature": 0, "response_format": LONG}
    told = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(told).encode() + b"\n"


async def shown(cluster: Cluster, id: str) -> Batch:
    """As any node that is up tells it."""
    member = next(member for member in cluster.members if member.up)
    async with client_of(member) as client:
        return await client.batches.retrieve(id)


def answered(batch: Batch) -> int:
    return batch.request_counts.completed if batch.request_counts else 0


async def kill_coordinator_at(cluster: Cluster, id: str, least: int) -> Member:
    """Once `least` lines are answered: the node that coordinates dies, and another takes over."""

    async def far_enough() -> bool:
        return answered(await shown(cluster, id)) >= least

    await cluster.until(far_enough, f"{least} lines", LIMIT_S)
    fallen = await cluster.coordinator()
    assert fallen is not None
    assert answered(await shown(cluster, id)) < LINES, "there is work left"
    cluster.kill(fallen)
    assert fallen.process is not None
    await fallen.process.wait()

    async def another() -> bool:
        leader = await cluster.coordinator()
        return leader is not None and leader is not fallen

    await cluster.until(another, "another coordinator", LIMIT_S)
    return fallen


async def test_a_batch_survives_two_coordinators_each_line_answered_once_in_order(cluster: Cluster) -> None:
    async with client_of(cluster.members[1]) as client:
        file = await client.files.create(file=("in.jsonl", b"".join(map(line, range(LINES)))), purpose="batch")
        begun = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    fallen = []
    for least in (60, 250):
        fallen.append(await kill_coordinator_at(cluster, begun.id, least))
        await cluster.start(fallen[-1])

    async def over() -> bool:
        return (await shown(cluster, begun.id)).status == "completed"

    await cluster.until(over, "the batch is over", LIMIT_S)
    ended = await shown(cluster, begun.id)
    assert (answered(ended), ended.error_file_id) == (LINES, None)
    assert ended.output_file_id is not None
    outputs = set()
    for member in cluster.members:  # those that fell have the answers, too
        async with client_of(member) as client:
            outputs.add((await client.files.content(ended.output_file_id)).content)
    assert len(outputs) == 1
    answers = [json.loads(row) for row in outputs.pop().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(LINES)]
    assert all(answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers)


async def until_over(cluster: Cluster, id: str) -> Batch:
    async def over() -> Batch | None:
        found = await shown(cluster, id)
        return found if found.status in ("completed", "cancelled", "failed") else None

    found: Batch = await cluster.until(over, "the batch is over", LIMIT_S)
    return found


async def test_a_wrong_line_has_its_error_and_the_others_their_answers(cluster: Cluster, tmp_path: Path) -> None:
    rows = [json.loads(line(number)) for number in range(6)]
    rows[2]["body"]["temperature"] = 9
    rows[4]["body"]["messages"][0]["content"] = "word " * 20_000  # longer than the context
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = await picluster("--host", cluster.members[2].url, "batch", "submit", str(tmp_path / "in.jsonl"), "--json")
    assert (begun.code, begun.err) == (0, "")
    id = json.loads(begun.out)["id"]
    ended = await until_over(cluster, id)
    assert ended.request_counts is not None
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 4, 2)
    read = [
        (await picluster("--host", cluster.members[0].url, "batch", "output", id, *more)).out.splitlines()
        for more in ((), ("--errors",))
    ]
    good, bad = ([json.loads(row) for row in rows] for rows in read)
    assert [row["custom_id"] for row in good] == ["line-0", "line-1", "line-3", "line-5"]
    assert [(row["custom_id"], row["response"]["status_code"]) for row in bad] == [("line-2", 400), ("line-4", 400)]


async def test_a_cancelled_batch_ends_and_keeps_what_was_answered(cluster: Cluster) -> None:
    async with client_of(cluster.members[0]) as client:
        file = await client.files.create(file=("in.jsonl", b"".join(map(line, range(LINES)))), purpose="batch")
        begun = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )

    async def begins() -> bool:
        return answered(await shown(cluster, begun.id)) > 0

    await cluster.until(begins, "some answers", LIMIT_S)
    async with client_of(cluster.members[1]) as client:
        await client.batches.cancel(begun.id)
    ended = await until_over(cluster, begun.id)
    count = answered(ended)
    assert ended.status == "cancelled"
    assert 0 < count < LINES
    assert ended.output_file_id is not None
    async with client_of(cluster.members[2]) as client:
        rows = (await client.files.content(ended.output_file_id)).text.splitlines()
    assert [json.loads(row)["custom_id"] for row in rows] == [f"line-{number}" for number in range(count)]
