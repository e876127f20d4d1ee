"""What a workflow is: a pure function from what is known so far to the next step.

A run's whole memory is the ledger: the webhook that caused it and the result of each step, by name. `next` is asked
again after every result, on whichever node coordinates by then, and must give the same step for the same results.

    hook ──▶ wants? ──▶ next({}) ──▶ AskModel("classify") ──▶ next({"classify": …}) ──▶ Call("update", …) … ──▶ Finish

Besides a model and a service, a step may ask a person (`Approve`). What a service told of may be events that never came
(`Call.found`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..ids import RunId
from ..wire import Hook

TIMEOUT_SAYS = "nobody, in time"
"""Who said no to what no person answered."""
Results = Mapping[str, Mapping[str, Any]]
"""Step name → what it returned. A step that is not there has not returned yet."""


def answered_by(result: Mapping[str, Any]) -> tuple[str, str]:
    """Model and node of an `AskModel`, as people call them; an older node tells its id only, and some tell nothing."""
    return str(result.get("model") or "unknown"), str(result.get("name") or result.get("node") or "unknown")


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask a local model. The result names who answered: `{"model": str, "node": id, "name": str}` (`answered_by`) and

        an OpenAI chat body                                     text: str; choices: {field: {option: probability}}
                                                                where it has `guided_choice`
        {"task": "embed", "model": str, "texts": [str]}         vectors: [bytes], little-endian float32 of length 1
        {"task": "classify", "model": str, "texts": [str]}      scores: [{label: 0 to 1}], the best label first

    Results stay in the ledger: ask for few texts a step.
    `prefer`: a role whose nodes are asked first, where one serves the model.
    `optional`: after few tries the run goes on without it, and the result is `{"failed": why}`.
    """

    name: str
    request: Mapping[str, Any]
    prefer: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of a service outside. It may be attempted more than once: `key` makes the effect happen once.

    `optional`: as of `AskModel`. `patient`: a failure that may pass is never one too many; the service itself says when
    it is too late.

    `found`: what the answer tells of, and what the run remembers of it instead of the whole (results stay in the
    ledger). Events that are not in the ledger yet are taken as if they had come, in one append with the result, which
    says how many: `{"taken": int}`. Raises `msgspec.ValidationError` where the answer is none.
    """

    name: str
    service: str
    operation: str
    arguments: Mapping[str, Any]
    key: str
    optional: bool = False
    patient: bool = False
    found: Callable[[Mapping[str, Any]], tuple[Sequence[Hook], Mapping[str, Any]]] | None = None


@dataclass(frozen=True, slots=True)
class Approve:
    """A person says yes or no (`picluster jobs approve|reject`); the result is `{"approved": bool, "by": str}`.

    Nobody's answer within the time that the configuration gives is a no. `question` is shown as it stands. `within_s`:
    another time; with it the step is a wait that a person may cut short.
    """

    name: str
    question: str
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The end. `urgent`: only once the relay outside the house, where there is one, holds a copy of the run.

    `case`: what this run adds to what triage remembers of an issue, `{issue, set}` (see `cases`).
    """

    outcome: Literal["done", "failed", "ignored"]
    detail: str = ""
    urgent: bool = False
    marks: Mapping[str, int] = field(default_factory=dict)
    """Service → milliseconds of its own clock up to which we know all that it sent."""
    case: Mapping[str, Any] | None = None


Step = AskModel | Call | Approve | Finish


class Workflow(Protocol):
    @property
    def name(self) -> str: ...

    def wants(self, hook: Hook) -> str | None:
        """A title for the run this event causes, or None where the workflow does not care for it."""

    def next(self, run: RunId, hook: Hook, results: Results) -> Step: ...


def wanted_by(workflows: Mapping[str, Workflow], hook: Hook) -> tuple[str, str]:
    """The first workflow that takes `hook` up, and the run's title; two empty texts where none does."""
    for name, workflow in workflows.items():
        title = workflow.wants(hook)
        if title is not None:
            return name, title
    return "", ""


def sifted(
    step: AskModel | Call, answer: Mapping[str, Any], known: Callable[[str], object]
) -> tuple[list[Hook], Mapping[str, Any]]:
    """The events that `step` found and whose keys are not `known` (None), each once; and what is recorded of `answer`.

    Raises `msgspec.ValidationError` where it is not what the step asked for.
    """
    if not isinstance(step, Call) or step.found is None:
        return [], answer
    hooks, kept = step.found(answer)
    new = [hook for hook in {hook.key: hook for hook in hooks}.values() if known(hook.key) is None]
    return new, {**kept, "taken": len(new)}
