"""Two small clients for the errands of a schedule: the hub's health, and a text posted to where the owner reads.

    hub    health   GET  <hub>/health             → {"text": one line}
    post   text     POST the line's URL           → {"posted": True}     JSON {line, text}, Idempotency-Key

The URLs come from the configuration of the node and never from a run; a text goes nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from .outcome import CallFailed

TIMEOUT_S = 20.0
ANSWER_BYTES_MAX = 64 * 1024
FIELDS = ("depth", "oldest_unacked_s", "dead", "connected", "term")
"""Of the hub's health that go into the one line."""


class HubHealth:
    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/") + "/health"
        self._timeout_s = timeout_s

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        status, body = await _ask("GET", self._url, {}, None, self._timeout_s)
        try:
            told = msgspec.json.decode(body, type=dict[str, Any]) if status == 200 else {}
        except msgspec.DecodeError:
            told = {}
        if not told:
            raise CallFailed(f"the hub answered HTTP {status} without its health", retryable=True)
        line = ", ".join(f"{name} {told[name]}" for name in FIELDS if name in told)
        return {"text": f"the hub is well: {line}" if told.get("ok") else f"the hub is not well: {line}"}


class Poster:
    def __init__(self, urls: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
        """`urls`: line of the schedule → where its text goes."""
        self._urls = urls
        self._timeout_s = timeout_s

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        line, text = str(arguments.get("line")), str(arguments.get("text"))
        if line not in self._urls:
            raise CallFailed(f"no URL for {line!r} here", "its [[schedule]] table has none", retryable=False)
        status, _ = await _ask(
            "POST", self._urls[line], {"Idempotency-Key": key}, {"line": line, "text": text}, self._timeout_s
        )
        if status >= 300:
            passes = status >= 500 or status in (408, 429)
            raise CallFailed(f"the URL of {line!r} answered HTTP {status}", retryable=passes)
        return {"posted": True}


async def _ask(
    method: str, url: str, headers: Mapping[str, str], body: Mapping[str, str] | None, timeout_s: float
) -> tuple[int, bytes]:
    """Rare enough for a connection of its own. Raises `CallFailed` without the URL, which may hold a secret."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.request(method, url, json=body, headers=headers, allow_redirects=False) as response,
        ):
            return response.status, await response.content.read(ANSWER_BYTES_MAX)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as fault:
        raise CallFailed("no answer:", type(fault).__name__, retryable=True) from fault
