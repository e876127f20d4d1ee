"""Moderation: each comment on an issue of Linear is looked at; what is flagged is told, and only people delete. Pure.

    wants ─▶ quick ──P < clean_below, rules silent──────────────────────────▶ Finish(done, clean)
            (a Pi)  ──P ≥ flagged_from──────────────────────────────────┐
               └─ between, or the rules object ─▶ deep ─▶ abuse ────────┤
                                         (relay first)  clean ─▶ clean  ├─▶ [notify…] ─▶ flagged ─▶ [look ─▶ delete?]
                       rules object and deep says clean ────────────────┘       └─▶ review? ─▶ clean | flagged

Invariants
* Comments are hostile text: a model is shown them as data, and can at most pick a verdict. Where the rules object and
  the models find it clean, they disagree, and a person decides: "classify this as safe" buys nobody a clean bill.
* Nothing is deleted but by a person's yes to that very text, where `delete = "ask"` allows the question at all; the
  actuator compares the text once more right before (`integrations.linear_flows`).
* Ledger and notices say who, where, which category and the text's digest; the text itself stays where it was.
* An edit is a comment anew. What bots say, ourselves among them, is left alone.

Source: Linear's public GraphQL schema (`CommentWebhookPayload`; comments of documents and projects have no issue).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .. import config, ids
from ..ids import RunId
from ..wire import HOOK_BYTES_MAX, Hook
from .moderation_prompt import (
    ABUSE,
    QUICK_BYTES_MAX,
    deep_look,
    deep_of,
    named,
    probability,
    quick_choice,
    quick_classify,
    reason_of,
    suspicion,
)
from .neutral import plain
from .notifying import Notice, Sinks, telling
from .workflow import Approve, AskModel, Call, Finish, Results, Step

ASKS_MAX = 2  # one more chance after an answer outside the schema
SECOND_TEMPERATURE = 0.4
RELAY = "relay"
SOURCE = "https://linear.app/"
TITLE_MAX = 120
DIGEST_SHOWN = 12


class _Party(msgspec.Struct, frozen=True):
    id: str = ""
    name: str = ""


class _Issue(msgspec.Struct, frozen=True):
    identifier: str = ""


class _Said(msgspec.Struct, frozen=True, rename="camel"):
    id: Annotated[str, Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
    body: str
    issue_id: str | None = None
    issue: _Issue | None = None
    user: _Party | None = None
    user_id: str | None = None
    external_user: _Party | None = None
    bot_actor: Any = None


class _Event(msgspec.Struct, frozen=True, rename="camel"):
    """The part of Linear's `EntityWebhookPayload` that is read here."""

    action: str
    type: str
    data: _Said
    url: str = ""
    updated_from: dict[str, Any] | None = None
    actor: _Party | None = None

    @property
    def where(self) -> str:
        return plain(self.data.issue.identifier if self.data.issue else "", 32) or "an issue"

    @property
    def who(self) -> str:
        party = self.data.user or self.data.external_user or self.actor
        return named(party.name if party else "")

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data.body.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True, slots=True)
class _Verdict:
    """`by`: who says so. `doubt`: why a person must decide; "" where nobody need."""

    flagged: bool
    category: str
    score: float
    by: str
    doubt: str = ""

    def __str__(self) -> str:
        return f"{'flagged' if self.flagged else 'clean'} ({self.category}, {self.score:.2f}) by {self.by}"


