"""One provider's budget and breaker: may it be asked now, and if not, until when. Pure.

    ready ──rate──▶ waits ──its time──▶ ready        ready ──quota, or the day's budget──▶ spent ──00:00 UTC──▶ ready
    ready ──FAILURES_MAX in a row──▶ left alone ──pause, doubling──▶ one request ──fails──▶ left alone …

Days are UTC days of the wall clock, since the quotas of the services are; a board that does not know the time counts
from when it started. Budgets are this node's alone, and a restart does not begin them anew (`spending`): the service's
own quota stands above them.
"""

from __future__ import annotations

from dataclasses import dataclass

DAY_S = 86_400
FAILURES_MAX = 3
PAUSE_FIRST_S = 5.0
PAUSE_MAX_S = 300.0


@dataclass(frozen=True, slots=True)
class Budget:
    """A day's. Zero: no limit."""

    requests: int = 0
    tokens: int = 0
    neurons: int = 0


@dataclass(slots=True)
class Used:
    """On `day`, counted from 1970; -1: never."""

    day: int = -1
    requests: int = 0
    tokens: int = 0
    neurons: float = 0.0


class Standby:
    """All times are of the wall clock, Unix seconds."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.used = Used()
        self._until = 0.0
        self._state, self._why = "ready", ""
        self._failures, self._pause_s = 0, PAUSE_FIRST_S

    def resume(self, used: Used, wall: float) -> None:
        """It was used so before this start; another day's use is none."""
        if used.day == int(wall // DAY_S):
            self.used = used
            self._check_budget(wall)

    def wait_s(self, wall: float) -> float:
        """Seconds until it may be asked; 0: now."""
        self._turn(wall)
        return max(0.0, self._until - wall)

    def asked(self, wall: float) -> None:
        """A request goes there."""
        self._turn(wall)
        self.used.requests += 1
        if self._failures >= FAILURES_MAX:
            self._until = wall + self._pause_s  # one finds out; the others wait for it

    def answered(self, tokens: int, neurons: float, wall: float) -> None:
        self._failures, self._pause_s = 0, PAUSE_FIRST_S
        self._until, self._state, self._why = 0.0, "ready", ""
        self.used.tokens += tokens
        self.used.neurons += neurons
        self._check_budget(wall)

    def limited(self, retry_after_s: float, why: str, wall: float) -> None:
        """It wants to be left alone for a time."""
        self._stop("waits", wall + retry_after_s, why)

    def spent(self, why: str, wall: float) -> None:
        """Its quota is used up."""
        self._stop("spent", _midnight(wall), why)

    def failed(self, why: str, wall: float) -> None:
        self._failures += 1
        self._why = why
        if self._failures >= FAILURES_MAX:
            self._stop("left alone", wall + self._pause_s, why)
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        else:
            self._check_budget(wall)

    def told(self, wall: float) -> dict[str, object]:
        """For people: state, why, seconds until it is asked again, what it was used for today."""
        wait_s = self.wait_s(wall)
        used = {"requests": self.used.requests, "tokens": self.used.tokens, "neurons": round(self.used.neurons, 1)}
        return {"state": self._state if wait_s else "ready", "why": self._why, "waits_s": round(wait_s), "today": used}

    def _stop(self, state: str, until: float, why: str) -> None:
        self._until = max(until, self._until)
        self._state, self._why = state, why

    def _check_budget(self, wall: float) -> None:
        for name in ("requests", "tokens", "neurons"):
            most = getattr(self._budget, name)
            if most and getattr(self.used, name) >= most:
                self._stop("spent", _midnight(wall), f"the day's {most} {name} are used")

    def _turn(self, wall: float) -> None:
        """A new day is a new budget."""
        if (day := int(wall // DAY_S)) != self.used.day:
            self.used = Used(day)
            if self._state == "spent":
                self._until, self._state, self._why = 0.0, "ready", ""


def _midnight(wall: float) -> float:
    return (wall // DAY_S + 1) * DAY_S
