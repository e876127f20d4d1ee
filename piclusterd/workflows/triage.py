"""Triage: a new Linear issue gets a type, a priority and one quiet comment. Pure: it only ever says the next step.

    wants ──▶ context ──▶ classify ──▶ shadow: Finish
              (read)      (model)  └─▶ recheck ──▶ [reclassify] ──▶ [update] ──▶ comment ──▶ Finish
                                       (read)      text edited      what is still unset

Invariants
* Human edits win. A priority or a type label that is set is never changed; the issue is read again after the model has
  answered, and the actuator looks once more right before it writes (`integrations.linear`).
* The issue's text is hostile: it is the user's turn of the chat and nothing else, cut to a limit. The model has no
  tools, no URLs, no secrets; its answer must fit a schema *and* lie in fixed sets: it picks names, never ids.
* Of the model's own words only `reason` reaches Linear, after `neutral` has made it inert.
* Every effect carries a key that is a function of the run, so that a step tried twice has one effect.
* Nothing is written about an issue that people have triaged, closed or deleted meanwhile, nor in shadow mode.

Sources: Linear's public GraphQL schema (payloads, priorities 0 none … 4 low, state types); GitHub Agentic Workflows'
"safe outputs" (the writer is not the model); "Clinejection" (2026-02), an issue title that drove a bot with tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .. import config, ids
from ..ids import RunId
from ..wire import HOOK_BYTES_MAX, Hook
from .neutral import neutral, plain
from .triage_prompt import (
    ANSWER_TOKENS_MAX,
    BODY_BYTES_MAX,
    REASON_CHARS_MAX,
    TITLE_MAX,
    TYPES,
    answer_format,
    messages,
)
from .workflow import AskModel, Call, Finish, Results, Step

PRIORITIES = {"P0": 1, "P1": 2, "P2": 3, "P3": 4}
"""Ours → Linear's (urgent, high, medium, low). 0 means "none" there and is never written."""
URGENT = ("P0", "P1")
"""Such a run ends only once the relay outside holds a copy of it."""
CLOSED_STATES = frozenset({"completed", "canceled", "duplicate"})
"""`WorkflowState.type` of issues nobody waits for; names differ from team to team, types do not."""

ANSWER_CHARS_MAX = 4096  # the answer is 250 characters; past this a model is running away
ASKS_MAX = 2  # one more chance after an answer outside the schema
SECOND_TEMPERATURE = 0.4  # at 0 the same model would give the same bad answer again
SERVED_BY_CHARS_MAX = 64  # of the names of model and node in the comment
_GONE = Finish("ignored", "the issue is gone")


class _Party(msgspec.Struct, frozen=True):
    id: str = ""


class _Label(msgspec.Struct, frozen=True):
    id: str
    name: str


class _State(msgspec.Struct, frozen=True):
    type: str = ""


