"""GitHub's record of what it sent us: which deliveries never arrived, and to send them again.

    CallOut ──perform──▶ deliveries_since   GET  /repos/{o}/{r}/hooks/{id}/deliveries     100 a page, newest first
                         run_look           GET  /repos/{o}/{r}/actions/runs/{run}
                         redeliver          POST /repos/{o}/{r}/hooks/{id}/deliveries/{delivery}/attempts   202

GitHub never tries again by itself and keeps its record for 3 days. A redelivery repeats the event's GUID and its body,
so an event counts as arrived where any of its deliveries was answered 2xx. What it sends again comes the usual way, and
its signature is checked there; sending twice is harmless, since the cluster knows the event by its body.

Rate limits: 403 or 429 with `retry-after`, or with `x-ratelimit-remaining: 0` and `x-ratelimit-reset` in epoch seconds.

Source: GitHub REST documentation, "Repository webhooks" and "Rate limits for the REST API".
"""

from __future__ import annotations

import asyncio
import email.utils
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import aiohttp
import msgspec
from msgspec import Meta

from .outcome import CallFailed

TIMEOUT_S = 20.0
PAGE_DELIVERIES = 100
RESPONSE_BYTES_MAX = 1024 * 1024
PAUSE_DEFAULT_S = 60.0
PAUSE_MAX_S = 3600.0
WORDS_MAX = 200
"""Characters of GitHub's own words in our errors."""
_NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')


class _Since(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since_ms: Annotated[int, Meta(ge=0)]
    after: Annotated[str, Meta(max_length=200)] = ""


class _Redeliver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    delivery: Annotated[int, Meta(ge=0)]


class _Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    repository: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,100}/[A-Za-z0-9_.-]{1,100}$")]
    run: Annotated[int, Meta(ge=0)]


class _Delivery(msgspec.Struct, frozen=True):
    id: int
    guid: str
    delivered_at: datetime
    status_code: int = 0

    @property
    def arrived(self) -> bool:
        return 200 <= self.status_code < 300


T = TypeVar("T")


class GithubClient:
    """`hook`: owner/repository/id. Every operation raises `CallFailed` and nothing else."""

    def __init__(self, url: str, token: str, hook: str, *, timeout_s: float = TIMEOUT_S) -> None:
        owner, repository, number = hook.split("/")
        self._url = url.rstrip("/")
        self._deliveries = f"{self._url}/repos/{owner}/{repository}/hooks/{number}/deliveries"
        self._token = token
        self._timeout_s = timeout_s
        self._own: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Perform one `CallOut`. `key` is not sent: neither operation has an effect that must not be repeated."""
        match operation:
            case "deliveries_since":
                return await self.deliveries_since(_checked(arguments, _Since))
            case "run_look":
                return await self.run_look(_checked(arguments, _Look))
            case "redeliver":
                return await self.redeliver(_checked(arguments, _Redeliver).delivery)
            case _:
                raise CallFailed(f"GitHub has no operation {operation!r} here", retryable=False)

    async def deliveries_since(self, ask: _Since) -> dict[str, Any]:
        """One page, newest first: `{failed: {GUID: delivery}, arrived: [GUID], more: cursor, now_ms}`.

        An event whose delivery failed may have another, on this page or on the one before, that arrived.
        """
        cursor = {"cursor": ask.after} if ask.after else {}
        headers, body = await self._request("GET", self._deliveries, {"per_page": str(PAGE_DELIVERIES), **cursor})
        try:
            told = msgspec.json.decode(body, type=list[_Delivery])
        except msgspec.DecodeError as fault:
            raise CallFailed("GitHub's list of deliveries lacks a field:", str(fault), retryable=True) from fault
        fresh = [one for one in told if one.delivered_at.timestamp() * 1000 >= ask.since_ms]
        arrived = sorted({one.guid for one in fresh if one.arrived})
        failed = {one.guid: one.id for one in fresh if not one.arrived}
        more = _cursor(headers) if len(fresh) == len(told) else ""
        return {"failed": failed, "arrived": arrived, "more": more, "now_ms": _sent_ms(headers, ask)}

    async def run_look(self, ask: _Look) -> dict[str, Any]:
        """A workflow's run as it is now, the fields that deploys read, or `{"missing": True}`."""
        try:
            _, body = await self._request("GET", f"{self._url}/repos/{ask.repository}/actions/runs/{ask.run}", {})
        except _Missing:
            return {"missing": True}
        try:
            told = msgspec.json.decode(body, type=dict[str, Any])
        except (ValueError, RecursionError) as fault:
            raise CallFailed("GitHub's run lacks a field:", str(fault), retryable=True) from fault
        fields = ("id", "path", "event", "status", "conclusion", "head_branch", "head_sha")
        origin = told.get("head_repository")
        head = {name: origin.get(name) for name in ("full_name", "fork")} if isinstance(origin, dict) else {}
        return {**{name: told.get(name) for name in fields}, "head_repository": head}

    async def redeliver(self, delivery: int) -> dict[str, Any]:
        """`{"accepted": True}`, or `{"missing": True}` for one that GitHub has forgotten."""
        try:
            await self._request("POST", f"{self._deliveries}/{delivery}/attempts", {})
        except _Missing:
            return {"missing": True}
        return {"accepted": True}

    async def _request(self, method: str, url: str, query: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
            "User-Agent": "piclusterd",
        }
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session().request(method, url, params=query, headers=headers, allow_redirects=False) as response,
            ):
                body = await response.content.read(RESPONSE_BYTES_MAX)
                _judge(response.status, response.headers, body)
                return response.headers, body
        except (TimeoutError, aiohttp.ClientError, OSError) as fault:
            raise CallFailed("GitHub did not answer:", type(fault).__name__, retryable=True) from fault

    def _session(self) -> aiohttp.ClientSession:
        if self._own is None or self._own.closed:
            self._own = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._own


