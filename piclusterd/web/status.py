"""The status page: what an owner of three Pis keeps open on a wall tablet.

    GET /                 the whole page, rendered here: it works with scripts off (then it reloads itself); who does
                          not ask for HTML gets Ollama's greeting, by which its clients know a server
    GET /?fragment=main   its changing parts, fetched by status.js on each event, at most once a second
    GET /static/{name}    three small files from the package, from memory, with ETag
    GET /status.json      the same picture for programs (its route is in `admin`)

Owns the wording and geometry of the page; asks the node for one `View` a request. Refuses inline script and style
(strict CSP), foreign hosts, and trust: titles and names come from strangers, so everything is escaped by the template
and nothing is put into an attribute that a browser would run. Data that is old says how old it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..board.sensors import HOT_C
from ..errors import PiclusterError
from ..ids import NodeId
from ..views import MemberView, RunView, View
from ..wire import Facts
from . import health
from .admin import as_json
from .stream import BusEvent, EventBus

HERE = Path(__file__).parent
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

STALE_S = 15.0
"""Facts older than this are drawn as history, with their age."""
RUNS_MAX = 20
EVENTS_MAX = 20
DRAWN_MAX = 12
"""Nodes in the picture; more would overlap, and the table has them all."""
LABEL_MAX = 16
"""Characters of a name in the picture."""
NO_SCRIPT_RELOAD_S = 10
GREETING = "Ollama is running"

WIDTH, HEIGHT = 440, 250
"""Of the picture, in its own units."""
HLC_SHIFT = 16
"""A hybrid logical clock is milliseconds << 16 | counter."""


class Page:
    """`view` may raise any `PiclusterError`; `uptime` in seconds; `wall` in seconds since 1970."""

    def __init__(
        self,
        view: Callable[[], Awaitable[View]],
        edge: Callable[[], Mapping[str, Any]],
        bus: EventBus,
        release: str,
        wall: Callable[[], float],
        uptime: Callable[[], float],
    ) -> None:
        self._view, self._edge, self._bus = view, edge, bus
        self._release, self._wall, self._uptime = release, wall, uptime
        jinja = Environment(
            autoescape=True, loader=FileSystemLoader(HERE / "templates"), trim_blocks=True, lstrip_blocks=True,
            undefined=StrictUndefined, auto_reload=False,
        )  # fmt: skip
        self._whole, self._main = jinja.get_template("status.html"), jinja.get_template("main.html")
        self._static = {path.name: _Static(path) for path in (HERE / "static").iterdir() if path.suffix in TYPES}

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self._show), web.get("/static/{name}", self._file)]

    async def picture(self) -> dict[str, Any]:
        """Body of /status.json and /admin/view: every field of `View`, and what was made of it."""
        view, edge = await self._view(), self._edge()
        found = health.findings(view, edge)
        judged = health.verdict(view, found)
        more = {"status": judged.status, "verdict": judged.sentence, "findings": [asdict(one) for one in found],
                "edge": dict(edge), "release": self._release, "uptime_s": round(self._uptime(), 1)}  # fmt: skip
        return {**as_json(view), **more}

    async def _show(self, request: web.Request) -> web.Response:
        if "text/html" not in request.headers.get("Accept", "") and not request.query:
            return web.Response(text=GREETING)
        base = f"{request.scheme}://{request.host}"
        now = self._wall()
        shared = {"release": self._release, "uptime": health.ago(self._uptime()), "base": base,
                  "now": _clock_time(now), "reload_s": NO_SCRIPT_RELOAD_S,
                  "events": [_event(event) for event in self._bus.recent(EVENTS_MAX)]}  # fmt: skip
        try:
            view = await self._view()
        except PiclusterError as fault:
            body, code = self._whole.render(fault=fault, view=None, name="", model="", **shared), 503
        else:
            shown = shape(view, self._edge(), now)
            template = self._main if request.query.get("fragment") == "main" else self._whole
            body, code = template.render(fault=None, view=view, **shown, **shared), 200
        response = web.Response(text=body, status=code, content_type="text/html", headers={"Cache-Control": "no-store"})
        response.enable_compression()
        return response

    async def _file(self, request: web.Request) -> web.Response:
        found = self._static.get(request.match_info["name"])
        if found is None:
            raise web.HTTPNotFound
        headers = {"Cache-Control": "no-cache", "ETag": found.etag}
        if request.headers.get("If-None-Match") == found.etag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=found.body, content_type=found.content_type, charset="utf-8", headers=headers)


class _Static:
    def __init__(self, path: Path) -> None:
        self.body = path.read_bytes()
        self.content_type = TYPES[path.suffix]
        self.etag = f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'


# what the template needs -----------------------------------------------------------------------------------------
def shape(view: View, edge: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The picture in the template's words. Pure; `now` in seconds since 1970."""
    called = health.names(view)
    found = health.findings(view, edge)
    members = sorted(view.members, key=lambda member: (called[member.node], member.node))
    models = [model.name for member in members for model in member.facts.models if member.state == "alive"]
    return {
        "name": view.name,
        "judged": health.verdict(view, found),
        "findings": found,
        "leader": called.get(view.leader, str(view.leader)) if view.leader else None,
        "edge": edge,
        "nodes": [_node(view, member, called) for member in members],
        "drawing": drawing(view, members, called),
        "runs": [_run(run, now) for run in sorted(view.runs, key=lambda run: -run.hlc)[:RUNS_MAX]],
        "heads": [(called.get(h.origin, str(h.origin)), h.epoch, h.seq) for h in view.heads],
        "model": next(iter(models), "your-model"),
    }


