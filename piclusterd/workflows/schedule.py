"""What the coordinator begins by itself: cron lines, and a look for events that never came.

    ClockTold(minute) ─▶ which lines are due? ─▶ Append(hook "schedule:<name>:<minute>") ─▶ a run, as of any webhook
    Activated, then every few hours ─────────▶ Append(hook "reconcile:<service>:<term>:<n>") ─▶ a run of `reconcile`

A line's run is a function of its name and the minute it was due, so two coordinators cannot run it twice. A minute that
no coordinator saw is `skip`ped, or the newest of them is run once. The wall clock says which minute it is and nothing
else; while it is not set the lines wait, and say so. What is missed is reckoned from the last run in the ledger: a line
that never ran has missed nothing.

The look asks for all that changed since the last one ended well, or since the newest event that did come, with an
overlap; events that came are known by their keys. Where none ever came there is no gap, and nothing is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ..events import (
    Activated,
    Append,
    AppendFailed,
    ClockTold,
    DeadlineReached,
    Deposed,
    Durable,
    Event,
    Note,
    Output,
    Token,
)
from ..ids import Term
from ..wire import Hook
from .journal import Journal, hook_record
from .timetable import last_due
from .workflow import Workflow, wanted_by

LATE_MAX = 2
"""Minutes after which a line that skips what it missed is late: an election may fall into its minute."""
OVERLAP_MS = 10 * 60 * 1000
"""Events within this before the newest known one may still be on their way, past others."""
RETRY_S = 60.0
"""A look that could not be recorded is tried again."""


@dataclass(frozen=True, slots=True)
class Line:
    """One `[[schedule]]` table."""

    name: str
    cron: str
    timezone: str
    what: Literal["hub-health", "triage-report", "prompt", "batch"]
    prompt: str = ""
    missed: Literal["skip", "run-once"] = "skip"
    post: bool = False
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agenda:
    """`reconciled`: the services asked for what never came, every `reconcile_s`."""

    lines: tuple[Line, ...] = ()
    reconciled: tuple[str, ...] = ()
    reconcile_s: float = 6 * 3600.0


class Schedule:
    def __init__(
        self, journal: Journal, workflows: Mapping[str, Workflow], agenda: Agenda, tokens: Iterator[Token]
    ) -> None:
        self._journal = journal
        self._workflows = workflows
        self._agenda = agenda
        self._tokens = tokens
        self._term: Term | None = None
        self._looks = 0
        self._due = float("inf")
        self._appending: dict[Token, str] = {}
        self._first: int | None = None
        """The first minute that this node was told."""
        self.clockless = False
        """There are lines, and this coordinator does not know the time."""

    def deadline(self) -> float:
        return self._due

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case ClockTold(minute, synced):
                return self._told(minute, synced)
            case AppendFailed(token) if token in self._appending:
                key = self._appending.pop(token)  # a line is found due again at the next ClockTold
                if key.startswith("reconcile:"):
                    self._due = min(self._due, now + RETRY_S)
                return []
            case DeadlineReached() if self._due <= now:
                return self._look(now)
            case _:
                return []

    def note(self, note: Note, now: float) -> list[Output]:
        match note:
            case Activated(term):
                self._term, self._looks = term, 0
                return self._look(now)
            case Deposed():
                self._term, self._due, self.clockless = None, float("inf"), False
                self._appending.clear()
                return []
            case Durable(token):
                self._appending.pop(token, None)
                return []
            case _:
                return []

    # the clock -----------------------------------------------------------------------------------------------
    def _told(self, minute: int, synced: bool) -> list[Output]:
        self.clockless = self._term is not None and bool(self._agenda.lines) and not synced
        if not synced:
            return []
        self._first = minute if self._first is None else self._first
        if self._term is None:
            return []
        return [out for line in self._agenda.lines for out in self._begin(line, minute)]

    def _begin(self, line: Line, minute: int) -> list[Output]:
        assert self._first is not None
        due = last_due(line.cron, line.timezone, minute)
        if due <= self._journal.scheduled.get(line.name, self._first - 1):
            return []
        if line.missed == "skip" and minute - due > LATE_MAX:
            return []
        asked = {"name": line.name, "what": line.what, "prompt": line.prompt, "post": line.post}
        asked |= {"prompts": line.prompts} if line.prompts else {}
        return self._append(Hook("schedule", f"schedule:{line.name}:{due}", line.what, json.dumps(asked).encode()))

    # what never came -----------------------------------------------------------------------------------------
    def _look(self, now: float) -> list[Output]:
        """Begin a run of `reconcile` for each service."""
        if self._term is None or not self._agenda.reconciled:
            return []
        self._due = now + self._agenda.reconcile_s
        self._looks += 1
        out: list[Output] = []
        for service in self._agenda.reconciled:
            known = self._journal.marks.get(service, self._journal.newest.get(service))
            if known is not None:
                body = json.dumps({"since_ms": max(known - OVERLAP_MS, 0)}).encode()
                out += self._append(Hook("cluster", f"reconcile:{service}:{self._term}:{self._looks}", service, body))
        return out

    def _append(self, hook: Hook) -> list[Output]:
        if hook.key in self._appending.values() or self._journal.known(hook.key) is not None:
            return []
        assert self._term is not None
        token = next(self._tokens)
        self._appending[token] = hook.key
        return [Append(token, (hook_record(hook, *wanted_by(self._workflows, hook), self._term),))]
