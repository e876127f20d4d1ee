"""What the hub for machines without workerd lets in: limits, and checks of single values. Pure but for `read_body`.

The numbers are those of forwarder/worker.js, and so are the errors: {error: {what, why, fix}}. Whatever passes here is
fit for the outbox (printable, bounded, whole numbers that JavaScript keeps exact), so the parts behind ask no more.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from aiohttp import web

from piclusterd.integrations.signatures import PROVIDERS, header, outlived

BODY_MAX = 1024 * 1024  # bytes, as in the Worker
HEADER_MAX = 1024  # characters of one stored header
TEXT_MAX = 200  # characters of a node id or a reason
COUNT_MAX = 2**53 - 1  # the largest whole number JavaScript keeps exact
FRESH_MS = 60_000  # Linear's own window

_KEEP = {
    "linear": ("linear-delivery", "linear-event", "linear-signature", "linear-timestamp"),
    "github": ("x-github-event", "x-github-delivery", "x-github-hook-id", "x-hub-signature-256"),
    "notion": ("x-notion-signature",),
    "selftest": ("x-picluster-signature",),
}
_KEEP_ALWAYS = ("content-type", "user-agent")
_PLAIN = re.compile(r"[\x20-\x7e]+")


class Refusal(Exception):
    """An answer other than 200, as the protocol words it: {error: {what, why, fix}}."""

    def __init__(self, status: int, what: str, why: str, fix: str, **more: Any) -> None:
        super().__init__(what)
        self.status = status
        self.body: dict[str, Any] = {"error": {"what": what, "why": why, "fix": fix}, **more}


async def read_body(request: web.Request) -> bytes:
    """The whole body, or 413 as soon as it is too long."""
    parts, size = [], 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > BODY_MAX:
            why = f"the limit is {BODY_MAX} bytes; nothing was stored"
            raise Refusal(413, "body too large", why, "send a smaller body")
        parts.append(part)
    return b"".join(parts)


def require_claim(fields: Mapping[str, Any], **counts: Any) -> None:
    """Refuse (400) a term, a node or any of `counts` that is not what it should be."""
    for name, value in {"term": fields.get("term"), **counts}.items():
        if not is_count(value):
            raise Refusal(400, "bad request", f'"{name}" must be a whole number >= 0', "see worker.js, protocol v1")
    if not is_plain(fields.get("node"), TEXT_MAX):
        why = f'"node" must be 1-{TEXT_MAX} printable characters'
        raise Refusal(400, "bad request", why, "send the node id")


def is_handshake(request: web.Request, data: dict[str, Any]) -> bool:
    """Notion's unsigned first POST, which carries nothing but the token."""
    unsigned = header(request.headers, PROVIDERS["notion"].signature) is None
    return unsigned and len(data) == 1 and is_plain(data.get("verification_token"), TEXT_MAX)


def is_stale(source: str, data: dict[str, Any], now_ms: int) -> bool:
    """Judged here and only here; Linear's retries may carry their first timestamp, so stale is stored, not refused."""
    if source != "linear":
        return False
    sent = data.get("webhookTimestamp")
    return not (isinstance(sent, int | float) and abs(now_ms - sent) <= FRESH_MS)


def require_fresh_enough(source: str, data: dict[str, Any], now_ms: int) -> None:
    """Raises `Refusal`: past the time for which acked hooks are remembered nothing tells a replay."""
    if outlived(source, data, now_ms):
        why = "it was signed longer ago than the hub remembers what it took"
        raise Refusal(401, "too old to be believed", why, "send what changed anew")


def kept_headers(source: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The headers worth storing, lower case: what proves the body, and what names the event."""
    found = {name: header(headers, name) for name in (*_KEEP[source], *_KEEP_ALWAYS)}
    return {name: value for name, value in found.items() if value is not None and is_plain(value, HEADER_MAX)}


def is_plain(text: object, limit: int) -> TypeGuard[str]:
    """Printable ASCII, not empty, at most `limit` characters."""
    return isinstance(text, str) and len(text) <= limit and _PLAIN.fullmatch(text) is not None


def is_count(value: object) -> TypeGuard[int]:
    """A whole number >= 0 that JavaScript keeps exact."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX


def digits(text: str | None) -> int | None:
    """The number that a query parameter spells."""
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,15}", text) else None


def reason_of(why: object) -> str:
    """A nack's reason, if it is fit to be stored."""
    return why if is_plain(why, TEXT_MAX) else "nacked without a reason"
