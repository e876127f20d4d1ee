"""Why a request went where it went: the newest decisions of this node, for `picluster why` and nothing else.

    Serving ──noted──▶ Decision: asked where, who failed, waited, predicted and real time ──▶ a ring of DECISIONS_MAX

Owns no content: neither prompts nor answers are kept, nor who asked. A request that was relayed is noted twice, by the
node that was asked and by the one that answered.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .attempts import Hop
from .protocol import Done

DECISIONS_MAX = 512
"""Some hours of a busy home, and half a megabyte."""


@dataclass(slots=True)
class Decision:
    """One request as one node saw it. Times in seconds; `at` since 1970, by this node's clock."""

    id: str
    at: float
    task: str
    model: str
    priority: str
    peer: str = ""
    """Who relayed it here; "" where this node was asked."""
    hops: Sequence[Hop] = ()
    """The nodes asked, in order; none where it was relayed here."""
    done: Done | None = None
    took_s: float = 0.0
    end: str = ""

    def told(self) -> dict[str, Any]:
        """As JSON takes it."""
        done = self.done
        return {
            "id": self.id, "at": self.at, "task": self.task, "model": self.model, "priority": self.priority,
            "relayed_by": self.peer, "took_s": round(self.took_s, 4), "end": self.end,
            "waited_s": round(done.waited_s, 4) if done else None,
            "prompt_tokens": done.prompt_tokens if done else None,
            "cached_tokens": done.cached_tokens if done else None,
            "completion_tokens": done.completion_tokens if done else None,
            "shipped": done.shipped._asdict() if done and done.shipped else None,
            "hops": [
                {"node": hop.choice.name or hop.choice.node, "why": hop.choice.reason, "fault": hop.fault,
                 "predicted_s": round(hop.choice.predicted_s, 4)}
                for hop in self.hops
            ],
        }  # fmt: skip


@dataclass(slots=True)
class Decisions:
    wall: Callable[[], float] = time.time
    _ring: deque[Decision] = field(default_factory=lambda: deque(maxlen=DECISIONS_MAX))

    def of(self, request: str) -> list[Decision]:
        """All of that request: it has several where `n` answers were asked for. The oldest first."""
        return [decision for decision in self._ring if decision.id == request]

    @contextmanager
    def noted(self, request: str, task: str, model: str, priority: str = "", peer: str = "") -> Iterator[Decision]:
        """A decision that is timed, and ended by how the block ends."""
        decision = Decision(request, self.wall(), task, model, priority, peer)
        self._ring.append(decision)
        began = time.monotonic()
        try:
            yield decision
            decision.end = decision.done.reason if decision.done else "done"
        except (GeneratorExit, asyncio.CancelledError):
            decision.end = "its reader left"
            raise
        except BaseException as fault:
            decision.end = str(fault)
            raise
        finally:
            decision.took_s = time.monotonic() - began
