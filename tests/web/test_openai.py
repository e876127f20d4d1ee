"""openai-python, unchanged, against the API on a loopback port, with a real model behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from openai.types.chat import ChatCompletionUserMessageParam

from piclusterd.errors import PiclusterError
from piclusterd.events import Choice, WhoServes
from piclusterd.ids import NodeId
from piclusterd.inference.echoes import Echoes
from piclusterd.inference.placement import Placement
from piclusterd.inference.pool import Pool
from piclusterd.inference.serving import Serving
from piclusterd.web import moderations, ollama
from piclusterd.web.ollama_schema import Card
from piclusterd.web.openai import routes
from piclusterd.wire import Facts, Member
from tests.inference.rig import NAME, Changes, pool_of, spec

ME = NodeId("1" * 16)
HELLO: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Title: Crash on save"}]
ENDLESS = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "string", "minLength": 900}},
    }
}


@dataclass
class Api:
    url: str
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession
    pool: Pool
    changes: Changes
    serving: Serving

    async def post(self, path: str, body: Any) -> tuple[int, Mapping[str, str], Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(f"{self.url}{path}", data=data) as response:
            return response.status, response.headers, await response.json()


async def no_classifiers() -> Sequence[str]:
    return ()


@asynccontextmanager
async def running(slots: int = 2, queue_max: int = 8, cache_bytes: int = 0) -> AsyncIterator[Api]:
    changes = Changes()
    async with pool_of([spec(slots=slots)], queue_max, changes) as pool:

        async def who(asked: WhoServes) -> Choice:
            placement = Placement(ME)
            placement.members_changed([Member(ME, 0, "alive", Facts(name="pi-1", models=pool.facts()))], ())
            choice = placement.choose(asked, 0.0)
            if isinstance(choice, PiclusterError):
                raise choice
            return choice

        async def list_models() -> Sequence[Mapping[str, Any]]:
            return [{"id": facts.name, "context": facts.context} for facts in pool.facts()]

        async def list_cards() -> Sequence[Card]:
            return [Card(facts.name, context=facts.context, embeds=facts.embeddings) for facts in pool.facts()]

        def relay(peer: NodeId, name: str, body: bytes) -> Any:
            raise AssertionError("there is one node only")

        app = web.Application()
        serving = Serving(ME, pool, who, relay, echoes=Echoes(pool, cache_bytes))
        app.add_routes(routes(serving, list_models))
        app.add_routes(ollama.routes(serving, list_cards, list_cards))
        app.add_routes(moderations.routes(serving, no_classifiers))
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        try:
            async with client, aiohttp.ClientSession() as http:
                yield Api(url, client, http, pool, changes, serving)
        finally:
            await runner.cleanup()


async def test_a_chat_is_answered_with_usage_and_the_node_that_did() -> None:
    async with running() as api:
        raw = await api.client.chat.completions.with_raw_response.create(
            model=NAME, messages=HELLO, max_completion_tokens=12, temperature=0
        )
        answer = raw.parse()
        assert raw.headers["X-Picluster-Node"] == "pi-1"
        assert raw.headers["X-Picluster-Why"].startswith("pi-1: 0 running")
        assert answer.model == NAME
        assert answer.choices[0].message.content
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_says_the_same_in_pieces_and_ends_with_usage() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 12, "temperature": 0}
        whole = await api.client.chat.completions.create(**asked)
        stream = await api.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert stream.response.headers["X-Picluster-Node"] == "pi-1"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_continue_raw_text_whole_and_in_pieces() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "prompt": "Title:", "max_tokens": 8, "temperature": 0}
        whole = await api.client.completions.create(**asked)
        chunks = [chunk async for chunk in await api.client.completions.create(**asked, stream=True)]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""


async def test_a_json_schema_is_kept_to() -> None:
    schema = {
        "type": "object",
        "properties": {"type": {"type": "string", "enum": ["bug", "chore"]}, "sure": {"type": "boolean"}},
        "required": ["type", "sure"],
        "additionalProperties": False,
    }
    async with running() as api:
        answer = await api.client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}},
        )
    found = json.loads(answer.choices[0].message.content or "")
    assert found["type"] in ("bug", "chore")
    assert isinstance(found["sure"], bool)


async def test_embeddings_come_in_base64_and_in_numbers() -> None:
    async with running() as api:
        packed = await api.client.embeddings.create(model=NAME, input=["one", "two"])
        plain = await api.client.embeddings.create(model=NAME, input=["one", "two"], encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1]
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(x * x for x in plain.data[1].embedding) == pytest.approx(1.0, abs=1e-3)
    assert packed.usage.prompt_tokens > 0


async def test_models_are_listed_and_shown() -> None:
    async with running() as api:
        assert [model.id async for model in api.client.models.list()] == [NAME]
        assert (await api.client.models.retrieve(NAME)).owned_by == "picluster"
        with pytest.raises(openai.NotFoundError, match=NAME):
            await api.client.models.retrieve("org/other")


async def test_an_unknown_model_is_not_found_by_its_code() -> None:
    async with running() as api:
        with pytest.raises(openai.NotFoundError) as caught:
            await api.client.chat.completions.create(model="gpt-5", messages=HELLO)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            await api.client.chat.completions.create(model="gpt-5", messages=HELLO, stream=True)


IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
BOMB = {"type": "array", "items": {}, "maxItems": 9**9}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 1000}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"stop": [""]}, "stop[0]"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", "a"]}, "guided_choice"),
    ({"guided_choice": ["x" * 129]}, "guided_choice[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 100_000}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": BOMB}}}, "response_format"),
    ({"messages": [{"role": "user", "content": "word " * 6000}]}, "messages"),
]  # fmt: skip


async def test_bad_values_are_refused_by_the_name_of_their_field() -> None:
    async with running() as api:
        for changes, param in BAD:
            body = {"model": NAME, "messages": HELLO, "max_tokens": 4} | changes
            for stream in (False, True):
                status, _, answer = await api.post("/v1/chat/completions", body | {"stream": stream})
                assert (status, answer["error"]["param"]) == (400, param), answer
                assert answer["error"]["type"] == "invalid_request_error"
        for junk in (b"", b"{", b"[]", b'{"temperature": NaN}', b"\xff", b"[" * 100_000):
            assert (await api.post("/v1/chat/completions", junk))[0] == 400
        for empty in ([], "", ["one", ""]):
            status, _, told = await api.post("/v1/embeddings", {"input": empty})
            assert (status, told["error"]["param"].partition("[")[0]) == (400, "input"), empty
        assert (await api.post("/v1/completions", {}))[2]["error"]["param"] == "prompt"


async def test_unknown_fields_nulls_and_absurd_lengths_are_tolerated() -> None:
    async with running() as api:
        part = {"type": "text", "text": "hello "}
        body = {
            "model": NAME,
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "name": "ann", "content": [part, part]},
            ],
            "max_tokens": 10**12,
            "stop": ["e", "a", "i", "o"],
            "seed": -1,
            "n": 1,
            "temperature": None,
            "response_format": None,
            "reasoning_effort": "low",
            "user": "someone",
        }  # fmt: skip
        status, _, answer = await api.post("/v1/chat/completions", body)
        assert status == 200, answer


async def test_several_answers_come_side_by_side_whole_and_in_pieces() -> None:
    async with running(slots=2) as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 8, "seed": 7, "temperature": 2.0}
        asked["extra_body"] = {"top_k": 0, "min_p": 0.0}
        asked["top_p"] = 1.0
        whole = await api.client.chat.completions.create(**asked, n=3)
        again = await api.client.chat.completions.create(**asked)
        stream = await api.client.chat.completions.create(
            **asked, n=3, stream=True, stream_options={"include_usage": True}
        )
        texts = ["", "", ""]
        usage = None
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
            usage = chunk.usage
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert all(choice.message.content for choice in whole.choices)
    assert len(set(texts)) == 3
    assert usage is not None
    assert whole.usage is not None
    assert again.usage is not None
    assert (usage.completion_tokens, usage.prompt_tokens) == (whole.usage.completion_tokens, again.usage.prompt_tokens)


async def test_log_probabilities_are_told_of_every_token() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 6, "temperature": 0}
        whole = await api.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        stream = await api.client.chat.completions.create(**asked, logprobs=True, stream=True)
        parts = [chunk.choices[0] async for chunk in stream]
        old = await api.client.completions.create(model=NAME, prompt="Title:", max_tokens=4, temperature=0, logprobs=2)
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert whole.usage is not None
    assert len(told.content) == whole.usage.completion_tokens
    assert "".join(token.token for token in told.content) == whole.choices[0].message.content
    for token in told.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy: the likeliest is taken
    streamed = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
    assert [token.token for token in streamed] == [token.token for token in told.content]
    assert old.choices[0].logprobs is not None
    assert "".join(old.choices[0].logprobs.tokens or []) == old.choices[0].text


async def test_a_bias_bans_a_token_or_forces_it() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 3, "temperature": 0}
        free = await api.client.chat.completions.create(**asked)
        forced = await api.client.chat.completions.create(**asked, logit_bias={"70": 100})
        outbid = await api.client.chat.completions.create(**asked, logit_bias={"70": 50, "71": 100, "72": -100})
    text = forced.choices[0].message.content or ""
    assert text != free.choices[0].message.content
    assert text == text[: len(text) // 3] * 3 != ""
    assert outbid.choices[0].message.content not in (text, free.choices[0].message.content)


@pytest.mark.parametrize("field", ["guided_choice", "structured_outputs"])
async def test_the_most_probable_option_is_answered_with_all_probabilities(field: str) -> None:
    async with running() as api:
        options = ["bug", "feature", "chore"]
        extra = {field: options if field == "guided_choice" else {"choice": options}}
        whole = await api.client.chat.completions.create(model=NAME, messages=HELLO, extra_body=extra)
        stream = await api.client.chat.completions.create(model=NAME, messages=HELLO, extra_body=extra, stream=True)
        chunks = [chunk async for chunk in stream]
    probabilities = whole.choices[0].model_dump()["choice_probabilities"]
    assert list(probabilities) == options
    assert sum(probabilities.values()) == pytest.approx(1.0)
    assert whole.choices[0].message.content == max(options, key=lambda option: probabilities[option])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].model_dump()["choice_probabilities"] == pytest.approx(probabilities, abs=0.03)


async def test_several_fields_are_chosen_in_one_request_and_make_json() -> None:
    fields = {"type": ["bug", "feature"], "priority": ["P0", "P1", "P2"]}
    async with running() as api:
        answer = await api.client.chat.completions.create(
            model=NAME, messages=HELLO, extra_body={"guided_choice": fields}
        )
    found = json.loads(answer.choices[0].message.content or "")
    probabilities = answer.choices[0].model_dump()["choice_probabilities"]
    assert list(found) == ["type", "priority"]
    for name, options in fields.items():
        assert found[name] == max(options, key=lambda option: probabilities[name][option])


async def test_a_full_queue_is_429_with_a_time_to_come_again() -> None:
    async with running(slots=1, queue_max=1) as api:
        asked = {"model": NAME, "messages": HELLO} | ENDLESS
        async with api.http.post(f"{api.url}/v1/chat/completions", json=asked | {"stream": True}) as first:
            await first.content.readline()
            second = asyncio.create_task(api.post("/v1/chat/completions", asked | {"max_tokens": 2}))
            await api.changes.until(lambda: api.pool.facts()[0].queued == 1)
            status, headers, answer = await api.post("/v1/chat/completions", asked)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(headers["Retry-After"]) >= 1
        assert (await second)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_slot(stream: bool) -> None:
    async with running(slots=1) as api:
        asked = {"model": NAME, "messages": HELLO, "stream": stream} | ENDLESS
        request = asyncio.create_task(api.post("/v1/chat/completions", asked))
        await api.changes.until(lambda: api.pool.facts()[0].busy == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await api.changes.until(lambda: api.pool.facts()[0].busy == 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(stream: bool) -> None:
    async with running(slots=1) as api:
        asked = {"model": NAME, "messages": HELLO, "stream": stream} | ENDLESS
        async with api.http.post(f"{api.url}/v1/chat/completions", json=asked | {"stream": True}) as first:
            await first.content.readline()
            second = asyncio.create_task(api.post("/v1/chat/completions", asked))
            await api.changes.until(lambda: api.pool.facts()[0].queued == 1)
            second.cancel()
            await api.changes.until(lambda: api.pool.facts()[0].queued == 0)
            assert api.pool.facts()[0].busy == 1


async def test_requests_side_by_side_are_all_answered() -> None:
    async with running(slots=4) as api:
        answers = await asyncio.gather(
            *(
                api.client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=6, seed=seed)
                for seed in range(10)
            )
        )
        assert all(answer.usage is not None and answer.usage.completion_tokens > 0 for answer in answers)


async def test_a_model_that_fails_mid_stream_ends_it_with_an_error_event() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "stream": True} | ENDLESS
        stream = await api.client.chat.completions.create(**asked)
        await anext(stream)
        closing = asyncio.create_task(api.pool.close())
        with pytest.raises(openai.APIError, match="died"):
            async for _ in stream:
                pass
        await closing


async def test_sixteen_equal_requests_at_once_are_one_answer_and_the_next_is_remembered() -> None:
    async with running(slots=1, queue_max=2, cache_bytes=1 << 20) as api:
        body = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 16}
        told = await asyncio.gather(*(api.post("/v1/chat/completions", body) for _ in range(16)))
        assert {status for status, _, _ in told} == {200}
        assert len({answer["choices"][0]["message"]["content"] for _, _, answer in told}) == 1
        assert [headers["X-Picluster-Cache"] for _, headers, _ in told].count("miss") == 1
        assert (await api.post("/v1/chat/completions", body))[1]["X-Picluster-Cache"] == "hit"
        for cache in ("miss", "hit"):
            _, headers, _ = await api.post("/v1/embeddings", {"model": NAME, "input": ["one"]})
            assert headers["X-Picluster-Cache"] == cache
