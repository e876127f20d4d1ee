"""Linear's GraphQL API: the actuator that holds the token. It knows five operations and refuses every other.

    CallOut ──perform──▶ issue_context   issue, its labels, the labels it may get            (query)
                         issue_update    look again ─▶ issueUpdate of what is still unset     (query, mutation)
                         issues_since    a page of what was created, newest first             (query)
                         comment_create  commentCreate ─conflict─▶ is that one ours? ─▶ done  (mutation, query)
                         comment_put     the same ─conflict, other text─▶ commentUpdate       (the same, mutation)

Owns: one HTTP session, the moment until which Linear wants to be left alone (until then it refuses by itself), and how
many writes it made in the last hour.
Refuses: operations and arguments outside the allow-list, redirects (they would carry the token away), large answers,
answers about something else than was asked, and more writes an hour than its owner allows.

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
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec
from msgspec import Meta

from ..errors import UserError
from .linear_answers import (
    LinearRefused,
    context_of,
    data_of,
    issues_page_of,
    pause_of,
    seen_of,
    sent_ms,
)
from .linear_documents import (
    COMMENT_CREATE,
    COMMENT_GLANCE,
    COMMENT_UPDATE,
    ISSUE_CONTEXT,
    ISSUE_GLANCE,
    ISSUE_UPDATE,
    ISSUES_SINCE,
)
from .outcome import CallFailed

TIMEOUT_S = 20.0  # of one request; Linear answers in under a second, a Pi's uplink may not
RESPONSE_BYTES_MAX = 1024 * 1024  # one issue with its description is at most a few hundred kilobytes
PAGE_ISSUES = 50  # Linear's own default; a page then costs some hundreds of the 3,000,000 points an hour
PAGE_LABELS = 20
HOUR_S = 3600.0
WRITES_PER_HOUR = 600  # a house makes tens; Linear takes 2,500 requests an hour of a key
LABELS_MAX = 100  # labels read of one issue or one team; ten times what people use

Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9-]+$")]
Name = Annotated[str, Meta(min_length=1, max_length=128)]


class _Context(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    labels: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Names of labels whose ids the caller needs, matched without case."""


