"""GitHub's record of one webhook's deliveries, behind the two REST calls that the client makes.

Checks each request as GitHub does: method, path, token, API version, page size. Faults are used up one a request.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web

HOOK = "ann/house/42"
TOKEN = "ghp_test"
Fault = Literal["primary", "secondary", "500", "hang-up", "malformed"]


class DeliveriesDouble:
    def __init__(self) -> None:
        self.deliveries: list[dict[str, Any]] = []
        """Oldest first, as `hook deliveries` of the REST documentation."""
        self.redelivered: list[int] = []
        self.violations: list[str] = []
        self.faults: deque[Fault | None] = deque()
        self.url = ""
        self._runner: web.AppRunner | None = None

    def sent(self, guid: str, status: int, ago_s: float = 0.0) -> int:
        number = 1000 + len(self.deliveries)
        at = datetime.fromtimestamp(time.time() - ago_s, UTC).isoformat().replace("+00:00", "Z")
        self.deliveries.append({
            "id": number, "guid": guid, "delivered_at": at, "redelivery": False, "duration": 0.1,
            "status": "OK" if status == 200 else "failed", "status_code": status, "event": "push", "action": None,
            "installation_id": None, "repository_id": 1, "throttled_at": None,
        })  # fmt: skip
        return number

    async def __aenter__(self) -> DeliveriesDouble:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            return self._fail(fault, request)
        expected = {"Authorization": f"Bearer {TOKEN}", "X-GitHub-Api-Version": "2022-11-28"}
        wrong = [name for name, value in expected.items() if request.headers.get(name) != value]
        if wrong or not request.headers.get("User-Agent"):
            self.violations.append(f"headers {wrong}")
            return web.json_response({"message": "Bad credentials"}, status=401)
        base = "/repos/ann/house/hooks/42/deliveries"
        if (request.method, request.path) == ("GET", base):
            return self._page(request)
        if request.method == "POST" and request.path.startswith(base) and request.path.endswith("/attempts"):
            return self._attempt(int(request.path.split("/")[-2]))
        return web.json_response({"message": "Not Found"}, status=404)

    def _page(self, request: web.Request) -> web.Response:
        size, cursor = int(request.query.get("per_page", 30)), request.query.get("cursor")
        if size > 100:
            self.violations.append("per_page over 100")
        rows = sorted(self.deliveries, key=lambda row: -int(row["id"]))
        rows = [row for row in rows if cursor is None or row["id"] < int(cursor.removeprefix("v1_"))]
        page, headers = rows[:size], {}
        if len(rows) > size:
            following = request.url.with_query(per_page=size, cursor=f"v1_{page[-1]['id']}")
            headers["Link"] = f'<{following}>; rel="next", <{request.url}>; rel="self"'
        return web.json_response(page, headers=headers)

    def _attempt(self, number: int) -> web.Response:
        if number not in {row["id"] for row in self.deliveries}:
            return web.json_response({"message": "Not Found"}, status=404)
        self.redelivered.append(number)
        return web.json_response({}, status=202)

    def _fail(self, fault: Fault, request: web.Request) -> web.Response:
        match fault:
            case "primary":
                headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(time.time()) + 120)}
                return web.json_response({"message": "API rate limit exceeded"}, status=403, headers=headers)
            case "secondary":
                return web.json_response({"message": "secondary"}, status=429, headers={"retry-after": "30"})
            case "500":
                return web.Response(status=500, text="oops")
            case "hang-up":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case "malformed":
                return web.json_response([{"id": "seven"}])
