"""Notices to where people read: a webhook of theirs, and an ntfy topic. Each POST carries the effect's key.

    CallOut ──perform──▶ webhook   POST <url>    JSON {key, title, text, priority, tags, link}, Idempotency-Key
                         ntfy      POST <topic>  the text; headers Title, Priority, Tags, Click, X-Sequence-ID

The addresses come from files of the node, never from a run, and appear in no error: they are secrets as a rule. A
notice that is sent twice has one effect where the receiver heeds the key; ntfy replaces a notification whose sequence
id it knows (since 2.16), and shows it again before that.

Source: docs.ntfy.sh, "Publishing"; RFC 2047 for titles that are not ASCII.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import aiohttp
import msgspec
from msgspec import Meta

from .outcome import CallFailed

TIMEOUT_S = 20.0
PAUSE_MAX_S = 3600.0


class _Notice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: Annotated[str, Meta(min_length=1, max_length=200)]
    text: Annotated[str, Meta(max_length=4000)]
    priority: Annotated[int, Meta(ge=1, le=5)] = 3
    tags: Annotated[tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_+-]{1,32}$")], ...], Meta(max_length=8)] = ()
    link: Annotated[str, Meta(max_length=2000, pattern=r"^(https://[!-~]+)?$")] = ""


class NotifyClient:
    """`webhook_url` and `ntfy_url` may be "". Every operation raises `CallFailed` and nothing else."""

    def __init__(
        self, webhook_url: str = "", ntfy_url: str = "", ntfy_token: str = "", timeout_s: float = TIMEOUT_S
    ) -> None:
        self._urls = {"webhook": webhook_url, "ntfy": ntfy_url}
        self._ntfy_token = ntfy_token
        self._timeout_s = timeout_s

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """`{"told": True}`."""
        if operation not in ("webhook", "ntfy"):
            raise CallFailed(f"notices have no operation {operation!r}", retryable=False)
        try:
            notice = msgspec.convert(arguments, _Notice)
        except msgspec.ValidationError as fault:
            raise CallFailed("not a notice:", str(fault), retryable=False) from fault
        if not self._urls[operation]:
            raise CallFailed(
                f"no {operation} is configured on this node", fix=f"Set [notify] {operation}_url_file.", retryable=False
            )
        if operation == "webhook":
            body = msgspec.json.encode({"key": key, **msgspec.structs.asdict(notice)})
            await self._post("webhook", body, {"Content-Type": "application/json", "Idempotency-Key": key})
        else:
            await self._post("ntfy", notice.text.encode(), self._ntfy_headers(notice, key))
        return {"told": True}

    def _ntfy_headers(self, notice: _Notice, key: str) -> dict[str, str]:
        headers = {"Title": _word(notice.title), "Priority": str(notice.priority), "X-Sequence-ID": key}
        if notice.tags:
            headers["Tags"] = ",".join(notice.tags)
        if notice.link:
            headers["Click"] = notice.link
        return headers | ({"Authorization": f"Bearer {self._ntfy_token}"} if self._ntfy_token else {})

    async def _post(self, sink: Literal["webhook", "ntfy"], body: bytes, headers: Mapping[str, str]) -> None:
        """Rare enough for a connection of its own."""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
                session.post(self._urls[sink], data=body, headers=headers, allow_redirects=False) as answer,
            ):
                status, asked = answer.status, answer.headers.get("Retry-After", "")
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as fault:
            raise CallFailed(f"the {sink} did not answer:", type(fault).__name__, retryable=True) from fault
        if status >= 300:
            passes = status >= 500 or status in (408, 429)
            pause_s = min(float(asked), PAUSE_MAX_S) if asked.isdigit() else None
            fix = "" if passes else f"Check [notify] {sink}_url_file."
            raise CallFailed(f"the {sink} answered HTTP {status}", "", fix, retryable=passes, retry_after_s=pause_s)


def _word(text: str) -> str:
    """As a header may carry it."""
    line = " ".join(text.split())
    return line if line.isascii() else f"=?UTF-8?B?{base64.b64encode(line.encode()).decode()}?="
