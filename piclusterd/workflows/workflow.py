"""What a workflow is: a pure function from what is known so far to the next step.

A run's whole memory is the ledger: the webhook that caused it and the result of each step, by name. `next` is asked
again after every result, on whichever node coordinates by then, and must give the same step for the same results.

    hook ──▶ wants? ──▶ next({}) ──▶ AskModel("classify") ──▶ next({"classify": …}) ──▶ Call("update", …) … ──▶ Finish
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..ids import RunId
from ..wire import Hook

Results = Mapping[str, Mapping[str, Any]]
"""Step name → what it returned. A step that is not there has not returned yet."""


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask a local model. `request` is an OpenAI chat body; the result is `{"text": str, "model": str, "node": str}`."""

    name: str
    request: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of a service outside. It may be attempted more than once: `key` makes the effect happen once."""

    name: str
    service: str
    operation: str
    arguments: Mapping[str, Any]
    key: str


@dataclass(frozen=True, slots=True)
class Finish:
    outcome: Literal["done", "failed", "ignored"]
    detail: str = ""


Step = AskModel | Call | Finish


class Workflow(Protocol):
    @property
    def name(self) -> str: ...

    def wants(self, hook: Hook) -> str | None:
        """A title for the run this event causes, or None where the workflow does not care for it."""

    def next(self, run: RunId, hook: Hook, results: Results) -> Step: ...