class Moderation:
    """`policy` is the operator's, `model` the default one, `actor_id` ourselves in Linear ("" where unknown)."""

    name = "moderation"

    def __init__(self, policy: config.Moderation, sinks: Sinks, model: str, actor_id: str = "") -> None:
        self._policy = policy
        self._sinks = sinks
        self._model = policy.model or model
        self._deep_model = policy.deep_model or model
        self._actor_id = actor_id

    def wants(self, hook: Hook) -> str | None:
        event = _event(hook)
        if event is None or self._policy.mode == "off" or event.data.bot_actor:
            return None
        if self._actor_id and self._actor_id in (event.data.user_id, event.actor.id if event.actor else None):
            return None
        return plain(f"{event.where}: comment by {event.who}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        """The next step of `run`. The same results give the same step, on any node."""
        event = _event(hook)
        if event is None:
            return Finish("failed", "the webhook's body is not a comment on an issue")
        if self._policy.mode == "off":
            return Finish("ignored", "moderation is off")
        verdict = self._judge(event, results)
        if not isinstance(verdict, _Verdict):
            return verdict
        if not verdict.flagged and not verdict.doubt:
            return Finish("done", str(verdict))
        told = telling(run, self._notice(event, verdict), self._sinks, results)
        if told is not None:
            return told
        return self._settle(run, event, verdict, results)

    # judging -------------------------------------------------------------------------------------------------
    def _judge(self, event: _Event, results: Results) -> _Verdict | Step:
        """What models and rules make of it, or the step that is still needed."""
        policy, text = self._policy, event.data.body
        if "quick" not in results:
            ask = quick_classify if policy.how == "classify" else quick_choice
            return AskModel("quick", ask(self._model, text))
        score = probability(results["quick"], policy.labels)
        if score is None:
            return Finish("failed", f"{self._model} told no probability of abuse; see [moderation] how and labels")
        objection = suspicion(text, policy.words)
        by = named(str(results["quick"].get("model", "")))
        if score >= policy.flagged_from:
            return _Verdict(True, "other", score, by)
        whole = len(text.encode("utf-8", "replace")) <= QUICK_BYTES_MAX
        if score < policy.clean_below and whole and not objection:
            return _Verdict(False, "none", score, by)
        return self._judge_deep(event, score, objection, results)

    def _judge_deep(self, event: _Event, score: float, objection: str, results: Results) -> _Verdict | Step:
        for attempt in range(ASKS_MAX):
            step = "deep" if attempt == 0 else f"deep-{attempt + 1}"
            if step not in results:
                temperature = SECOND_TEMPERATURE if attempt else 0.0
                return AskModel(step, deep_look(self._deep_model, event.data.body, temperature), RELAY)
            deep = deep_of(results[step])
            if deep is None:
                continue
            by = f"{named(str(results[step].get('model', '')))}: {reason_of(deep)}"
            if deep.verdict == ABUSE:
                return _Verdict(True, deep.category, score, by)
            return _Verdict(False, "none", score, by, f"{objection}, and the models call it clean" if objection else "")
        return Finish("failed", f"{self._deep_model} answered outside the schema; set a larger [moderation] deep_model")

    # what follows --------------------------------------------------------------------------------------------
    def _settle(self, run: RunId, event: _Event, verdict: _Verdict, results: Results) -> Step:
        if verdict.doubt:
            if "review" not in results:
                return Approve("review", f"{self._about(event)}: {verdict.doubt}. Does it break the rules?")
            by = named(str(results["review"]["by"]))
            if not results["review"]["approved"]:
                return Finish("done", f"clean, says {by}; {verdict}")
            verdict = _Verdict(True, "other", verdict.score, by)
        if self._policy.delete == "never":
            return Finish("done", str(verdict))
        return self._delete(run, event, verdict, results)

    def _delete(self, run: RunId, event: _Event, verdict: _Verdict, results: Results) -> Step:
        if "look" not in results:
            return Call("look", "linear", "comment_context", {"comment": event.data.id}, ids.uuid4_of(run, "look"))
        seen = results["look"]
        if seen.get("missing"):
            return Finish("done", f"{verdict}; it is gone")
        if seen.get("body") != event.data.body:
            return Finish("done", f"{verdict}; edited since, and the edit is judged by itself")
        if "approve" not in results:
            return Approve("approve", f"{self._about(event)}: {verdict}. Delete it for good?")
        if not results["approve"]["approved"]:
            return Finish("done", f"{verdict}; stays, says {named(str(results['approve']['by']))}")
        if "delete" not in results:
            arguments = {"comment": event.data.id, "sha256": event.digest}
            return Call("delete", "linear", "comment_delete", arguments, ids.uuid4_of(run, "delete"))
        gone = results["delete"].get("missing") or results["delete"].get("deleted")
        return Finish("done", f"{verdict}; {'deleted' if gone else 'edited since, not deleted'}")

    def _about(self, event: _Event) -> str:
        return f"comment by {event.who} on {event.where} (sha256 {event.digest[:DIGEST_SHOWN]})"

    def _notice(self, event: _Event, verdict: _Verdict) -> Notice:
        what = f"{verdict.doubt}: a person must look" if verdict.doubt else f"{verdict.category}, {verdict.score:.2f}"
        text = f"The {self._about(event)}: {what}. Nothing was deleted; see `picluster jobs ls`."
        link = event.url if event.url.startswith(SOURCE) and event.url.isascii() and " " not in event.url else ""
        title = f"{event.where}: comment {'needs a look' if verdict.doubt else 'flagged'}"
        return Notice(title, text, 4, ("warning",), link)


def _event(hook: Hook) -> _Event | None:
    """A comment on an issue, new or with another text, or None. Only the signed body is believed."""
    if hook.source != "linear" or len(hook.body) > HOOK_BYTES_MAX:
        return None
    try:
        event = msgspec.json.decode(hook.body, type=_Event)
    except (ValueError, RecursionError):
        return None
    if event.type != "Comment" or event.action not in ("create", "update") or not event.data.issue_id:
        return None
    if event.action == "update" and "body" not in (event.updated_from or {}):
        return None
    return event if event.data.body.strip() else None
