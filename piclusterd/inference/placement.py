"""Which node should answer: knows from gossip who serves what, and picks the node that would be done first. Pure.

    members (gossip) ──▶ members_changed        choose(model, …) ──▶ Choice(node, reason) | NotFound | Unavailable

Gossip is seconds old, so a burst would all run to the node that was idle a moment ago: what was sent to a node since it
last spoke of itself counts as running there, for at most `UNSEEN_S`. Who is alive by gossip and not linked with
this node (just started, or cut off from here alone) gets none: the request would only fail on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..errors import NotFound, PiclusterError, Unavailable
from ..events import Choice, WhoServes
from ..ids import NodeId
from ..wire import TASKS, Member, ModelFacts
from .routing import predict

UNSEEN_S = 3.0
"""A request shows in a node's facts within a gossip round or two, or is over."""
ANY_MODEL = ("", "default")
"""Names a client sends that has no preference; the serving node replaces them by its default where it has one."""


class Placement:
    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._members: tuple[Member, ...] = ()
        self._links: Collection[NodeId] = ()
        self._sent: dict[NodeId, list[float]] = {}
        """When requests were placed on a node that its facts do not show yet."""

    def members_changed(self, members: Sequence[Member], links: Collection[NodeId]) -> None:
        """`members` is the whole list, this node included; only alive ones get requests, and others only by a link."""
        before = {member.node: member.facts.version for member in self._members}
        self._members = tuple(sorted(members, key=lambda member: member.node))
        self._links = links
        for member in self._members:
            if before.get(member.node) != member.facts.version:
                self._sent.pop(member.node, None)

    def choose(self, asked: WhoServes, now: float) -> Choice | PiclusterError:
        """The alive node that would answer first. Those in `exclude` have failed this request already.

        Where `prefer` names a role, nodes of that role come before all others, however busy: work that nobody waits for
        goes to the droplet and leaves the Pis to those who do.

        Returns `NotFound`, naming the models there are, where no node of the cluster serves `model`; `Unavailable`
        where those that do are not alive, not linked or excluded.
        """
        model, task, exclude = asked.model, asked.task, asked.exclude
        name = self._named(model)
        serving = [(member, facts) for member in self._members for facts in _serves(member, name, task)]
        if not serving:
            return self._not_found(model, task)
        able = [(m, facts) for m, facts in serving if not self._hindrance(m, exclude)]
        if not able:
            return self._unavailable(name, [member for member, _ in serving], exclude)
        ranked = sorted(
            (
                asked.prefer not in ("", m.facts.role),
                self._predicted(m, facts, asked.prompt_tokens, now),
                m.node != self._me,
                m.node,
            )
            for m, facts in able
        )
        _, seconds, _, node = ranked[0]
        member, facts = next((m, facts) for m, facts in able if m.node == node)
        self._sent.setdefault(node, []).append(now)
        return Choice(node, _shown(member), name, _reason(member, facts, seconds), seconds)

    def models(self, loaded: bool = False) -> dict[str, tuple[NodeId, ...]]:
        """Every model an alive node serves, with the nodes that do. `loaded`: without loading it first."""
        served: dict[str, tuple[NodeId, ...]] = {}
        for member in self._members:
            for facts in member.facts.models if member.state == "alive" else ():
                if loaded and facts.load_s:
                    continue
                served[facts.name] = (*served.get(facts.name, ()), member.node)
        return dict(sorted(served.items()))

    def _named(self, model: str) -> str:
        """The only model in memory, else the only one there is, for a client without a preference."""
        if model not in ANY_MODEL:
            return model
        there = list(self.models(loaded=True) or self.models())
        return there[0] if len(there) == 1 else model

    def _predicted(self, member: Member, facts: ModelFacts, prompt_tokens: int, now: float) -> float:
        recent = [at for at in self._sent.get(member.node, ()) if now - at < UNSEEN_S]
        if member.node in self._sent:
            self._sent[member.node] = recent
        return predict(facts, member.facts, prompt_tokens, member.node == self._me, len(recent))

    def _hindrance(self, member: Member, exclude: Sequence[NodeId]) -> str:
        """Why `member` cannot be asked; "" where it can."""
        if member.node in exclude:
            return "failed this request"
        if member.state != "alive":
            return member.state
        return "" if member.node == self._me or member.node in self._links else "no link from here"

    def _not_found(self, model: str, task: str) -> NotFound:
        there = self.models()
        if model in there:
            why = f"It can {_can(self._members, model)}."
            return NotFound(f"the model {model!r} cannot {task}.", why, param="model")
        why = f"There are: {', '.join(there) or 'none'}."
        return NotFound(f"no node serves the model {model!r}.", why, param="model")

    def _unavailable(self, model: str, serving: list[Member], exclude: Sequence[NodeId]) -> Unavailable:
        why = ", ".join(f"{_shown(member)}: {self._hindrance(member, exclude)}" for member in serving)
        return Unavailable(f"no node can answer with {model!r} now", f"{why}.")


def _serves(member: Member, model: str, task: str) -> list[ModelFacts]:
    return [facts for facts in member.facts.models if facts.name == model and facts.does(task)][:1]


def _can(members: Sequence[Member], model: str) -> str:
    facts = next(facts for member in members for facts in member.facts.models if facts.name == model)
    return ", ".join(task for task in TASKS if facts.does(task)) or "nothing that this release knows"


def _shown(member: Member) -> str:
    return member.facts.name or member.node


def _reason(member: Member, facts: ModelFacts, seconds: float) -> str:
    speed = f"{facts.decode_tps:.0f} tok/s" if facts.decode_tps else "not measured yet"
    flags = f", {' '.join(member.facts.flags)}" if member.facts.flags else ""
    return f"{_shown(member)}: {facts.busy} running, {facts.queued} queued, {speed}{flags}, predicted {seconds:.1f} s"
