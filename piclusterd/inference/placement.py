"""Which node should answer: knows from gossip who serves what, and picks the node that would be done first. Pure.

    members (gossip) ──▶ members_changed        choose(model, …) ──▶ Choice(node, reason) | NotFound | Unavailable

Gossip is seconds old, so a burst would all run to the node that was idle a moment ago: what was sent to a node since it
last spoke of itself counts as running there, for at most `UNSEEN_S`. A node that has read the prompt's beginning before
need not read it again, and is credited that, unless it has far more to do than others (`routing.crowded`). Who would
fetch it from there is predicted so, by the plan that it will make (`shipping`). Who is alive by gossip and not linked
with this node (just started, or cut off from here alone) gets none: the request would only fail on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from ..errors import NotFound, PiclusterError, Unavailable
from ..events import Choice, WhoServes
from ..ids import NodeId
from ..wire import DRAINING, TASKS, Facts, Mark, Member, ModelFacts
from .prefix import DIGEST_BYTES, DIGESTS_MAX, held
from .routing import Load, crowded, predict
from .shipping import Here, Plan, plan

UNSEEN_S = 3.0
"""A request shows in a node's facts within a gossip round or two, or is over."""
FORGET, FORGET_TOKENS = 0.1, 256
"""A long prompt that nobody knows goes where there is least to forget for it, among nodes that are much alike."""
ANY_MODEL = ("", "default")
"""Names a client sends that has no preference; the serving node replaces them by its default where it has one."""


_Giver = tuple[NodeId, Facts]


@dataclass(frozen=True, slots=True)
class _Sent:
    at: float
    model: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class _Offer:
    """What is to be expected of one node."""

    member: Member
    facts: ModelFacts
    cached: int
    """Bytes of the prompt that it need not read."""
    fetched: Plan | None
    """What it would rather fetch than read."""
    seconds: float


class Placement:
    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._members: tuple[Member, ...] = ()
        self._links: Collection[NodeId] = ()
        self._sent: dict[NodeId, list[_Sent]] = {}
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
        best = min(
            self._offers(name, able, asked, now),
            key=lambda offer: (
                0 < offer.facts.context < asked.prompt_tokens,  # it would not fit, as far as one can guess
                DRAINING in offer.member.facts.flags,
                asked.prefer not in ("", offer.member.facts.role),
                offer.seconds,
                offer.member.node != self._me,
                offer.member.node,
            ),
        )
        node = best.member.node
        self._sent.setdefault(node, []).append(_Sent(now, name, asked.marks))
        return Choice(node, _shown(best.member), name, _reason(best), best.seconds)

    def _offers(
        self, name: str, able: Sequence[tuple[Member, ModelFacts]], asked: WhoServes, now: float
    ) -> list[_Offer]:
        recent = {member.node: self._recent(member.node, name, now) for member, _ in able}
        loads = {member.node: Load.of(facts, len(recent[member.node])) for member, facts in able}
        idlest = min(load.part for load in loads.values())
        givers = [
            (one.node, one.facts) for one, facts in able if facts.token_bytes and held(facts.prefixes, asked.marks)
        ]
        return [
            _offer(
                member, facts, asked, recent[member.node], load, crowded(load, idlest), givers, member.node == self._me
            )
            for member, facts in as_measured(able)
            for load in (loads[member.node],)
        ]

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

    def _recent(self, node: NodeId, model: str, now: float) -> list[_Sent]:
        """What was sent there that its facts do not show yet."""
        recent = [sent for sent in self._sent.get(node, ()) if now - sent.at < UNSEEN_S]
        if node in self._sent:
            self._sent[node] = recent
        return [sent for sent in recent if sent.model == model]

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
    """Its facts of that model, where it can do the task; "": whatever it can do."""
    return [facts for facts in member.facts.models if facts.name == model and (not task or facts.does(task))][:1]


def _can(members: Sequence[Member], model: str) -> str:
    facts = next(facts for member in members for facts in member.facts.models if facts.name == model)
    return ", ".join(task for task in TASKS if facts.does(task)) or "nothing that this release knows"


def _shown(member: Member) -> str:
    return member.facts.name or member.node


def _offer(
    member: Member, facts: ModelFacts, asked: WhoServes, recent: Sequence[_Sent], load: Load, full: bool,
    givers: Sequence[_Giver], local: bool,
) -> _Offer:  # fmt: skip
    """`full`: its memory of the prompt must not count. `givers`: who has read a beginning, and gives it to others."""
    cached = 0 if full else _cached(facts, asked.marks, recent)
    fetched = None if full else _fetched(facts, asked, cached, load.beside, givers)
    tokens = asked.prompt_tokens
    if fetched is not None:
        tokens -= fetched.tokens
    elif cached:
        tokens -= tokens * cached // asked.marks[-1].length
    seconds = predict(facts, member.facts, tokens, local, load, asked.answer_tokens)
    if fetched is not None:
        seconds += fetched.fetch_s
    if not cached and asked.prompt_tokens >= FORGET_TOKENS:
        seconds *= 1 + FORGET * min(1.0, len(facts.prefixes) / (DIGESTS_MAX * DIGEST_BYTES))
    return _Offer(member, facts, cached, fetched, seconds)


def _fetched(facts: ModelFacts, asked: WhoServes, cached: int, busy: int, givers: Sequence[_Giver]) -> Plan | None:
    """What the node would plan (`ferry`), as far as its gossip tells."""
    if not givers:
        return None
    here = Here(asked.prompt_tokens, asked.marks, cached, busy, facts.prefill_tps, facts.token_bytes, facts.states_max)
    return plan(here, facts.name, givers, {node: facts.states_bps for node, _ in givers})


def as_measured(able: Sequence[tuple[Member, ModelFacts]]) -> list[tuple[Member, ModelFacts]]:
    """Who has not measured yet is taken for as fast as the fastest: else nobody would ever ask it."""
    prefill = max(facts.prefill_tps for _, facts in able)
    decode = max(facts.decode_tps for _, facts in able)
    return [
        (
            member,
            msgspec.structs.replace(
                facts, prefill_tps=facts.prefill_tps or prefill, decode_tps=facts.decode_tps or decode
            ),
        )
        for member, facts in able
    ]


def _cached(facts: ModelFacts, asked: Sequence[Mark], recent: Sequence[_Sent]) -> int:
    """Bytes that the model has read, or is just reading for a request that its facts do not show yet."""
    sent = {mark.digest for one in recent for mark in one.marks}
    reading = next((mark.length for mark in reversed(asked) if mark.digest in sent), 0)
    return max(held(facts.prefixes, asked), reading)


def _reason(offer: _Offer) -> str:
    facts = offer.facts
    speed = f"{facts.decode_tps:.0f} tok/s" if facts.decode_tps else "not measured yet"
    flags = f", {' '.join(offer.member.facts.flags)}" if offer.member.facts.flags else ""
    known = f", knows {offer.cached} bytes of it" if offer.cached else ""
    if offer.fetched is not None:
        known += f", fetches {offer.fetched.tokens} tokens of it in {offer.fetched.fetch_s:.1f} s"
    return (
        f"{_shown(offer.member)}: {facts.busy} running, {facts.queued} queued, {speed}{flags}{known},"
        f" predicted {offer.seconds:.1f} s"
    )
