"""Attacks on the API of models: each ends as it should (numbers as in users-ops-security, 4.5, HTTP)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from piclusterd.inference.protocol import STOPS_MAX
from tests.inference.rig import NAME

from .test_openai import ENDLESS, HELLO, running

FREED_S = 1.0
REFUSED: dict[str, dict[str, Any]] = {
    "B13 a thousand answers": {"n": 1000},
    "B13 no answer": {"n": 0},
    "B13 fewer than no tokens": {"max_tokens": -1},
    "B13 cold below zero": {"temperature": -0.1},
    "B13 too hot": {"temperature": 1e9},
    "B13 no number": {"temperature": float("nan")},
    "B13 endless": {"top_p": float("inf")},
    "B13 a megabyte of stops": {"stop": ["x" * 64] * 15_000},
    "B13 one stop too many": {"stop": ["x"] * (STOPS_MAX + 1)},
    "B13 too many log-probabilities": {"logprobs": True, "top_logprobs": 10**9},
}
TAKEN: dict[str, dict[str, Any]] = {
    "B13 a billion tokens": {"max_tokens": 10**9, "stop": ["}"]},
    "B13 what is not of this API": {"n_discard": -1, "num_ctx": 10**9, "options": {"num_ctx": 10**9}},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=list(REFUSED))
async def test_what_asks_for_too_much_is_refused(changes: dict[str, Any]) -> None:
    async with running() as api:
        status, _, answer = await api.post("/v1/chat/completions", {"model": NAME, "messages": HELLO} | changes)
        assert status == 400, answer
        assert api.pool.facts()[0].busy == 0


@pytest.mark.parametrize("changes", TAKEN.values(), ids=list(TAKEN))
async def test_what_asks_for_more_than_there_is_gets_what_there_is(changes: dict[str, Any]) -> None:
    async with running() as api:
        body = {"model": NAME, "messages": HELLO, "max_tokens": 4} | changes
        status, _, answer = await api.post("/v1/chat/completions", body)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] < 1024


async def test_no_picture_is_fetched_for_anybody() -> None:  # B13
    fetched: list[str] = []

    async def secrets(request: web.Request) -> web.Response:
        fetched.append(request.path)
        return web.Response(text="role credentials")

    app = web.Application()
    app.router.add_get("/{path:.*}", secrets)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with running() as api:
            for url in (f"http://127.0.0.1:{runner.addresses[0][1]}/latest/meta-data", "http://169.254.169.254/"):
                picture = {"type": "image_url", "image_url": {"url": url}}
                body = {"model": NAME, "messages": [{"role": "user", "content": [picture]}]}
                status, _, answer = await api.post("/v1/chat/completions", body)
                assert (status, answer["error"]["param"]) == (400, "messages[0].content")
    finally:
        await runner.cleanup()
    assert fetched == []


async def test_a_client_that_hangs_up_in_mid_stream_frees_its_place_within_a_second() -> None:  # B12
    async with running(slots=1) as api:
        body = {"model": NAME, "messages": HELLO, "stream": True, "temperature": 0} | ENDLESS
        answer = await api.http.post(f"{api.url}/v1/chat/completions", data=json.dumps(body))
        await answer.content.readline()
        assert api.pool.facts()[0].busy == 1
        answer.close()
        async with asyncio.timeout(FREED_S):
            await api.changes.until(lambda: api.pool.facts()[0].busy == 0)
