"""`chat` against a double of the OpenAI routes behind the real guards of the client listener."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from piclusterd.web.app import make_app
from piclusterd.web.listener import Served, serve
from tests.web.house import Node, ring

from .command import picluster

KEY = "secret-key"


class Model:
    """Answers with `pieces`; `ends` says whether the stream gets its end mark. Remembers what it was asked."""

    def __init__(self) -> None:
        self.pieces: list[dict[str, Any]] = [{"content": "Hel"}, {"role": "assistant"}, {"content": "lo"}]
        self.ends = True
        self.asked: list[dict[str, Any]] = []

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": queued pos=1\n\n")
        for piece in self.pieces:
            event = piece if "error" in piece else {"choices": [{"index": 0, "delta": piece}]}
            await response.write(b"data: %s\n\n" % json.dumps(event).encode())
        if self.ends:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "qwen"}, {"id": "other"}]})

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self.complete), web.get("/v1/models", self.models)]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.fixture
async def served(model: Model, path: Path) -> AsyncIterator[Served]:
    doors = Node().doors(extra_routes=model.routes(), keys=ring(KEY))
    listener = await serve(make_app(doors), "127.0.0.1", 0, path)
    yield listener
    await listener.close()


async def test_one_question_streams_one_answer(model: Model, served: Served, path: Path) -> None:
    result = await picluster("--socket", str(path), "chat", "hi", "--system", "be brief", "--max-tokens", "9")
    assert (result.code, result.out, result.err) == (0, "Hello\n", "")
    (asked,) = model.asked
    assert asked["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (asked["model"], asked["stream"], asked["max_tokens"]) == ("qwen", True, 9)


async def test_the_question_may_come_from_stdin(model: Model, served: Served, path: Path) -> None:
    await picluster("--socket", str(path), "chat", "-m", "other", stdin="from a pipe")
    assert (model.asked[0]["model"], model.asked[0]["messages"][0]["content"]) == ("other", "from a pipe")


async def test_a_model_cannot_paint_the_terminal(model: Model, served: Served, path: Path) -> None:
    model.pieces = [{"content": "a\nb\x1b]52;c;aGk=\x07"}]
    result = await picluster("--socket", str(path), "chat", "hi")
    assert result.out == "a\nb\\x1b]52;c;aGk=\\x07\n"


async def test_an_answer_that_breaks_off_is_a_fault(model: Model, served: Served, path: Path) -> None:
    model.ends = False
    result = await picluster("--socket", str(path), "chat", "hi")
    assert result.code == 1
    assert "error: the answer broke off" in result.err


async def test_an_error_inside_the_stream_is_told(model: Model, served: Served, path: Path) -> None:
    model.pieces = [{"error": {"message": "the node went away"}}]
    result = await picluster("--socket", str(path), "chat", "hi")
    assert (result.code, result.err) == (1, "error: the node went away\n")


async def test_over_a_url_the_key_is_needed(served: Served, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    url = f"http://127.0.0.1:{served.port}/v1"
    refused = await picluster("--host", url, "chat", "hi")
    assert refused.code == 1
    assert refused.err.startswith("error: no valid API key\n")
    answered = await picluster("--host", url, "--key-file", str(tmp_path / "key"), "chat", "hi")
    assert (answered.code, answered.out) == (0, "Hello\n")


async def test_an_empty_question_is_wrong_usage(served: Served, path: Path) -> None:
    assert (await picluster("--socket", str(path), "chat", stdin=" \n")).code == 64