class _HookIssue(msgspec.Struct, frozen=True, rename="camel"):
    id: Annotated[str, Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
    identifier: str
    title: str
    priority: float = 0
    labels: tuple[_Label, ...] = ()
    state: _State = _State()
    creator_id: str | None = None
    bot_actor: Any = None
    trashed: bool | None = None


class _Event(msgspec.Struct, frozen=True):
    """The part of Linear's `EntityWebhookPayload` that triage reads."""

    action: str
    type: str
    data: _HookIssue
    actor: _Party | None = None


class _Issue(msgspec.Struct, frozen=True):
    """What the operation `issue_context` returns; see `integrations.linear`."""

    missing: bool = False
    id: str = ""
    title: str = ""
    description: str = ""
    priority: int = 0
    state: str = ""
    labels: tuple[_Label, ...] = ()
    team_labels: tuple[_Label, ...] = ()


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    priority: str
    reason: str


class _Verdict(msgspec.Struct, frozen=True):
    type: str
    priority: str
    reason: str
    model: str
    node: str

    def __str__(self) -> str:
        return f"{self.type} {self.priority}: {self.reason}"


class Triage:
    """`policy` is the operator's, `model` the name to ask for, `actor_id` ourselves in Linear ("" where unknown).

    `body_bytes` of an issue's description are shown to the model; a model with a longer context can take more.
    """

    name = "triage"

    def __init__(self, policy: config.Triage, model: str, actor_id: str, *, body_bytes: int = BODY_BYTES_MAX) -> None:
        self._policy = policy
        self._model = model
        self._actor_id = actor_id
        self._body_bytes = body_bytes
        self._types = (*TYPES, *(kind for kind in policy.labels if kind not in TYPES))

    def wants(self, hook: Hook) -> str | None:
        """The run's title for a new issue that people have not triaged; None for every other event and for junk."""
        event = _event(hook)
        if event is None or self._policy.mode == "off" or self._is_bots(event):
            return None
        issue = event.data
        if issue.trashed or issue.state.type in CLOSED_STATES:
            return None
        if issue.priority and self._labelled(issue.labels):
            return None
        return plain(f"{issue.identifier} {issue.title}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        """The next step of `run`. The same results give the same step, on any node."""
        event = _event(hook)
        if event is None:
            return Finish("failed", "the webhook's body is not an issue of Linear")
        if self._policy.mode == "off":
            return Finish("ignored", "triage is off")
        if "context" not in results:
            return self._look("context", run, event.data.id)
        issue = self._open(results["context"])
        if isinstance(issue, Finish):
            return issue
        verdict = self._ask("classify", issue, results)
        if not isinstance(verdict, _Verdict):
            return verdict
        if self._policy.mode == "shadow":
            return Finish("done", f"shadow: {verdict}")
        if "recheck" not in results:
            return self._look("recheck", run, event.data.id)
        now = self._open(results["recheck"])
        if isinstance(now, Finish):
            return now
        if (now.title, now.description) != (issue.title, issue.description):
            # The verdict is about a text that is gone. Once: whoever keeps typing gets the verdict on this version.
            verdict = self._ask("reclassify", now, results)
            if not isinstance(verdict, _Verdict):
                return verdict
        return self._write(run, now, verdict, results)

    def _write(self, run: RunId, issue: _Issue, verdict: _Verdict, results: Results) -> Step:
        """From a verdict that stands to the end."""
        change = self._change(issue, verdict)
        if change and "update" not in results:
            return Call("update", "linear", "issue_update", {"issue": issue.id, **change}, ids.uuid4_of(run, "update"))
        done = results.get("update", {})
        if done.get("missing"):
            return _GONE
        if "comment" not in results:
            key = ids.uuid4_of(run, "comment")
            body = _comment(run, verdict, done)
            return Call("comment", "linear", "comment_create", {"issue": issue.id, "id": key, "body": body}, key)
        if results["comment"].get("missing"):
            return _GONE
        return Finish("done", str(verdict), urgent=self._policy.copy_urgent and verdict.priority in URGENT)

    def _is_bots(self, event: _Event) -> bool:
        """True for what we or another bot created: answering those can loop."""
        if event.data.bot_actor:
            return True
        authors = (event.actor.id if event.actor else None, event.data.creator_id)
        return bool(self._actor_id) and self._actor_id in authors

    def _look(self, name: str, run: RunId, issue: str) -> Call:
        arguments = {"issue": issue, "labels": sorted(self._policy.labels.values())}
        return Call(name, "linear", "issue_context", arguments, ids.uuid4_of(run, name))

    def _open(self, result: Mapping[str, Any]) -> _Issue | Finish:
        """The issue that `issue_context` returned, or the end where there is nothing left to do about it."""
        try:
            issue = msgspec.convert(result, _Issue)
        except msgspec.ValidationError as fault:
            return Finish("failed", f"the answer of issue_context is not an issue: {fault}")
        if issue.missing:
            return _GONE
        if issue.state in CLOSED_STATES:
            return Finish("ignored", f"the issue is {issue.state}")
        if issue.priority and self._labelled(issue.labels):
            return Finish("ignored", "people have triaged it")
        return issue

    def _labelled(self, labels: tuple[_Label, ...]) -> bool:
        """True where one of the policy's type labels is among `labels` (names compare without case, as in Linear)."""
        ours = {name.casefold() for name in self._policy.labels.values()}
        return any(label.name.casefold() in ours for label in labels)

    def _ask(self, name: str, issue: _Issue, results: Results) -> _Verdict | Step:
        """The verdict on `issue` under the step `name`, or the step that is still needed for it."""
        for attempt in range(ASKS_MAX):
            step = name if attempt == 0 else f"{name}-{attempt + 1}"
            if step not in results:
                return AskModel(step, self._request(issue, SECOND_TEMPERATURE if attempt else 0.0))
            verdict = self._verdict(results[step])
            if verdict is not None:
                return verdict
        return Finish("failed", "model answered outside the schema")

    def _request(self, issue: _Issue, temperature: float) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": messages(issue.title, issue.description, self._body_bytes),
            "temperature": temperature,
            "max_tokens": ANSWER_TOKENS_MAX,
            "response_format": answer_format(self._types, tuple(PRIORITIES)),
        }

    def _verdict(self, result: Mapping[str, Any]) -> _Verdict | None:
        """The model's answer where schema and policy allow it; a grammar fixes the shape, not the meaning."""
        text = result.get("text")
        if not isinstance(text, str) or len(text) > ANSWER_CHARS_MAX:
            return None
        try:
            answer = msgspec.json.decode(text, type=_Answer)
        except (ValueError, RecursionError):
            return None
        if answer.type not in self._types or answer.priority not in PRIORITIES:
            return None
        reason = neutral(answer.reason, REASON_CHARS_MAX) or "no reason given"
        model, node = (str(result.get(part) or "unknown") for part in ("model", "node"))
        return _Verdict(answer.type, answer.priority, reason, model, node)

    def _change(self, issue: _Issue, verdict: _Verdict) -> dict[str, Any]:
        """Arguments of `issue_update` for what is unset on `issue`; empty where nothing is."""
        change: dict[str, Any] = {}
        if issue.priority == 0:
            change["priority"] = PRIORITIES[verdict.priority]
        wanted = self._policy.labels.get(verdict.type, "").casefold()
        label = next((label.id for label in issue.team_labels if label.name.casefold() == wanted), None)
        if label is not None and not self._labelled(issue.labels):
            change["added_label_ids"] = [label]
            change["unless_labels"] = sorted(self._policy.labels.values())
        return change


def _comment(run: RunId, verdict: _Verdict, done: Mapping[str, Any]) -> str:
    """The one comment. Its last line is a link definition nobody refers to, which every Markdown renderer leaves out
    (Linear's does not know HTML comments); it tells later tools that the comment is ours."""
    model, node = (plain(name.replace("`", ""), SERVED_BY_CHARS_MAX) for name in (verdict.model, verdict.node))
    changed = [part for part in ("priority", "label") if part in done.get("changed", ())]
    wrote = f"Set: {' and '.join(changed)}. " if changed else ""
    return (
        f"**{verdict.type} · {verdict.priority}**: {verdict.reason}\n\n"
        f"_{wrote}Generated by a small local model (`{model}` on `{node}`), may be wrong._\n\n"
        f"[//]: # (piclusterd triage {run})"
    )


def _event(hook: Hook) -> _Event | None:
    """The creation of an issue in `hook`, or None. Only the signed body is believed, not the name in `hook.event`."""
    if hook.source != "linear" or len(hook.body) > HOOK_BYTES_MAX:
        return None
    try:
        event = msgspec.json.decode(hook.body, type=_Event)
    except (ValueError, RecursionError):
        return None
    return event if (event.type, event.action) == ("Issue", "create") else None
