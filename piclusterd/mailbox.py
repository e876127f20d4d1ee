"""The node's one inbox: bounded, with tickets for callers that wait.

    hands ──post(event)──▶ ┌─────────┐ ──next(until)──▶ daemon's loop ──▶ node.handle
    web   ──ask(make)────▶ │ mailbox │
          ◀──future────────└─────────┘ ◀──answer(ticket, value)── perform(Answer)

It refuses rather than grows: `ask` raises `Overloaded` when the inbox or the ticket book is full, and `post` (events
that the hands owe the node: results, frames) waits for room, which is the back-pressure on links.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .errors import Overloaded, PiclusterError, Unavailable
from .events import DeadlineReached, Event, Ticket

EVENTS_MAX = 4096
"""Events waiting for the node. At 20 µs an event that is 80 ms of work: past it, refusing is kinder than queueing."""
TICKETS_MAX = 1024
"""Callers waiting for an answer (a webhook flood is answered 503 beyond it, and the sender retries)."""


class Mailbox:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queue: asyncio.Queue[Event] = asyncio.Queue(EVENTS_MAX)
        self._waiting: dict[Ticket, asyncio.Future[Any]] = {}
        self._last_ticket = 0

    async def post(self, event: Event) -> None:
        """Hand `event` to the node, waiting for room."""
        await self._queue.put(event)

    def post_now(self, event: Event) -> bool:
        """As `post`, for callers that cannot wait. False: the inbox is full and `event` is dropped."""
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True

    async def ask(self, make: Callable[[Ticket], Event], timeout_s: float) -> Any:
        """The node's answer to the event that `make(ticket)` gives.

        Raises the `PiclusterError` it was answered with, `Overloaded` when full, `Unavailable` after `timeout_s`.
        """
        if len(self._waiting) >= TICKETS_MAX or self._queue.full():
            raise Overloaded("this node has too much waiting", "its inbox is full", "Try again shortly.")
        self._last_ticket += 1
        ticket = self._last_ticket
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting[ticket] = future
        timer = loop.call_later(timeout_s, self._give_up, ticket, timeout_s)
        try:
            self._queue.put_nowait(make(ticket))
            answer = await future
        finally:
            timer.cancel()
            self._waiting.pop(ticket, None)
        if isinstance(answer, PiclusterError):
            raise answer
        return answer

    def _give_up(self, ticket: Ticket, after_s: float) -> None:
        self.answer(ticket, Unavailable("no answer in time", f"the cluster did not settle it within {after_s:g} s"))

    def answer(self, ticket: Ticket, value: object) -> None:
        """Resolve `ticket`; one that nobody waits for any more is ignored."""
        future = self._waiting.get(ticket)
        if future is not None and not future.done():
            future.set_result(value)

    async def next(self, until: float) -> Event:
        """The next event, or `DeadlineReached` once the clock passes `until`."""
        delay = until - self._clock()
        if delay <= 0:
            return DeadlineReached()  # before the queue: a flood of events must not silence the heartbeat
        if not self._queue.empty():
            return self._queue.get_nowait()
        try:
            async with asyncio.timeout(delay):
                return await self._queue.get()
        except TimeoutError:
            return DeadlineReached()