class _Missing(CallFailed):
    """404: the delivery is older than GitHub's memory, or the hook is gone."""


def _judge(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise what the answer means; nothing for 2xx."""
    if status < 300:
        return
    words = body[:WORDS_MAX].decode(errors="replace")
    pause_s = _pause_s(headers)
    if status == 429 or (status == 403 and pause_s is not None):
        pause_s = PAUSE_DEFAULT_S if pause_s is None else pause_s
        raise CallFailed("GitHub limits our rate", f"for {pause_s:.0f} s", retryable=True, retry_after_s=pause_s)
    if status == 404:
        raise _Missing("GitHub knows no such delivery or webhook", words, "Check [github] hook.", retryable=False)
    retryable = status >= 500 or status == 408
    raise CallFailed(f"GitHub answered HTTP {status}:", words, retryable=retryable, retry_after_s=pause_s)


def _pause_s(headers: Mapping[str, str]) -> float | None:
    """Seconds GitHub wants us to be quiet; compared with its own `Date`, as a Pi may not know the time."""
    asked = headers.get("retry-after", "")
    if asked.isdigit():
        return min(float(asked), PAUSE_MAX_S)
    if headers.get("x-ratelimit-remaining") != "0":
        return None
    try:
        sent = email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
        return min(max(float(headers["x-ratelimit-reset"]) - sent, 1.0), PAUSE_MAX_S)
    except (KeyError, ValueError):
        return PAUSE_DEFAULT_S


def _cursor(headers: Mapping[str, str]) -> str:
    """Of the next page, in the `Link` header; "" on the last one."""
    link = _NEXT.search(headers.get("Link", ""))
    return parse_qs(urlsplit(link.group(1)).query).get("cursor", [""])[0] if link else ""


def _sent_ms(headers: Mapping[str, str], ask: _Since) -> int:
    try:
        return int(email.utils.parsedate_to_datetime(headers["Date"]).timestamp() * 1000)
    except (KeyError, ValueError):
        return ask.since_ms


def _checked(arguments: Mapping[str, Any], shape: type[T]) -> T:
    try:
        return msgspec.convert(arguments, shape)
    except msgspec.ValidationError as fault:
        raise CallFailed("not an argument that GitHub may get:", str(fault), retryable=False) from fault
