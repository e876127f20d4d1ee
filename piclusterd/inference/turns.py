"""The places of one model and the queue before them: who holds one, who waits, who is sent away and until when.

    turn(asked) ──a place is free──▶ Turn ──left──▶ the next in line (`fair`) gets it
         └── waits ──▶ Turn        └── the queue is full ──▶ Overloaded, with the time in which it will have drained

Owns the count of places; every way out of `turn` gives its place back, a caller that goes away while it waits included.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..errors import Overloaded
from .fair import Fair, Waiting
from .protocol import ClassifyRequest, EmbedRequest, GenerateRequest, Priority

SMOOTHING = 0.2
"""Weight of the newest measurement."""
SECONDS_PER_TOKEN = 0.05
"""What a token is taken to hold a place for until a request has been measured."""
ANSWER_TOKENS = 128
"""What an answer is taken to need where the request does not say; put right when it is over."""
PROMPT_SHARE = 8
"""So many tokens of a prompt are read in the time of one of the answer, on CPUs."""
CHARS_PER_TOKEN = 4
"""English in common vocabularies; for predictions only, the engine counts exactly."""
RETRY_S_MIN = 1.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Whose request it is, how urgent, and what it is expected to cost (see `cost`)."""

    tenant: str = ""
    priority: Priority = "interactive"
    cost: float = float(ANSWER_TOKENS)
    keep_alive_s: float | None = None


NOBODY = Asked()


def cost(prompt_tokens: int, answer_tokens: int) -> float:
    """The tokens of an answer that would take as long as this request."""
    return prompt_tokens / PROMPT_SHARE + answer_tokens


def asked_by(request: GenerateRequest | EmbedRequest | ClassifyRequest) -> Asked:
    """What `request` says of itself, and a guess at its cost."""
    if isinstance(request, GenerateRequest):
        guess = cost(request.text_length // CHARS_PER_TOKEN, min(request.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS))
    else:
        guess = cost(sum(map(len, request.texts)) // CHARS_PER_TOKEN, 1)
    if isinstance(request, ClassifyRequest):
        return Asked(priority="workflow", cost=guess)
    return Asked(request.tenant, request.priority, guess, request.keep_alive_s)


@dataclass(slots=True)
class Turn:
    """A place, held."""

    waited_s: float
    cost: float
    done: bool = False

    def ended(self, cost: float) -> None:
        """The answer is whole, and cost so many tokens. (Its reader may close it before it gives its place back.)"""
        self.cost, self.done = cost, True


class Turns:
    """`places` at once, `queue_max` waiting. `name` is for people; `on_change` is called whenever a count changes."""

    def __init__(self, name: str, places: int, queue_max: int, on_change: Callable[[], None]) -> None:
        self._name = name
        self.places = places
        self._queue = Fair(queue_max)
        self._futures: dict[int, asyncio.Future[None]] = {}
        self._on_change = on_change
        self._held_cost = 0.0
        self._per_token = 0.0
        self.busy = 0
        self.held_s = 0.0
        """How long a place is held, on average; 0: not measured."""

    @property
    def queued(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def turn(self, asked: Asked) -> AsyncIterator[Turn]:
        """A place, once it is `asked`'s turn. Raises `Overloaded`: the queue is full, or it gave way to another."""
        waited_s = await self._enter(asked)
        began = time.monotonic()
        turn = Turn(waited_s, asked.cost)
        self._held_cost += asked.cost
        try:
            yield turn
        finally:
            if turn.done:
                self._measure(time.monotonic() - began, turn.cost)
            self._held_cost -= asked.cost
            self._queue.settle(asked.tenant, turn.cost - asked.cost)
            self._leave()

    async def _enter(self, asked: Asked) -> float:
        if self.busy < self.places and not self._queue:
            self._queue.enter(asked.tenant, asked.cost)
            self._count(1)
            return 0.0
        began = time.monotonic()
        one, victim = self._queue.push(asked.tenant, asked.priority, asked.cost, began)
        if victim is one:
            raise self._full()
        if victim is not None:
            self._send_away(victim)
        await self._wait(one)
        return time.monotonic() - began

    def _send_away(self, victim: Waiting) -> None:
        future = self._futures.get(victim.number)
        if future is not None and not future.done():  # else its caller is leaving anyway
            future.set_exception(self._full())

    async def _wait(self, one: Waiting) -> None:
        granted = self._futures[one.number] = asyncio.get_running_loop().create_future()
        self._on_change()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self._leave()  # the place came at the very moment the caller left
            raise
        finally:
            self._futures.pop(one.number, None)
            self._queue.remove(one)
            self._on_change()

    def _leave(self) -> None:
        """A place is free: the next in line has it from this moment, though it runs a little later."""
        self._count(-1)
        while self.busy < self.places and (one := self._queue.pop(time.monotonic())) is not None:
            future = self._futures.get(one.number)
            if future is None or future.done():
                self._queue.settle(one.tenant, -one.cost)  # its caller is just leaving
                continue
            future.set_result(None)
            self._count(1)

    def _count(self, more: int) -> None:
        self.busy += more
        self._on_change()

    def _measure(self, seconds: float, tokens: float) -> None:
        if seconds > 0:
            self.held_s += (seconds - self.held_s) * (SMOOTHING if self.held_s else 1.0)
            each = seconds / max(tokens, 1.0)
            self._per_token += (each - self._per_token) * (SMOOTHING if self._per_token else 1.0)

    def drain_s(self) -> float:
        """Seconds in which all that wait, and half of what runs, will be done."""
        tokens = self._queue.cost + self._held_cost / 2
        return tokens * (self._per_token or SECONDS_PER_TOKEN) / self.places

    def _full(self) -> Overloaded:
        return Overloaded(
            f"{self._name} has {self.queued} requests waiting",
            "The queue is full.",
            retry_after_s=max(RETRY_S_MIN, self.drain_s()),
        )
