"""The nodes tried for one request: the next one, until one answers, nobody is left, or patience is at its end.

    next ──▶ Choice ──answers──▶ progressed        (an answer under way that breaks off is gone on with elsewhere)
      ▲         └──fails──▶ failed: not that node again
      └── nobody left, and a fault that passes (a child is started again) ──PAUSE_S──▶ all of them again, for PATIENCE_S

Owns the excuses: when it gives up, the newest fault is told, which says more than "nobody".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..errors import Broken, NotFound, Overloaded, PiclusterError, Unavailable
from ..events import Choice, WhoServes
from ..ids import NodeId

ATTEMPTS_MAX = 3
"""Nodes tried without a pause: past two failures the cluster has a fault that a fourth node will not hide at once."""
PATIENCE_S = 15.0
"""From the first failure to giving up: a killed child is back in a second or two, a model read from a card in ten."""
PAUSE_S = 0.25
"""Before the nodes that failed are asked again: a new child's model is gossiped about that quickly."""
RETRYABLE = (Unavailable, Broken, OSError, TimeoutError)
"""Faults of a node or of the way to it."""

Who = Callable[[WhoServes], Awaitable[Choice]]
"""Where to go (the ticket is the asker's business). Raises the `PiclusterError` where nobody can."""


@dataclass(frozen=True, slots=True)
class Hop:
    """A node that was asked, and how it failed; "" where it did not."""

    choice: Choice
    fault: str = ""


class Attempts:
    """`asked` with `exclude` filled in, again and again."""

    def __init__(self, who: Who, asked: WhoServes, patience_s: float = PATIENCE_S) -> None:
        self._who = who
        self._asked = asked
        self._patience_s = patience_s
        self._excluded: tuple[NodeId, ...] = ()
        self._fault: PiclusterError | None = None
        self._until: float | None = None
        self.hops: list[Hop] = []

    async def next(self) -> Choice:
        """The next node to try. Raises the newest node's fault where no other is left, or `who`'s."""
        while True:
            try:
                if self._fault is not None and len(self._excluded) >= ATTEMPTS_MAX:
                    raise self._fault
                choice = await self._who(replace(self._asked, exclude=self._excluded))
                self.hops.append(Hop(choice))
                return choice
            except PiclusterError:
                if self._fault is None:
                    raise
                if not self._may_pass():
                    raise self._fault from None
            await asyncio.sleep(PAUSE_S)
            self._excluded = ()

    def failed(self, choice: Choice, fault: BaseException) -> None:
        """`choice` did not answer, or not to the end."""
        if not isinstance(fault, PiclusterError):
            fault = Unavailable(f"{choice.name} cannot be reached", f"{fault}.")
        self._excluded = (*self._excluded, choice.node)
        if not _sooner(self._fault, fault):
            self._fault = fault
        self.hops[-1] = Hop(choice, str(fault))
        if self._until is None:
            self._until = time.monotonic() + self._patience_s

    def progressed(self) -> None:
        """A part of the answer came: a fault from now on is a new story."""
        self._until = None

    def _may_pass(self) -> bool:
        passes = isinstance(self._fault, Unavailable) and not isinstance(self._fault, Overloaded)
        return passes and self._until is not None and time.monotonic() + PAUSE_S < self._until


def _sooner(before: PiclusterError | None, fault: PiclusterError) -> bool:
    """Where all are overloaded, the caller is told of the queue that drains first."""
    if not isinstance(before, Overloaded) or not isinstance(fault, Overloaded):
        return False
    return before.retry_after_s < fault.retry_after_s


def elsewhere(fault: BaseException) -> bool:
    """Whether another node might answer: a fault of the node, or gossip about its models that is out of date."""
    return isinstance(fault, RETRYABLE) or (isinstance(fault, NotFound) and fault.param == "model")
