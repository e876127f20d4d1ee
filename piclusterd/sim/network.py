"""A bad network: late, lost, doubled and reordered messages, partitions that need not be symmetric, clogged paths.

Worse than the daemon's links on purpose (those are ordered streams): a protocol that lives here lives there.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..ids import NodeId

TAIL = 50.0
"""A slow message takes up to so many times the usual delay."""
CLOG_MAX_S = 5.0
"""A clogged path lets go after this long at the latest (TigerBeetle's packet simulator has the same)."""


@dataclass(frozen=True, slots=True)
class Weather:
    """One seed's network. Times in seconds, probabilities per message."""

    delay_min_s: float
    delay_max_s: float
    loss: float
    duplication: float
    slow: float
    """Probability that a message takes up to TAIL times as long (a heavy tail reorders)."""

    @property
    def longest_s(self) -> float:
        """How late a message can be where no path is clogged."""
        return self.delay_max_s * (TAIL if self.slow else 1.0)


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
        self._clogged: dict[tuple[NodeId, NodeId], float] = {}

    def cut(self, one: NodeId, other: NodeId) -> None:
        """Nothing passes from `one` to `other`; the way back is untouched."""
        self._cut[one, other] = None

    def mend(self, one: NodeId, other: NodeId) -> None:
        self._cut.pop((one, other), None)

    def clog(self, one: NodeId, other: NodeId, until: float) -> None:
        """What `one` sends `other` is held until then, and arrives in one heap."""
        self._clogged[one, other] = until

    def heal(self) -> None:
        self._cut.clear()
        self._clogged.clear()

    @property
    def quiet(self) -> bool:
        """Nothing is cut."""
        return not self._cut

    def passes(self, one: NodeId, other: NodeId) -> bool:
        return (one, other) not in self._cut

    def delays(self, sender: NodeId, to: NodeId, now: float) -> tuple[float, ...]:
        """When copies of one message arrive, in seconds from now; empty: lost."""
        weather, random = self.weather, self._rng.random
        if self._cut and (sender, to) in self._cut:
            return ()
        if weather.loss and random() < weather.loss:
            return ()
        copies = 2 if weather.duplication and random() < weather.duplication else 1
        if not self._clogged:
            return (self._delay(),) if copies == 1 else (self._delay(), self._delay())
        held = max(self._clogged.get((sender, to), now) - now, 0.0)
        return tuple([held + self._delay() for _ in range(copies)])

    def _delay(self) -> float:
        weather, rng = self.weather, self._rng
        delay = weather.delay_min_s + (weather.delay_max_s - weather.delay_min_s) * rng.random()
        if weather.slow and rng.random() < weather.slow:
            delay *= 1.0 + (TAIL - 1.0) * rng.random()
        return delay