class _Add(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: Id
    unless: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    """Names; the label is not given to an issue that has one of them."""


class _Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    priority: Annotated[int, Meta(ge=0, le=4)] | None = None
    instead_of: Annotated[tuple[Annotated[int, Meta(ge=0, le=4)], ...], Meta(max_length=5)] = (0,)
    """Written only where the issue has one of these; 0, none, is written to take back what we set, never else."""
    add: Annotated[tuple[_Add, ...], Meta(max_length=8)] = ()
    removed_label_ids: Annotated[tuple[Id, ...], Meta(max_length=8)] = ()


class _Comment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    issue: Id
    id: Id
    body: Annotated[str, Meta(min_length=1, max_length=4000)]
    parent: Id | None = None
    """The comment it answers; Linear has one level of answers."""


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
        writes_per_hour: int = WRITES_PER_HOUR,
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
        self._writes_per_hour = writes_per_hour
        self._writes = deque[float]()
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
            case "comment_put":
                return await self.comment_put(_checked(arguments, _Comment))
            case _:
                raise CallFailed(f"Linear has no operation {operation!r} here", retryable=False)

    async def issue_context(self, ask: _Context) -> dict[str, Any]:
        """`{id, identifier, title, description, updated_at, priority, state, labels, team, project, creator,
        team_labels}`; `team_labels` are the team's and the workspace's labels among `ask.labels` that an issue can get.
        """
        named: dict[str, Any] = {"or": [{"name": {"eqIgnoreCase": name}} for name in ask.labels]}
        if not ask.labels:
            named = {"name": {"in": []}}
        shared = {"and": [named, {"team": {"null": True}}]}
        variables = {"id": ask.issue, "labels": LABELS_MAX, "team": named, "workspace": shared}
        return await _or_missing(
            self._query(ISSUE_CONTEXT, variables, lambda data: context_of(_about(data["issue"], ask.issue), data))
        )

    async def issue_update(self, change: _Update) -> dict[str, Any]:
        """Write what people have not set meanwhile: `{changed, priority, label_ids}`, the latter two as they are then.

        `changed` names what was written now: priority, label.
        """
        glance = {"id": change.issue, "labels": LABELS_MAX}
        seen = await _or_missing(
            self._query(ISSUE_GLANCE, glance, lambda data: seen_of(_about(data["issue"], change.issue)))
        )
        if seen.get("missing"):
            return seen
        wanted = _wanted(change, seen)
        if not wanted:
            return {"changed": [], **_state(seen)}
        self._spend()
        after = await _or_missing(
            self._query(ISSUE_UPDATE, {**glance, "input": wanted}, lambda data: _updated(data, change.issue))
        )
        names = {"priority": "priority", "addedLabelIds": "label", "removedLabelIds": "label"}
        changed = list(dict.fromkeys(names[field] for field in wanted))
        return after if after.get("missing") else {"changed": changed, **_state(after)}

    async def issues_since(self, ask: _Since) -> dict[str, Any]:
        """Issues that were created at `since_ms` or later: `{issues, more, now_ms}`; `more`: cursor of the next page.

        `issues` have the fields that a webhook of their creation would have and that workflows read; both times are
        milliseconds of Linear's clock.
        """
        since = datetime.fromtimestamp(ask.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
        variables = {"since": since, "first": PAGE_ISSUES, "after": ask.after or None, "labels": PAGE_LABELS}
        page = await self._query(ISSUES_SINCE, variables, issues_page_of)
        return {**page, "now_ms": self._sent_ms or ask.since_ms}

    async def comment_create(self, comment: _Comment) -> dict[str, Any]:
        """Comment once per `comment.id`, subscribing nobody. `{"comment": id, "repeated": bool}`."""
        done, _ = await self._created(comment)
        return done

    async def comment_put(self, comment: _Comment) -> dict[str, Any]:
        """The comment `comment.id` with this body: made, or edited where it is there. One that people deleted stays so.

        `{"comment": id, "repeated": bool, "edited": bool}`.
        """
        done, standing = await self._created(comment)
        if standing in (None, comment.body):
            return {**done, "edited": False}
        self._spend()
        variables = {"id": comment.id, "input": {"body": comment.body, "doNotSubscribeToIssue": True}}
        await self._query(COMMENT_UPDATE, variables, lambda data: _success(data["commentUpdate"], comment))
        return {**done, "edited": True}

    async def _created(self, comment: _Comment) -> tuple[dict[str, Any], str | None]:
        """What `comment_create` returns, and the body that stands where it was there before."""
        fields = {"id": comment.id, "issueId": comment.issue, "body": comment.body, "doNotSubscribeToIssue": True}
        fields |= {"parentId": comment.parent} if comment.parent else {}
        self._spend()
        create = self._query(COMMENT_CREATE, {"input": fields}, lambda data: _success(data["commentCreate"], comment))
        try:
            done = await _or_missing(create)
        except LinearRefused as refusal:
            if not refusal.names_conflict():
                raise
            return {"comment": comment.id, "repeated": True}, await self._standing(comment, refusal)
        return done or {"comment": comment.id, "repeated": False}, None

    async def _standing(self, comment: _Comment, refusal: LinearRefused) -> str | None:
        """The body of the comment with our id; None where people have deleted it. Raises where it is elsewhere."""
        try:
            found = await self._query(COMMENT_GLANCE, {"id": comment.id}, lambda data: dict(data["comment"]))
        except LinearRefused as fault:
            if not fault.names_missing("Comment"):
                raise
            return None
        issue = found.get("issue") or {}
        if comment.issue not in (issue.get("id"), issue.get("identifier")):
            raise refusal
        return str(found.get("body"))

    def _spend(self) -> None:
        """One write of the hour's; refused by ourselves where they are used up, whatever made them so many."""
        now = self._clock()
        self._writes = deque(at for at in self._writes if now - at < HOUR_S)
        if len(self._writes) >= self._writes_per_hour:
            left = HOUR_S - (now - self._writes[0])
            why = f"{self._writes_per_hour} writes an hour are allowed (linear.writes_per_hour)"
            raise CallFailed("nothing was written:", why, retryable=True, retry_after_s=left)
        self._writes.append(now)

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


def _success(payload: Mapping[str, Any], comment: _Comment | None = None) -> dict[str, Any]:
    """Nothing to add where the mutation succeeded, on the comment it was meant for."""
    if payload["success"] is not True:
        raise CallFailed(
            "Linear says that it did not succeed", "and not why", "Look whether the token may write there.",
            retryable=True,
        )  # fmt: skip
    if comment is not None:
        _about(payload["comment"], comment.id)
    return {}


def _about(node: Mapping[str, Any], wanted: str) -> Mapping[str, Any]:
    """`node`, where it is the one that was asked for, by id or identifier."""
    if wanted not in (node["id"], node.get("identifier")):
        why = f"it was asked about {wanted} and told of {str(node['id'])[:64]}"
        raise CallFailed("Linear answered about something else:", why, "Look at it by hand.", retryable=True)
    return node


def _updated(data: dict[str, Any], issue: str) -> dict[str, Any]:
    payload = data["issueUpdate"]
    _success(payload)
    return seen_of(_about(payload["issue"], issue))


def _wanted(change: _Update, seen: Mapping[str, Any]) -> dict[str, Any]:
    """The mutation's input: what of `change` still may be done to the issue as it is `seen`."""
    wanted: dict[str, Any] = {}
    priority = seen["priority"]
    if change.priority is not None and priority in change.instead_of and priority != change.priority:
        wanted["priority"] = change.priority
    here = {label["id"] for label in seen["labels"]}
    leaving = here & set(change.removed_label_ids)
    names = {label["name"].casefold() for label in seen["labels"] if label["id"] not in leaving}
    added = {one.id for one in change.add if not names & {name.casefold() for name in one.unless}} - here
    wanted |= {"addedLabelIds": sorted(added)} if added else {}
    return wanted | ({"removedLabelIds": sorted(leaving)} if leaving else {})


def _state(seen: Mapping[str, Any]) -> dict[str, Any]:
    return {"priority": seen["priority"], "label_ids": [label["id"] for label in seen["labels"]]}
