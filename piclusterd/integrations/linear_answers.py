"""Reading Linear's answers: is it data, will the fault pass, how long to be quiet? Pure functions of what was received.

* `errors[]` comes with HTTP 200 too, beside partial data: any error fails the call, half an issue is no issue.
* Rate limited is HTTP 400 with code RATELIMITED, not 429 (which a proxy may still send).
* `x-ratelimit-{requests,complexity}-reset` are epoch milliseconds. They are compared with the answer's own `Date`,
  because a Raspberry Pi without a clock chip may not know what time it is.
* Each error has `extensions{type, code, userError, userPresentableMessage}`; not always all of them.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .outcome import CallFailed

PAUSE_DEFAULT_S = 60.0  # when told to wait and not how long
PAUSE_MAX_S = 3600.0  # Linear's buckets are an hour long: a longer pause is a misread clock
FAULT_CHARS_MAX = 300  # of Linear's own words in our errors


class _Extensions(msgspec.Struct, frozen=True, rename="camel"):
    type: str = ""
    code: str = ""
    user_error: bool = False
    user_presentable_message: str | None = None


class _Fault(msgspec.Struct, frozen=True):
    message: str = ""
    extensions: _Extensions = _Extensions()

    def __str__(self) -> str:
        words = " ".join(part for part in (self.message, self.extensions.user_presentable_message) if part)
        return words[:FAULT_CHARS_MAX]


class _Reply(msgspec.Struct, frozen=True):
    data: dict[str, Any] | None = None
    errors: tuple[_Fault, ...] | None = None


class LinearRefused(CallFailed):
    """Linear understood and answered with `errors`."""

    def __init__(self, faults: tuple[_Fault, ...], retryable: bool) -> None:
        super().__init__("Linear refused:", "; ".join(map(str, faults))[:FAULT_CHARS_MAX], retryable=retryable)
        self.faults = faults

    def names_missing(self, entity: str) -> bool:
        """True where an `entity` ("Issue", and not "IssueLabel") is not there or not ours to see."""
        return any(re.match(rf"entity not found: {entity}\b", str(fault), re.IGNORECASE) for fault in self.faults)

    def names_conflict(self) -> bool:
        """True where something has the id already that we wanted to give."""
        return any("conflict on insert" in str(f).lower() or "already exists" in str(f).lower() for f in self.faults)


_TRANSIENT = frozenset(
    {"ratelimited", "network error", "internal error", "internal_server_error", "lock timeout", "lock_timeout"}
)
"""`extensions.type` and `.code`, lower case, of errors that pass."""
_PERMANENT = frozenset(
    {
        "invalid input", "input_error", "invalid_input", "user error", "graphql error", "graphql_validation_failed",
        "authentication error", "authentication_error", "forbidden", "feature not accessible", "usage limit exceeded",
    }
)  # fmt: skip
"""Those that stay. What is in neither list is permanent where Linear calls it the user's error."""


def data_of(status: int, answer: bytes, pause_s: float | None) -> dict[str, Any]:
    """The data of an answer without a fault; else the fault, told apart by whether it passes."""
    try:
        reply = msgspec.json.decode(answer, type=_Reply)
    except (ValueError, RecursionError) as fault:
        passes = status < 300 or status in (408, 429) or status >= 500
        raise CallFailed(
            f"Linear answered HTTP {status} with no JSON", retryable=passes, retry_after_s=pause_s
        ) from fault
    codes = {code.lower() for f in reply.errors or () for code in (f.extensions.type, f.extensions.code)}
    if "ratelimited" in codes or status == 429:
        pause = PAUSE_DEFAULT_S if pause_s is None else pause_s
        raise CallFailed("Linear limits our rate", f"for {pause:.0f} s", retryable=True, retry_after_s=pause)
    if reply.errors:
        raise LinearRefused(reply.errors, retryable=_passes(status, reply.errors, codes))
    if status != 200 or reply.data is None:
        passes = status in (200, 408) or status >= 500
        raise CallFailed(f"Linear answered HTTP {status} without data", retryable=passes, retry_after_s=pause_s)
    return reply.data


