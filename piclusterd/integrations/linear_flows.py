"""What specs, moderation and notices do at Linear: a few operations more, of the same client and under the same rules.

    CallOut ──perform──▶ issue_told         issue, its project and its newest comments               (query)
                         attachment_create  one attachment a URL: the second of two changes the first (mutation)
                         comment_context    a comment as it is now                                    (query)
                         comment_delete     only where it still reads as what was approved   (query, mutation)
                         issue_create       an issue of ours, once per id                       (mutation, query)

`attachmentCreate` has the URL as its key, and may be repeated; `issueCreate` takes a UUID v4 from the client like
`commentCreate`. `commentDelete` cannot be taken back and comes from an approved step only (`workflows.moderation`).

Source: Linear's public GraphQL schema.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .linear import Id, LinearClient, _checked, _or_missing, _success
from .linear_answers import LinearRefused, facts_of
from .outcome import CallFailed

COMMENTS_MAX = 20
"""Read of an issue, the newest: what a prompt can hold."""

ISSUE_TOLD = """
query IssueTold($id: String!, $comments: Int!) {
  issue(id: $id) {
    id identifier title description url updatedAt trashed
    state { type }
    team { id key }
    project { name }
    comments(first: $comments, orderBy: createdAt) { nodes { body createdAt user { name } botActor { id } } }
  }
}"""
ATTACHMENT_CREATE = """
mutation AttachmentCreate($input: AttachmentCreateInput!) {
  attachmentCreate(input: $input) { success attachment { id url } }
}"""
COMMENT_CONTEXT = """
query CommentContext($id: String!) {
  comment(id: $id) { id body url updatedAt issue { id identifier } }
}"""
COMMENT_DELETE = """
mutation CommentDelete($id: String!) {
  commentDelete(id: $id) { success }
}"""
ISSUE_CREATE = """
mutation IssueCreate($input: IssueCreateInput!) {
  issueCreate(input: $input) { success }
}"""
ISSUE_CREATED = """
query IssueCreated($id: String!) {
  issue(id: $id) { id }
}"""
DOCUMENTS = (ISSUE_TOLD, ATTACHMENT_CREATE, COMMENT_CONTEXT, COMMENT_DELETE, ISSUE_CREATE, ISSUE_CREATED)
"""Everything sent from here; a test validates each against the public schema."""


class _Issue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id


class _Attachment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    url: Annotated[str, Meta(max_length=2000, pattern=r"^https://[^\s]+$")]
    title: Annotated[str, Meta(min_length=1, max_length=200)]
    subtitle: Annotated[str, Meta(max_length=200)] = ""


class _Comment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    comment: Id


class _Delete(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    comment: Id
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Of the text that was approved for deletion."""


class _NewIssue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: Id
    team: Id
    title: Annotated[str, Meta(min_length=1, max_length=200)]
    body: Annotated[str, Meta(max_length=4000)] = ""


class LinearFlows(LinearClient):
    """Every operation raises `CallFailed` and returns plain values; `{"missing": True}` where the thing is gone."""

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        match operation:
            case "issue_told":
                return await self.issue_told(_checked(arguments, _Issue).issue)
            case "attachment_create":
                return await self.attachment_create(_checked(arguments, _Attachment))
            case "comment_context":
                return await self.comment_context(_checked(arguments, _Comment).comment)
            case "comment_delete":
                return await self.comment_delete(_checked(arguments, _Delete))
            case "issue_create":
                return await self.issue_create(_checked(arguments, _NewIssue))
            case _:
                return await super().perform(operation, arguments, key)

    async def issue_told(self, issue: str) -> dict[str, Any]:
        """`{id, identifier, title, description, url, updated_at, state, team, project, comments: [{by, body}]}`.

        Comments are the oldest first and those of people only: what a bot said is nobody's decision.
        """
        variables = {"id": issue, "comments": COMMENTS_MAX}
        return await _or_missing(self._query(ISSUE_TOLD, variables, _told_of))

    async def attachment_create(self, wish: _Attachment) -> dict[str, Any]:
        """`{"attachment": id}`."""
        fields = {"issueId": wish.issue, "url": wish.url, "title": wish.title, "subtitle": wish.subtitle}
        return await _or_missing(self._query(ATTACHMENT_CREATE, {"input": fields}, _attachment_of))

    async def comment_context(self, comment: str) -> dict[str, Any]:
        """`{id, body, url, updated_at, issue, identifier}`."""
        try:
            return await self._query(COMMENT_CONTEXT, {"id": comment}, _comment_of)
        except LinearRefused as refusal:
            if refusal.names_missing("Comment"):
                return {"missing": True}
            raise

    async def comment_delete(self, wish: _Delete) -> dict[str, Any]:
        """`{"deleted": bool}`; False where people have edited it since it was judged."""
        seen = await self.comment_context(wish.comment)
        if seen.get("missing"):
            return seen
        if hashlib.sha256(seen["body"].encode()).hexdigest() != wish.sha256:
            return {"deleted": False}
        try:
            await self._query(COMMENT_DELETE, {"id": wish.comment}, lambda data: _success(data["commentDelete"]))
        except LinearRefused as refusal:
            if not refusal.names_missing("Comment"):
                raise
        return {"deleted": True}

    async def issue_create(self, wish: _NewIssue) -> dict[str, Any]:
        """`{"issue": id, "repeated": bool}`; once per `wish.id`."""
        fields = {"id": wish.id, "teamId": wish.team, "title": wish.title, "description": wish.body}
        try:
            await self._query(ISSUE_CREATE, {"input": fields}, lambda data: _success(data["issueCreate"]))
        except LinearRefused as refusal:
            if not refusal.names_conflict():
                raise
            await self._query(ISSUE_CREATED, {"id": wish.id}, lambda data: data["issue"]["id"])
            return {"issue": wish.id, "repeated": True}
        return {"issue": wish.id, "repeated": False}


def _told_of(data: dict[str, Any]) -> dict[str, Any]:
    issue = data["issue"]
    if issue["trashed"]:
        return {"missing": True}
    said = [node for node in issue["comments"]["nodes"] if not node["botActor"]]
    said.sort(key=lambda node: str(node["createdAt"]))
    return {
        **facts_of(issue),
        "url": str(issue["url"]),
        "team": str(issue["team"]["key"]),
        "comments": [{"by": str((node["user"] or {}).get("name") or ""), "body": str(node["body"])} for node in said],
    }


def _attachment_of(data: dict[str, Any]) -> dict[str, Any]:
    made = data["attachmentCreate"]
    if made["success"] is not True:
        raise CallFailed("Linear says that it did not succeed", retryable=True)
    return {"attachment": str(made["attachment"]["id"])}


def _comment_of(data: dict[str, Any]) -> dict[str, Any]:
    comment = data["comment"]
    issue = comment["issue"] or {}
    return {
        "id": str(comment["id"]),
        "body": str(comment["body"]),
        "url": str(comment["url"]),
        "updated_at": str(comment["updatedAt"]),
        "issue": str(issue.get("id") or ""),
        "identifier": str(issue.get("identifier") or ""),
    }
