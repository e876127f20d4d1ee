"""A double of Notion's API 2026-03-11, as far as specs need it: data sources, pages made of markdown, their text.

    POST  /v1/pages                          {parent: {data_source_id}, properties, markdown | children} → page with url
    GET   /v1/pages/{id} · PATCH …           properties, in_trash
    GET   /v1/pages/{id}/markdown · PATCH …  {type: replace_content, replace_content: {new_str}}
    POST  /v1/data_sources/{id}/query        {filter: {property, rich_text: {equals}}, page_size, start_cursor}

Checks what the documentation says: `Notion-Version` is mandatory, unknown fields are refused, one of `markdown`,
`children` and `content` at most, 2,000 characters a text, 100 of everything, 500 KB a body. The kinds of "too many":
429 with Retry-After and its reason (`ratelimited` of the integration, `spent` of the whole workspace), 529 where Notion
itself is overloaded (`unavailable`). A full free workspace is no limit that passes: see `full`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web

from .doubles import Double, Fault

VERSION = "2026-03-11"
BODY_BYTES_MAX = 500_000
TEXT_CHARS_MAX = 2000
ARRAY_MAX = 100
CODES = {
    400: "validation_error", 401: "unauthorized", 403: "restricted_resource", 404: "object_not_found",
    405: "invalid_request_url", 409: "conflict_error", 413: "validation_error", 429: "rate_limited",
    529: "service_overload",
}  # fmt: skip

Properties = dict[str, dict[str, Any]]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Parent(msgspec.Struct, forbid_unknown_fields=True):
    data_source_id: str | None = None
    page_id: str | None = None
    type: str | None = None


class NewPage(msgspec.Struct, forbid_unknown_fields=True):
    parent: Parent
    properties: Properties = msgspec.field(default_factory=dict)
    markdown: str | None = None
    children: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=ARRAY_MAX)] | None = None
    icon: dict[str, Any] | None = None
    allow_async: bool = False


class PageChange(msgspec.Struct, forbid_unknown_fields=True):
    properties: Properties = msgspec.field(default_factory=dict)
    in_trash: bool | None = None


class NewText(msgspec.Struct, forbid_unknown_fields=True):
    new_str: str


class TextChange(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["replace_content"]
    replace_content: NewText


class Equals(msgspec.Struct, forbid_unknown_fields=True):
    equals: str


class Filter(msgspec.Struct, forbid_unknown_fields=True):
    property: str
    rich_text: Equals


class Query(msgspec.Struct, forbid_unknown_fields=True):
    filter: Filter | None = None
    page_size: Annotated[int, msgspec.Meta(ge=1, le=100)] = 100
    start_cursor: str | None = None


@dataclass(slots=True)
class Page:
    """One page as it stands."""

    id: str
    parent: str
    properties: Properties
    markdown: str
    in_trash: bool = False
    created_time: str = field(default_factory=now)
    last_edited_time: str = field(default_factory=now)

    def told(self) -> dict[str, Any]:
        url = f"https://www.notion.so/{self.id.replace('-', '')}"
        parent = {"type": "data_source_id", "data_source_id": self.parent}
        told = {"object": "page", "id": self.id, "url": url, "parent": parent, "in_trash": self.in_trash}
        times = {"created_time": self.created_time, "last_edited_time": self.last_edited_time}
        return told | times | {"properties": self.properties}


class NotionDouble(Double):
    def __init__(self, key: str = "ntn_demo", properties: Mapping[str, str] | None = None) -> None:
        """`properties`: those of the one data source, name → type."""
        super().__init__(key)
        self.data_source = str(uuid.uuid4())
        self.schema = dict(properties or {"Name": "title", "Linear ID": "rich_text"})
        self.pages: dict[str, Page] = {}
        self.full = False
        """A free workspace with members that has used up its 1,000 blocks: creates fail for good."""

    def edit(self, page: str, markdown: str) -> bytes:
        """A person changes a page's text; the webhook that Notion sends of it (a signal: it tells no new value)."""
        self.pages[page].markdown = markdown
        self.pages[page].last_edited_time = now()
        return self.webhook("page.content_updated", page)

    def webhook(self, kind: str, page: str, author: str = "person") -> bytes:
        """The event `kind` of a page, as Notion sends it."""
        told = {
            "id": str(uuid.uuid4()), "timestamp": now(), "workspace_id": str(uuid.uuid4()), "workspace_name": "Pi",
            "subscription_id": str(uuid.uuid4()), "integration_id": str(uuid.uuid4()), "type": kind,
            "authors": [{"id": str(uuid.uuid4()), "type": author}], "attempt_number": 1, "api_version": VERSION,
            "entity": {"id": page, "type": "page"},
            "data": {"parent": {"id": self.data_source, "type": "data_source"}},
        }  # fmt: skip
        return json.dumps(told).encode()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/pages", self._create),
            web.get("/v1/pages/{page}", self._show),
            web.patch("/v1/pages/{page}", self._change),
            web.get("/v1/pages/{page}/markdown", self._text),
            web.patch("/v1/pages/{page}/markdown", self._retell),
            web.post("/v1/data_sources/{source}/query", self._query),
        ]

    def limited(self, fault: Fault) -> web.Response:
        space = "_space" if fault.kind == "spent" else ""
        reason = {"additional_data": {"rate_limit_reason": f"public_api{space}_request_rate_limit"}}
        body = {**self.refusal(429, "You have been rate limited. Please try again in a few minutes."), **reason}
        return web.json_response(body, status=429, headers={"Retry-After": f"{fault.seconds:g}"})

    def overloaded(self, fault: Fault) -> web.Response:
        body = self.refusal(529, "Notion is overloaded.")
        return web.json_response(body, status=529, headers={"Retry-After": f"{fault.seconds:g}"})

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        code = CODES.get(status, "internal_server_error")
        return {"object": "error", "status": status, "code": code, "message": why, "request_id": str(uuid.uuid4())}

    def check(self, request: web.Request) -> None:
        super().check(request)
        if request.headers.get("Notion-Version") != VERSION:
            raise self.wrong(400, f"Notion-Version header failed validation: it should be {VERSION}")
        if (request.content_length or 0) > BODY_BYTES_MAX:
            raise self.wrong(413, f"body failed validation: body should be under {BODY_BYTES_MAX} bytes")

    async def _create(self, request: web.Request) -> web.Response:
        wish = await self.read(request, NewPage)
        if wish.markdown is not None and wish.children is not None:
            raise self.wrong(400, "markdown and children cannot be used together")
        if wish.parent.data_source_id != self.data_source:
            raise self.wrong(404, "Could not find data source. Is it shared with the integration?")
        self._check_properties(wish.properties)
        if self.full:
            raise self.wrong(400, "This workspace has reached its block limit. Upgrade to keep adding content.")
        page = Page(str(uuid.uuid4()), self.data_source, wish.properties, wish.markdown or "")
        self.pages[page.id] = page
        return web.json_response(page.told())

    async def _show(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request).told())

    async def _change(self, request: web.Request) -> web.Response:
        page, wish = self._find(request), await self.read(request, PageChange)
        self._check_properties(wish.properties)
        page.properties |= wish.properties
        page.in_trash = page.in_trash if wish.in_trash is None else wish.in_trash
        return web.json_response(page.told())

    async def _text(self, request: web.Request) -> web.Response:
        return web.json_response(self._told_text(self._find(request)))

    async def _retell(self, request: web.Request) -> web.Response:
        page, wish = self._find(request), await self.read(request, TextChange)
        page.markdown = wish.replace_content.new_str
        return web.json_response(self._told_text(page))

    async def _query(self, request: web.Request) -> web.Response:
        wish = await self.read(request, Query)
        if request.match_info["source"] != self.data_source:
            raise self.wrong(404, "Could not find data source. Is it shared with the integration?")
        found = [page for page in self.pages.values() if not page.in_trash]
        if wish.filter is not None:
            name, text = wish.filter.property, wish.filter.rich_text.equals
            if self.schema.get(name) != "rich_text":
                raise self.wrong(400, f"Could not find property with name: {name}")
            found = [page for page in found if _text_of(page.properties.get(name)) == text]
        start = int(wish.start_cursor or 0)
        page = found[start : start + wish.page_size]
        more = start + len(page) < len(found)
        told = {"object": "list", "results": [one.told() for one in page], "has_more": more}
        return web.json_response(told | {"next_cursor": str(start + len(page)) if more else None})

    def _check_properties(self, properties: Properties) -> None:
        for name, value in properties.items():
            kind = self.schema.get(name)
            if kind is None:
                raise self.wrong(400, f"{name} is not a property that exists.")
            if list(value) != [kind] or not isinstance(value[kind], list) or len(value[kind]) > ARRAY_MAX:
                raise self.wrong(400, f"{name} is expected to be {kind}.")
            for part in value[kind]:
                if len(part["text"]["content"]) > TEXT_CHARS_MAX:
                    raise self.wrong(400, f"{name}: text.content.length should be ≤ `{TEXT_CHARS_MAX}`")

    def _told_text(self, page: Page) -> dict[str, Any]:
        return {"object": "page_markdown", "id": page.id, "markdown": page.markdown, "truncated": False}

    def _find(self, request: web.Request) -> Page:
        page = self.pages.get(request.match_info["page"])
        if page is None:
            raise self.wrong(404, "Could not find page. Make sure it is shared with the integration.")
        return page


def _text_of(value: Mapping[str, Any] | None) -> str:
    return "".join(part["text"]["content"] for part in (value or {}).get("rich_text", []))
