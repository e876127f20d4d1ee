"""The OpenAI client, unchanged, against any node: also one that has no model, also when a node with one is killed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import ollama
import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionUserMessageParam

from piclusterd.demo.cluster import MODEL, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

WITH_MODEL = ("pi-1", "pi-2")
RELAY = 2
"""Index of the node that has no model."""
SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["bug", "feature", "question", "chore"]},
        "priority": {"enum": ["P0", "P1", "P2", "P3"]},
        "reason": {"type": "string", "maxLength": 120},
    },
    "required": ["type", "priority", "reason"],
    "additionalProperties": False,
}


def question(text: str = "Title: Checkout crashes for every customer") -> list[ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": text}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(Path(tmp_path_factory.mktemp("clients")))
    try:
        await made.found()
        await made.until_served()
        yield made
    finally:
        await made.close()


@pytest_asyncio.fixture(loop_scope="module", params=[0, RELAY], ids=["node with model", "node without model"])
async def client(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of that node, as in OpenAI's documentation but for the base URL."""
    async with client_of(cluster, request.param) as made:
        yield made


def client_of(cluster: Cluster, index: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.members[index].url}/v1", api_key="unused", max_retries=0)


async def test_a_chat_is_answered_and_says_by_which_node(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=question(), max_tokens=40)
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert raw.headers["X-Picluster-Node"] in WITH_MODEL


async def test_a_stream_has_the_words_of_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=question(), max_tokens=30, temperature=0)
    stream = await client.chat.completions.create(
        model=MODEL, messages=question(), max_tokens=30, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole.choices[0].message.content


async def test_an_answer_keeps_to_a_json_schema(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=question(),
        response_format={"type": "json_schema", "json_schema": {"name": "triage", "schema": SCHEMA, "strict": True}},
    )
    said = json.loads(answer.choices[0].message.content or "")
    assert set(said) == {"type", "priority", "reason"}
    assert said["type"] in ("bug", "feature", "question", "chore")


async def test_texts_are_embedded(client: openai.AsyncOpenAI) -> None:
    answer = await client.embeddings.create(model=MODEL, input=["printer on fire", "please add dark mode"])
    first, second = (line.embedding for line in answer.data)
    assert len(first) == len(second) > 8
    assert first != second


async def test_every_node_lists_the_models_of_the_cluster(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == [MODEL]


async def test_a_model_that_nobody_has_is_a_404_that_names_those_there_are(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        await client.chat.completions.create(model="gpt-unknown", messages=question())


@pytest.mark.parametrize("index", [0, RELAY], ids=["node with model", "node without model"])
async def test_ollamas_own_client_is_answered_by_any_node(cluster: Cluster, index: int) -> None:
    client = ollama.AsyncClient(cluster.members[index].url)
    try:
        listed = await client.list()
        assert [model.model for model in listed.models] == [f"{MODEL}:latest"]
        options = {"temperature": 0, "num_predict": 12}
        whole = await client.chat(MODEL, [dict(one) for one in question()], options=options)
        stream = await client.chat(MODEL, [dict(one) for one in question()], options=options, stream=True)
        parts = [part async for part in stream]
        assert "".join(part.message.content or "" for part in parts) == whole.message.content != ""
        assert len((await client.embed(MODEL, "printer on fire")).embeddings[0]) > 8
    finally:
        await client._client.aclose()


async def test_when_the_node_that_answered_is_killed_another_replica_answers_the_next_request(cluster: Cluster) -> None:
    async with client_of(cluster, RELAY) as client:
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=question(), max_tokens=8)
        served_by = raw.headers["X-Picluster-Node"]
        cluster.kill(next(member for member in cluster.members if member.name == served_by))
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=question(), max_tokens=8)
        assert raw.parse().choices[0].message.content
        assert raw.headers["X-Picluster-Node"] in set(WITH_MODEL) - {served_by}
