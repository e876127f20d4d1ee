"""Runs: walking the steps of a workflow so that a dead coordinator costs a delay and never an effect too many.

Owns what this node, as the active coordinator, has in flight. Everything that must survive is in the ledger
(`journal`): a new coordinator starts from there and finds either an intent without a result (do it again: the effect
has a key) or a result (go on).

    next() ─▶ Append(intent) ─Durable─▶ Ask | CallOut ─StepFinished─▶ Append(result) ─Durable─▶ next() … Append(done)
                                             │ error: wait (full jitter, Retry-After) and act again; then give up

Invariants: no act before its intent is on W ledgers, no next step before the result is; nothing is acted on for a run
that is done; an outcome whose token is not in flight (an older term's) is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from ..events import (
    Activated,
    Append,
    AppendFailed,
    Ask,
    CallOut,
    DeadlineReached,
    Deposed,
    Durable,
    Event,
    LedgerGrew,
    Note,
    Output,
    Record,
    RunMoved,
    StepFinished,
    Token,
)
from ..ids import RunId, Term
from .journal import Journal
from .workflow import AskModel, Call, Finish, Workflow

ACTIVE_MAX = 8
"""Runs worked on side by side; a Pi's model answers few at a time, the rest wait in order."""
ACT_TIMEOUT_S = 300.0
"""An act with no outcome by then counts as failed and is tried again (a Pi 4 needs minutes for a long prompt)."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 300.0

Phase = Literal["intent", "acting", "waiting", "result", "done"]


@dataclass(slots=True)
class Flight:
    """One run in progress on this coordinator."""

    run: RunId
    phase: Phase
    token: Token
    step: AskModel | Call | None = None
    attempt: int = 1
    due: float = float("inf")


class Runs:
    def __init__(
        self,
        journal: Journal,
        workflows: Mapping[str, Workflow],
        attempts_max: int,
        rng: Random,
        tokens: Iterator[Token],
    ) -> None:
        self._journal = journal
        self._workflows = workflows
        self._attempts_max = attempts_max
        self._rng = rng
        self._tokens = tokens
        self._term: Term | None = None
        self._flights: dict[RunId, Flight] = {}
        self._by_token: dict[Token, Flight] = {}

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def deadline(self) -> float:
        return min([f.due for f in self._flights.values()]) if self._flights else float("inf")

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case StepFinished(token) if token in self._by_token:
                return self._outcome(self._by_token[token], event, now)
            case AppendFailed(token) if token in self._by_token:
                flight = self._by_token[token]
                flight.step = None  # nothing was recorded: ask the journal again where we are
                return self._wait(flight, None, now)
            case DeadlineReached():
                late = [f for f in self._flights.values() if f.due <= now]
                return [out for flight in late for out in self._due(flight, now)]
            case _:
                return []

    def note(self, note: Note, now: float) -> list[Output]:
        match note:
            case Activated(term):
                self._term = term
                return self._fill(now)
            case Deposed():
                self._term = None
                self._flights.clear()
                self._by_token.clear()
                return []
            case Durable(token) if token in self._by_token:
                return self._recorded(self._by_token[token], now)
            case LedgerGrew(facts) if any(fact.kind == "hook" for fact in facts):
                return self._fill(now)  # only a webhook makes a run that was not there
            case _:
                return []

    # starting ------------------------------------------------------------------------------------------------
    def _fill(self, now: float) -> list[Output]:
        """Take up open runs while there is room."""
        if self._term is None or len(self._flights) >= ACTIVE_MAX:
            return []
        out: list[Output] = []
        for run in self._journal.open_runs():
            if len(self._flights) >= ACTIVE_MAX:
                break
            if run not in self._flights:
                self._flights[run] = Flight(run, "waiting", 0)
                out += self._advance(self._flights[run])
        return out

    def _advance(self, flight: Flight) -> list[Output]:
        """The workflow's next step, its intent first."""
        run = self._journal.standing(flight.run)
        if run is None:  # a checkpoint ended it: it was done elsewhere
            return self._land(flight)
        workflow = self._workflows.get(run.workflow)
        if workflow is None:
            return self._finish(flight, Finish("failed", f"this release knows no workflow {run.workflow!r}"))
        if run.hook is None:
            return self._land(flight)
        step = workflow.next(flight.run, run.hook, run.values())
        if isinstance(step, Finish):
            return self._finish(flight, step)
        flight.step, flight.attempt = step, 1
        return self._record(flight, "intent", "run.intent", {"step": step.name, "attempt": 1})

    def _finish(self, flight: Flight, finish: Finish) -> list[Output]:
        moved = RunMoved(flight.run, self._journal.runs[flight.run].workflow, "finish", finish.outcome)
        body = {"outcome": finish.outcome, "detail": finish.detail}
        return [moved, *self._record(flight, "done", "run.done", body)]

    # moving --------------------------------------------------------------------------------------------------
    def _recorded(self, flight: Flight, now: float) -> list[Output]:
        """What the flight waited for is on W ledgers."""
        match flight.phase:
            case "intent":
                return self._act(flight, now)
            case "result":
                out = self._advance(flight)
                return out if flight.run in self._flights else [*out, *self._fill(now)]
            case _:
                return [*self._land(flight), *self._fill(now)]

    def _act(self, flight: Flight, now: float) -> list[Output]:
        assert self._term is not None
        self._retoken(flight, "acting")
        flight.due = now + ACT_TIMEOUT_S
        match flight.step:
            case AskModel(_, request):
                return [Ask(flight.token, flight.run, request)]
            case Call(_, service, operation, arguments, key):
                return [CallOut(flight.token, flight.run, service, operation, arguments, key, self._term)]
            case None:
                return self._land(flight)

    def _outcome(self, flight: Flight, outcome: StepFinished, now: float) -> list[Output]:
        assert flight.step is not None
        if self._journal.standing(flight.run) is None:
            return self._land(flight)
        moved = RunMoved(flight.run, self._journal.runs[flight.run].workflow, flight.step.name, outcome.error or "ok")
        if outcome.value is not None:
            body = {"step": flight.step.name, "value": dict(outcome.value)}
            return [moved, *self._record(flight, "result", "run.result", body)]
        if not outcome.retryable or flight.attempt >= self._attempts_max:
            tries = f" after {flight.attempt} tries" if flight.attempt > 1 else ""
            return [moved, *self._finish(flight, Finish("failed", f"{flight.step.name}: {outcome.error}{tries}"))]
        return [moved, *self._wait(flight, outcome.retry_after_s, now)]

    def _wait(self, flight: Flight, retry_after_s: float | None, now: float) -> list[Output]:
        """Full jitter below an exponential ceiling, but never before the server said."""
        ceiling = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (flight.attempt - 1))
        self._retoken(flight, "waiting")
        flight.due = now + max(retry_after_s or 0.0, self._rng.uniform(0.0, ceiling))
        return []

    def _due(self, flight: Flight, now: float) -> list[Output]:
        if flight.phase == "acting":
            return self._outcome(flight, StepFinished(flight.token, error="no outcome in time"), now)
        flight.attempt += 1
        if flight.step is None:
            return self._advance(flight)
        return self._act(flight, now)

    def _land(self, flight: Flight) -> list[Output]:
        self._by_token.pop(flight.token, None)
        self._flights.pop(flight.run, None)
        return []

    # records -------------------------------------------------------------------------------------------------
    def _record(self, flight: Flight, phase: Phase, kind: str, body: Mapping[str, Any]) -> list[Output]:
        assert self._term is not None
        self._retoken(flight, phase)
        return [Append(flight.token, (Record(kind, {"run": flight.run, **body}, self._term),))]

    def _retoken(self, flight: Flight, phase: Phase) -> None:
        self._by_token.pop(flight.token, None)
        flight.token, flight.phase, flight.due = next(self._tokens), phase, float("inf")
        self._by_token[flight.token] = flight
