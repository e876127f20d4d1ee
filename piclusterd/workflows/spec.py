"""Spec: an issue of Linear that is completed gets a page in Notion that says what was made. Pure.

    Linear: moved to a completed state                              Notion: people changed a page
      look ─▶ write ─▶ recheck ─▶ [rewrite] ─▶ page ─▶ attach ─▶ end     edited ─▶ end
     (issue,  (model,  (issue)    text edited  (once   (its URL           (whose page? recorded, and
     comments) relay first where long)         an issue) on the issue)     nothing is overwritten)

Invariants
* One page an issue, whoever crashes: Notion is searched for the issue's id before one is made (`integrations.notion`),
  and the URL is the attachment's key. An issue that is completed again keeps its page as people left it.
* Issue and comments are hostile text: data in the user's turn, cut to a limit. The model's answer must have the shape,
  and every line of it is made inert.
* What is written is about the issue as it is: read again after the model has answered; reopened, it is left alone.

What is moved tells `updatedFrom.stateId`; of a move between two completed states `completedAt` says nothing new, and
where it is told it must have been unset. States have names that differ from team to team; their types do not.

Source: Linear's public GraphQL schema (webhook payloads, `WorkflowState.type`); Notion's documentation of webhooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from .. import config, ids
from ..ids import RunId
from ..wire import HOOK_BYTES_MAX, Hook
from .neutral import plain
from .spec_prompt import ANSWER_TOKENS_MAX, TITLE_MAX, Draft, answer_format, draft_of, messages, page
from .workflow import AskModel, Call, Finish, Results, Step, answered_by

ASKS_MAX = 2  # one more chance after an answer outside the schema
SECOND_TEMPERATURE = 0.4  # at 0 the same model would give the same bad answer again
RELAY = "relay"
SOURCE = "https://linear.app/"
"""Where an issue's address must begin to be shown as one."""
EDITS = ("page.content_updated", "page.properties_updated", "page.deleted", "page.undeleted", "page.moved")
"""What people do to a page after it was made."""
T = TypeVar("T")
_GONE = Finish("ignored", "the issue is gone")


class _State(msgspec.Struct, frozen=True):
    type: str = ""


class _Team(msgspec.Struct, frozen=True):
    key: str = ""


class _Party(msgspec.Struct, frozen=True):
    id: str = ""
    type: str = ""