def _node(view: View, member: MemberView, called: Mapping[NodeId, str]) -> dict[str, Any]:
    facts, heard = member.facts, member.heard_s or 0.0
    return {
        "name": called[member.node],
        "me": member.node == view.me,
        "state": member.state,
        "since": health.ago(member.since_s),
        "role": "relay" if facts.role == "relay" else health.role_of(view, member),
        "leads": member.node == view.leader,
        "stale": member.state != "alive" or heard > STALE_S,
        "heard": "this node" if member.node == view.me else "now" if heard < 1 else f"{health.ago(heard)} ago",
        "load": _percent(health.finite(facts.cpu_percent) or 0.0),
        "temperature": health.finite(facts.temperature_c),
        "hot": facts.temperature_c is not None and facts.temperature_c >= HOT_C,
        "facts": facts,
        **_memory(facts),
    }


def _memory(facts: Facts) -> dict[str, Any]:
    if facts.memory_total <= 0:
        return {"memory": None, "memory_text": "–"}
    used, total = facts.memory_used / 2**30, facts.memory_total / 2**30
    return {"memory": _percent(100 * used / total), "memory_text": f"{used:.1f} of {total:.1f} GB"}


def _percent(share: float) -> int:
    return max(0, min(100, round(share)))


def _run(run: RunView, now: float) -> dict[str, Any]:
    at = (run.hlc >> HLC_SHIFT) / 1000
    return {"run": run, "iso": _iso(at), "ago": f"{health.ago(now - at)} ago"}


def _event(event: BusEvent) -> dict[str, str]:
    text = str(event.data.get("text", event.kind))
    return {"iso": _iso(event.at), "time": _clock_time(event.at), "kind": event.kind, "text": text}


def _iso(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):  # a clock that a peer made up
        return ""


def _clock_time(seconds: float) -> str:
    return _iso(seconds)[11:19]


# the picture -----------------------------------------------------------------------------------------------------
def drawing(view: View, members: list[MemberView], called: Mapping[NodeId, str]) -> dict[str, Any] | None:
    """Where to draw whom: the house in a ring, relays beside it; a line from the leader to each node it leads.

    None where there are too many. `text` says the same in words.
    """
    if not 0 < len(members) <= DRAWN_MAX:
        return None
    spots = _spots(members)
    dots = [_dot(view, member, called, spots[member.node]) for member in members]
    hub = spots.get(view.leader) if view.leader else None
    lines = [] if hub is None else [{"from": hub, "to": dot["at"], "state": dot["state"]} for dot in dots
                                    if dot["at"] != hub]  # fmt: skip
    text = ". ".join(f"{dot['full']}: {dot['role']}, {dot['state']}" for dot in dots)
    return {"width": WIDTH, "height": HEIGHT, "dots": dots, "lines": lines, "text": text}


def _dot(view: View, member: MemberView, called: Mapping[NodeId, str], at: tuple[int, int]) -> dict[str, Any]:
    name = called[member.node]
    return {
        "at": at,
        "full": name,
        "label": name if len(name) <= LABEL_MAX else name[: LABEL_MAX - 1] + "…",
        "state": member.state,
        "role": "relay" if member.facts.role == "relay" else health.role_of(view, member),
        "leads": member.node == view.leader,
    }


def _spots(members: list[MemberView]) -> dict[NodeId, tuple[int, int]]:
    relays = [member.node for member in members if member.facts.role == "relay"]
    house = [member.node for member in members if member.facts.role != "relay"]
    middle = WIDTH // 2 - (60 if relays else 0)
    spots = {}
    for index, node in enumerate(house):
        angle = math.tau * index / len(house) - math.pi / 2
        radius = 0 if len(house) == 1 else 1
        spots[node] = (round(middle + radius * 118 * math.cos(angle)), round(120 + radius * 76 * math.sin(angle)))
    for index, node in enumerate(relays):
        spots[node] = (WIDTH - 50, round(HEIGHT * (index + 1) / (len(relays) + 1)) - 10)
    return spots
