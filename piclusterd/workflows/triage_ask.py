"""Asking models about an issue until there is a verdict, each answer a step of its own.

    [similar] ──▶ classify ──sure?──▶ [classify-relay] ──sure?──▶ [classify-cloud] ──▶ [reason] ──▶ Verdict
    (memory)      the team's model     larger, droplet first      provider, if allowed   one sentence about the verdict

A model of the house is asked by `guided_choice`: every value's probability, and nothing is written freely. A provider
outside knows no such thing; it answers in JSON under a schema, and so may an older node. An escalation that cannot be
asked (the droplet is off) is passed over: the first verdict stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from .neutral import neutral
from .triage_decide import NONE, TOLD, Answered, Evidence, Near, Odds, Recalled, Verdict, decide, is_unsure
from .triage_issue import PRIORITIES, Issue
from .triage_policy import Policy
from .triage_prompt import ANSWER_TOKENS_MAX, REASON_CHARS_MAX, answer_format, messages
from .triage_rules import certain
from .workflow import AskModel, Call, Finish, Results, Step, answered_by

ANSWER_CHARS_MAX = 4096  # the answer is 250 characters; past this a model is running away
ASKS_MAX = 2  # one more chance after an answer outside the schema
SECOND_TEMPERATURE = 0.4  # at 0 the same model would give the same bad answer again
TEXT_CHARS_MAX = 2000
"""Of an issue, for its vector."""
FAILED = "failed"
"""The key of an optional step's result that could not be had (`workflow.AskModel.optional`)."""
NO_REASON = "no reason given"
_AFTER_PRIORITY = {"reason": ["."]}
"""With it a model scores the values as it would write them, followed by another key; a single option costs no pass."""


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    priority: str
    label: str = NONE
    reason: str = ""


class Asker:
    """`model` is asked where a policy names none; `body_bytes` of an issue's description are shown."""

    def __init__(self, model: str, body_bytes: int) -> None:
        self._model = model
        self._body_bytes = body_bytes

    def verdict(self, again: str, issue: Issue, policy: Policy, results: Results) -> Verdict | Step:
        """The verdict on `issue`, or the step that is still needed. `again` is before each step's name."""
        recalled = Recalled()
        if policy.encoder:
            name = f"{again}similar"
            if name not in results:
                return _similar(name, issue, policy)
            recalled = recalled_of(results[name])
        evidence = Evidence(policy, certain(policy, issue), recalled)
        verdict: Verdict | None = None
        for stage, model, prefer in self._stages(policy):
            if verdict is not None and not is_unsure(verdict, policy):
                break
            answered = self._answered(f"{again}{stage}", model, prefer, issue, evidence, results)
            if isinstance(answered, Answered):
                verdict = decide(evidence, answered)
            elif answered is not None:
                return answered
        assert verdict is not None
        return self._with_reason(f"{again}reason", verdict, issue, policy, results)

    def _stages(self, policy: Policy) -> Iterable[tuple[str, str, str]]:
        yield "classify", policy.model or self._model, ""
        if policy.larger_model:
            yield "classify-relay", policy.larger_model, "relay"
        if policy.cloud_provider:
            yield "classify-cloud", policy.cloud_provider, ""

    def _answered(
        self, name: str, model: str, prefer: str, issue: Issue, evidence: Evidence, results: Results
    ) -> Answered | Step | None:
        """A model's answer; None where that model is passed over."""
        later = not name.endswith("classify")
        for attempt in range(ASKS_MAX):
            step = name if attempt == 0 else f"{name}-{attempt + 1}"
            if step not in results:
                is_outside = name.endswith("-cloud")
                request = self._request("" if is_outside else model, issue, evidence, is_outside)
                request["temperature"] = SECOND_TEMPERATURE if attempt else 0.0
                if is_outside:
                    asked = {"provider": model, "request": request}
                    return Call(step, "cloud", "complete", asked, "", optional=True)
                return AskModel(step, request, prefer, optional=later)
            if FAILED in results[step]:
                return None
            answered = _read(results[step], evidence.policy)
            if answered is not None:
                return answered
        return None if later else Finish("failed", "model answered outside the schema")

    def _request(self, model: str, issue: Issue, evidence: Evidence, plain: bool) -> dict[str, Any]:
        policy = evidence.policy
        body: dict[str, Any] = {
            "model": model,
            "messages": self._messages(issue, evidence),
            "max_tokens": ANSWER_TOKENS_MAX,
        }
        if plain:
            return {**body, "response_format": answer_format(policy.types, tuple(PRIORITIES), _labels(policy))}
        fields = {"type": list(policy.types), "priority": list(PRIORITIES)}
        if labels := _labels(policy):
            fields["label"] = list(labels)
        return {**body, "guided_choice": {**fields, **_AFTER_PRIORITY}}

    def _messages(self, issue: Issue, evidence: Evidence) -> list[dict[str, str]]:
        policy = evidence.policy
        judged = [near for near in evidence.recalled.near if _is_example(near)]
        turns = [(near.title, near.text, near.holds) for near in judged[: policy.examples]]
        return messages(issue.title, issue.description, self._body_bytes, policy.rubric, turns)

    def _with_reason(
        self, name: str, verdict: Verdict, issue: Issue, policy: Policy, results: Results
    ) -> Verdict | Step:
        """The verdict with a sentence: the model's own, or one that it writes when the values are given."""
        reason = verdict.reason
        if not reason:
            if name not in results:
                asked = {
                    "model": policy.model or self._model,
                    "messages": messages(issue.title, issue.description, self._body_bytes, policy.rubric),
                    "temperature": 0.0,
                    "max_tokens": ANSWER_TOKENS_MAX,
                    "response_format": answer_format((verdict.type.value,), (verdict.priority.value,)),
                }
                return AskModel(name, asked, optional=True)
            answer = _decoded(results[name])
            reason = answer.reason if answer else ""
        return replace(verdict, reason=neutral(reason, REASON_CHARS_MAX) or NO_REASON)


