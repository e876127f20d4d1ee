"""A bad network: late, lost, doubled and reordered messages, and partitions that need not be symmetric.

Worse than the daemon's links on purpose (those are ordered streams): a protocol that lives here lives there.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..ids import NodeId


@dataclass(frozen=True, slots=True)
class Weather:
    """One seed's network. Times in seconds, probabilities per message."""

    delay_min_s: float
    delay_max_s: float
    loss: float
    duplication: float
    slow: float
    """Probability that a message takes up to fifty times as long (a heavy tail reorders)."""


CALM = Weather(0.0002, 0.005, 0.0, 0.0, 0.0)


def draw_weather(rng: Random) -> Weather:
    """Swarm testing: each seed draws which faults exist at all (Groce et al., 2012)."""
    return Weather(
        delay_min_s=0.0002,
        delay_max_s=rng.choice((0.002, 0.02, 0.2)),
        loss=rng.choice((0.0, 0.0, 0.05, 0.3)),
        duplication=rng.choice((0.0, 0.0, 0.1, 0.5)),
        slow=rng.choice((0.0, 0.01, 0.1)),
    )


class Network:
    def __init__(self, rng: Random, weather: Weather) -> None:
        self.weather = weather
        self._rng = rng
        self._cut: dict[tuple[NodeId, NodeId], None] = {}

    def cut(self, one: NodeId, other: NodeId) -> None:
        """Nothing passes from `one` to `other`; the way back is untouched."""
        self._cut[one, other] = None

    def heal(self) -> None:
        self._cut.clear()

    def passes(self, one: NodeId, other: NodeId) -> bool:
        return (one, other) not in self._cut

    def delays(self, sender: NodeId, to: NodeId) -> list[float]:
        """When copies of one message arrive, in seconds from now; empty: lost."""
        rng, weather = self._rng, self.weather
        if (sender, to) in self._cut or rng.random() < weather.loss:
            return []
        copies = 2 if rng.random() < weather.duplication else 1
        return [self._delay() for _ in range(copies)]

    def _delay(self) -> float:
        delay = self._rng.uniform(self.weather.delay_min_s, self.weather.delay_max_s)
        return delay * self._rng.uniform(1, 50) if self._rng.random() < self.weather.slow else delay
