"""Linear's GraphQL API: the actuator that holds the token. It knows four operations and refuses every other.

    CallOut ──perform──▶ issue_context   issue, its labels, the labels it may get            (query)
                         issue_update    look again ─▶ issueUpdate of what is still unset     (query, mutation)
                         issues_since    a page of what changed, newest first                 (query)
                         comment_create  commentCreate ─conflict─▶ is that one ours? ─▶ done  (mutation, query)

Owns: one HTTP session, and the moment until which Linear wants to be left alone (until then it refuses by itself).
Refuses: operations and arguments outside the allow-list, redirects (they would carry the token away), large answers.

Facts (Linear's public schema and API documents; the refusals as people report them):
* An API key goes into `Authorization` bare, an OAuth token as `Bearer …`.
* `issueUpdate` has no precondition and the last write wins, so `issue_update` looks before it writes.
* `commentCreate` takes a UUID v4 from the client. The second of two is answered INPUT_ERROR, "conflict on insert of
  Comment", "Entity Comment with id … already exists.": the first one's answer was lost, and the effect is there.
* A missing issue is INPUT_ERROR, "Entity not found: Issue"; one in the trash can still be read and says `trashed`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec
from msgspec import Meta

from ..errors import UserError
from .linear_answers import LinearRefused, data_of, pause_of, sent_ms
from .outcome import CallFailed

TIMEOUT_S = 20.0  # of one request; Linear answers in under a second, a Pi's uplink may not
RESPONSE_BYTES_MAX = 1024 * 1024  # one issue with its description is at most a few hundred kilobytes
PAGE_ISSUES = 50  # Linear's own default; a page then costs some hundreds of the 3,000,000 points an hour
PAGE_LABELS = 20
LABELS_MAX = 100  # labels read of one issue or one team; ten times what people use

ISSUE_CONTEXT = """
query IssueContext($id: String!, $labels: Int!, $team: IssueLabelFilter!, $workspace: IssueLabelFilter!) {
  issue(id: $id) {
    id identifier title description updatedAt priority trashed
    state { type }
    labels(first: $labels) { nodes { id name } }
    team { id key labels(first: $labels, filter: $team) { nodes { id name isGroup } } }
  }
  issueLabels(first: $labels, filter: $workspace) { nodes { id name isGroup } }
}"""
ISSUE_GLANCE = """
query IssueGlance($id: String!, $labels: Int!) {
  issue(id: $id) { id priority trashed labels(first: $labels) { nodes { id name } } }
}"""
ISSUE_UPDATE = """
mutation IssueUpdate($id: String!, $input: IssueUpdateInput!) {
  issueUpdate(id: $id, input: $input) { success }
}"""
COMMENT_CREATE = """
mutation CommentCreate($input: CommentCreateInput!) {
  commentCreate(input: $input) { success }
}"""
COMMENT_GLANCE = """
query CommentGlance($id: String!) {
  comment(id: $id) { id issue { id identifier } }
}"""
ISSUES_SINCE = """
query IssuesSince($since: DateTimeOrDuration!, $first: Int!, $after: String, $labels: Int!) {
  issues(filter: { updatedAt: { gt: $since } }, orderBy: updatedAt, first: $first, after: $after) {
    nodes {
      id identifier title priority trashed createdAt
      state { type }
      creator { id }
      botActor { id }
      labels(first: $labels) { nodes { id name } }
    }
    pageInfo { hasNextPage endCursor }
  }
}"""
DOCUMENTS = (ISSUE_CONTEXT, ISSUE_GLANCE, ISSUE_UPDATE, COMMENT_CREATE, COMMENT_GLANCE, ISSUES_SINCE)
"""Everything this client ever sends; a test validates each against the public schema."""

Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]+$")]
Name = Annotated[str, Meta(min_length=1, max_length=128)]


class _Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    labels: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Names of labels whose ids the caller needs, matched without case."""


