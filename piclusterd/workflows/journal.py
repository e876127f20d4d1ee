"""The fold of the ledger that workflows stand on: webhooks and runs, the same on every node from the same entries.

    hook      {source, key, event, body, workflow, title}   a verified event; `workflow` names the run it causes
    run.intent{run, step, attempt}                          before an act
    run.result{run, step, value}                            after it
    run.done  {run, outcome, detail}                        closes it

Entries may arrive in any order and more than once, so every field is chosen by rank, not by arrival. Where two results
of one step exist, the one with the higher (term, log, seq) wins: a coordinator only asks again for a result it does not
hold after its recovery barrier, so an older one was never on W ledgers and nothing was done with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..events import Fact, Record
from ..ids import LogId, RunId, Term, run_id
from ..views import RunView
from ..wire import Hook

Rank = tuple[Term, LogId, int]

DETAIL_CHARS_MAX = 500


@dataclass(slots=True)
class HookEntry:
    """Where the first copy of an event stands."""

    rank: Rank
    run: RunId | None


@dataclass(slots=True)
class Run:
    run: RunId
    workflow: str = ""
    title: str = ""
    hook: Hook | None = None
    """The event; dropped when the run is done, to keep memory for open ones."""
    hook_rank: Rank | None = None
    hlc: int = 0
    results: dict[str, tuple[Rank, Mapping[str, Any]]] = field(default_factory=dict)
    intents: dict[str, int] = field(default_factory=dict)
    """Step → highest attempt recorded."""
    done: tuple[Rank, str, str] | None = None

    @property
    def open(self) -> bool:
        return self.done is None and self.hook is not None

    def values(self) -> dict[str, Mapping[str, Any]]:
        return {step: value for step, (_, value) in self.results.items()}


class Journal:
    def __init__(self) -> None:
        self.hooks: dict[str, HookEntry] = {}
        self.runs: dict[RunId, Run] = {}

    def open_runs(self) -> list[RunId]:
        """Runs to be worked on, oldest event first."""
        rows = [(run.hlc, run.run) for run in self.runs.values() if run.open]
        return [run for _, run in sorted(rows)]

    def grow(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            if fact.kind == "hook":
                self._hook(fact)
            elif fact.kind.startswith("run."):
                self._step(fact)

    def _hook(self, fact: Fact) -> None:
        hook = hook_of(fact.body)
        workflow = str(fact.body.get("workflow", ""))
        run = run_id(workflow, hook.key) if workflow else None
        known = self.hooks.get(hook.key)
        if known is None or fact.order < known.rank:
            self.hooks[hook.key] = HookEntry(fact.order, run)
        if run is None:
            return
        entry = self._run(run)
        if entry.hook_rank is None or fact.order < entry.hook_rank:
            entry.hook_rank, entry.workflow, entry.hlc = fact.order, workflow, fact.hlc
            entry.title = str(fact.body.get("title", ""))
            entry.hook = hook if entry.done is None else None

    def _step(self, fact: Fact) -> None:
        body = fact.body
        run = self._run(RunId(str(body["run"])))
        step = str(body.get("step", ""))
        match fact.kind:
            case "run.intent":
                run.intents[step] = max(int(body.get("attempt", 1)), run.intents.get(step, 0))
            case "run.result":
                known = run.results.get(step)
                if known is None or fact.order > known[0]:
                    run.results[step] = (fact.order, body["value"])
            case "run.done":
                if run.done is None or fact.order > run.done[0]:
                    run.done = (fact.order, str(body["outcome"]), str(body.get("detail", "")))
                    run.hook = None
            case _:
                pass  # a newer release's kind: kept in the ledger, of no meaning here

    def _run(self, run: RunId) -> Run:
        return self.runs.setdefault(run, Run(run))

    def views(self, most: int) -> tuple[RunView, ...]:
        """The newest `most` runs, newest first."""
        rows = sorted(self.runs.values(), key=lambda run: (run.hlc, run.run), reverse=True)[:most]
        return tuple(_view(run) for run in rows)


def hook_record(hook: Hook, workflow: str, title: str, term: Term) -> Record:
    body = {
        "source": hook.source,
        "key": hook.key,
        "event": hook.event,
        "body": hook.body,
        "workflow": workflow,
        "title": title,
    }
    return Record("hook", body, term)


def hook_of(body: Mapping[str, Any]) -> Hook:
    return Hook(str(body["source"]), str(body["key"]), str(body["event"]), bytes(body["body"]))


def _view(run: Run) -> RunView:
    state = "open" if run.done is None else run.done[1]
    step = next(reversed(run.intents), "") if run.done is None else ""
    detail = run.done[2][:DETAIL_CHARS_MAX] if run.done else ""
    return RunView(run.run, run.workflow, run.title, state, step, max(run.intents.values(), default=0), detail, run.hlc)
