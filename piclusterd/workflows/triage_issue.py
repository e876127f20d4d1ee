"""Shapes of what Linear tells about issues, as far as triage reads them: webhooks, and the answer of `issue_context`.

Only the signed body of a webhook is believed, never the names beside it. Junk is None.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from ..wire import HOOK_BYTES_MAX, Hook

PRIORITIES = {"P0": 1, "P1": 2, "P2": 3, "P3": 4}
"""Ours → Linear's (urgent, high, medium, low). 0 means "none" there and is never written but to undo."""
NAMES = {number: name for name, number in PRIORITIES.items()}
CLOSED_STATES = frozenset({"completed", "canceled", "duplicate"})
"""`WorkflowState.type` of issues nobody waits for; names differ from team to team, types do not."""

Id = Annotated[str, Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
E = TypeVar("E", bound=msgspec.Struct)


class Party(msgspec.Struct, frozen=True):
    """Who did something; `type` is `user` of people."""

    id: str = ""
    name: str = ""
    email: str = ""
    type: str = ""

    def among(self, names: tuple[str, ...]) -> bool:
        """Is it one of these ids, e-mail addresses or names?"""
        ours = {part.casefold() for part in (self.id, self.name, self.email) if part}
        return any(name.casefold() in ours for name in names)


class Label(msgspec.Struct, frozen=True):
    id: str
    name: str


class State(msgspec.Struct, frozen=True):
    type: str = ""


class Team(msgspec.Struct, frozen=True):
    id: str = ""
    key: str = ""


class Project(msgspec.Struct, frozen=True):
    name: str = ""


class HookIssue(msgspec.Struct, frozen=True, rename="camel"):
    """The part of `IssueWebhookPayload` that triage reads."""

    id: Id
    identifier: str
    title: str
    description: str | None = None
    priority: float = 0
    labels: tuple[Label, ...] = ()
    state: State = State()
    team: Team | None = None
    project: Project | None = None
    creator: Party | None = None
    creator_id: str | None = None
    bot_actor: Any = None
    trashed: bool | None = None

    @property
    def team_key(self) -> str:
        return self.team.key if self.team else ""


class IssueEvent(msgspec.Struct, frozen=True, rename="camel"):
    """The part of Linear's `EntityWebhookPayload`; `updated_from`: what changed, as it was before."""

    action: str
    type: str
    data: HookIssue
    actor: Party | None = None
    updated_from: dict[str, Any] | None = None


class ChildIssue(msgspec.Struct, frozen=True):
    id: Id
    identifier: str = ""
    title: str = ""
    team: Team | None = None


class HookComment(msgspec.Struct, frozen=True, rename="camel"):
    id: Id
    body: str = ""
    issue: ChildIssue | None = None
    parent_id: Id | None = None
    user: Party | None = None
    user_id: str | None = None
    external_user_id: str | None = None
    bot_actor: Any = None


class CommentEvent(msgspec.Struct, frozen=True):
    action: str
    type: str
    data: HookComment
    actor: Party | None = None


class Issue(msgspec.Struct, frozen=True):
    """What the operation `issue_context` returns; see `integrations.linear`."""

    missing: bool = False
    id: str = ""
    identifier: str = ""
    title: str = ""
    description: str = ""
    priority: int = 0
    state: str = ""
    labels: tuple[Label, ...] = ()
    team: Team = Team()
    project: str = ""
    creator: Party = Party()
    team_labels: tuple[Label, ...] = ()

    def named(self, name: str) -> Label | None:
        """A label it has; names compare without case, as in Linear."""
        return next((label for label in self.labels if label.name.casefold() == name.casefold()), None)

    def offered(self, name: str) -> Label | None:
        """A label it could get."""
        return next((label for label in self.team_labels if label.name.casefold() == name.casefold()), None)


def issue_event(hook: Hook, action: str) -> IssueEvent | None:
    """An `action` (create, update) of an issue."""
    event = _decoded(hook, IssueEvent)
    return event if event is not None and (event.type, event.action) == ("Issue", action) else None


def comment_event(hook: Hook) -> CommentEvent | None:
    """A new comment of a person on an issue: not of a bot, nor of somebody outside the workspace."""
    event = _decoded(hook, CommentEvent)
    if event is None or (event.type, event.action) != ("Comment", "create") or event.data.issue is None:
        return None
    comment = event.data
    return None if comment.bot_actor or comment.external_user_id or not comment.user_id else event


def _decoded(hook: Hook, shape: type[E]) -> E | None:
    if hook.source != "linear" or len(hook.body) > HOOK_BYTES_MAX:
        return None
    try:
        return msgspec.json.decode(hook.body, type=shape)
    except (ValueError, RecursionError):
        return None
