"""`GET /why/{request}`: what the cluster remembers of one request, node by node. Reading is free, as of the status.

client ─▶ /why/{id} ─▶ find ─▶ {"request", "seen": [{"node", "relayed_by", "hops", "waited_s", …}]} | 404
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ..errors import NotFound

Find = Callable[[str], Awaitable[list[dict[str, Any]]]]


def routes(find: Find) -> list[web.RouteDef]:
    async def why(request: web.Request) -> web.Response:
        asked = request.match_info["id"]
        seen = await find(asked)
        if not seen:
            raise NotFound(f"no node remembers the request {asked!r}", "Each keeps the newest 512, until it restarts.")
        return web.json_response({"request": asked, "seen": seen})

    return [web.get("/why/{id:[A-Za-z0-9._-]{1,64}}", why)]
