"""How long a suspect has to refute, and how slow we ourselves may be: Lifeguard's two clocks (arXiv 1707.00788).

    accused once ──▶ waits max ──confirmation──▶ … ──CONFIRMATIONS independent ones──▶ waits min ──▶ failed
    LocalHealth 0 (well) … HEALTH_MAX: probe interval and timeouts are multiplied by 1 + score (§IV.A)

Both bounds of the wait grow with log10 of the cluster's size, because a refutation needs that many rounds of gossip.
Pure values and arithmetic; `membership` owns the instances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..ids import NodeId

HEALTH_MAX = 7
"""The score's ceiling: a node that is very slow still probes every eighth period (memberlist's 8 ×)."""
CONFIRMATIONS = 2
"""Independent confirmations that bring the wait to its minimum (memberlist: SuspicionMult - 2)."""


@dataclass(frozen=True, slots=True)
class Guards:
    """Protections against our own slowness, each behind a switch so that the simulator can show what it is worth."""

    lifeguard: bool = True
    """Health-scaled probes, nacks, confirmations, telling a suspect directly. Off: plain SWIM with a fixed wait."""
    loop_lag: bool = True
    """A node that did not run discards the probe it slept through and prolongs the suspicions it holds."""


@dataclass(slots=True)
class LocalHealth:
    """Lifeguard's local health multiplier: signs that the slow one is us."""

    scaling: bool = True
    score: int = 0

    def add(self, delta: int) -> None:
        self.score = min(HEALTH_MAX, max(0, self.score + delta))

    @property
    def stretch(self) -> int:
        return 1 + self.score if self.scaling else 1


@dataclass(slots=True)
class Suspicion:
    """One suspect's timer. `shortest_s` and `longest_s` in seconds; `others` could confirm it when it began."""

    since: float
    shortest_s: float
    longest_s: float
    others: int
    accusers: dict[NodeId, None] = field(default_factory=dict)
    due: float = 0.0
    """When the suspect has failed."""

    @property
    def wanted(self) -> int:
        """Confirmations worth waiting for: none where too few are left to give them (memberlist `suspectNode`)."""
        return CONFIRMATIONS if self.others >= CONFIRMATIONS else 0

    def accuse(self, accuser: NodeId, now: float) -> bool:
        """Is this accusation news worth passing on? One voice counts once, and enough is enough.

        The wait falls from longest to shortest as the logarithm of independent confirmations (Lifeguard §IV.B).
        """
        if accuser in self.accusers or len(self.accusers) > self.wanted:
            return False
        self.accusers[accuser] = None
        part = math.log(len(self.accusers)) / math.log(self.wanted + 1) if self.wanted else 1.0
        wait = self.longest_s - (self.longest_s - self.shortest_s) * part
        self.due = max(now, self.since + wait)
        return True

    def postpone(self, seconds: float) -> None:
        """We did not run for so long: a refutation may lie in our inbox."""
        self.since += seconds
        self.due += seconds
