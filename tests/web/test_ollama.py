"""ollama-python, unchanged, against the API on a loopback port, with a real model behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ollama
import pytest

from piclusterd.web import ollama as api_of_ollama
from tests.inference.rig import NAME

from .test_openai import Api, running

HELLO = [{"role": "user", "content": "Title: Crash on save"}]
SCHEMA = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["bug", "chore"]}, "sure": {"type": "boolean"}},
    "required": ["type", "sure"],
    "additionalProperties": False,
}
ENDLESS = {"type": "string", "minLength": 900}
TOOL = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on a device",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": []},
    },
}


@dataclass
class Served:
    api: Api
    client: ollama.AsyncClient

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        status, _, answer = await self.api.post(path, body)
        return status, answer

    async def lines(self, path: str, body: Any) -> tuple[str, list[dict[str, Any]]]:
        async with self.api.http.post(f"{self.api.url}{path}", json=body) as response:
            return response.content_type, [json.loads(line) async for line in response.content]


@asynccontextmanager
async def serving(slots: int = 2, queue_max: int = 8) -> AsyncIterator[Served]:
    async with running(slots, queue_max) as api:
        client = ollama.AsyncClient(api.url)
        try:
            yield Served(api, client)
        finally:
            await client._client.aclose()


async def test_a_chat_is_answered_whole_with_counts_and_durations() -> None:
    async with serving() as served:
        answer = await served.client.chat(NAME, HELLO, options={"temperature": 0, "num_predict": 12})
    assert answer.message.role == "assistant"
    assert answer.message.content
    assert (answer.model, answer.done, answer.done_reason) == (NAME, True, "length")
    assert answer.eval_count == 12
    assert answer.prompt_eval_count is not None
    assert answer.prompt_eval_count > 0
    assert answer.total_duration is not None
    assert answer.eval_duration is not None
    assert 0 < answer.eval_duration <= answer.total_duration
    assert answer.prompt_eval_duration is not None
    assert answer.load_duration is not None
    assert answer.created_at is not None
    assert answer.created_at.endswith("Z")


async def test_a_stream_says_the_same_one_object_a_line() -> None:
    async with serving() as served:
        options = {"temperature": 0, "num_predict": 12}
        whole = await served.client.chat(NAME, HELLO, options=options)
        parts = [part async for part in await served.client.chat(NAME, HELLO, options=options, stream=True)]
        kind, lines = await served.lines("/api/chat", {"model": NAME, "messages": HELLO, "options": options})
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == 12
    assert kind == "application/x-ndjson"
    assert len(lines) > 2
    assert lines[-1]["done_reason"] == "length"


async def test_the_tag_latest_may_be_said_or_left_out() -> None:
    async with serving() as served:
        plain = await served.client.generate(NAME, "Title:", options={"num_predict": 4, "temperature": 0})
        tagged = await served.client.generate(f"{NAME}:latest", "Title:", options={"num_predict": 4, "temperature": 0})
        shown = await served.client.show(f"{NAME}:latest")
        with pytest.raises(ollama.ResponseError):
            await served.client.generate(f"{NAME}:7b", "Title:")
    assert plain.response == tagged.response
    assert tagged.model == f"{NAME}:latest"
    assert shown.capabilities == ["completion", "embedding"], "the demo model's template has no place for tools"


async def test_a_prompt_is_a_turn_of_a_chat_unless_it_is_raw() -> None:
    async with serving() as served:
        options = {"num_predict": 6, "temperature": 0}
        said = await served.client.generate(NAME, "Title: Crash on save", options=options)
        chat = await served.client.chat(NAME, HELLO, options=options)
        raw = await served.client.generate(NAME, "Title: Crash on save", raw=True, options=options)
        with_system = await served.client.generate(NAME, "Title:", system="Be brief.", options=options)
    assert said.response == chat.message.content
    assert raw.prompt_eval_count is not None
    assert said.prompt_eval_count is not None
    assert raw.prompt_eval_count < said.prompt_eval_count
    assert with_system.response


async def test_a_format_is_kept_to() -> None:
    async with serving() as served:
        by_schema = await served.client.chat(NAME, HELLO, format=SCHEMA)
        free = await served.client.generate(NAME, "Say JSON", format="json", options={"num_predict": 400})
    assert json.loads(by_schema.message.content or "")["type"] in ("bug", "chore")
    assert (free.response or "").startswith("{")


async def test_a_seed_repeats_an_answer_and_a_stop_ends_it() -> None:
    async with serving() as served:
        hot = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7, "num_predict": 10}
        one = await served.client.generate(NAME, "Title:", options=hot)
        two = await served.client.generate(NAME, "Title:", options=hot)
        other = await served.client.generate(NAME, "Title:", options=hot | {"seed": 8})
        free = await served.client.generate(NAME, "Title:", options={"temperature": 0, "num_predict": 20})
        assert free.response is not None
        cut = await served.client.generate(
            NAME, "Title:", options={"temperature": 0, "num_predict": 20, "stop": [free.response[4]]}
        )
    assert one.response == two.response != other.response
    assert cut.response == free.response[: free.response.index(free.response[4])]
    assert cut.done_reason == "stop"


async def test_what_is_only_about_speed_is_ignored() -> None:
    async with serving() as served:
        options = {"num_ctx": 10**9, "num_thread": 99, "num_gpu": 1, "mirostat": 2, "num_predict": 2, "made_up": "x"}
        answer = await served.client.chat(NAME, HELLO, options=options, keep_alive=-1, think=False)
    assert answer.eval_count == 2


async def test_texts_are_embedded_one_several_and_the_old_way() -> None:
    given: tuple[dict[str, Any], ...] = ({}, {"input": ""}, {"input": []})
    async with serving() as served:
        one = await served.client.embed(NAME, "printer on fire")
        two = await served.client.embed(NAME, ["printer on fire", "dark mode"])
        old = await served.client.embeddings(NAME, "printer on fire")
        empty = [await served.post("/api/embed", {"model": NAME} | what) for what in given]
        nothing = await served.post("/api/embeddings", {"model": NAME})
    assert len(one.embeddings) == 1
    assert two.embeddings[0] == pytest.approx(one.embeddings[0], abs=1e-5)
    assert list(old.embedding) == pytest.approx(list(one.embeddings[0]), abs=1e-5)
    assert two.prompt_eval_count is not None
    assert empty == [(200, {"model": NAME, "embeddings": []})] * 3
    assert nothing == (200, {"embedding": []})


async def test_models_are_listed_shown_and_running() -> None:
    async with serving() as served:
        listed, running_, shown = (
            await served.client.list(),
            await served.client.ps(),
            await served.client.show(NAME),
        )
        status, old = await served.post("/api/show", {"name": NAME})
        async with served.api.http.get(f"{served.api.url}/api/version") as response:
            version = await response.json()
    assert [model.model for model in listed.models] == [f"{NAME}:latest"]
    assert len(listed.models[0].digest or "") == 64
    assert running_.models[0].context_length == 1024
    assert running_.models[0].expires_at is not None
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 1024
    assert (status, old["capabilities"]) == (200, shown.capabilities)
    assert version["version"].count(".") == 2


async def test_a_configured_model_is_loaded_already_and_no_client_unloads_it() -> None:
    async with serving() as served:
        assert (await served.client.generate(NAME)).done_reason == "load"
        with pytest.raises(ollama.ResponseError, match="stays in memory"):
            await served.client.chat(NAME, [], keep_alive=0)
        with pytest.raises(ollama.ResponseError):
            await served.client.generate("other")


async def test_an_unknown_model_is_404_in_ollamas_words() -> None:
    async with serving() as served:
        for call in (served.client.chat("nope", HELLO), served.client.show("nope"), served.client.embed("nope", "x")):
            with pytest.raises(ollama.ResponseError) as caught:
                await call
            assert caught.value.status_code == 404
            assert "not found" in caught.value.error
            assert NAME in caught.value.error


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
    ("chat", {"messages": HELLO, "options": {"temperature": -1}}, "options.temperature"),
    ("chat", {"messages": HELLO, "options": {"stop": ["x"] * 99}}, "options.stop"),
    ("chat", {"messages": HELLO, "options": {"num_predict": "many"}}, "options.num_predict"),
    ("chat", {"messages": HELLO, "format": "xml"}, "format"),
    ("chat", {"messages": HELLO, "format": {"type": "array", "items": {}, "maxItems": 9**9}}, "schema"),
    ("chat", {"messages": HELLO, "think": True}, "thinking"),
    ("chat", {"messages": [{"role": "root", "content": "x"}]}, "role"),
    ("chat", {"messages": "hello"}, "messages"),
    ("generate", {"prompt": "x", "images": ["aGk="]}, "images"),
    ("generate", {"prompt": "def f(", "suffix": "pass"}, "insert"),
    ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
    ("embed", {"input": 7}, "input"),
]


@pytest.mark.parametrize("stream", [True, False])
async def test_bad_values_are_refused_in_ollamas_shape(stream: bool) -> None:
    async with serving() as served:
        for door, changes, named in BAD:
            status, answer = await served.post(f"/api/{door}", {"model": NAME, "stream": stream} | changes)
            assert (status, list(answer)) == (400, ["error"]), (door, changes)
            assert named in answer["error"], (named, answer)
        for junk in (b"{", b"[]", b"\xff", b"[" * 100_000):
            assert (await served.post("/api/chat", junk))[0] == 400


async def test_models_cannot_be_changed_and_what_is_here_is_pulled_already() -> None:
    async with serving() as served:
        assert (await served.client.pull(NAME)).status == "success"
        steps = [step.status async for step in await served.client.pull(f"{NAME}:latest", stream=True)]
        assert steps == ["pulling manifest", "success"]
        for call in (served.client.pull("tinyllama"), served.client.delete(NAME), served.client.copy(NAME, "mine")):
            with pytest.raises(ollama.ResponseError) as caught:
                await call
            assert caught.value.status_code == 403


async def test_home_assistants_call_is_taken_as_it_comes() -> None:
    """Streamed, with its tools, its own num_ctx, keep_alive in seconds, and turns with calls and their results."""
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a voice assistant."},
        {"role": "user", "content": "Turn on the light", "images": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "HassTurnOn", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": '{"success": true}'},
    ]
    async with serving() as served:
        answer = await served.client.chat(
            NAME, turns, tools=[TOOL], stream=True, keep_alive="-1s", options={"num_ctx": 8192.0, "num_predict": 4},
            think=None, format=None,
        )  # fmt: skip
        parts = [part async for part in answer]
    assert parts[-1].done
    assert parts[-1].done_reason in ("stop", "length")


async def test_a_full_queue_is_429_with_a_time_to_come_again() -> None:
    async with serving(slots=1, queue_max=1) as served:
        asked = {"model": NAME, "messages": HELLO, "format": ENDLESS}
        async with served.api.http.post(f"{served.api.url}/api/chat", json=asked) as first:
            await first.content.readline()
            second = asyncio.create_task(served.post("/api/chat", asked | {"options": {"num_predict": 2}}))
            await served.api.changes.until(lambda: served.api.pool.facts()[0].queued == 1)
            status, headers, answer = await served.api.post("/api/chat", asked)
            assert (status, list(answer)) == (429, ["error"])
            assert int(headers["Retry-After"]) >= 1
        second.cancel()


async def test_a_stream_that_waits_is_kept_open_with_blanks_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_of_ollama, "KEEP_ALIVE_S", 0.01)
    async with serving(slots=1) as served:
        first = asyncio.create_task(served.post("/api/chat", {"model": NAME, "messages": HELLO, "format": ENDLESS}))
        await served.api.changes.until(lambda: served.api.pool.facts()[0].busy == 1)
        asked = {"model": NAME, "messages": HELLO, "options": {"num_predict": 2}}
        async with served.api.http.post(f"{served.api.url}/api/chat", json=asked) as response:
            blanks = await response.content.readexactly(2)
            first.cancel()
            rest = await response.read()
        lines = [json.loads(line) for line in (blanks + rest).splitlines()]
        stream = await served.client.chat(NAME, HELLO, options={"num_predict": 2}, stream=True)
        assert [part async for part in stream][-1].done
    assert blanks == b"  "
    assert [line["done"] for line in lines][-1] is True


async def test_a_client_that_goes_away_frees_its_slot() -> None:
    async with serving(slots=1) as served:
        asked = {"model": NAME, "messages": HELLO, "format": ENDLESS}
        for stream in (True, False):
            request = asyncio.create_task(served.post("/api/chat", asked | {"stream": stream}))
            await served.api.changes.until(lambda: served.api.pool.facts()[0].busy == 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            await served.api.changes.until(lambda: served.api.pool.facts()[0].busy == 0)


async def test_a_model_that_fails_mid_stream_ends_it_with_an_error() -> None:
    async with serving() as served:
        stream = await served.client.chat(NAME, HELLO, format=ENDLESS, stream=True)
        await anext(stream)
        closing = asyncio.create_task(served.api.pool.close())
        with pytest.raises(ollama.ResponseError, match="died"):
            async for _ in stream:
                pass
        await closing
