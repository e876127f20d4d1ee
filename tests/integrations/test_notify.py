"""Notices over real HTTP: what a webhook and an ntfy topic get, and what their refusals mean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from piclusterd.integrations.notify import NotifyClient
from piclusterd.integrations.outcome import CallFailed

NOTICE = {
    "title": "LIN-1: flagged",
    "text": "Look.",
    "priority": 4,
    "tags": ["warning"],
    "link": "https://linear.app/x",
}


class Listener:
    """Takes POSTs at /secret and answers with `status`."""

    def __init__(self) -> None:
        self.status, self.headers = 200, {}  # type: int, dict[str, str]
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        self.got.append((dict(request.headers), await request.read()))
        return web.Response(status=self.status, headers=self.headers)


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    app = web.Application()
    app.router.add_post("/secret", listener.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    listener.url = f"http://127.0.0.1:{runner.addresses[0][1]}/secret"
    yield listener
    await runner.cleanup()


async def test_a_webhook_gets_json_with_the_key(listener: Listener) -> None:
    client = NotifyClient(listener.url)
    assert await client.perform("webhook", NOTICE, "key-1") == {"told": True}
    ((headers, body),) = listener.got
    assert headers["Idempotency-Key"] == "key-1"
    assert b'"key":"key-1"' in body
    assert b'"title":"LIN-1: flagged"' in body


async def test_ntfy_gets_the_text_and_the_rest_as_headers(listener: Listener) -> None:
    client = NotifyClient("", listener.url, "tk_secret")
    await client.perform("ntfy", NOTICE, "key-1")
    await client.perform("ntfy", {"title": "Überlauf", "text": "voll"}, "key-2")
    (headers, body), (plain, _) = listener.got
    assert body == b"Look."
    assert (headers["Title"], headers["Priority"], headers["Tags"]) == ("LIN-1: flagged", "4", "warning")
    assert (headers["Click"], headers["X-Sequence-ID"]) == ("https://linear.app/x", "key-1")
    assert headers["Authorization"] == "Bearer tk_secret"
    assert plain["Title"] == "=?UTF-8?B?w5xiZXJsYXVm?="
    assert "Click" not in plain


@pytest.mark.parametrize(
    ("status", "retryable", "pause"), [(429, True, 7.0), (503, True, 7.0), (301, False, 7.0), (403, False, 7.0)]
)
async def test_refusals_say_whether_to_come_again_and_never_where(
    listener: Listener, status: int, retryable: bool, pause: float
) -> None:
    listener.status, listener.headers = status, {"Retry-After": "7", "Location": "http://evil.example"}
    with pytest.raises(CallFailed) as caught:
        await NotifyClient(listener.url).perform("webhook", NOTICE, "k")
    assert (caught.value.retryable, caught.value.retry_after_s) == (retryable, pause)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("operation", "change"),
    [("sms", {}), ("ntfy", {}), ("webhook", {"title": ""}), ("webhook", {"link": "javascript:x"}),
     ("webhook", {"tags": ["a,b"]}), ("webhook", {"url": "http://evil.example"}), ("webhook", {"priority": 9})],
)  # fmt: skip
async def test_nothing_else_is_sent(listener: Listener, operation: str, change: dict[str, Any]) -> None:
    with pytest.raises(CallFailed) as caught:
        await NotifyClient(listener.url).perform(operation, {**NOTICE, **change}, "k")
    assert not caught.value.retryable
    assert listener.got == []


async def test_who_does_not_answer_is_asked_again() -> None:
    with pytest.raises(CallFailed) as caught:
        await NotifyClient("http://127.0.0.1:9/secret").perform("webhook", NOTICE, "k")
    assert caught.value.retryable
    assert "secret" not in str(caught.value)
