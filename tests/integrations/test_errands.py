"""The clients of a schedule's errands, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from piclusterd.integrations.errands import HubHealth, Poster
from piclusterd.integrations.outcome import CallFailed

WELL = {"ok": True, "depth": 3, "oldest_unacked_s": 1.5, "dead": 0, "connected": True, "secret": "s"}


@asynccontextmanager
async def server(status: int, answer: Any, seen: list[Any] | None = None) -> AsyncIterator[str]:
    async def handle(request: web.Request) -> web.Response:
        if seen is not None:
            seen.append((request.path, request.headers.get("Idempotency-Key"), await request.json()))
        return web.json_response(answer, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_the_hubs_health_is_one_line_of_known_fields() -> None:
    async with server(200, WELL) as url:
        told = await HubHealth(url).perform("health", {}, "k")
    assert told == {"text": "the hub is well: depth 3, oldest_unacked_s 1.5, dead 0, connected True"}
    async with server(200, {**WELL, "ok": False}) as url:
        assert "not well" in (await HubHealth(url).perform("health", {}, "k"))["text"]


@pytest.mark.parametrize(("status", "answer"), [(500, {}), (200, []), (200, {})])
async def test_a_hub_without_health_is_asked_again(status: int, answer: Any) -> None:
    async with server(status, answer) as url:
        with pytest.raises(CallFailed) as caught:
            await HubHealth(url).perform("health", {}, "k")
    assert caught.value.retryable


async def test_a_text_goes_to_the_url_of_its_line_with_its_key() -> None:
    seen: list[Any] = []
    async with server(204, None, seen) as url:
        poster = Poster({"daily": f"{url}/in/secret"})
        assert await poster.perform("text", {"line": "daily", "text": "hi"}, "k1") == {"posted": True}
        with pytest.raises(CallFailed):
            await poster.perform("text", {"line": "other", "text": "hi"}, "k1")
    assert seen == [("/in/secret", "k1", {"line": "daily", "text": "hi"})]


@pytest.mark.parametrize(("status", "passes"), [(500, True), (429, True), (404, False), (302, False)])
async def test_a_refusal_passes_or_stays_and_tells_no_address(status: int, passes: bool) -> None:
    async with server(status, {}) as url:
        with pytest.raises(CallFailed) as caught:
            await Poster({"daily": f"{url}/secret"}).perform("text", {"line": "daily", "text": "hi"}, "k")
    assert caught.value.retryable is passes
    assert "secret" not in str(caught.value)


async def test_nobody_there_is_retryable_and_tells_no_address() -> None:
    with pytest.raises(CallFailed) as caught:
        await Poster({"daily": "http://127.0.0.1:9/secret"}).perform("text", {"line": "daily", "text": "hi"}, "k")
    assert caught.value.retryable
    assert "secret" not in str(caught.value)
