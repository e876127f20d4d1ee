"""Runs: walking the steps of a workflow so that a dead coordinator costs a delay and never an effect too many.

Owns what this node, as the active coordinator, has in flight. Everything that must survive is in the ledger
(`journal`): a new coordinator starts from there and finds either an intent without a result (do it again: the effect
has a key) or a result (go on).

    next() ─▶ Append(intent) ─Durable─▶ Ask | CallOut ─StepFinished─▶ Append(result) ─Durable─▶ next() … Append(done)
                                             │ error: wait (full jitter, Retry-After) and act again; then give up
              Approve: a person's answer, or the end of its time, is the result     events found: one append with it
              optional steps that cannot be had: their result says why, and the run goes on
              urgent Finish: once the relay outside holds the run's entries

A run that gave up is a dead letter: it keeps its event and its reason, and a person may open it again at the step that
failed. A person may also cancel a run. Services that fail in a row are left alone (`breaker`); meanwhile nobody's tries
are used up. Runs that wait for a person or a copy stand aside and keep nobody from work.

Invariants: no act before its intent is on W ledgers, no next step before the result is; nothing is acted on for a run
that is done or cancelled; an outcome whose token is not in flight (an older term's) is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import msgspec

from ..errors import NotFound, PiclusterError, Unavailable, UserError
from ..events import (
    Activated,
    Answer,
    Append,
    AppendFailed,
    Ask,
    CallOut,
    ChangeRun,
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
from ..ids import LogId, RunId, Term
from ..views import ServiceView
from .batch import NAME as BATCH
from .breaker import Breaker
from .flight import ASIDE, Flight, Patience, Phase
from .journal import Journal, Run, hook_record, view_of
from .workflow import TIMEOUT_SAYS as TIMEOUT_SAYS
from .workflow import Approve, AskModel, Call, Finish, Workflow, sifted, wanted_by

ACTIVE_MAX = 8
"""Runs worked on side by side; a Pi's model answers few at a time, the rest wait in order."""
ACT_TIMEOUT_S = 300.0
"""An act with no outcome by then counts as failed and is tried again (a Pi 4 needs minutes for a long prompt)."""
BACKOFF_FIRST_S = 1.0
BACKOFF_MAX_S = 300.0
BATCHES_MAX = 2
"""Of them batches, which take hours: webhooks keep the other places, and a batch that has no model its neighbour."""
OPTIONAL_TRIES = 2
"""Of a step that its run can do without."""
COPY_LOOK_S = 1.0
"""Between two looks whether the relay holds a copy; they cost nothing but the look."""


