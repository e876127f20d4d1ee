"""The client listener: one aiohttp application that any node serves, on TCP and on the owner's unix socket.

    request ─▶ id ─▶ faults as JSON ─▶ Host and Origin ─▶ bearer key ─▶ health | metrics | events | page | hooks
                                                                        | admin | the OpenAI routes (injected)

Owns what every door shares: the request id (header `X-Request-Id`, context variable for the logs), the shape of an
error, the guards, the security headers. Refuses: Host names that are not ours (421: DNS rebinding), writes from
another site's page (403), /v1 and /api without a key where keys are set (401). A fault of ours is logged with its id
and told without its traceback.

    {"error": {"message", "what", "why", "fix", "type", "param", "code"}}      OpenAI's error object and three of ours
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ..board.logs import request_id
from ..board.survey import clock_synced
from ..errors import PiclusterError, Refused, Unavailable, UserError
from ..events import HookTaken
from ..views import View
from ..wire import HOOK_BYTES_MAX, Hook
from . import admin, health, hooks, metrics, status, stream
from . import ollama_schema as ollama
from .admin import AdminDoors
from .keys import Keyring, NoKey, caller
from .listener import ANSWERING, Answering, route_of
from .metrics import Meters
from .stream import EventBus
from .visitors import remember

log = logging.getLogger(__name__)

BODY_BYTES_MAX = HOOK_BYTES_MAX + 64 * 1024
"""The largest webhook and some slack, so that its own door can say exactly what was too large."""
HOSTS_KEPT = 64
"""Verdicts about names in Host headers: a node goes by few."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Server": "piclusterd",
}
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 421: "unknown_host", 429: "overloaded",
         503: "unavailable"}  # fmt: skip


class WrongHost(Refused):
    status = 421


