"""A double of GitHub: a repository's webhook that delivers signed events, and the API that lists and repeats them.

    double.deliver("push", {...}) ──signed POST──▶ the hook's URL            GitHub never tries again by itself
    GET  /repos/{o}/{r}/hooks/{id}/deliveries?per_page=&status=&cursor=      newest first; what failed shows here
    GET  …/deliveries/{delivery} · POST …/deliveries/{delivery}/attempts     202: sent again, under the same GUID
    GET  /repos/{o}/{r}/actions/runs/{run} · GET /repos/{o}/{r}/releases/tags/{tag}

Checks what the documentation asks: Bearer token, `Accept: application/vnd.github+json`, `X-GitHub-Api-Version`, a
`User-Agent`, known query parameters in their ranges, redelivery within 3 days. The two kinds of "too many": the
secondary limit (`ratelimited`: 429 with Retry-After) and the hour's own (`spent`: 403, remaining 0, reset in seconds).
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from .doubles import Double, Fault
from .signing import sign

REPOSITORY = "octo/house"
HOOK_ID = 1
API_VERSION = "2022-11-28"
REDELIVER_S = 3 * 86_400
PER_PAGE_MAX = 100
ANSWER_S = 10.0
"""GitHub waits so long for a 2xx."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One sending. `guid` names the event and is the same in every sending of it."""

    id: int
    guid: str
    event: str
    body: bytes
    at: float
    status_code: int
    redelivery: bool = False

    def told(self) -> dict[str, Any]:
        when = datetime.fromtimestamp(self.at, UTC).isoformat().replace("+00:00", "Z")
        status = "OK" if 200 <= self.status_code < 300 else "Invalid HTTP Response: " + str(self.status_code)
        action = json.loads(self.body).get("action")
        told = {"id": self.id, "guid": self.guid, "delivered_at": when, "redelivery": self.redelivery}
        return told | {"status": status, "status_code": self.status_code, "event": self.event, "action": action}


class GitHubDouble(Double):
    def __init__(self, key: str = "ghp_demo", secret: str = "", clock: Callable[[], float] = time.time) -> None:
        """`secret` signs the webhooks."""
        super().__init__(key)
        self.secret = secret
        self.hook_url = ""
        self.deliveries: list[Delivery] = []
        self.runs: dict[int, Mapping[str, Any]] = {}
        self.releases: dict[str, Mapping[str, Any]] = {}
        self._clock = clock
        self._ids = itertools.count(1001)

    # webhooks -------------------------------------------------------------------------------------------------------
    async def deliver(self, event: str, payload: Mapping[str, Any]) -> Delivery:
        """Something happened: one sending, whatever becomes of it."""
        told = {**payload, "repository": {"full_name": REPOSITORY, "default_branch": "main"}}
        first = Delivery(0, str(uuid.uuid4()), event, json.dumps(told).encode(), 0.0, 0)
        return await self._send(first)

    async def _send(self, delivery: Delivery) -> Delivery:
        headers = sign("github", delivery.body, self.secret, event=delivery.event, delivery=delivery.guid)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S)) as http,
                http.post(self.hook_url, data=delivery.body, headers=headers) as answer,
            ):
                status = answer.status
        except (aiohttp.ClientError, OSError):
            status = 502
        sent = replace(delivery, id=next(self._ids), at=self._clock(), status_code=status)
        self.deliveries.append(sent)
        return sent

    # the API --------------------------------------------------------------------------------------------------------
    def routes(self) -> list[web.RouteDef]:
        repository = f"/repos/{REPOSITORY}"
        hook = f"{repository}/hooks/{HOOK_ID}/deliveries"
        return [
            web.get(hook, self._list),
            web.get(hook + r"/{delivery:\d+}", self._show),
            web.post(hook + r"/{delivery:\d+}/attempts", self._attempt),
            web.get(repository + r"/actions/runs/{run:\d+}", self._run),
            web.get(repository + "/releases/tags/{tag}", self._release),
        ]

    def limited(self, fault: Fault) -> web.Response:
        if fault.kind == "spent":
            body = self.refusal(403, "API rate limit exceeded for user ID 1.")
            reset = str(int(self._clock() + fault.seconds))
            headers = {"x-ratelimit-limit": "5000", "x-ratelimit-remaining": "0", "x-ratelimit-reset": reset}
            return web.json_response(body, status=403, headers=headers)
        body = self.refusal(429, "You have exceeded a secondary rate limit.")
        return web.json_response(body, status=429, headers={"Retry-After": f"{fault.seconds:g}"})

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        return {"message": why, "documentation_url": "https://docs.github.com/rest", "status": str(status)}

    def check(self, request: web.Request) -> None:
        super().check(request)
        wanted = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": API_VERSION}
        for name, value in wanted.items():
            if request.headers.get(name) != value:
                raise self.wrong(415, f"{name} must be {value}")
        if not request.headers.get("User-Agent"):
            raise self.wrong(403, "Request forbidden by administrative rules: no User-Agent")

    async def _list(self, request: web.Request) -> web.Response:
        query = dict(request.query)
        size, before = query.pop("per_page", "30"), query.pop("cursor", str(2**53))
        wanted = query.pop("status", "")
        if query or wanted not in ("", "success", "failure") or not _within(size, PER_PAGE_MAX) or not before.isdigit():
            raise self.wrong(422, "Validation Failed")
        found = [d for d in reversed(self.deliveries) if d.id < int(before)]
        if wanted:
            found = [d for d in found if (200 <= d.status_code < 300) == (wanted == "success")]
        page = found[: int(size)]
        more = {}
        if len(found) > len(page):
            more["Link"] = f'<{self.url}{request.path}?per_page={size}&cursor={page[-1].id}>; rel="next"'
        return web.json_response([delivery.told() for delivery in page], headers=more)

    async def _show(self, request: web.Request) -> web.Response:
        delivery = self._find(request)
        sent = {"headers": {"X-GitHub-Delivery": delivery.guid}, "payload": json.loads(delivery.body)}
        return web.json_response(delivery.told() | {"request": sent})

    async def _attempt(self, request: web.Request) -> web.Response:
        delivery = self._find(request)
        if self._clock() - delivery.at > REDELIVER_S:
            raise self.wrong(422, "This delivery is too old to be redelivered")
        await self._send(replace(delivery, redelivery=True))
        return web.json_response({}, status=202)

    async def _run(self, request: web.Request) -> web.Response:
        return self._known(self.runs, int(request.match_info["run"]))

    async def _release(self, request: web.Request) -> web.Response:
        return self._known(self.releases, request.match_info["tag"])

    def _known(self, held: Mapping[Any, Mapping[str, Any]], key: Any) -> web.Response:
        if key not in held:
            raise self.wrong(404, "Not Found")
        return web.json_response(held[key])

    def _find(self, request: web.Request) -> Delivery:
        wanted = int(request.match_info["delivery"])
        found = next((delivery for delivery in self.deliveries if delivery.id == wanted), None)
        if found is None:
            raise self.wrong(404, "Not Found")
        return found


def _within(text: str, most: int) -> bool:
    return text.isdigit() and 1 <= int(text) <= most
