"""Reconcile: after an outage, ask each service what it sent, and take what never came. Pure.

    linear   page-1 ─▶ page-2 … ─▶ Finish(marks: Linear's own time at page-1)
             each: events made of issues that were created since; the cursor of the next is all that is remembered
    github   page-1 … ─▶ redeliver-<id> for each event of which no delivery arrived ─▶ Finish(marks)

An event made here carries the key that the webhook of the same creation carries (`signatures.event_key`), so whichever
comes first is the only one that makes a run. GitHub is asked to deliver again, and its signature is checked as ever.
What Linear's issues looked like before they were changed is not told, so changes that were missed are not made up.

Source: Linear's public GraphQL schema (`issues`, `IssueFilter`); GitHub's REST documentation of webhook deliveries:
kept for 3 days, no automatic retries, a redelivery repeats the GUID.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .. import ids
from ..ids import RunId
from ..wire import Hook
from .workflow import Call, Finish, Results, Step

OPERATIONS = {"linear": "issues_since", "github": "deliveries_since"}
"""Service → what asks it for a page."""
PAGES_MAX = 100
"""Of 50 issues or 100 deliveries each: far beyond what a house misses; past it a person should look."""
REDELIVER_MAX = 1000
"""Deliveries asked for again in one run."""


class _Since(msgspec.Struct, frozen=True):
    since_ms: int


class _Page(msgspec.Struct, frozen=True):
    now_ms: int
    more: str = ""
    taken: int = 0
    """Events that were found here and had not come."""
    failed: dict[str, int] = {}
    """Event → a delivery of it that did not arrive."""
    arrived: tuple[str, ...] = ()
    """Events of which a delivery did, perhaps told on another page."""


class _Issues(msgspec.Struct, frozen=True):
    """A page of Linear's as it comes."""

    now_ms: int
    more: str
    issues: tuple[dict[str, Any], ...]


class Reconcile:
    name = "reconcile"

    def __init__(self, actor_id: str = "") -> None:
        """`actor_id`: ourselves in Linear."""
        self._actor_id = actor_id

    def wants(self, hook: Hook) -> str | None:
        asked = hook.source == "cluster" and hook.event in OPERATIONS
        return f"what never came from {hook.event}" if asked else None

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        try:
            since = msgspec.json.decode(hook.body, type=_Since)
            pages = [msgspec.convert(results[f"page-{n}"], _Page) for n in _numbers(results)]
        except (msgspec.DecodeError, KeyError) as fault:
            return Finish("failed", f"not what a reconciliation is made of: {fault}")
        if not pages:
            return self._page(run, hook.event, since, 1, "")
        if pages[-1].more and len(pages) >= PAGES_MAX:
            return Finish("failed", f"more than {PAGES_MAX} pages changed at {hook.event}; look there by hand")
        if pages[-1].more:
            return self._page(run, hook.event, since, len(pages) + 1, pages[-1].more)
        if hook.event == "github":
            return self._redeliver(run, pages, results)
        found = sum(page.taken for page in pages)
        return Finish("done", f"{found} events had not come", marks={hook.event: pages[0].now_ms})

    def _page(self, run: RunId, service: str, since: _Since, number: int, after: str) -> Call:
        arguments = {"since_ms": since.since_ms, "after": after}
        key = ids.uuid4_of(run, str(number))
        found = _creations if service == "linear" else None
        return Call(f"page-{number}", service, OPERATIONS[service], arguments, key, found=found)

    def _redeliver(self, run: RunId, pages: list[_Page], results: Results) -> Step:
        arrived = {event for page in pages for event in page.arrived}
        failed = {event: delivery for page in pages for event, delivery in page.failed.items()}
        lost = sorted(delivery for event, delivery in failed.items() if event not in arrived)
        if len(lost) > REDELIVER_MAX:
            return Finish("failed", f"{len(lost)} deliveries failed; redeliver them at GitHub by hand")
        for delivery in lost:
            step = f"redeliver-{delivery}"
            if step not in results:
                return Call(step, "github", "redeliver", {"delivery": delivery}, ids.uuid4_of(run, step))
        return Finish("done", f"{len(lost)} deliveries asked for again", marks={"github": pages[0].now_ms})


def _numbers(results: Results) -> Iterator[int]:
    """1, 2, … as long as there is a page of that number."""
    number = 1
    while f"page-{number}" in results:
        yield number
        number += 1


def _creations(answer: Mapping[str, Any]) -> tuple[list[Hook], Mapping[str, Any]]:
    """The events that Linear sent, or should have, of the issues of this page."""
    page = msgspec.convert(answer, _Issues)
    return [_creation(issue) for issue in page.issues], {"now_ms": page.now_ms, "more": page.more}


def _creation(issue: Mapping[str, Any]) -> Hook:
    event = {"action": "create", "type": "Issue", "data": issue, "reconciled": True}
    return Hook("linear", f"linear:create:Issue:{issue.get('id')}", "Issue", json.dumps(event).encode())
