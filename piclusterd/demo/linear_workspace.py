"""Linear's workspace in memory: teams, labels, issues and comments; what the API may change, and what people do.

Every change through the API is an `Effect`; one that changes nothing is none, and a comment whose id was ever used is
refused as Linear refuses it. What people do (`create_issue`, `edit`, `delete`) is no effect. The methods of `roots` are
resolvers as graphql-core calls them, `resolver(info, **arguments)`; a callable in a result is a field with arguments.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from .. import ids

PRIORITY_LABELS = ("No priority", "Urgent", "High", "Medium", "Low")
STATES = {"triage": "Triage", "unstarted": "Todo", "started": "Doing", "completed": "Done", "canceled": "Canceled"}
TEAM = {"id": ids.uuid4_of("team"), "key": "LIN", "name": "Pi cluster"}
PERSON: Mapping[str, Any] = {
    "id": ids.uuid4_of("user"),
    "name": "Ada",
    "email": "ada@example.com",
    "type": "user",
    "url": "https://linear.app/pi/profiles/ada",
}


@dataclass(frozen=True, slots=True)
class Effect:
    """One change of the workspace through the API. `key`: what makes it happen once; "" for updates."""

    kind: Literal[
        "issue-update", "comment-create", "comment-update", "attachment-create", "comment-delete", "issue-create"
    ]  # fmt: skip
    issue: str
    key: str
    change: Mapping[str, Any]


@dataclass(slots=True)
class Issue:
    id: str
    number: int
    title: str
    description: str
    priority: int
    label_ids: list[str]
    state: str
    created_at: str
    updated_at: str
    trashed: bool = False
    team: Mapping[str, Any] = field(default_factory=lambda: TEAM)
    comments: list[dict[str, str]] = field(default_factory=list)

    @property
    def identifier(self) -> str:
        return f"{self.team['key']}-{self.number}"


class Refusal(Exception):
    """An error of Linear. graphql-core copies `extensions` into its own."""

    def __init__(
        self, message: str, presentable: str = "", code: str = "INPUT_ERROR", kind: str = "invalid input"
    ) -> None:
        super().__init__(message)
        self.extensions = {
            "type": kind,
            "code": code,
            "userError": True,
            "userPresentableMessage": presentable or message,
        }


class Workspace:
    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = {ids.uuid4_of("label", name): name for name in labels}
        """Id → name."""
        self.effects: list[Effect] = []
        self.on_effect: Callable[[Effect], None] = lambda effect: None
        self._issues: dict[str, Issue] = {}
        self._comments: dict[str, dict[str, str]] = {}
        self._comment_ids: set[str] = set()

    # through the API -----------------------------------------------------------------------------------------------
    def roots(self) -> dict[str, Callable[..., Any]]:
        return {
            "issue": lambda info, id: self._shown(self._find(id)),
            "comment": self._comment,
            "issues": self._issues_page,
            "issueLabels": lambda info, **arguments: {"nodes": []},  # every label here is the team's own
            "issueUpdate": self._issue_update,
            "commentCreate": self._comment_create,
            "commentUpdate": self._comment_update,
        }

    def _issues_page(
        self, info: Any, filter: Mapping[str, Any], first: int = 50, after: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Newest first; a cursor is the id of the last issue before it."""
        since = datetime.fromisoformat(filter["createdAt"]["gte"])
        found = [issue for issue in self._issues.values() if datetime.fromisoformat(issue.created_at) >= since]
        found.sort(key=lambda issue: (issue.created_at, issue.number), reverse=True)
        start = next((n for n, issue in enumerate(found, start=1) if issue.id == after), 0)
        page, more = found[start : start + first], len(found) > start + first
        cursor = page[-1].id if page else None
        nodes = [{**self._shown(issue), "botActor": None} for issue in page]
        return {"nodes": nodes, "pageInfo": {"hasNextPage": more, "endCursor": cursor}}

    def _comment(self, info: Any, id: str) -> dict[str, Any]:
        comment = self._comments.get(id)
        if comment is None:
            raise Refusal("Entity not found: Comment", "Could not find referenced Comment.")
        return {**comment, "issue": self._shown(self._find(comment["issueId"]))}

    def _issue_update(self, info: Any, id: str, input: Mapping[str, Any]) -> dict[str, Any]:
        issue = self._find(id)
        if unknown := set(input) - {"priority", "addedLabelIds", "removedLabelIds"}:
            raise Refusal(f"the double does not know {sorted(unknown)}")
        if input.get("priority", 0) not in range(5):
            raise Refusal("Argument Validation Error", "priority must be one of 0, 1, 2, 3, 4.", "INVALID_INPUT")
        change: dict[str, Any] = {}
        if "priority" in input and input["priority"] != issue.priority:
            change["priority"] = issue.priority = input["priority"]
        for label in input.get("addedLabelIds", ()):
            if label not in self.labels:
                raise Refusal("Entity not found: IssueLabel: addedLabelIds contained an entry that could not be found.")
            if label not in issue.label_ids:
                issue.label_ids.append(label)
                change.setdefault("added_labels", []).append(self.labels[label])
        for label in input.get("removedLabelIds", ()):
            if label in issue.label_ids:
                issue.label_ids.remove(label)
                change.setdefault("removed_labels", []).append(self.labels[label])
        if change:
            issue.updated_at = _now()
            self._record(Effect("issue-update", issue.identifier, "", change))
        return {"success": True, "lastSyncId": len(self.effects), "issue": self._shown(issue)}

    def _comment_create(self, info: Any, input: Mapping[str, Any]) -> dict[str, Any]:
        issue = self._find(input["issueId"])
        key = input.get("id") or str(uuid.uuid4())
        if not _is_uuid4(key):
            raise Refusal("Argument Validation Error", "id must be a UUID.", "INVALID_INPUT")
        if key in self._comment_ids:
            raise Refusal("conflict on insert of Comment", f"Entity Comment with id {key} already exists.")
        comment = {"id": key, "issueId": issue.id, "body": input["body"]}
        self._comments[key] = comment
        self._comment_ids.add(key)
        issue.comments.append(comment)
        self._record(Effect("comment-create", issue.identifier, key, {"body": input["body"]}))
        return {"success": True, "lastSyncId": len(self.effects), "comment": comment}

    def _comment_update(self, info: Any, id: str, input: Mapping[str, Any]) -> dict[str, Any]:
        comment = self._comments.get(id)
        if comment is None:
            raise Refusal("Entity not found: Comment", "Could not find referenced Comment.")
        if comment["body"] != input["body"]:
            comment["body"] = input["body"]
            issue = self._find(comment["issueId"])
            self._record(Effect("comment-update", issue.identifier, id, {"body": input["body"]}))
        return {"success": True, "lastSyncId": len(self.effects), "comment": comment}

    def _record(self, effect: Effect) -> None:
        self.effects.append(effect)
        self.on_effect(effect)

    def _find(self, reference: str) -> Issue:
        for issue in self._issues.values():
            if reference in (issue.id, issue.identifier):
                return issue
        raise Refusal("Entity not found: Issue", "Could not find referenced Issue.")

    def _shown(self, issue: Issue) -> dict[str, Any]:
        """The issue as GraphQL shows it; a callable is a field with arguments."""
        return {
            "id": issue.id,
            "identifier": issue.identifier,
            "title": issue.title,
            "description": issue.description,
            "createdAt": issue.created_at,
            "updatedAt": issue.updated_at,
            "priority": issue.priority,
            "trashed": issue.trashed or None,
            "state": {"type": issue.state},
            "project": None,
            "creator": {part: PERSON[part] for part in ("id", "name", "email")},
            "labels": lambda info, **_: {"nodes": [self._label(label) for label in issue.label_ids]},
            "team": {**issue.team, "labels": lambda info, **wish: {"nodes": self._labels(wish.get("filter"))}},
        }

    def _labels(self, wanted: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """The team's labels that match `{or: [{name: {eqIgnoreCase}}]}`; all of them without a filter."""
        if wanted is None:
            return [self._label(label) for label in self.labels]
        names = {option["name"]["eqIgnoreCase"].casefold() for option in wanted.get("or", ())}
        return [self._label(label) for label, name in self.labels.items() if name.casefold() in names]

    def _label(self, label: str) -> dict[str, Any]:
        return {"id": label, "name": self.labels[label], "isGroup": False}

    # people --------------------------------------------------------------------------------------------------------
    def create_issue(
        self,
        title: str,
        description: str = "",
        priority: int = 0,
        labels: Sequence[str] = (),
        state: str = "triage",
        actor: Mapping[str, Any] | None = None,
        team: Mapping[str, Any] = TEAM,
    ) -> dict[str, Any]:
        """A person makes an issue; the webhook (`EntityWebhookPayload`) that Linear sends for it."""
        number, now = len(self._issues) + 1, _now()
        label_ids = [ids.uuid4_of("label", name) for name in labels]
        issue = Issue(
            ids.uuid4_of("issue", str(number)), number, title, description, priority, label_ids, state, now, now,
            team=team,
        )  # fmt: skip
        self._issues[issue.id] = issue
        return self._webhook(issue, actor or PERSON)

    def add_label(self, name: str) -> None:
        """The team gets a label."""
        self.labels[ids.uuid4_of("label", name)] = name

    def edit(self, reference: str, **changes: Any) -> None:
        """A person changes fields of an issue; `labels` are names."""
        issue = self._find(reference)
        if "labels" in changes:
            issue.label_ids = [ids.uuid4_of("label", name) for name in changes.pop("labels")]
        for name, value in changes.items():
            setattr(issue, name, value)
        issue.updated_at = _now()

    def changed(self, reference: str, actor: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """A person changes fields, as `edit`; the webhook (`EntityWebhookPayload`) that Linear sends for it."""
        issue, names = self._find(reference), {"labels": "labelIds", "state": "stateId"}
        before = self._webhook_data(issue, PERSON)
        self.edit(reference, **changes)
        told = self._webhook(issue, actor or PERSON)
        was = {names.get(name, name): before[names.get(name, name)] for name in changes}
        return told | {"action": "update", "updatedFrom": {"updatedAt": before["updatedAt"], **was}}

    def said(
        self, reference: str, body: str, actor: Mapping[str, Any] | None = None, parent: str | None = None
    ) -> dict[str, Any]:
        """A person comments; the webhook that Linear sends for it."""
        issue, who, now = self._find(reference), actor or PERSON, _now()
        comment = {"id": str(uuid.uuid4()), "issueId": issue.id, "body": body}
        self._comments[comment["id"]] = comment
        issue.comments.append(comment)
        child = {"id": issue.id, "identifier": issue.identifier, "title": issue.title, "team": issue.team,
                 "teamId": issue.team["id"], "url": _url(issue)}  # fmt: skip
        told = {"parentId": parent} if parent else {}
        user = {part: who[part] for part in ("id", "name", "email", "url") if part in who}
        data = {**comment, **told, "issue": child, "userId": who["id"], "user": user, "reactionData": {},
                "createdAt": now, "updatedAt": now}  # fmt: skip
        return self._webhook(issue, who) | {"type": "Comment", "data": data}

    def delete(self, reference: str) -> None:
        """A person deletes an issue for good."""
        del self._issues[self._find(reference).id]

    def delete_comment(self, key: str) -> None:
        """A person deletes a comment; its id stays taken, as in Linear."""
        comment = self._comments.pop(key)
        self._find(comment["issueId"]).comments.remove(comment)

    def issue(self, reference: str) -> Issue:
        """The issue with this id or identifier. Raises `Refusal`."""
        return self._find(reference)

    def _webhook(self, issue: Issue, actor: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "action": "create",
            "type": "Issue",
            "actor": dict(actor),
            "createdAt": issue.created_at,
            "data": self._webhook_data(issue, actor),
            "url": _url(issue),
            "organizationId": ids.uuid4_of("organization"),
            "webhookId": ids.uuid4_of("webhook"),
            "webhookTimestamp": time.time_ns() // 1_000_000,
        }

    def _webhook_data(self, issue: Issue, actor: Mapping[str, Any]) -> dict[str, Any]:
        """`IssueWebhookPayload`: every field that is never null, and those that triage reads."""
        labels = [{"id": key, "name": self.labels[key], "color": "#bec2c8"} for key in issue.label_ids]
        state = {
            "id": ids.uuid4_of("state", issue.state),
            "name": STATES[issue.state],
            "type": issue.state,
            "color": "#888",
        }
        return {
            "id": issue.id,
            "identifier": issue.identifier,
            "number": issue.number,
            "title": issue.title,
            "description": issue.description,
            "priority": issue.priority,
            "priorityLabel": PRIORITY_LABELS[issue.priority],
            "prioritySortOrder": 0.0,
            "sortOrder": float(-issue.number),
            "state": state,
            "stateId": state["id"],
            "team": issue.team,
            "teamId": issue.team["id"],
            "labels": labels,
            "labelIds": issue.label_ids.copy(),
            "creatorId": actor["id"],
            "previousIdentifiers": [],
            "reactionData": {},
            "subscriberIds": [actor["id"]],
            "createdAt": issue.created_at,
            "updatedAt": issue.updated_at,
            "url": _url(issue),
        }


def _is_uuid4(text: str) -> bool:
    try:
        return uuid.UUID(text).version == 4
    except ValueError:
        return False


def _url(issue: Issue) -> str:
    return f"https://linear.app/pi/issue/{issue.identifier}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
