"""Notion's REST API: the actuator that holds the token. It makes one page an issue, and looks at pages.

    CallOut ──perform──▶ spec_page   POST /v1/data_sources/{d}/query   a page with this id already? ─▶ that one
                                     POST /v1/pages                    parent, properties, markdown, all at once
                                     POST …/query                      another beside ours? ─▶ the later to the trash
                         page_look   GET  /v1/pages/{id}               whose page is it, and what does it say of itself

Notion has no idempotency key, so the page carries one: a text property with the issue's id. It is searched for before
a page is made, and again afterwards, because a coordinator that fell may have made one meanwhile: both then keep the
older of the two. Within this process one issue is worked on at a time, and a page that was made is remembered, since
the search may be some seconds behind. What people write into a page is never overwritten.

What is believed: nothing. A page counts where its own property says so, and its address where it is Notion's.

Limits: 429 and 529 with Retry-After pass; 500 to 504 and silence pass too (made or not, the search finds out). A free
workspace that has used up its blocks, a data source that is not shared and properties that do not exist do not, and the
error says what to do about them.

Source: Notion's API documentation, versions 2025-09-03 (data sources) and 2026-03-11 (markdown, `in_trash`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Meta

from ..errors import UserError
from .outcome import CallFailed

TIMEOUT_S = 30.0
RESPONSE_BYTES_MAX = 1024 * 1024
PAUSE_DEFAULT_S = 30.0
PAUSE_MAX_S = 3600.0
INDEX_S = 5.0
"""After a page whose making was not confirmed: the search may not know it before."""
TEXT_CHARS_MAX = 2000
"""Of one text of a property; Notion's limit."""
MARKDOWN_BYTES_MAX = 400_000
"""Notion takes 500 KB a request."""
MADE_MAX = 256
"""Pages remembered: far more than a coordinator makes while the search is behind."""
WORDS_MAX = 200
HOSTS = ("notion.so", "notion.com", "notion.site")
"""Where Notion's pages live, and their subdomains."""

Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]+$")]
Property = Annotated[str, Meta(min_length=1, max_length=100)]