class _Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    priority: Annotated[int, Meta(ge=1, le=4)] | None = None
    """Written only where the issue has none."""
    added_label_ids: Annotated[tuple[Id, ...], Meta(max_length=8)] = ()
    unless_labels: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Names; nothing is added where the issue has one of them."""


class _Comment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    id: Id
    body: Annotated[str, Meta(min_length=1, max_length=4000)]


class _Since(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since_ms: Annotated[int, Meta(ge=0)]
    after: Annotated[str, Meta(max_length=200)] = ""


T = TypeVar("T")


class LinearClient:
    """`token` is an API key or `Bearer …`. A `session` that is handed in stays the caller's to close.

    Every operation raises `CallFailed` and returns a dict of plain values; `{"missing": True}` where the issue is gone.
    """

    def __init__(
        self,
        url: str,
        token: str,
        session: aiohttp.ClientSession | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._token = token.strip()
        if not self._token or not self._token.isprintable():
            raise UserError(
                "Linear's token is not one line of text", fix="Put the API key alone into linear.token_file."
            )
        self._given = session
        self._own: aiohttp.ClientSession | None = None
        self._timeout_s = timeout_s
        self._clock = clock
        self._quiet_until = 0.0
        self._sent_ms = 0
        """When Linear sent its newest answer, by its own clock."""

    async def close(self) -> None:
        if self._own is not None:
            await self._own.close()

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Perform one `CallOut`; repeated with the same arguments it has one effect.

        `key` is not sent: a comment carries its own id, and an update changes only what is unset.
        """
        match operation:
            case "issue_context":
                return await self.issue_context(_checked(arguments, _Context))
            case "issue_update":
                return await self.issue_update(_checked(arguments, _Update))
            case "issues_since":
                return await self.issues_since(_checked(arguments, _Since))
            case "comment_create":
                return await self.comment_create(_checked(arguments, _Comment))
            case _:
                raise CallFailed(f"Linear has no operation {operation!r} here", retryable=False)

    async def issue_context(self, ask: _Context) -> dict[str, Any]:
        """`{id, identifier, title, description, updated_at, priority, state, labels, team, team_labels}`.

        `team_labels` are the team's and the workspace's labels among `ask.labels` that can be given to an issue.
        """
        named: dict[str, Any] = {"or": [{"name": {"eqIgnoreCase": name}} for name in ask.labels]}
        if not ask.labels:
            named = {"name": {"in": []}}
        shared = {"and": [named, {"team": {"null": True}}]}
        variables = {"id": ask.issue, "labels": LABELS_MAX, "team": named, "workspace": shared}
        return await _or_missing(self._query(ISSUE_CONTEXT, variables, _context_of))

    async def issue_update(self, change: _Update) -> dict[str, Any]:
        """Write what people have not set meanwhile. `{"changed": [...]}` names what was written: priority, label."""
        glance = {"id": change.issue, "labels": LABELS_MAX}
        seen = await _or_missing(self._query(ISSUE_GLANCE, glance, _seen_of))
        if seen.get("missing"):
            return seen
        wanted: dict[str, Any] = {}
        if change.priority is not None and seen["priority"] == 0:
            wanted["priority"] = change.priority
        unless = {name.casefold() for name in change.unless_labels}
        if not any(label["name"].casefold() in unless for label in seen["labels"]):
            wanted["addedLabelIds"] = sorted(set(change.added_label_ids) - {label["id"] for label in seen["labels"]})
        wanted = {field: value for field, value in wanted.items() if value}
        if not wanted:
            return {"changed": []}
        variables = {"id": change.issue, "input": wanted}
        done = await _or_missing(self._query(ISSUE_UPDATE, variables, lambda data: _success(data["issueUpdate"])))
        names = {"priority": "priority", "addedLabelIds": "label"}
        return done or {"changed": [names[field] for field in wanted]}

    async def issues_since(self, ask: _Since) -> dict[str, Any]:
        """Issues that changed after `since_ms`: `{issues, created, more, now_ms}`; `more`: cursor of the next page.

        `issues` have the fields that a webhook of their creation would have and that workflows read; `created` and
        `now_ms` are milliseconds of Linear's clock.
        """
        since = datetime.fromtimestamp(ask.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
        variables = {"since": since, "first": PAGE_ISSUES, "after": ask.after or None, "labels": PAGE_LABELS}
        page = await self._query(ISSUES_SINCE, variables, _page_of)
        return {**page, "now_ms": self._sent_ms or ask.since_ms}

    async def comment_create(self, comment: _Comment) -> dict[str, Any]:
        """Comment once per `comment.id`, subscribing nobody. `{"comment": id, "repeated": bool}`."""
        fields = {"id": comment.id, "issueId": comment.issue, "body": comment.body, "doNotSubscribeToIssue": True}
        create = self._query(COMMENT_CREATE, {"input": fields}, lambda data: _success(data["commentCreate"]))
        try:
            done = await _or_missing(create)
        except LinearRefused as refusal:
            if not refusal.names_conflict():
                raise
            await self._confirm(comment, refusal)
            return {"comment": comment.id, "repeated": True}
        return done or {"comment": comment.id, "repeated": False}

    async def _confirm(self, comment: _Comment, refusal: LinearRefused) -> None:
        """Raise `refusal` unless the comment with our id is on our issue, or people have deleted it since."""
        try:
            issue = await self._query(COMMENT_GLANCE, {"id": comment.id}, lambda data: data["comment"]["issue"] or {})
        except LinearRefused as fault:
            if not fault.names_missing("Comment"):
                raise
            return
        if comment.issue not in (issue.get("id"), issue.get("identifier")):
            raise refusal

    async def _query(self, document: str, variables: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T:
        """What `read` makes of the data of Linear's answer, where that is whole."""
        if (left := self._quiet_until - self._clock()) > 0:
            raise CallFailed("Linear wants to be left alone", f"for {left:.0f} s", retryable=True, retry_after_s=left)
        body = msgspec.json.encode({"query": document, "variables": variables})
        try:
            async with asyncio.timeout(self._timeout_s):
                status, headers, answer = await self._post(body)
        except (TimeoutError, aiohttp.ClientError, OSError) as fault:
            raise CallFailed("Linear did not answer:", type(fault).__name__, retryable=True) from fault
        pause_s = pause_of(headers)
        self._sent_ms = sent_ms(headers) or self._sent_ms
        if pause_s is not None:
            self._quiet_until = max(self._quiet_until, self._clock() + pause_s)
        data = data_of(status, answer, pause_s)
        try:
            return read(data)
        except (KeyError, TypeError, AttributeError, ValueError) as fault:
            raise CallFailed("Linear's answer lacks a field:", repr(fault), retryable=True) from fault

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Authorization": self._token, "Content-Type": "application/json"}
        async with self._session().post(self._url, data=body, headers=headers, allow_redirects=False) as response:
            answer = b""
            async for chunk in response.content.iter_chunked(64 * 1024):
                answer += chunk
                if len(answer) > RESPONSE_BYTES_MAX:
                    raise CallFailed(
                        "Linear's answer is too large", f"over {RESPONSE_BYTES_MAX} bytes", retryable=False
                    )
            return response.status, response.headers, answer

    def _session(self) -> aiohttp.ClientSession:
        if self._given is not None:
            return self._given
        if self._own is None or self._own.closed:
            self._own = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        return self._own


def _checked(arguments: Mapping[str, Any], shape: type[T]) -> T:
    try:
        return msgspec.convert(arguments, shape)
    except msgspec.ValidationError as fault:
        raise CallFailed("not an argument that Linear may get:", str(fault), retryable=False) from fault


async def _or_missing(query: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await query
    except LinearRefused as refusal:
        if refusal.names_missing("Issue"):
            return {"missing": True}
        raise


def _success(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing to add where the mutation succeeded."""
    if payload["success"] is not True:
        raise CallFailed("Linear says that it did not succeed", retryable=True)
    return {}


def _context_of(data: dict[str, Any]) -> dict[str, Any]:
    issue, team = data["issue"], data["issue"]["team"]
    if issue["trashed"]:
        return {"missing": True}
    offered = [*team["labels"]["nodes"], *data["issueLabels"]["nodes"]]  # the team's own label of a name comes first
    return {
        "id": str(issue["id"]),
        "identifier": str(issue["identifier"]),
        "title": str(issue["title"]),
        "description": str(issue["description"] or ""),
        "updated_at": str(issue["updatedAt"]),
        "priority": int(issue["priority"]),
        "state": str(issue["state"]["type"]),
        "labels": _labels(issue["labels"]["nodes"]),
        "team": {"id": str(team["id"]), "key": str(team["key"])},
        "team_labels": _labels(label for label in offered if not label["isGroup"]),
    }


def _seen_of(data: dict[str, Any]) -> dict[str, Any]:
    issue = data["issue"]
    if issue["trashed"]:
        return {"missing": True}
    return {"priority": int(issue["priority"]), "labels": _labels(issue["labels"]["nodes"])}


def _page_of(data: dict[str, Any]) -> dict[str, Any]:
    nodes, page = data["issues"]["nodes"], data["issues"]["pageInfo"]
    created = [datetime.fromisoformat(node["createdAt"]) for node in nodes]
    return {
        "issues": [_hook_data(node) for node in nodes],
        "created": [int(at.timestamp() * 1000) for at in created],
        "more": str(page["endCursor"] or "") if page["hasNextPage"] else "",
    }


def _hook_data(node: Mapping[str, Any]) -> dict[str, Any]:
    """An issue as `IssueWebhookPayload` would have it, as far as anybody reads it."""
    return {
        "id": str(node["id"]),
        "identifier": str(node["identifier"]),
        "title": str(node["title"]),
        "priority": int(node["priority"]),
        "labels": _labels(node["labels"]["nodes"]),
        "state": {"type": str(node["state"]["type"])},
        "creatorId": (node["creator"] or {}).get("id"),
        "botActor": node["botActor"],
        "trashed": node["trashed"],
    }


def _labels(nodes: Any) -> list[dict[str, str]]:
    return [{"id": str(node["id"]), "name": str(node["name"])} for node in nodes]
