"""Linear's double with what specs, moderation and notices need: attachments, projects, people's comments, new issues.

People `complete` issues and `say`, `resay` comments; each gives the webhook that Linear sends of it. Through the API
come `attachmentCreate` (one a URL: the second changes the first), `commentDelete` and `issueCreate` (once per id).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from .. import ids
from .linear_double import LinearDouble
from .linear_workspace import PERSON, STATES, Effect, Issue, Refusal, _is_uuid4, _now, _url

PROJECT = "Cupboard"


class LinearFlowsDouble(LinearDouble):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.attachments: dict[str, dict[str, Any]] = {}
        """URL → attachment."""
        self._said: dict[str, dict[str, Any]] = {}
        """Comment of a person → who and when; those of the API have none."""

    def roots(self) -> dict[str, Callable[..., Any]]:
        more: dict[str, Callable[..., Any]] = {
            "attachmentCreate": self._attachment_create,
            "commentDelete": self._comment_delete,
            "issueCreate": self._issue_create,
        }
        return {**super().roots(), **more}

    # through the API -----------------------------------------------------------------------------------------------
    def _attachment_create(self, info: Any, input: Mapping[str, Any]) -> dict[str, Any]:
        issue = self._find(input["issueId"])
        before = self.attachments.get(input["url"])
        attachment = {"id": before["id"] if before else str(uuid.uuid4()), **dict(input)}
        if attachment != before:
            self.attachments[input["url"]] = attachment
            change = {"url": input["url"], "title": input["title"]}
            self._record(Effect("attachment-create", issue.identifier, input["url"], change))
        return {"success": True, "lastSyncId": len(self.effects), "attachment": attachment}

    def _comment_delete(self, info: Any, id: str) -> dict[str, Any]:
        comment = self._comments.get(id)
        if comment is None:
            raise Refusal("Entity not found: Comment", "Could not find referenced Comment.")
        identifier = self._find(comment["issueId"]).identifier
        self.delete_comment(id)
        self._record(Effect("comment-delete", identifier, id, {}))
        return {"success": True, "lastSyncId": len(self.effects), "entityId": id}

    def _issue_create(self, info: Any, input: Mapping[str, Any]) -> dict[str, Any]:
        key = input.get("id") or str(uuid.uuid4())
        if not _is_uuid4(key):
            raise Refusal("Argument Validation Error", "id must be a UUID.", "INVALID_INPUT")
        if key in self._issues:
            raise Refusal("conflict on insert of Issue", f"Entity Issue with id {key} already exists.")
        number, now = len(self._issues) + 1, _now()
        title, body = str(input.get("title") or ""), str(input.get("description") or "")
        issue = Issue(key, number, title, body, 0, [], "triage", now, now)
        self._issues[key] = issue
        self._record(Effect("issue-create", issue.identifier, key, {"title": title}))
        return {"success": True, "lastSyncId": len(self.effects), "issue": self._shown(issue)}

    def _comment(self, info: Any, id: str) -> dict[str, Any]:
        return {**super()._comment(info, id), **self._about(id)}

    def _shown(self, issue: Issue) -> dict[str, Any]:
        comments = [{**comment, **self._about(comment["id"])} for comment in issue.comments]
        more = {"url": _url(issue), "project": {"name": PROJECT}}
        return {**super()._shown(issue), **more, "comments": lambda info, **_: {"nodes": comments}}

    def _about(self, comment: str) -> dict[str, Any]:
        said = self._said.get(comment, {"at": "2026-01-01T00:00:00.000Z", "by": None})
        told = {"url": f"https://linear.app/pi/comment/{comment}", "createdAt": said["at"], "updatedAt": said["at"]}
        return {**told, "user": said["by"], "botActor": None if said["by"] else {"id": "app"}}

    # people --------------------------------------------------------------------------------------------------------
    def complete(self, reference: str, state: str = "completed") -> dict[str, Any]:
        """A person moves an issue; the webhook of it."""
        issue = self._find(reference)
        before: dict[str, Any] = {"stateId": ids.uuid4_of("state", issue.state), "updatedAt": issue.updated_at}
        if state == "completed" != issue.state:
            before["completedAt"] = None
        self.edit(reference, state=state)
        told = {**self._webhook(issue, PERSON), "action": "update", "updatedFrom": before}
        told["data"]["state"]["name"] = STATES[state]
        return told

    def say(self, reference: str, body: str, by: str = "Bob") -> dict[str, Any]:
        """A person comments on an issue; the webhook of it."""
        issue, key, now = self._find(reference), str(uuid.uuid4()), _now()
        comment = {"id": key, "issueId": issue.id, "body": body}
        self._comments[key] = comment
        self._comment_ids.add(key)
        issue.comments.append(comment)
        self._said[key] = {"at": now, "by": {"id": ids.uuid4_of("user", by), "name": by}}
        return self._comment_webhook(key, "create")

    def resay(self, comment: str, body: str) -> dict[str, Any]:
        """A person edits a comment; the webhook of it."""
        before = self._comments[comment]["body"]
        self._comments[comment]["body"] = body
        self._said[comment]["at"] = _now()
        return {**self._comment_webhook(comment, "update"), "updatedFrom": {"body": before}}

    def _comment_webhook(self, key: str, action: str) -> dict[str, Any]:
        """`CommentWebhookPayload`: every field that is never null, and those that moderation reads."""
        comment, said = self._comments[key], self._said[key]
        issue = self._find(comment["issueId"])
        shown = {"id": issue.id, "identifier": issue.identifier, "title": issue.title, "url": _url(issue)}
        data = {
            **comment, "issue": {**shown, "team": issue.team, "teamId": issue.team["id"]}, "userId": said["by"]["id"],
            "user": said["by"], "reactionData": {}, "createdAt": said["at"], "updatedAt": said["at"],
        }  # fmt: skip
        actor = {**said["by"], "type": "user"}
        return {
            "action": action, "type": "Comment", "actor": actor, "createdAt": said["at"], "data": data,
            "url": f"{_url(issue)}#comment-{key[:8]}", "organizationId": ids.uuid4_of("organization"),
            "webhookId": ids.uuid4_of("webhook"), "webhookTimestamp": time.time_ns() // 1_000_000,
        }  # fmt: skip