class _Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    data_source: Id
    id_property: Property
    title_property: Property
    issue: Id
    title: Annotated[str, Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
    markdown: Annotated[str, Meta(min_length=1)]


class _Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    page: Id
    id_property: Property


class _Text(msgspec.Struct, frozen=True):
    plain_text: str = ""
    text: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.plain_text or str((self.text or {}).get("content", ""))


class _Value(msgspec.Struct, frozen=True):
    rich_text: tuple[_Text, ...] = ()
    title: tuple[_Text, ...] = ()


class _Page(msgspec.Struct, frozen=True):
    id: Id
    url: str
    created_time: str = ""
    last_edited_time: str = ""
    in_trash: bool = False
    properties: dict[str, Any] = {}

    def text_of(self, name: str) -> str:
        """Of a text or title property; "" where it is none."""
        try:
            value = msgspec.convert(self.properties.get(name, {}), _Value)
        except msgspec.ValidationError:
            return ""
        return "".join(map(str, (*value.rich_text, *value.title)))

    @property
    def title(self) -> str:
        named = (name for name, value in self.properties.items() if isinstance(value, dict) and "title" in value)
        return self.text_of(next(named, ""))


class _List(msgspec.Struct, frozen=True):
    results: tuple[_Page, ...]


class _Fault(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


T = TypeVar("T")


class NotionClient:
    """Every operation raises `CallFailed` and nothing else."""

    def __init__(self, url: str, token: str, version: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._url = url.rstrip("/") + "/v1"
        if not token.strip() or not token.strip().isprintable():
            raise UserError("Notion's token is not one line of text", fix="Put it alone into notion.token_file.")
        self._headers = {"Authorization": f"Bearer {token.strip()}", "Notion-Version": version}
        self._timeout_s = timeout_s
        self._own: aiohttp.ClientSession | None = None
        self._turns: dict[str, asyncio.Lock] = {}
        self._made: dict[str, _Page] = {}
        """Issue → the page that this process made for it."""

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Perform one `CallOut`. `key` is not sent: the page carries the issue's id."""
        match operation:
            case "spec_page":
                wish = _checked(arguments, _Wish)
                async with self._turns.setdefault(wish.issue, asyncio.Lock()):
                    return await self.spec_page(wish)
            case "page_look":
                return await self.page_look(_checked(arguments, _Look))
            case _:
                raise CallFailed(f"Notion has no operation {operation!r} here", retryable=False)

    async def spec_page(self, wish: _Wish) -> dict[str, Any]:
        """`{page, url, repeated}`; `repeated`: it stood already, and its text was left alone."""
        if len(wish.markdown.encode()) > MARKDOWN_BYTES_MAX:
            raise CallFailed("the page is too long", f"over {MARKDOWN_BYTES_MAX} bytes", retryable=False)
        found = await self._remembered(wish.issue) or await self._standing(wish)
        if found is not None:
            return {"page": found.id, "url": found.url, "repeated": True}
        made = await self._create(wish)
        first = await self._standing(wish) or made
        if first.id != made.id:  # another coordinator was quicker
            await self._request("PATCH", f"/pages/{made.id}", {"in_trash": True}, _Page)
        self._remember(wish.issue, first)
        return {"page": first.id, "url": first.url, "repeated": first.id != made.id}

    async def page_look(self, ask: _Look) -> dict[str, Any]:
        """`{issue, title, edited_at, in_trash}`; `issue` is "" for a page that is no spec; `missing`."""
        try:
            page = await self._request("GET", f"/pages/{ask.page}", None, _Page)
        except _Missing:
            return {"missing": True}
        told = {"issue": page.text_of(ask.id_property), "title": page.title}
        return {**told, "edited_at": page.last_edited_time, "in_trash": page.in_trash}

    async def _remembered(self, issue: str) -> _Page | None:
        """The page that this process made, unless people have thrown it away since."""
        made = self._made.get(issue)
        if made is None:
            return None
        page = await self._request("GET", f"/pages/{made.id}", None, _Page)
        return None if page.in_trash else made

    async def _standing(self, wish: _Wish) -> _Page | None:
        """The oldest page of this issue."""
        asked = {"filter": {"property": wish.id_property, "rich_text": {"equals": wish.issue}}, "page_size": 10}
        told = await self._request("POST", f"/data_sources/{wish.data_source}/query", asked, _List)
        ours = [page for page in told.results if page.text_of(wish.id_property) == wish.issue and not page.in_trash]
        return _believed(min(ours, key=lambda page: (page.created_time, page.id))) if ours else None

    async def _create(self, wish: _Wish) -> _Page:
        properties = {
            wish.title_property: {"title": [{"text": {"content": wish.title}}]},
            wish.id_property: {"rich_text": [{"text": {"content": wish.issue}}]},
        }
        parent = {"type": "data_source_id", "data_source_id": wish.data_source}
        body = {"parent": parent, "properties": properties, "markdown": wish.markdown}
        page = await self._request("POST", "/pages", body, _Page)
        if page.text_of(wish.id_property) != wish.issue:
            raise CallFailed("Notion's answer is another page than was made", retryable=True, retry_after_s=INDEX_S)
        return _believed(page)

    def _remember(self, issue: str, page: _Page) -> None:
        self._made[issue] = page
        while len(self._made) > MADE_MAX:
            self._made.pop(next(iter(self._made)))

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, shape: type[T]) -> T:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session().request(
                    method, self._url + path, json=body, headers=self._headers, allow_redirects=False
                ) as response,
            ):
                answer = b""
                async for chunk in response.content.iter_chunked(64 * 1024):
                    answer += chunk
                    if len(answer) > RESPONSE_BYTES_MAX:
                        raise CallFailed("Notion's answer is too large", retryable=False)
                _judge(response.status, response.headers, answer)
        except (TimeoutError, aiohttp.ClientError, OSError) as fault:
            name = type(fault).__name__
            raise CallFailed("Notion did not answer:", name, retryable=True, retry_after_s=INDEX_S) from fault
        try:
            return msgspec.json.decode(answer, type=shape)
        except (ValueError, RecursionError) as fault:
            why = str(fault)[:WORDS_MAX]
            raise CallFailed("Notion's answer is not whole:", why, retryable=True, retry_after_s=INDEX_S) from fault

    def _session(self) -> aiohttp.ClientSession:
        if self._own is None or self._own.closed:
            self._own = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._own


class _Missing(CallFailed):
    """404: gone, or not shared with the integration."""


def _believed(page: _Page) -> _Page:
    """Raise unless its address is one of Notion's."""
    parts = urlsplit(page.url)
    host = parts.hostname or ""
    if parts.scheme == "https" and any(host == name or host.endswith("." + name) for name in HOSTS):
        return page
    raise CallFailed("Notion told an address that is not Notion's", page.url[:WORDS_MAX], retryable=True)


def _judge(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raise what the answer means; nothing for 2xx."""
    if status < 300:
        return
    try:
        fault = msgspec.json.decode(body, type=_Fault)
    except (ValueError, RecursionError):
        fault = _Fault()
    words = f"{fault.code}: {fault.message}"[:WORDS_MAX] if fault.code else f"HTTP {status}"
    if status in (429, 529):
        pause_s = _pause_s(headers)
        raise CallFailed(
            "Notion limits our rate" if status == 429 else "Notion is overloaded", f"for {pause_s:.0f} s",
            retryable=True, retry_after_s=pause_s,
        )  # fmt: skip
    if status >= 500 or status in (408, 409):
        raise CallFailed("Notion failed:", words, retryable=True, retry_after_s=INDEX_S)
    if status == 404:
        fix = "Share the data source with the integration, or correct [spec] data_source."
        raise _Missing("Notion does not show it to us:", words, fix, retryable=False)
    raise CallFailed("Notion refuses:", words, _fix(status, fault.message), retryable=False)


def _fix(status: int, message: str) -> str:
    if "block limit" in message.lower():
        return "The workspace's plan is used up: upgrade it, or name a data source of another workspace."
    if status in (401, 403):
        return "Put a valid token with insert and read capabilities into [notion] token_file."
    return "Compare [spec] title_property and id_property with the data source's properties."


def _pause_s(headers: Mapping[str, str]) -> float:
    asked = headers.get("Retry-After", "")
    return min(float(asked), PAUSE_MAX_S) if asked.isdigit() else PAUSE_DEFAULT_S


def _checked(arguments: Mapping[str, Any], shape: type[T]) -> T:
    try:
        return msgspec.convert(arguments, shape)
    except msgspec.ValidationError as fault:
        raise CallFailed("not an argument that Notion may get:", str(fault), retryable=False) from fault