class Runs:
    def __init__(
        self,
        journal: Journal,
        workflows: Mapping[str, Workflow],
        patience: Patience,
        rng: Random,
        tokens: Iterator[Token],
        copied: Callable[[Sequence[tuple[LogId, int]]], bool] = lambda places: True,
    ) -> None:
        """`copied(places)`: the relay outside holds these entries, or there is none."""
        self._journal = journal
        self._workflows = workflows
        self._patience = patience
        self._rng = rng
        self._tokens = tokens
        self._copied = copied
        self._term: Term | None = None
        self._flights: dict[RunId, Flight] = {}
        self._by_token: dict[Token, Flight] = {}
        self._breakers: dict[str, Breaker] = {}

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def services(self, now: float) -> tuple[ServiceView, ...]:
        """Those that are left alone now."""
        return tuple(breaker.view(now) for breaker in self._breakers.values() if breaker.open)

    def copying_s(self, now: float) -> list[float]:
        """How long each urgent run has waited for its copy."""
        return [now - flight.since for flight in self._flights.values() if flight.phase == "copying"]

    def deadline(self) -> float:
        return min([f.due for f in self._flights.values()]) if self._flights else float("inf")

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case StepFinished(token) if token in self._by_token:
                return self._outcome(self._by_token[token], event, now)
            case AppendFailed(token, why) if token in self._by_token:
                flight = self._by_token[token]
                flight.step = None  # nothing was recorded: ask the journal again where we are
                told = self._answer(flight, Unavailable("nothing was changed", why, "See `picluster status`."))
                return [*told, *self._wait(flight, None, now)]
            case ChangeRun():
                return self._change(event, now)
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
                return self._drop()
            case Durable(token) if token in self._by_token:
                return self._recorded(self._by_token[token], now)
            case LedgerGrew(facts) if any(fact.kind == "hook" for fact in facts):
                return self._fill(now)  # only a webhook makes a run that was not there
            case _:
                return []

    def _drop(self) -> list[Output]:
        self._term = None
        out = [o for flight in self._flights.values() for o in self._answer(flight, _not_here())]
        self._flights.clear()
        self._by_token.clear()
        self._breakers.clear()
        return out

    # starting ------------------------------------------------------------------------------------------------
    def _fill(self, now: float) -> list[Output]:
        """Take up open runs while there is room."""
        if self._term is None or self._busy() >= ACTIVE_MAX:
            return []
        out: list[Output] = []
        for run in self._journal.open_runs():
            if self._busy() >= ACTIVE_MAX:
                break
            if run not in self._flights and not self._crowded(run):
                self._flights[run] = Flight(run, "waiting", 0)
                out += self._advance(self._flights[run], now)
        return out

    def _crowded(self, run: RunId) -> bool:
        """Is it a batch, and are as many under way as may be?"""
        runs = self._journal.runs
        if runs[run].workflow != BATCH:
            return False
        return sum(flying in runs and runs[flying].workflow == BATCH for flying in self._flights) >= BATCHES_MAX

    def _busy(self) -> int:
        return sum(flight.phase not in ASIDE for flight in self._flights.values())

    def _advance(self, flight: Flight, now: float) -> list[Output]:
        """The workflow's next step, its intent first."""
        run = self._journal.standing(flight.run)
        if run is None:  # a checkpoint ended it: it was done elsewhere
            return self._land(flight)
        workflow = self._workflows.get(run.workflow)
        if workflow is None:
            return self._finish(flight, Finish("failed", f"this release knows no workflow {run.workflow!r}"), now)
        if run.hook is None or not run.open:
            return self._land(flight)
        step = workflow.next(flight.run, run.hook, run.values())
        match step:
            case Finish():
                return self._finish(flight, step, now)
            case Approve(name, question):
                flight.step = step
                asked = name in run.intents  # by an earlier coordinator, perhaps
                body = {"step": name, "attempt": 1, "asks": question}
                return self._ask_person(flight, now) if asked else self._record(flight, "intent", "run.intent", body)
            case _:
                flight.step, flight.attempt = step, 1
                return self._record(flight, "intent", "run.intent", {"step": step.name, "attempt": 1})

    def _finish(self, flight: Flight, finish: Finish, now: float) -> list[Output]:
        run = self._journal.runs[flight.run]
        if finish.urgent and not self._copied(run.places()):
            return self._await_copy(flight, finish, now)
        moved = RunMoved(flight.run, run.workflow, "finish", finish.outcome)
        body: dict[str, Any] = {"outcome": finish.outcome, "detail": finish.detail}
        if finish.outcome == "failed":
            body["step"] = flight.step.name if flight.step else run.newest
        if finish.marks:
            body["marks"] = dict(finish.marks)
        assert self._term is not None
        learnt = self._journal.cases.records(finish.case, self._term) if finish.case else ()
        return [moved, *self._record(flight, "done", "run.done", body, learnt)]

    # standing aside ------------------------------------------------------------------------------------------
    def _await_copy(self, flight: Flight, finish: Finish, now: float) -> list[Output]:
        first = flight.phase != "copying"
        self._retoken(flight, "copying")
        flight.finish, flight.since = finish, now if first else flight.since
        flight.due = now + COPY_LOOK_S
        workflow = self._journal.runs[flight.run].workflow
        return [RunMoved(flight.run, workflow, "copy", "waits for the relay")] if first else []

    def _ask_person(self, flight: Flight, now: float) -> list[Output]:
        """A new coordinator begins the time anew: an answer may come late, never too early."""
        assert isinstance(flight.step, Approve)
        within_s = flight.step.within_s
        self._retoken(flight, "asking")
        flight.since, flight.due = now, now + (self._patience.approval_s if within_s is None else within_s)
        return []

    def _decided(self, flight: Flight, approved: bool, by: str) -> list[Output]:
        assert isinstance(flight.step, Approve)
        value = {"approved": approved, "by": by}
        moved = RunMoved(
            flight.run, self._journal.runs[flight.run].workflow, flight.step.name,
            f"{'approved' if approved else 'rejected'} by {by}",
        )  # fmt: skip
        return [moved, *self._record(flight, "result", "run.result", {"step": flight.step.name, "value": value})]

    # moving --------------------------------------------------------------------------------------------------
    def _recorded(self, flight: Flight, now: float) -> list[Output]:
        """What the flight waited for is on W ledgers."""
        run = self._journal.standing(flight.run)
        told = self._answer(flight, view_of(run) if run else _gone(flight.run)) if flight.tickets else []
        match flight.phase:
            case "intent":
                out = self._act(flight, now)
            case "result" | "retry":
                out = self._advance(flight, now)
            case _:
                out = self._land(flight)
        has_room = flight.run not in self._flights or flight.phase in ASIDE
        return [*told, *out, *(self._fill(now) if has_room else ())]

    def _act(self, flight: Flight, now: float) -> list[Output]:
        assert self._term is not None
        match flight.step:
            case AskModel(_, request, prefer):
                self._retoken(flight, "acting", now + ACT_TIMEOUT_S)
                return [Ask(flight.token, flight.run, request, prefer)]
            case Call(_, service, operation, arguments, key):
                breaker = self._breakers.setdefault(service, Breaker(service, self._rng))
                if (wait_s := breaker.wait_s(now)) > 0:
                    if flight.step.optional:
                        return self._without(flight, f"{service} is left alone for {wait_s:.0f} s")
                    self._retoken(flight, "waiting", now + wait_s)
                    return []
                flight.probe = breaker.open
                self._retoken(flight, "acting", now + ACT_TIMEOUT_S)
                return [CallOut(flight.token, flight.run, service, operation, arguments, key, self._term)]
            case _:
                return self._ask_person(flight, now)

    def _outcome(self, flight: Flight, outcome: StepFinished, now: float) -> list[Output]:
        assert isinstance(flight.step, AskModel | Call)
        run = self._journal.standing(flight.run)
        if run is None or not run.open:
            return self._land(flight)
        tried, flight.probe = not flight.probe, False
        if isinstance(flight.step, Call):
            tried = tried and not flight.step.patient
            self._judge(self._breakers[flight.step.service], outcome, now)
        moved = RunMoved(flight.run, run.workflow, flight.step.name, outcome.error or "ok")
        if outcome.value is not None:
            return [moved, *self._returned(flight, flight.step, outcome.value, now)]
        if not outcome.retryable or (tried and flight.attempt >= self._tries_of(flight.step)):
            if flight.step.optional:
                return [moved, *self._without(flight, outcome.error or "")]
            tries = f" after {flight.attempt} tries" if flight.attempt > 1 else ""
            return [moved, *self._finish(flight, Finish("failed", f"{flight.step.name}: {outcome.error}{tries}"), now)]
        waits = self._wait(flight, outcome.retry_after_s, now)
        flight.attempt += tried
        return [moved, *waits]

    def _returned(self, flight: Flight, step: AskModel | Call, value: Mapping[str, Any], now: float) -> list[Output]:
        """The step's result, behind the events that it found."""
        assert self._term is not None
        try:
            new, kept = sifted(step, value, self._journal.known)
        except msgspec.ValidationError as fault:
            return self._finish(flight, Finish("failed", f"{step.name}: no answer to it: {fault}"), now)
        found = [hook_record(hook, *wanted_by(self._workflows, hook), self._term) for hook in new]
        return self._record(flight, "result", "run.result", {"step": step.name, "value": dict(kept)}, found)

    def _tries_of(self, step: AskModel | Call) -> int:
        most = self._patience.attempts_max
        return min(most, OPTIONAL_TRIES) if step.optional else most

    def _without(self, flight: Flight, why: str) -> list[Output]:
        """An optional step that could not be had."""
        assert flight.step is not None
        return self._record(flight, "result", "run.result", {"step": flight.step.name, "value": {"failed": why}})

    def _judge(self, breaker: Breaker, outcome: StepFinished, now: float) -> None:
        """What a refusal is for is in the call; what passes is in the service."""
        if outcome.value is not None or not outcome.retryable:
            breaker.succeeded()
        else:
            breaker.failed(outcome.error or "", outcome.retry_after_s, now)

    def _wait(self, flight: Flight, retry_after_s: float | None, now: float) -> list[Output]:
        """Full jitter below an exponential ceiling, but never before the server said."""
        ceiling = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (flight.attempt - 1))
        self._retoken(flight, "waiting", now + max(retry_after_s or 0.0, self._rng.uniform(0.0, ceiling)))
        return []

    def _due(self, flight: Flight, now: float) -> list[Output]:
        match flight.phase:
            case "acting":
                return self._outcome(flight, StepFinished(flight.token, error="no outcome in time"), now)
            case "asking":
                return self._decided(flight, False, TIMEOUT_SAYS)
            case "copying":
                assert flight.finish is not None
                run = self._journal.standing(flight.run)
                return self._finish(flight, flight.finish, now) if run and run.open else self._land(flight)
            case _:
                return self._advance(flight, now) if flight.step is None else self._act(flight, now)

    def _land(self, flight: Flight) -> list[Output]:
        """Let go of it. Whoever waits for it learns what became of it."""
        self._by_token.pop(flight.token, None)
        self._flights.pop(flight.run, None)
        return self._answer(flight, _gone(flight.run))

    # a person's word -----------------------------------------------------------------------------------------
    def _change(self, change: ChangeRun, now: float) -> list[Output]:
        run, flight = self._journal.standing(change.run), self._flights.get(change.run)
        fault = _not_here() if self._term is None else self._objection(change, run, flight)
        if fault is not None:
            return [Answer(change.ticket, fault)]
        flight = self._flights.setdefault(change.run, flight or Flight(change.run, "waiting", 0))
        flight.tickets.append(change.ticket)
        match change.what:
            case "approve" | "reject":
                return self._decided(flight, change.what == "approve", change.by)
            case "cancel":
                detail = f"cancelled by {change.by}"
                return self._record(flight, "done", "run.done", {"outcome": "cancelled", "detail": detail})
            case _:
                assert run is not None
                return self._record(flight, "retry", "run.retry", {"step": run.failed_at})

    def _objection(self, change: ChangeRun, run: Run | None, flight: Flight | None) -> PiclusterError | None:
        if run is None:
            return _gone(change.run)
        match change.what:
            case "retry" if run.state != "failed" or flight is not None:
                return UserError(f"this run is {run.state}", "only a run that failed can be tried again")
            case "cancel" if run.final or (flight is not None and flight.phase == "done"):
                return UserError(
                    "this run has ended", f"it is {run.state}" if run.final else "its end is being written"
                )
            case "approve" | "reject" if flight is None or flight.phase != "asking":
                return UserError("this run asks nobody", f"it is {run.state}", "See `picluster jobs show`.")
            case _:
                return None

    def _answer(self, flight: Flight, value: object) -> list[Output]:
        out: list[Output] = [Answer(ticket, value) for ticket in flight.tickets]
        flight.tickets.clear()
        return out

    # records -------------------------------------------------------------------------------------------------
    def _record(
        self, flight: Flight, phase: Phase, kind: str, body: Mapping[str, Any], before: Sequence[Record] = ()
    ) -> list[Output]:
        assert self._term is not None
        self._retoken(flight, phase)
        return [Append(flight.token, (*before, Record(kind, {"run": flight.run, **body}, self._term)))]

    def _retoken(self, flight: Flight, phase: Phase, due: float = float("inf")) -> None:
        self._by_token.pop(flight.token, None)
        flight.token, flight.phase, flight.due = next(self._tokens), phase, due
        self._by_token[flight.token] = flight


def _gone(run: RunId) -> NotFound:
    return NotFound(f"there is no run {run}", "it never was, or it ended and the ledger let it go")


def _not_here() -> Unavailable:
    return Unavailable("no coordinator can do this now", "an election is open", "Try again.")