class _Moved(msgspec.Struct, frozen=True, rename="camel"):
    id: Annotated[str, Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
    identifier: str
    title: str
    state: _State
    team: _Team = _Team()
    trashed: bool | None = None


class _Event(msgspec.Struct, frozen=True, rename="camel"):
    """The part of Linear's `EntityWebhookPayload` that is read here."""

    action: str
    type: str
    data: _Moved
    updated_from: dict[str, Any]
    actor: _Party | None = None


class _Entity(msgspec.Struct, frozen=True):
    id: Annotated[str, Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
    type: str = ""


class _Edit(msgspec.Struct, frozen=True):
    """The part of Notion's webhook that is read here."""

    type: str
    entity: _Entity
    authors: tuple[_Party, ...] = ()


class _Comment(msgspec.Struct, frozen=True):
    by: str = ""
    body: str = ""


class _Issue(msgspec.Struct, frozen=True):
    """What the operation `issue_told` returns; see `integrations.linear_flows`."""

    missing: bool = False
    id: str = ""
    identifier: str = ""
    title: str = ""
    description: str = ""
    url: str = ""
    state: str = ""
    project: str = ""
    comments: tuple[_Comment, ...] = ()

    @property
    def text(self) -> tuple[object, ...]:
        return (self.title, self.description, self.comments)

    @property
    def bytes(self) -> int:
        said = sum(len(comment.body.encode("utf-8", "replace")) for comment in self.comments)
        return said + len(f"{self.title}{self.description}".encode("utf-8", "replace"))


class Spec:
    """`policy` is the operator's, `model` the default one, `actor_id` ourselves in Linear ("" where unknown)."""

    name = "spec"

    def __init__(self, policy: config.Spec, model: str, actor_id: str = "") -> None:
        self._policy = policy
        self._model = policy.model or model
        self._actor_id = actor_id

    def wants(self, hook: Hook) -> str | None:
        if self._policy.mode == "off":
            return None
        if _edit(hook) is not None:
            return "a page of Notion was changed"
        event = _event(hook)
        if event is None or event.data.trashed or (event.actor and self._actor_id and event.actor.id == self._actor_id):
            return None
        if self._policy.teams and event.data.team.key not in self._policy.teams:
            return None
        return plain(f"{event.data.identifier} {event.data.title}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        """The next step of `run`. The same results give the same step, on any node."""
        if self._policy.mode == "off":
            return Finish("ignored", "specs are off")
        edit, event = _edit(hook), _event(hook)
        if edit is not None:
            return self._noticed(run, edit, results)
        if event is None:
            return Finish("failed", "the webhook's body is neither a completed issue nor an edited page")
        if "look" not in results:
            return _look("look", run, event.data.id)
        issue = _open(results["look"])
        if isinstance(issue, Finish):
            return issue
        draft = self._ask("write", issue, results)
        if not isinstance(draft, tuple):
            return draft
        if "recheck" not in results:
            return _look("recheck", run, event.data.id)
        now = _open(results["recheck"])
        if isinstance(now, Finish):
            return now
        if now.text != issue.text:  # once: whoever keeps typing gets the spec of this version
            draft = self._ask("rewrite", now, results)
            if not isinstance(draft, tuple):
                return draft
        return self._publish(run, now, *draft, results)

    def _publish(self, run: RunId, issue: _Issue, draft: Draft, by: Mapping[str, Any], results: Results) -> Step:
        """From a draft that stands to the end."""
        title = plain(f"{issue.identifier} {issue.title}", TITLE_MAX) or issue.id
        if "page" not in results:
            source = issue.url if issue.url.startswith(SOURCE) and issue.url.isascii() and " " not in issue.url else ""
            arguments = {
                "data_source": self._policy.data_source, "title_property": self._policy.title_property,
                "id_property": self._policy.id_property, "issue": issue.id, "title": title,
                "markdown": page(draft, source, *answered_by(by)),
            }  # fmt: skip
            return Call("page", "notion", "spec_page", arguments, ids.uuid4_of(run, "page"))
        made = results["page"]
        if "attach" not in results:
            arguments = {"issue": issue.id, "url": made["url"], "title": f"Spec: {title}"[:TITLE_MAX]}
            return Call("attach", "linear", "attachment_create", arguments, ids.uuid4_of(run, "attach"))
        if results["attach"].get("missing"):
            return _GONE
        stood = "stood already and was left as it is: " if made.get("repeated") else ""
        return Finish("done", f"{stood}{made['url']}")

    def _noticed(self, run: RunId, edit: _Edit, results: Results) -> Step:
        if "edited" not in results:
            arguments = {"page": edit.entity.id, "id_property": self._policy.id_property}
            return Call("edited", "notion", "page_look", arguments, ids.uuid4_of(run, "edited"))
        seen = results["edited"]
        if not seen.get("issue"):
            return Finish("ignored", "no spec of ours")
        what = edit.type.removeprefix("page.").replace("_", " ")
        return Finish("done", f"{plain(str(seen.get('title', '')), TITLE_MAX)}: {what} by people; their text stays")

    def _ask(self, name: str, issue: _Issue, results: Results) -> tuple[Draft, Mapping[str, Any]] | Step:
        """The draft of `issue` under the step `name` and who made it, or the step that is still needed for it."""
        for attempt in range(ASKS_MAX):
            step = name if attempt == 0 else f"{name}-{attempt + 1}"
            if step not in results:
                prefer = RELAY if issue.bytes >= self._policy.long_bytes else ""
                return AskModel(step, self._request(issue, SECOND_TEMPERATURE if attempt else 0.0), prefer)
            draft = draft_of(results[step])
            if draft is not None:
                return draft, results[step]
        return Finish("failed", f"{self._model} answered outside the schema twice; set a larger [spec] model, retry")

    def _request(self, issue: _Issue, temperature: float) -> dict[str, Any]:
        comments = [(comment.by, comment.body) for comment in issue.comments]
        bytes_max = self._policy.prompt_bytes
        return {
            "model": self._model,
            "messages": messages(issue.title, issue.project, issue.description, comments, bytes_max),
            "temperature": temperature,
            "max_tokens": ANSWER_TOKENS_MAX,
            "response_format": answer_format(),
        }


def _look(name: str, run: RunId, issue: str) -> Call:
    return Call(name, "linear", "issue_told", {"issue": issue}, ids.uuid4_of(run, name))


def _open(result: Mapping[str, Any]) -> _Issue | Finish:
    """The issue that `issue_told` returned, or the end where there is nothing to specify."""
    try:
        issue = msgspec.convert(result, _Issue)
    except msgspec.ValidationError as fault:
        return Finish("failed", f"the answer of issue_told is not an issue: {fault}")
    if issue.missing:
        return _GONE
    return issue if issue.state == "completed" else Finish("ignored", f"the issue is {plain(issue.state, 32)} again")


def _event(hook: Hook) -> _Event | None:
    """A move to a completed state in `hook`, or None. Only the signed body is believed."""
    event = _decoded(hook, "linear", _Event)
    if event is None or (event.type, event.action) != ("Issue", "update") or event.data.state.type != "completed":
        return None
    before = event.updated_from
    return event if "stateId" in before and before.get("completedAt") is None else None


def _edit(hook: Hook) -> _Edit | None:
    """A change of a page by people in `hook`, or None: what bots write, ourselves among them, is no edit."""
    edit = _decoded(hook, "notion", _Edit)
    if edit is None or edit.type not in EDITS or edit.entity.type != "page":
        return None
    return edit if any(author.type == "person" for author in edit.authors) else None


def _decoded(hook: Hook, source: str, shape: type[T]) -> T | None:
    if hook.source != source or len(hook.body) > HOOK_BYTES_MAX:
        return None
    try:
        return msgspec.json.decode(hook.body, type=shape)
    except (ValueError, RecursionError):
        return None
