"""Breakers: a service that failed k times in a row is left alone for a while, then asked by one call only.

    closed ──FAILURES_MAX failures in a row──▶ open ──its pause is over──▶ half-open: one call goes
       ▲                                        ▲ │ twice the pause              │
       └────────────────── success ─────────────┼─┴──────── failure ─────────────┘

One for each service outside. A run that waits here has not tried anything, so it gives up nothing: a day without the
service costs a day, and no run. A refusal that will stay (bad arguments, no permission) says that the service is well.

Source: Nygard, Release It!, ch. 5; pauses with full jitter, so that clusters do not come back in step.
"""

from __future__ import annotations

from random import Random

from ..views import ServiceView

FAILURES_MAX = 5
"""In a row, over all runs; fewer open it in the ordinary hiccups of an API."""
PAUSE_FIRST_S = 5.0
PAUSE_MAX_S = 300.0
"""As long as the longest pause between two tries of a step."""
PROBE_S = 300.0
"""A probe without an outcome by then was lost with its run, and another may go."""
QUEUE_S = 2.0
"""Who waits for another's probe looks again after this."""
WHY_CHARS_MAX = 200


class Breaker:
    def __init__(self, name: str, rng: Random) -> None:
        self._name = name
        self._rng = rng
        self._failures = 0
        self._pause_s = PAUSE_FIRST_S
        self._until = 0.0
        self._probe_until = 0.0
        self._why = ""

    @property
    def open(self) -> bool:
        return self._failures >= FAILURES_MAX

    def wait_s(self, now: float) -> float:
        """Seconds before a call should ask again; 0 lets it go, and where the breaker is open, it is the probe."""
        if not self.open:
            return 0.0
        if now < self._until:
            return self._until - now
        if now < self._probe_until:
            return QUEUE_S
        self._probe_until = now + PROBE_S
        return 0.0

    def succeeded(self) -> None:
        self._failures, self._pause_s, self._probe_until, self._why = 0, PAUSE_FIRST_S, 0.0, ""

    def failed(self, why: str, retry_after_s: float | None, now: float) -> None:
        self._failures, self._why = self._failures + 1, why[:WHY_CHARS_MAX]
        if self.open:
            self._until = now + max(retry_after_s or 0.0, self._rng.uniform(self._pause_s / 2, self._pause_s))
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
            self._probe_until = 0.0

    def view(self, now: float) -> ServiceView:
        return ServiceView(self._name, self._failures, max(self._until - now, 0.0), self._why)
