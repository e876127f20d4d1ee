"""More than the context holds is refused with the numbers, or ended by "length"; nothing is ever shifted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import openai
import pytest

from piclusterd.errors import TooLong
from piclusterd.inference.engine import Engine
from piclusterd.inference.faults import failed, raised
from piclusterd.inference.protocol import ChatMessage, Failed, Field, GenerateRequest, decode, encode
from tests.web.test_openai import running

from .rig import NAME
from .test_engine import drained, small

CONTEXT = 256
ON_AND_ON = '{"type": "string", "minLength": 1000}'


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = small(CONTEXT, 2)
    yield made
    made.close()


def of_length(engine: Engine, tokens: int) -> GenerateRequest:
    """A prompt of exactly so many tokens."""
    for start in ("", "x"):  # the unit is two tokens
        request = GenerateRequest(prompt=start + " x" * (tokens // 2 - 1), temperature=0.0)
        while len(engine.prompt_tokens(request)) < tokens:
            request = msgspec.structs.replace(request, prompt=request.prompt + " x")
        if len(engine.prompt_tokens(request)) == tokens:
            return request
    raise AssertionError(f"no text of {tokens} tokens")


@pytest.mark.parametrize("room", [1, 2, 40])
def test_an_answer_that_reaches_the_end_of_the_context_ends_by_length(engine: Engine, room: int) -> None:
    engine.submit(1, msgspec.structs.replace(of_length(engine, engine.context - room), json_schema=ON_AND_ON))
    done = drained(engine)[1][1]
    assert (done.reason, done.completion_tokens) == ("length", room)
    assert done.prompt_tokens + done.completion_tokens == engine.context


def test_max_tokens_beyond_the_context_is_no_fault(engine: Engine) -> None:
    request = msgspec.structs.replace(of_length(engine, engine.context - 9), json_schema=ON_AND_ON, max_tokens=10**6)
    engine.submit(1, request)
    assert drained(engine)[1][1].completion_tokens == 9


@pytest.mark.parametrize("over", [0, 1, 300])
def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(engine: Engine, over: int) -> None:
    tokens = engine.context + over
    with pytest.raises(TooLong) as caught:
        engine.submit(1, of_length(engine, tokens))
    assert caught.value.param == "prompt"
    for said in (f"has {tokens} tokens", f"maximum context length is {engine.context} tokens", f"by {over + 1}."):
        assert said in str(caught.value)
    assert "larger `context` in the configuration: it can read" in caught.value.fix
    assert not engine.busy


def test_options_count_as_part_of_the_answer(engine: Engine) -> None:
    request = msgspec.structs.replace(of_length(engine, engine.context - 2), choices=(Field("", ("a long one", "b")),))
    with pytest.raises(TooLong, match="the answer needs at least"):
        engine.submit(1, request)


def test_where_no_configuration_would_help_none_is_proposed() -> None:
    engine = small(2048, 1)  # more than it was trained for
    with pytest.raises(TooLong) as caught:
        engine.submit(1, of_length(engine, engine.context))
    assert "configuration" not in str(caught.value)
    engine.close()


def test_its_code_survives_the_way_between_nodes() -> None:
    fault = TooLong("what", "why", "fix", "messages")
    frame = decode(encode(failed(3, fault)), Failed)
    assert isinstance(frame, Failed)
    there = raised(frame)
    assert isinstance(there, TooLong)
    assert (str(there), there.param) == (str(fault), "messages")
    assert not isinstance(raised(msgspec.structs.replace(frame, code="")), TooLong)


@pytest.mark.parametrize("stream", [True, False])
async def test_openais_client_gets_openais_code(stream: bool) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    async with running() as api:
        with pytest.raises(openai.BadRequestError) as caught:
            await api.client.chat.completions.create(model=NAME, messages=long, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "maximum context length is 1024 tokens" in caught.value.message


def test_a_chat_is_told_apart_from_a_text(engine: Engine) -> None:
    with pytest.raises(TooLong) as caught:
        engine.submit(1, GenerateRequest(messages=(ChatMessage("user", "word " * 500),)))
    assert caught.value.param == "messages"
