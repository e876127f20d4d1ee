"""From what rules, a model and similar issues say to a verdict: each field's value, confidence and where it is from.

    model's probabilities ─┐ moved by what people made of similar issues
    what people corrected ─┘ of which the model had said the like  ─▶ calibrated by what became of such verdicts
    rules before ─▶ certain          rules after: a raise; a P0 that nothing confirms is P1

What is learnt is the model's error: of each of the NEIGHBOURS nearest judged issues, what a person said minus what the
model had said, weighted by likeness² and by how much the model's odds there overlap with those here. So an issue about
the same thing moves the verdict where the model is wrong in the same way, and leaves it alone where it was right.

Source: Nadaraya and Watson's kernel regression (1964), of residuals. Figures: `bench/triage.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from .cases import calibrated
from .triage_issue import PRIORITIES
from .triage_policy import Policy
from .triage_rules import Certain

NEIGHBOURS = 6
"""Judged issues that may move a verdict; more of them blur what the nearest say."""
DOUBT = 0.1
"""The weight of "nothing was learnt": one issue of likeness 0.3 moves half of its error."""
TOLD = 0.75
"""The confidence in an answer whose model tells no probabilities (a provider outside, or an older node)."""
NONE = "none"
"""The model's word for no further label."""
Odds = Mapping[str, float]


class Near(msgspec.Struct, frozen=True):
    """A similar issue, as the service `memory` tells it."""

    identifier: str
    title: str
    likeness: float
    holds: dict[str, str] = {}
    """Field → what a person made it."""
    odds: dict[str, dict[str, float]] = {}
    """What a model had said of it; nothing where none was asked."""
    text: str = ""


class Recalled(msgspec.Struct, frozen=True):
    """What the service `memory` returns for an issue. `case`: what we said of it before; empty where nothing."""

    vector: bytes = b""
    encoder: str = ""
    near: tuple[Near, ...] = ()
    bins: dict[str, list[list[int]]] = {}
    case: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answer: odds of each field's values; `reason` where it gave one already."""

    odds: Mapping[str, Odds]
    model: str
    node: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """One field of a verdict. `raw` is the confidence before calibration; `source`: rule, model or similar issues."""

    value: str
    raw: float
    confidence: float
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    type: Judged
    priority: Judged
    label: Judged | None
    duplicate: Near | None
    reason: str
    model: str
    node: str
    why: tuple[str, ...] = ()
    near: tuple[Near, ...] = ()
    odds: Mapping[str, Odds] = field(default_factory=dict)
    """The model's own."""
    urgent: bool = False
    """It was P0 before the rules that come after, and no rule had said so."""

    @property
    def fields(self) -> dict[str, Judged]:
        found = {"type": self.type, "priority": self.priority}
        return found | ({"label": self.label} if self.label else {})

    def __str__(self) -> str:
        return f"{self.type.value} {self.priority.value}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a verdict is made of."""

    policy: Policy
    certain: Certain
    recalled: Recalled = field(default_factory=Recalled)


def decide(evidence: Evidence, answered: Answered) -> Verdict:
    policy, rules, recalled = evidence.policy, evidence.certain, evidence.recalled
    kind = _field("type", rules.type, answered, policy.types, recalled)
    priority = _field("priority", rules.priority, answered, tuple(PRIORITIES), recalled)
    urgent = priority.value == "P0" and priority.source != "rule"
    priority, told = _after(priority, rules, policy)
    label = None
    if rules.labels:
        label = Judged(rules.labels[0], 1.0, 1.0, "rule")
    elif policy.labels_more and "label" in policy.fields:
        found = _field("label", "", answered, (*policy.labels_more, NONE), recalled)
        label = found if found.value != NONE else None
    near = recalled.near
    twin = near[0] if near and near[0].likeness >= policy.duplicate and "duplicate" in policy.fields else None
    return Verdict(kind, priority, label, twin, answered.reason, answered.model, answered.node,
                   (*rules.why, *told), near, answered.odds, urgent)  # fmt: skip


def is_unsure(verdict: Verdict, policy: Policy) -> bool:
    """Should a larger model look?"""
    judged = [verdict.fields[name] for name in ("type", "priority") if name in policy.fields]
    return verdict.urgent or any(one.confidence < policy.escalate_below for one in judged)


def _field(name: str, rule: str, answered: Answered, options: Sequence[str], recalled: Recalled) -> Judged:
    if rule:
        return Judged(rule, 1.0, 1.0, "rule")
    said = answered.odds.get(name) or dict.fromkeys(options, 1.0 / len(options))
    moved = corrected(name, options, said, recalled.near)
    best = max(options, key=lambda option: moved[option])
    by_model = best == max(options, key=lambda option: said.get(option, 0.0))
    raw = min(moved[best], 1.0)
    return Judged(best, raw, calibrated(raw, recalled.bins.get(name, [])), "model" if by_model else "similar issues")


def corrected(name: str, options: Sequence[str], said: Odds, near: Sequence[Near]) -> Odds:
    """The model's odds `said`, moved by its errors on similar issues."""
    weighed = []
    for case in near:
        value, before = case.holds.get(name, ""), case.odds.get(name) or said
        if value in options:
            overlap = sum(min(before.get(option, 0.0), said.get(option, 0.0)) for option in options)
            weighed.append((max(case.likeness, 0.0) ** 2 * overlap, value, before))
    weighed = sorted(weighed, key=lambda one: -one[0])[:NEIGHBOURS]
    total = DOUBT + sum(weight for weight, _, _ in weighed)
    moved = {
        option: max(
            said.get(option, 0.0)
            + sum(weight * ((value == option) - before.get(option, 0.0)) for weight, value, before in weighed) / total,
            0.0,
        )
        for option in options
    }
    whole = sum(moved.values()) or 1.0
    return {option: share / whole for option, share in moved.items()}


def _after(priority: Judged, rules: Certain, policy: Policy) -> tuple[Judged, tuple[str, ...]]:
    """The rules that come after the model; P0 < P1 as text, too."""
    value, told = priority.value, []
    if rules.at_least and value > rules.at_least:
        told.append(f"raised from {value} by a rule")
        return Judged(rules.at_least, 1.0, 1.0, "rule"), tuple(told)
    if value == "P0" and not rules.confirms_p0 and priority.confidence < policy.p0_confidence:
        told.append(f"P0 at {priority.confidence:.0%} is not confirmed")
        return Judged("P1", priority.raw, priority.confidence, priority.source), tuple(told)
    return priority, ()