def _passes(status: int, faults: tuple[_Fault, ...], codes: set[str]) -> bool:
    """True where the same request may be answered better later."""
    if codes & _PERMANENT or any(fault.extensions.user_error for fault in faults):
        return False
    return bool(codes & _TRANSIENT) or status == 200 or status >= 500


def pause_of(headers: Mapping[str, str]) -> float | None:
    """Seconds Linear wants us to be quiet after this answer, or None: `retry-after`, or a bucket that is empty."""
    pauses = [
        _until(headers, f"x-ratelimit-{bucket}-reset")
        for bucket in ("requests", "complexity", "endpoint-requests")
        if headers.get(f"x-ratelimit-{bucket}-remaining", "").strip() == "0"
    ]
    asked = _number(headers.get("retry-after"))
    if asked is not None:
        pauses.append(min(asked, PAUSE_MAX_S))
    return max(pauses, default=None)


def sent_ms(headers: Mapping[str, str]) -> int:
    """When the answer was sent, by the sender's clock; 0 where it does not say."""
    try:
        return int(email.utils.parsedate_to_datetime(headers["Date"]).timestamp() * 1000)
    except (KeyError, ValueError):
        return 0


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def _until(headers: Mapping[str, str], name: str) -> float:
    """Seconds from the answer's `Date` to the epoch milliseconds in the header `name`."""
    reset_ms = _number(headers.get(name))
    sent = sent_ms(headers)
    if reset_ms is None or not sent:
        return PAUSE_DEFAULT_S
    return min(max((reset_ms - sent) / 1000, 1.0), PAUSE_MAX_S)


# what was asked for --------------------------------------------------------------------------------------------------
def context_of(issue: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    team, creator = issue["team"], issue["creator"] or {}
    if issue["trashed"]:
        return {"missing": True}
    offered = [*team["labels"]["nodes"], *data["issueLabels"]["nodes"]]  # the team's own label of a name comes first
    return {
        **facts_of(issue),
        "priority": int(issue["priority"]),
        "labels": labels_of(issue["labels"]["nodes"]),
        "team": {"id": str(team["id"]), "key": str(team["key"])},
        "creator": {part: str(creator.get(part) or "") for part in ("id", "name", "email")},
        "team_labels": labels_of(label for label in offered if not label["isGroup"]),
    }


def facts_of(issue: Mapping[str, Any]) -> dict[str, str]:
    """What every workflow reads of an issue."""
    return {
        "id": str(issue["id"]),
        "identifier": str(issue["identifier"]),
        "title": str(issue["title"]),
        "description": str(issue["description"] or ""),
        "updated_at": str(issue["updatedAt"]),
        "state": str(issue["state"]["type"]),
        "project": str((issue["project"] or {}).get("name") or ""),
    }


def seen_of(issue: Mapping[str, Any]) -> dict[str, Any]:
    if issue.get("trashed"):
        return {"missing": True}
    return {"priority": int(issue["priority"]), "labels": labels_of(issue["labels"]["nodes"])}


def issues_page_of(data: dict[str, Any]) -> dict[str, Any]:
    nodes, page = data["issues"]["nodes"], data["issues"]["pageInfo"]
    return {
        "issues": [_hook_data(node) for node in nodes],
        "more": str(page["endCursor"] or "") if page["hasNextPage"] else "",
    }


def _hook_data(node: Mapping[str, Any]) -> dict[str, Any]:
    """An issue as `IssueWebhookPayload` would have it, as far as anybody reads it."""
    return {
        "id": str(node["id"]),
        "identifier": str(node["identifier"]),
        "title": str(node["title"]),
        "priority": int(node["priority"]),
        "labels": labels_of(node["labels"]["nodes"]),
        "state": {"type": str(node["state"]["type"])},
        "team": {"id": str(node["team"]["id"]), "key": str(node["team"]["key"])},
        "creatorId": (node["creator"] or {}).get("id"),
        "botActor": node["botActor"],
        "trashed": node["trashed"],
    }


def labels_of(nodes: Any) -> list[dict[str, str]]:
    return [{"id": str(node["id"]), "name": str(node["name"])} for node in nodes]
