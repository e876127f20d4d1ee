"""Live events: what the cluster does, told to pages and command lines as it happens.

    Noted(note) ──▶ EventBus.note ──▶ ring of 256 ──▶ GET /events                 SSE, resumed by Last-Event-ID
                                  └─▶ follower queues                             ?format=jsonl for the command line

Owns the ring and one bounded queue per client. Refuses the 33rd client (503). A client that cannot keep up is dropped
with a last comment rather than slowing anybody: it reconnects and resumes from the ring. Ids grow; give `first_id`
from the clock so that they also grow across restarts (an id from the future means the clock went back: the whole ring
is sent again). Ledger growth is told live and not kept, or it would push the rest out of the ring.

Source: HTML Living Standard §9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, assert_never

import msgspec
from aiohttp import web

from .. import events
from ..errors import Unavailable
from ..ids import NodeId

RING_MAX = 256
"""Events kept for those who were away: some hours of a calm cluster, at most a few hundred KiB."""
CLIENTS_MAX = 32
"""Open streams. Each holds a socket and a queue; a house has a few tablets."""
QUEUE_MAX = 512
"""Events waiting for one client: a full replay of the ring and as much again."""
HEARTBEAT_S = 15.0
"""Silence after which a comment is sent, so that proxies keep the stream and dead clients are noticed."""
WRITE_TIMEOUT_S = 10.0
"""A client whose socket takes nothing for so long is gone."""
RETRY_MS = 2000


class BusEvent(msgspec.Struct, frozen=True):
    """One line of the stream. `at` is the wall clock in seconds since 1970, for display only."""

    id: int
    at: float
    kind: str
    data: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Follower:
    """One client. `None` in the queue is the end; `lost` says that it could not keep up."""

    queue: asyncio.Queue[BusEvent | None] = field(default_factory=lambda: asyncio.Queue(QUEUE_MAX))
    lost: bool = False


class EventBus:
    def __init__(
        self, first_id: int = 1, wall: Callable[[], float] = time.time, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._next_id = first_id
        self._wall = wall
        self._ring: deque[BusEvent] = deque(maxlen=RING_MAX)
        self._followers: list[Follower] = []
        self._closed = False
        self.heartbeat_s = heartbeat_s

    @property
    def clients(self) -> int:
        return len(self._followers)

    def recent(self, count: int) -> list[BusEvent]:
        """The latest `count` events, newest first."""
        return list(self._ring)[: -count - 1 : -1]

    def publish(self, kind: str, data: Mapping[str, Any], keep: bool = True) -> None:
        """Tell every client, now or never: no client is waited for. `data` must be JSON-able."""
        event = BusEvent(self._next_id, self._wall(), kind, data)
        self._next_id += 1
        if keep:
            self._ring.append(event)
        for follower in list(self._followers):
            self._offer(follower, event)

    def note(self, note: events.Note, name_of: Callable[[NodeId], str]) -> None:
        """Publish what the node noted, if it is news to a person."""
        told = describe(note, name_of)
        if told is not None:
            kind, text, data = told
            self.publish(kind, {"text": text, **data}, keep=kind != "ledger")

    def _offer(self, follower: Follower, event: BusEvent) -> None:
        try:
            follower.queue.put_nowait(event)
        except asyncio.QueueFull:
            follower.lost = True
            self._end(follower)

    def _end(self, follower: Follower) -> None:
        if follower in self._followers:
            self._followers.remove(follower)
        while follower.queue.full():
            follower.queue.get_nowait()  # make room for the end; what is lost here is in the ring
        follower.queue.put_nowait(None)

    @contextmanager
    def follow(self, after: int | None) -> Iterator[Follower]:
        """A queue that first holds the kept events beyond id `after` (None: no replay), then what comes."""
        if self._closed or len(self._followers) >= CLIENTS_MAX:
            raise Unavailable("too many follow the events", f"the cap is {CLIENTS_MAX} streams", "Close a page.", 10.0)
        follower = Follower()
        if after is not None:
            behind = after if after < self._next_id else -1
            for event in self._ring:
                if event.id > behind:
                    follower.queue.put_nowait(event)
        self._followers.append(follower)
        try:
            yield follower
        finally:
            if follower in self._followers:
                self._followers.remove(follower)

    def close(self) -> None:
        """End every stream; new ones are refused."""
        self._closed = True
        for follower in list(self._followers):
            self._end(follower)


def describe(note: events.Note, name_of: Callable[[NodeId], str]) -> tuple[str, str, dict[str, Any]] | None:
    """(kind, sentence, data) of a note; None for what only deciders care about."""
    match note:
        case events.MemberUp(node, name):
            return "member-up", f"{name or name_of(node)} is up", {"node": name or name_of(node)}
        case events.MemberDown(node, name, state, why):
            called = name or name_of(node)
            text = f"{called} is {state}" + (f": {why}" if why else "")
            return "member-down", text, {"node": called, "state": state}
        case events.LeaderChanged(term, leader):
            who = name_of(leader) if leader else None
            text = f"{who} coordinates term {term}" if who else f"No coordinator in term {term}: an election is open"
            return "leader", text, {"term": term, "leader": who}
        case events.Elected(term):
            return "elected", f"This node won term {term} and is recovering", {"term": term}
        case events.Deposed(term, why):
            return "deposed", f"This node no longer leads term {term}: {why}", {"term": term}
        case events.HandedOver(term, to, why):
            text = f"Handed over to {name_of(to)}: {why}"
            return "handed-over", text, {"term": term, "to": name_of(to), "why": why}
        case events.Activated(term):
            return "activated", f"This node serves as coordinator of term {term}", {"term": term}
        case events.LedgerGrew(facts):
            return (
                "ledger",
                f"{len(facts)} new ledger {'entry' if len(facts) == 1 else 'entries'}",
                {"entries": len(facts)},
            )
        case events.Durable(_, facts, copies) if any(fact.kind == "hook" for fact in facts):
            return "durable", f"a webhook is durable on {copies} ledgers", {"copies": copies}
        case events.Durable():
            return None
        case events.RunMoved(run, workflow, step, outcome):
            data = {"run": run, "workflow": workflow, "step": step, "outcome": outcome}
            return "run", f"{workflow} {run[:8]}: {step} {outcome}".rstrip(), data
        case events.LedgerAlarm(text):
            return "alarm", text, {}
    assert_never(note)


def routes(bus: EventBus) -> list[web.RouteDef]:
    async def follow(request: web.Request) -> web.StreamResponse:
        lines = request.query.get("format") == "jsonl"
        with bus.follow(_resume_point(request)) as follower:
            response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
            response.content_type = "application/x-ndjson" if lines else "text/event-stream"
            response.charset = "utf-8"
            await response.prepare(request)
            await _pour(request, response, follower, bus.heartbeat_s, lines)
        return response

    return [web.get("/events", follow)]


def _resume_point(request: web.Request) -> int | None:
    """The last id the client has: by the browser's header, or `?after=` from a command line."""
    told = request.headers.get("Last-Event-ID") or request.query.get("after", "")
    return int(told) if told.isascii() and told.isdigit() and len(told) < 19 else None


