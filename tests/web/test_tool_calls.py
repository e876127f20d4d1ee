"""Tools through both APIs, with their own clients: a call that is demanded comes back as one, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import ollama
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from piclusterd.events import Choice
from piclusterd.ids import NodeId
from piclusterd.inference.protocol import CallPart, Delta, Done, ToolCall
from piclusterd.inference.serving import Started
from piclusterd.web.ollama import _Lines
from piclusterd.web.ollama_schema import Clock, Shape
from tests.inference.rig import NAME

from .test_openai import HELLO, running

LAMP = {
    "type": "object",
    "properties": {"name": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "set_lamp", "description": "A lamp", "parameters": LAMP}}
OTHER: Any = {"type": "function", "function": {"name": "open_door", "parameters": {"type": "object", "properties": {}}}}


async def test_a_demanded_call_is_told_as_openai_does() -> None:
    async with running() as api:
        asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "tools": [OTHER, TOOL], "temperature": 0}
        asked["tool_choice"] = {"type": "function", "function": {"name": "set_lamp"}}
        whole = await api.client.chat.completions.create(**asked)
        chunks = [chunk async for chunk in await api.client.chat.completions.create(**asked, stream=True)]
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "set_lamp"
    assert json.loads(call.function.arguments)["name"] in ("kitchen", "hall")
    told = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    first, *others = told
    assert first.function is not None
    assert (first.index, first.function.name, first.function.arguments) == (0, "set_lamp", ""), "the name goes first"
    assert first.id
    assert len(others) >= 3, "the arguments come as they are written"
    assert [(part.index, part.id, part.function and part.function.name) for part in others] == [(0, None, None)] * len(
        others
    )
    assert "".join(part.function.arguments or "" for part in told if part.function) == call.function.arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_the_calls_result_is_a_turn_that_is_answered() -> None:
    async with running() as api:
        function = {"name": "set_lamp", "arguments": '{"name": "hall", "on": true}'}
        call = {"id": "c1", "type": "function", "function": function}
        turns: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "tool_call_id": "c1", "content": "done"}]  # fmt: skip
        answer = await api.client.chat.completions.create(model=NAME, messages=turns, tools=[TOOL], max_tokens=4)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize("stream", [True, False])
async def test_ollama_gets_arguments_as_an_object(stream: bool) -> None:
    """Ollama has no tool_choice, and what a model calls of itself is its affair: the shape is looked at."""
    done = Done(0, "stop", 3, 4, tool_calls=(ToolCall("c1", "set_lamp", '{"name": "hall", "on": true}'),))
    shape, clock = Shape(NAME, chat=True), Clock(0.0, 1.0, 2.0)
    told = shape.calling(done.tool_calls, 0.0) if stream else shape.whole("", done, clock, 0.0)
    read = ollama.ChatResponse.model_validate(told)
    assert read.message.tool_calls is not None
    assert read.message.tool_calls[0].function.arguments == {"name": "hall", "on": True}
    assert "tool_calls" not in shape.ending(done, clock, 0.0)["message"]


async def test_ollama_gets_each_call_as_soon_as_it_is_whole() -> None:
    first, second = '{"name": "hall", "on": true}', '{"name": "kitchen", "on": false}'
    items: list[Any] = [
        Started(Choice(NodeId("2" * 16), "pi-4", NAME, "idle")),
        Delta(0, "So: ", 1, calls=(CallPart(0, "", "c1", "set_lamp"), CallPart(0, first[:9]))),
        Delta(0, "", 1, calls=(CallPart(0, first[9:], last=True), CallPart(1, "", "c2", "set_lamp"))),
        Delta(0, "", 1, calls=(CallPart(1, second[:5]),)),
        Done(0, "stop", 3, 4, tool_calls=(ToolCall("c1", "set_lamp", first), ToolCall("c2", "set_lamp", second))),
    ]
    lines = [json.loads(line) for line in (await _streamed(items)).splitlines()]
    messages = [ollama.ChatResponse.model_validate(line).message for line in lines]
    calls = [[call.function.arguments for call in message.tool_calls or ()] for message in messages]
    assert [message.content for message in messages] == ["So: ", "", "", ""]
    assert calls == [[], [json.loads(first)], [json.loads(second)], []]


async def _streamed(items: list[Any]) -> str:
    """What `/api/chat` says where the cluster answers with `items`."""

    async def answer() -> AsyncGenerator[Any, None]:
        for item in items:
            yield item

    async def handle(request: web.Request) -> web.StreamResponse:
        return await _Lines(request, Shape(NAME, chat=True)).send(answer())

    application = web.Application()
    application.router.add_get("/", handle)
    async with TestClient(TestServer(application)) as client, client.get("/") as response:
        return await response.text()
