"""From a verdict to what is written: which fields, what they replace, and what is remembered of it.

A field is written where it is certain enough, and where nobody has set it: it is unset, or it still is what an earlier
run of ours made it. What a person set, changed or took away after us stays as it is. Suggested is what is less certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..ids import RunId
from .triage_decide import Judged, Recalled, Verdict
from .triage_issue import PRIORITIES, Issue, Label
from .triage_policy import Policy

CASE_TEXT_CHARS_MAX = 300
"""Of an issue's description in its case, for examples."""


ODDS_MIN = 0.005
"""Less likely values are not remembered."""


class Wrote(msgspec.Struct, frozen=True):
    """What of an issue is ours: the priority (0: none) and the labels that we gave it."""

    priority: int = 0
    labels: tuple[Label, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"priority": self.priority, "labels": [{"id": one.id, "name": one.name} for one in self.labels]}


@dataclass(frozen=True, slots=True)
class Plan:
    """`change`: arguments of `issue_update` but for the issue, empty where nothing is written. `wanted`: what is ours
    after it. `suggested`: field → what people may apply. `kept`: fields that a person has set."""

    change: Mapping[str, Any] = field(default_factory=dict)
    wanted: Wrote = field(default_factory=Wrote)
    suggested: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def wrote_before(case: Mapping[str, Any]) -> Wrote:
    """What an earlier run wrote and nobody took back by `undo`."""
    try:
        return Wrote() if case.get("undone") else msgspec.convert(case.get("wrote", {}), Wrote)
    except msgspec.ValidationError:
        return Wrote()


def plan(issue: Issue, verdict: Verdict, policy: Policy, before: Wrote, apply_all: bool = False) -> Plan:
    """What to write and what to suggest. `apply_all`: a person said so, whatever the confidence."""
    fields: dict[str, Judged] = {name: judged for name, judged in verdict.fields.items() if name in policy.fields}
    certain = [name for name, judged in fields.items() if apply_all or judged.confidence >= policy.auto_of(name)]
    if policy.mode != "apply" and not apply_all:
        certain = []
    change: dict[str, Any] = {}
    kept: list[str] = []
    if "priority" in fields and _is_set(issue.priority, before.priority):
        kept.append("priority")
    elif "priority" in certain and (number := PRIORITIES[fields["priority"].value]) != issue.priority:
        change |= {"priority": number, "instead_of": [issue.priority]}
    labels = _labels(issue, {name: fields[name] for name in fields if name != "priority"}, certain, policy, before)
    change |= labels.change
    kept += labels.kept
    suggested = {
        name: judged.value
        for name, judged in fields.items()
        if name not in (*certain, *kept) and judged.confidence >= policy.suggest
    }
    priority = change.get("priority", before.priority if issue.priority == before.priority else 0)
    return Plan(change, Wrote(priority, labels.ours), suggested, tuple(kept))


@dataclass(frozen=True, slots=True)
class _Labels:
    change: Mapping[str, Any]
    ours: tuple[Label, ...]
    kept: tuple[str, ...]


def _labels(
    issue: Issue, fields: Mapping[str, Judged], certain: list[str], policy: Policy, before: Wrote
) -> _Labels:  # fmt: skip
    groups = {"type": tuple(policy.labels.values()), "label": policy.labels_more}
    ours = [label for label in before.labels if issue.named(label.name)]
    add: list[dict[str, Any]] = []
    remove: list[str] = []
    kept: list[str] = []
    for name, judged in fields.items():
        here = [label for named in groups[name] if (label := issue.named(named))]
        theirs = [label for label in here if label not in ours]
        taken = [label for label in before.labels if label.name in groups[name] and label not in ours]
        if theirs or taken:
            kept.append(name)
            continue
        wanted = policy.labels.get(judged.value, "") if name == "type" else judged.value
        label = issue.offered(wanted) if wanted and name in certain else None
        if label is None or label in here:
            continue
        old = [one for one in ours if one in here]
        remove += [one.id for one in old]
        ours = [*(one for one in ours if one not in old), label]
        add.append({"id": label.id, "unless": [n for n in groups[name] if n not in {o.name for o in old}]})
    change: dict[str, Any] = {**({"add": add} if add else {}), **({"removed_label_ids": remove} if remove else {})}
    return _Labels(change, tuple(ours), tuple(kept))


def _is_set(priority: int, ours: int) -> bool:
    """Did a person set it, or take away what we had set?"""
    return priority != ours and (priority != 0 or ours != 0)


def stands(wanted: Wrote, done: Mapping[str, Any]) -> Wrote:
    """What of `wanted` the issue has, as the answer of `issue_update` tells it; all of it where nothing was to do."""
    if "priority" not in done:
        return wanted
    priority = wanted.priority if done["priority"] == wanted.priority else 0
    there = set(done.get("label_ids", ()))
    return Wrote(priority, tuple(label for label in wanted.labels if label.id in there))


def case_of(
    run: RunId,
    issue: Issue,
    verdict: Verdict,
    recalled: Recalled,
    mode: str,
    wrote: Wrote,
    suggested: Mapping[str, str],
) -> dict[str, Any]:
    """What is remembered: enough to explain, to undo and to learn from."""
    told: dict[str, Any] = {
        "identifier": issue.identifier,
        "team": issue.team.key,
        "title": issue.title[:CASE_TEXT_CHARS_MAX],
        "text": issue.description[:CASE_TEXT_CHARS_MAX],
        "encoder": recalled.encoder,
        "vector": recalled.vector,
        "wrote": wrote.as_dict(),
        "suggested": dict(suggested),
        "reason": verdict.reason,
        "why": list(verdict.why),
        "model": verdict.model,
        "node": verdict.node,
        "run": run,
        "mode": mode,
        "near": [[near.identifier, round(near.likeness, 3)] for near in verdict.near[:3]],
        "undone": False,
    }
    for name, judged in verdict.fields.items():
        told[f"said.{name}"] = [judged.value, round(judged.raw, 4), round(judged.confidence, 4)]
        told[f"from.{name}"] = judged.source
        odds = {option: round(share, 3) for option, share in verdict.odds.get(name, {}).items() if share >= ODDS_MIN}
        told |= {f"odds.{name}": odds} if odds else {}
    return {"issue": issue.id, "set": told}