def text_of(title: str, description: str) -> str:
    """What an issue's vector is made of."""
    return f"{title}\n\n{description}".strip()[:TEXT_CHARS_MAX]


def recalled_of(result: Mapping[str, Any]) -> Recalled:
    """What the memory said; nothing where it could not be asked or said something else."""
    try:
        return Recalled() if FAILED in result else msgspec.convert(result, Recalled)
    except msgspec.ValidationError:
        return Recalled()


def _similar(name: str, issue: Issue, policy: Policy) -> Call:
    asked = {
        "issue": issue.id,
        "team": issue.team.key,
        "encoder": policy.encoder,
        "text": text_of(issue.title, issue.description),
        "with_text": policy.examples > 0,
    }
    return Call(name, "memory", "similar", asked, "", optional=True)


def _labels(policy: Policy) -> tuple[str, ...]:
    return (*policy.labels_more, NONE) if policy.labels_more and "label" in policy.fields else ()


def _is_example(near: Near) -> bool:
    return all(near.holds.get(name) for name in ("type", "priority"))


def _read(result: Mapping[str, Any], policy: Policy) -> Answered | None:
    """A model's answer where schema and policy allow it; a grammar fixes the shape, not the meaning."""
    model, node = answered_by(result)
    allowed = {"type": policy.types, "priority": tuple(PRIORITIES), "label": _labels(policy)}
    told = result.get("choices")
    if isinstance(told, Mapping) and told:
        odds = {name: _odds(told.get(name), options) for name, options in allowed.items() if options}
        return Answered(odds, model, node) if odds["type"] and odds["priority"] else None
    answer = _decoded(result)
    if answer is None or answer.type not in policy.types or answer.priority not in PRIORITIES:
        return None
    said = {"type": answer.type, "priority": answer.priority}
    said |= {"label": answer.label} if answer.label in allowed["label"] else {}
    return Answered({name: _told(value, allowed[name]) for name, value in said.items()}, model, node, answer.reason)


def _odds(told: Any, options: tuple[str, ...]) -> Odds:
    if not isinstance(told, Mapping):
        return {}
    found = {option: float(told[option]) for option in options if isinstance(told.get(option), int | float)}
    return {option: min(max(share, 0.0), 1.0) for option, share in found.items()}


def _told(value: str, options: tuple[str, ...]) -> Odds:
    rest = (1 - TOLD) / max(len(options) - 1, 1)
    return {option: TOLD if option == value else rest for option in options}


def _decoded(result: Mapping[str, Any]) -> _Answer | None:
    text = result.get("text")
    if not isinstance(text, str) or len(text) > ANSWER_CHARS_MAX:
        return None
    try:
        return msgspec.json.decode(text, type=_Answer)
    except (ValueError, RecursionError):
        return None
