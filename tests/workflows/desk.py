"""A ledger of plain facts and a workflow of three steps, for what stands on the journal."""

from __future__ import annotations

from collections.abc import Iterable

from piclusterd.events import Fact, Record
from piclusterd.ids import LogId, NodeId, RunId, Term, run_id
from piclusterd.wire import Hook
from piclusterd.workflows.journal import hook_record
from piclusterd.workflows.workflow import AskModel, Call, Finish, Results, Step

ME, PEER = NodeId("a" * 16), NodeId("b" * 16)
LOG = LogId(ME, 1)


class ThreeSteps:
    """classify (a model) → update → comment (calls) → done. Hooks whose event is `skip` are not wanted."""

    name = "three"

    def wants(self, hook: Hook) -> str | None:
        return f"about {hook.key}" if hook.event != "skip" else None

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "classify" not in results:
            return AskModel("classify", {"messages": [hook.key]})
        for name in ("update", "comment"):
            if name not in results:
                return Call(name, "linear", name, {"of": hook.key}, f"{run}/{name}")
        return Finish("done", str(results["classify"]["text"]))


def hook(key: str = "k", event: str = "create") -> Hook:
    return Hook("linear", key, event, b"{}")


def run_of(key: str) -> RunId:
    return run_id("three", key)


class Ledger:
    """The facts that W nodes hold, numbered as one log."""

    def __init__(self, facts: Iterable[Fact] = ()) -> None:
        self.facts = list(facts)

    def add(self, *records: Record) -> tuple[Fact, ...]:
        first = len(self.facts) + 1
        new = tuple(
            Fact(LOG, first + at, record.term, record.kind, record.body, hlc=first + at)
            for at, record in enumerate(records)
        )
        self.facts += new
        return new

    def add_hook(self, key: str, term: Term = 1, workflow: str = "three") -> tuple[Fact, ...]:
        return self.add(hook_record(hook(key), workflow, f"about {key}", term))