@dataclass(frozen=True, slots=True)
class Doors:
    """Everything the pages and doors need of the daemon."""

    name: str
    """This node's name, accepted in Host."""
    release: str
    view: Callable[[], Awaitable[View]]
    take_hook: Callable[[Hook], Awaitable[HookTaken]]
    bus: EventBus
    admin: AdminDoors
    meters: Meters = field(default_factory=Meters)
    edge: Callable[[], Mapping[str, Any]] = lambda: health.NO_EDGE
    """The hub connection: url, connected, last_seq, and depth or why where known."""
    providers: Callable[[], Sequence[Mapping[str, Any]]] = tuple
    """Who answers when no node can: name, kind, model, state and what it was used for today."""
    ledger_fault: Callable[[], str] = lambda: ""
    """Why the ledger takes no writes; "" while it does."""
    secrets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Webhook secrets by source."""
    lists: hooks.Lists = field(default_factory=hooks.Lists)
    keys: Keyring | None = None
    """Bearer keys of /v1 and /api; None: open."""
    allowed_hosts: tuple[str, ...] = ()
    extra_routes: Sequence[web.AbstractRouteDef] = ()
    wall: Callable[[], float] = time.time
    clock_synced: Callable[[], bool] = clock_synced
    """Whether a time server has set `wall`."""
    clock: Callable[[], float] = time.monotonic
    started: float = field(default_factory=time.monotonic)
    """When the daemon started, by `clock`."""


def _wall_ms(doors: Doors) -> int | None:
    return int(doors.wall() * 1000) if doors.clock_synced() else None


def make_app(doors: Doors) -> web.Application:
    """The application; it starts nothing until it is served."""
    answering = Answering()
    guards = [_identify(doors.meters), answering.count, _explain, remember]
    guards.append(_guard_host(doors.name, doors.allowed_hosts))
    if doors.keys is not None:
        guards.append(_guard_keys(doors.keys))
    app = web.Application(middlewares=guards, client_max_size=BODY_BYTES_MAX)
    app[ANSWERING] = answering
    page = status.Page(doors.view, doors.edge, doors.bus, doors.release, doors.wall, lambda: _uptime(doors))
    app.add_routes(page.routes())
    app.add_routes(
        health.routes(doors.view, doors.edge, doors.ledger_fault, doors.release, doors.wall, doors.providers)
    )
    app.add_routes(metrics.routes(doors.view, doors.meters))
    app.add_routes(stream.routes(doors.bus))
    app.add_routes(hooks.routes(doors.secrets, doors.take_hook, doors.meters, doors.lists, lambda: _wall_ms(doors)))
    app.add_routes(admin.routes(doors.admin, page.picture))
    app.add_routes(doors.extra_routes)
    app.on_response_prepare.append(_put_headers)
    app.on_shutdown.append(lambda _app: _end_streams(doors.bus))
    return app


def _uptime(doors: Doors) -> float:
    return doors.clock() - doors.started


async def _end_streams(bus: EventBus) -> None:
    bus.close()


async def _put_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.setdefault("X-Request-Id", request_id.get())
    response.headers.update(HEADERS)


# guards, outermost first -----------------------------------------------------------------------------------------
def _identify(meters: Meters) -> Middleware:
    @web.middleware
    async def identify(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Name the request and count it."""
        told = request.headers.get("X-Request-Id", "")
        request_id.set(told if told and REQUEST_ID.fullmatch(told) else f"{random.getrandbits(64):016x}")
        began, code, route = time.monotonic(), "gone", route_of(request)
        try:
            response = await handler(request)
            code = str(response.status)
            return response
        finally:
            meters.request(route, code).inc()
            meters.request_took(route).observe(time.monotonic() - began)

    return identify


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every fault becomes its status and the error object; ours are logged."""
    try:
        return await handler(request)
    except PiclusterError as fault:
        if _begun(request):
            raise  # too late for another answer: the connection is closed, which clients take for a failure
        if fault.status >= 500 and not isinstance(fault, Unavailable):
            log.exception("request %s failed", request_id.get())
        return _told(request, fault)
    except web.HTTPException as fault:
        if fault.status < 400:
            raise
        said = UserError(fault.reason.lower(), _reason(request, fault))
        allow = {"Allow": fault.headers["Allow"]} if "Allow" in fault.headers else {}
        return _told(request, said, fault.status, allow)
    except Exception:
        if _begun(request):
            raise
        log.exception("request %s failed", request_id.get())
        what = PiclusterError("this node failed to answer", "the fault is ours and is in its log",
                              f"Look for request id {request_id.get()} in `journalctl -u piclusterd`.")  # fmt: skip
        return _told(request, what)


def _told(
    request: web.Request, fault: PiclusterError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """In the words of the API that was asked."""
    response = error_response(fault, status, headers)
    if request.path.startswith("/api/"):
        response.text = json.dumps(ollama.error(fault))
    return response


def _begun(request: web.Request) -> bool:
    return request.writer.output_size > 0


def _reason(request: web.Request, fault: web.HTTPException) -> str:
    if isinstance(fault, web.HTTPRequestEntityTooLarge):
        return "a body may have 1 MiB"
    return f"{request.method} {request.path[:200]}"


def error_response(
    fault: PiclusterError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    """`fault` as JSON with its status (or `status`), Retry-After and WWW-Authenticate where they apply."""
    status = status or fault.status
    more = dict(headers or {})
    if isinstance(fault, Unavailable):
        more["Retry-After"] = str(max(1, math.ceil(fault.retry_after_s)))
    if isinstance(fault, NoKey):
        more["WWW-Authenticate"] = "Bearer"
    return web.json_response({"error": error_body(fault, status)}, status=status, headers=more)


def error_body(fault: PiclusterError, status: int) -> dict[str, Any]:
    code = "invalid_api_key" if isinstance(fault, NoKey) else CODES.get(status)
    if isinstance(fault, hooks.Unsigned):
        code = "invalid_signature"
    return {
        "message": str(fault),
        "what": fault.what,
        "why": fault.why,
        "fix": fault.fix,
        "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": getattr(fault, "param", None),
        "code": code,
    }


def _guard_host(name: str, allowed: Sequence[str]) -> Middleware:
    known = frozenset(host.lower().rstrip(".") for host in (name, "localhost", *allowed) if host)

    @web.middleware
    async def guard_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        """A page on another name must not reach us by making its name point here (DNS rebinding)."""
        if admin.is_local(request):
            return await handler(request)
        host = request.headers.get("Host", "")
        if not host_allowed(host, known):
            raise WrongHost(
                f"this node is not called {host[:200]!r}", "names it does not know are refused (DNS rebinding)",
                "Use its address, or add the name to [api] allowed_hosts.",
            )  # fmt: skip
        origin = request.headers.get("Origin")
        if origin is not None and request.method not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            raise Refused("another site's page may not write here", f"the request comes from {origin[:200]!r}")
        return await handler(request)

    return guard_host


@lru_cache(HOSTS_KEPT)
def host_allowed(host: str, known: frozenset[str]) -> bool:
    """May `host` (a Host header, with or without port) be asked for here? Addresses and *.local always may."""
    bare = re.sub(r":\d{1,5}$", "", host) if host.startswith("[") or host.count(":") < 2 else host
    bare = bare.lower().rstrip(".")
    if bare in known or (bare.endswith(".local") and len(bare) > len(".local")):
        return True
    try:
        ipaddress.ip_address(bare.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _guard_keys(keys: Keyring) -> Middleware:
    @web.middleware
    async def guard_keys(request: web.Request, handler: Handler) -> web.StreamResponse:
        """/v1 and /api ask for a key; the unix socket has shown who it is by its file mode."""
        if not route_of(request).startswith(("/v1/", "/api/")) or admin.is_local(request):
            return await handler(request)
        who = await keys.identify(request.headers.get("Authorization", ""))
        if request.method == "POST":
            who.ask()
        caller.set(who)
        return await handler(request)

    return guard_keys