async def _pour(
    request: web.Request, response: web.StreamResponse, follower: Follower, heartbeat_s: float, lines: bool
) -> None:
    """Write until the follower ends or the client is gone."""
    try:
        await _write(response, b"\n" if lines else f"retry: {RETRY_MS}\n\n".encode())
        while (event := await _next(follower, heartbeat_s)) is not None:
            if isinstance(event, BusEvent):
                await _write(response, _line(event) if lines else _block(event))
            else:
                await _write(response, b"\n" if lines else b": still here\n\n")
        why = "dropped: too slow, reconnect to resume" if follower.lost else "this node is stopping"
        await _write(response, b"" if lines else f": {why}\n\n".encode())
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the client went away, which is how most streams end


async def _next(follower: Follower, heartbeat_s: float) -> BusEvent | bool | None:
    """The next event, None at the end, False after `heartbeat_s` of silence."""
    try:
        async with asyncio.timeout(heartbeat_s):
            return await follower.queue.get()
    except TimeoutError:
        return False


async def _write(response: web.StreamResponse, chunk: bytes) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(chunk)


def _line(event: BusEvent) -> bytes:
    return msgspec.json.encode(event) + b"\n"


def _block(event: BusEvent) -> bytes:
    return b"id: %d\ndata: %s\n\n" % (event.id, msgspec.json.encode(event))
