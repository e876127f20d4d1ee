"""The owner's doors to what triage learnt: on the unix socket only, as all of `/admin`.

GET /admin/triage            agreement, calibration, what could be left to triage alone
GET /admin/triage/{issue}    how one verdict came about; `issue` is LIN-12, or Linear's id
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from .admin import as_json, owner_only


@dataclass(frozen=True, slots=True)
class Explained:
    """`told` is all that is remembered, but for the vector; `lines` the same for people."""

    issue: str
    identifier: str
    title: str
    lines: tuple[str, ...]
    told: Mapping[str, Any]


def routes(
    report: Callable[[], Awaitable[Any]], why: Callable[[str], Awaitable[Explained]]
) -> list[web.RouteDef]:  # fmt: skip
    async def show_report(_request: web.Request) -> web.Response:
        return web.json_response(as_json(await report()))

    async def show_why(request: web.Request) -> web.Response:
        return web.json_response(as_json(await why(request.match_info["issue"])))

    return [
        web.get("/admin/triage", owner_only(show_report)),
        web.get("/admin/triage/{issue:[A-Za-z0-9-]{1,64}}", owner_only(show_why)),
    ]
