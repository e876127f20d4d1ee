"""Triage from webhook to effect without a cluster: the workflows, the memory's fold, and Linear's double over HTTP.

What the engine of runs does is done in a few lines: a step that fails retryably is taken again, a result is kept, the
end's case goes into the fold as the ledger would tell it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

from piclusterd import config, ids
from piclusterd.demo.linear_double import LinearDouble
from piclusterd.errors import Unavailable
from piclusterd.events import Choice, Fact
from piclusterd.ids import LogId, NodeId, RunId
from piclusterd.inference.protocol import Embedded, EmbedRequest
from piclusterd.integrations.linear import LinearClient
from piclusterd.integrations.outcome import CallFailed
from piclusterd.memory import Memory
from piclusterd.wire import Hook
from piclusterd.workflows.cases import Cases
from piclusterd.workflows.triage import Triage
from piclusterd.workflows.triage_commands import Commands
from piclusterd.workflows.triage_policy import Policies, Policy
from piclusterd.workflows.triage_watch import Watch
from piclusterd.workflows.workflow import TIMEOUT_SAYS, Approve, AskModel, Call, Finish, Workflow

LABELS = {"bug": "Bug", "feature": "Feature", "question": "Question", "chore": "Chore"}
LOG = LogId(NodeId("a" * 16), 1)
TRIES = 20
Model = Callable[[AskModel], Mapping[str, Any]]


def says(
    kind: str = "bug", priority: str = "P1", sure: float = 0.8, label: str = "", spread: bool = False
) -> dict[str, Any]:
    """A local model's answer to `guided_choice`; what it is not sure of it gives to another value, or `spread`s."""

    def odds(value: str, *others: str) -> dict[str, float]:
        rest = [other for other in others if other != value][: None if spread else 1]
        return {value: sure, **dict.fromkeys(rest, (1 - sure) / len(rest))}

    told = {"type": odds(kind, "chore", "bug", "feature"), "priority": odds(priority, "P3", "P2", "P1")}
    told |= {"label": odds(label, "none", "web")} if label else {}
    return {"text": json.dumps({"type": kind, "priority": priority}), "model": "m", "node": "pi-1", "choices": told}


class Office:
    _open: ClassVar[list[LinearClient]] = []
    """Sessions of this test's offices."""

    def __init__(self, double: LinearDouble, policy: Policy | None = None, actor_id: str = "us") -> None:
        policy = policy or Policy(labels=LABELS)
        self.double = double
        self.client = LinearClient(double.url, double.key)
        self._open.append(self.client)
        self.cases = Cases()
        self.open_titles: list[str] = []
        """Of runs that are under way."""
        self.memory = Memory(lambda: self.cases, self._nobody_embeds, lambda: self.open_titles)
        self.triage = Triage(config.Triage(), "m", actor_id, Policies(policy, {}))
        self.workflows: list[Workflow] = [
            self.triage, Commands(self.triage, actor_id), Watch(self.triage, actor_id),
        ]  # fmt: skip
        self.model: Model = lambda ask: says()
        self.before: Callable[[str], None] = lambda step: None
        """Told of each step before it is taken."""
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        """What happens while a run waits."""
        self.asked: list[AskModel] = []
        self.cloud: Callable[[str], Mapping[str, Any]] = lambda provider: {"failed": "nobody there"}
        self.asked_outside: list[Mapping[str, Any]] = []
        self.steps: list[str] = []
        self._seqs = itertools.count(1)

    async def _nobody_embeds(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        raise Unavailable("no node embeds here")

    def wanted(self, payload: Mapping[str, Any]) -> Workflow | None:
        hook = _hook(payload)
        return next((one for one in self.workflows if one.wants(hook) is not None), None)

    async def take(self, payload: Mapping[str, Any]) -> Finish:
        """The webhook, to the end of the run it causes."""
        workflow, hook = self.wanted(payload), _hook(payload)
        assert workflow is not None, "nobody wants it"
        run = ids.run_id(workflow.name, hook.key)
        results: dict[str, Mapping[str, Any]] = {}
        self.steps = []
        for _ in range(TRIES):
            step = workflow.next(run, hook, results)
            if isinstance(step, Finish):
                self._learn(step, run)
                return step
            self.steps.append(step.name)
            self.before(step.name)
            value = await self._done(step)
            if value is not None:
                results[step.name] = value
        raise AssertionError(f"no end in sight: {self.steps}")

    async def _done(self, step: Any) -> Mapping[str, Any] | None:
        match step:
            case AskModel():
                self.asked.append(step)
                if "guided_choice" in step.request or step.name != "reason":
                    return self.model(step)
                return {"text": '{"type": "bug", "priority": "P1", "reason": "because"}', "model": "m", "node": "n"}
            case Approve():
                meanwhile, self.meanwhile = self.meanwhile, None
                if meanwhile is not None:
                    await meanwhile()
                return {"approved": False, "by": TIMEOUT_SAYS}
            case Call(_, "cloud", _, arguments, _):
                self.asked_outside.append(arguments)
                return self.cloud(str(arguments["provider"]))
            case Call(_, service, operation, arguments, key):
                actor: Any = {"linear": self.client, "memory": self.memory}[service]
                try:
                    return dict(await actor.perform(operation, json.loads(json.dumps(dict(arguments))), key))
                except CallFailed as fault:
                    if not fault.retryable:
                        raise
                    return None
            case _:
                raise AssertionError(step)

    def _learn(self, finish: Finish, run: RunId) -> None:
        if finish.case:
            for record in self.cases.records(finish.case, 1):
                seq = next(self._seqs)
                self.cases.grow(Fact(LOG, seq, 1, record.kind, record.body, hlc=seq))

    @classmethod
    async def close_all(cls) -> None:
        while cls._open:
            await cls._open.pop().close()


def _hook(payload: Mapping[str, Any]) -> Hook:
    body = json.dumps(payload).encode()
    return Hook("linear", f"{payload['type']}:{payload['data']['id']}:{hash(body)}", payload["type"], body)
