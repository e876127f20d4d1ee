"""The world outside the cluster: a hub with an outbox and a term fence, a service with idempotency keys, a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..events import Ticket
from ..ids import NodeId, RunId, Term, uuid4_of
from ..wire import Hook
from ..workflows.flight import Patience
from ..workflows.schedule import Agenda
from ..workflows.workflow import AskModel, Call, Finish, Results, Step, Workflow

PATIENCE = Patience(attempts_max=1000)
"""Of rehearsed runs: none is given up in a storm."""
WINDOW = 32
"""Webhooks the hub has under way at once (as the forwarder)."""


@dataclass(frozen=True, slots=True)
class Line:
    """The coordinator's connection: of one life of one node, in one term."""

    node: NodeId
    life: int
    term: Term


class Hub:
    """Keeps a webhook until a coordinator called it taken; talks only to the highest term it has seen."""

    def __init__(self) -> None:
        self.outbox: dict[int, Hook] = {}
        self.line: Line | None = None
        self._highest: Term = 0
        self._last = 0
        self._under_way: dict[int, None] = {}

    def accept(self, hook: Hook) -> None:
        self._last += 1
        self.outbox[self._last] = hook

    def connect(self, line: Line) -> None:
        """A line of an older term is refused."""
        if line.term >= self._highest:
            self._highest, self.line = line.term, line
            self._under_way.clear()

    def hang_up(self, node: NodeId) -> None:
        if self.line is not None and self.line.node == node:
            self.line = None

    def to_send(self) -> list[tuple[int, Hook]]:
        """What the window allows to send now, oldest first."""
        room = WINDOW - len(self._under_way)
        fresh = [(seq, hook) for seq, hook in self.outbox.items() if seq not in self._under_way][:room]
        self._under_way.update((seq, None) for seq, _ in fresh)
        return fresh

    def answered(self, seq: int, taken: bool) -> None:
        self._under_way.pop(seq, None)
        if taken:
            self.outbox.pop(seq, None)


class Rehearsed:
    """A workflow of the shape of triage, without its prose."""

    name = "rehearsed"

    def wants(self, hook: Hook) -> str | None:
        return hook.key if hook.event == "create" else None

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "classify" not in results:
            return AskModel("classify", {"messages": [{"role": "user", "content": hook.key}]})
        if "update" not in results:
            return Call("update", "service", "update", {"text": results["classify"]["text"]}, f"{run}/update")
        if "comment" not in results:
            return Call("comment", "service", "comment", {"issue": hook.key}, uuid4_of(run, "comment"))
        return Finish("done", str(results["classify"]["text"]))


class Service:
    """As Linear: an effect whose client-made id is known already is refused, so it happens once.

    And what the runs that call it are made of. A test may put another in its place, before the world opens.
    """

    reads: tuple[str, ...] = ()
    """Operations that change nothing."""

    def __init__(self, forgetful: bool = False) -> None:
        """`forgetful` (an ablation): it does not look at keys, and does everything it is asked."""
        self._done: dict[str, RunId] = {}
        self._forgetful = forgetful
        self.workflows: Mapping[str, Workflow] = {"rehearsed": Rehearsed()}
        self.agenda = Agenda()

    @property
    def engine(self) -> dict[str, Any]:
        """What of a node's setup runs are made of."""
        return {"workflows": self.workflows, "patience": PATIENCE, "agenda": self.agenda}

    def says(self, priority: str) -> str:
        """The model's words for a priority."""
        return priority

    def perform(self, run: RunId, operation: str, key: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        key += f"/{len(self._done)}" if self._forgetful else ""
        first = key not in self._done
        if operation == "comment":
            self._done.setdefault(key, run)
        return {"first": first}

    def effects(self) -> dict[str, int]:
        """Run → comments made for it."""
        count: dict[str, int] = {}
        for run in self._done.values():
            count[run] = count.get(run, 0) + 1
        return count


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook on its way into the cluster. `seq` is the hub's; None for one posted to a node directly."""

    ticket: Ticket
    seq: int | None
    hook: Hook
