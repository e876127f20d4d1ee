"""Chats answered by a provider that speaks OpenAI's API: a GPU box with vLLM or llama-server, or a service outside.

    POST <url>/chat/completions {…, stream} ──▶ SSE chunks, as objects ──▶ the one who asked

Providers say "too many" in two ways that need opposite handling, so every failure has a kind: `rate` passes within
seconds or minutes, `quota` with the day or the month, `asked` would be refused again, `broken` is the provider's.
`dialect` reads it off an answer; each provider has its own. Owns no budget and repeats nothing (`inference.standby`).

Refuses: redirects (a key must not travel), lines and answers beyond a limit, silence beyond the time it is given.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Literal

import aiohttp

from ..errors import PiclusterError

CONNECT_S = 10.0
SILENCE_S = 60.0
"""Between two chunks of an answer."""
ERROR_BYTES_MAX = 16 * 1024
ANSWER_BYTES_MAX = 8 * 1024 * 1024
WORDS_MAX = 200
"""Of an answer's text in an error."""
RATE_S = 10.0
"""What a rate limit without a time is taken to last."""
RATE_S_MAX = 3600.0
KEY_S = 600.0
"""A key that is refused is mended by a person."""

Json = dict[str, Any]
Kind = Literal["rate", "quota", "asked", "broken"]


class ProviderFailed(PiclusterError):
    """`retry_after_s`: how long a `rate` stands."""

    status = 502

    def __init__(self, kind: Kind, what: str, why: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(what, why)
        self.kind: Kind = kind
        self.retry_after_s = retry_after_s


Dialect = Callable[[int, Mapping[str, str], bytes], ProviderFailed]
"""(status, headers, body) of an answer that is none → what it means."""


def openai(status: int, headers: Mapping[str, str], body: bytes) -> ProviderFailed:
    """OpenAI's own words, which most speak."""
    error = as_object(as_object(_decoded(body)).get("error"))
    said = str(error.get("message") or body[:WORDS_MAX].decode(errors="replace"))[:WORDS_MAX]
    if status == 402 or (status == 429 and error.get("code") == "insufficient_quota"):
        return ProviderFailed("quota", "the quota is used up", said)
    return by_status(status, headers, said)


def by_status(status: int, headers: Mapping[str, str], said: str) -> ProviderFailed:
    """What HTTP alone says."""
    if status in (401, 403):
        return ProviderFailed("rate", f"the key is refused (HTTP {status})", said, KEY_S)
    if status == 429:
        return ProviderFailed("rate", "too many requests", said, pause_s(headers))
    if 400 <= status < 500 and status != 408:
        return ProviderFailed("asked", f"the request is refused (HTTP {status})", said)
    return ProviderFailed("broken", f"HTTP {status}", said)


def pause_s(headers: Mapping[str, str]) -> float:
    asked = headers.get("Retry-After", "")
    try:
        return min(max(float(asked), 1.0), RATE_S_MAX)
    except ValueError:
        return RATE_S


def as_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


class OpenAICompatible:
    """`url` ends where `/chat/completions` begins; `key` may be empty. `timeout_s`: until the first byte."""

    def __init__(self, url: str, key: str = "", timeout_s: float = 60.0, dialect: Dialect = openai) -> None:
        self._url, self._key, self._timeout_s, self._dialect = url.rstrip("/"), key, timeout_s, dialect
        self._own: aiohttp.ClientSession | None = None

    async def chat(self, body: Mapping[str, Any]) -> AsyncGenerator[Json, None]:
        """The chunks of the streamed answer to `body`, `[DONE]` seen. Raises `ProviderFailed` and nothing else."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._session().post(
                    f"{self._url}/chat/completions", json={**body, "stream": True}, headers=headers,
                    allow_redirects=False,
                )  # fmt: skip
            async with response:
                if response.status != 200:
                    async with asyncio.timeout(SILENCE_S):
                        told = await response.content.read(ERROR_BYTES_MAX)
                    raise self._dialect(response.status, response.headers, told)
                if response.content_type == "text/event-stream":
                    async for chunk in _events(response.content):
                        yield chunk
                else:  # some do not stream, whatever they are asked
                    yield await _whole(response.content)
        except (TimeoutError, aiohttp.ClientError, OSError) as fault:
            raise ProviderFailed("broken", "no answer", f"{type(fault).__name__}.") from None
        except ValueError as fault:
            raise ProviderFailed("broken", "the answer cannot be read", f"{fault}"[:WORDS_MAX]) from None

    def _session(self) -> aiohttp.ClientSession:
        if self._own is None or self._own.closed:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            self._own = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout)
        return self._own

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[Json, None]:
    size = 0
    while True:
        async with asyncio.timeout(SILENCE_S):
            line = await content.readline()
        size += len(line)
        if not line:
            raise ProviderFailed("broken", "the answer broke off")
        if size > ANSWER_BYTES_MAX:
            raise ProviderFailed("broken", "the answer does not end")
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        chunk = as_object(json.loads(data))
        if "error" in chunk:
            raise ProviderFailed("broken", "the answer failed", str(chunk["error"])[:WORDS_MAX])
        yield chunk


async def _whole(content: aiohttp.StreamReader) -> Json:
    """A completion in one piece, as its only chunk."""
    data = bytearray()
    async with asyncio.timeout(SILENCE_S):
        async for part in content.iter_any():
            data += part
            if len(data) > ANSWER_BYTES_MAX:
                raise ProviderFailed("broken", "the answer does not end")
    whole = as_object(json.loads(data))
    choices = whole.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ProviderFailed("broken", "the answer is no completion")
    told = [{**choice, "delta": as_object(choice.get("message"))} for choice in map(as_object, choices)]
    return {**whole, "choices": told}
