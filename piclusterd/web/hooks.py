"""The second way in for webhooks: straight from the provider, past the hub.

    provider ──POST /hooks/{source}──▶ raw body ──▶ hook_of (signature, key) ──▶ take_hook ──▶ W ledgers ──▶ 200
                                                        │ Refused: 401                │ Unavailable: 503, sender retries
                                                        └ not on the lists: 202, logged, nothing kept

Promises: 200 means durable on W ledgers. Refuses, with nothing stored: bodies over 1 MiB (413), sources it does not
know (404), bodies whose signature does not match (401) or was made a week ago, bodies that are no plain JSON object
(400). A hook may rightly be days late, and what protects from replays is the key made of signed content; only what is
older than that memory is turned away, where this board knows the time. `hook_of` is also the hub's path into the
cluster, and judges no time: what the hub took may wait there for two weeks.

Source: research on Linear, GitHub and Notion deliveries; signatures in `integrations.signatures`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..errors import NotFound, PiclusterError, Refused, Unavailable, UserError
from ..events import HookTaken
from ..integrations import signatures
from ..wire import HOOK_BYTES_MAX, Hook
from .metrics import Meters

log = logging.getLogger(__name__)

BODY_BYTES_MAX = HOOK_BYTES_MAX
"""What the ledger can hold of one event; providers send at most a few hundred KiB, GitHub up to 25 MB in theory."""
EVENT_CHARS_MAX = 64
UNCONFIGURED_RETRY_S = 3600.0
"""Until a person has set the secret; senders that honour it come back in an hour instead of at once."""

EVENT_HEADERS = {"linear": "linear-event", "github": "x-github-event"}


@dataclass(frozen=True, slots=True)
class Lists:
    """Whose GitHub events are taken, and which; empty: all that are signed. The lists are the owner's, not secrets."""

    repos: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


class Ignored(PiclusterError):
    """Signed, and not on the lists: it is neither kept nor sent again."""

    status = 202


class Unsigned(Refused):
    """The signature is missing or wrong: 401, so that the provider's delivery log shows the real cause."""

    status = 401


def hook_of(
    source: str, headers: Mapping[str, str], body: bytes, secrets: Sequence[str], lists: Lists = Lists()
) -> Hook:
    """The verified event in a provider's request, however it came here.

    Raises `NotFound` for an unknown source, `Unavailable` without secrets, `Unsigned` (a `Refused`) for a signature
    that does not match, `Refused` for a body over `BODY_BYTES_MAX`, `UserError` for one that is no plain JSON object,
    `Ignored` for one that is not on `lists`.
    """
    if source not in signatures.PROVIDERS:
        raise NotFound(f"no webhooks of {source[:EVENT_CHARS_MAX]!r}", f"known are {', '.join(signatures.PROVIDERS)}")
    if len(body) > BODY_BYTES_MAX:
        raise Refused("the webhook is too large", f"{len(body)} bytes, over the cap of {BODY_BYTES_MAX}")
    if not any(secrets):
        raise Unavailable(
            f"webhooks of {source} are not set up", "no signing secret is configured on this node",
            f"Set [webhooks] {source}_secret_file and reload.", retry_after_s=UNCONFIGURED_RETRY_S,
        )  # fmt: skip
    verdict = signatures.verify(source, headers, body, secrets)
    if not verdict.ok:
        raise Unsigned(
            f"the signature of this {source} webhook does not hold", verdict.value,
            f"Compare the secret at {source} with [webhooks] {source}_secret_file.",
        )  # fmt: skip
    try:
        event = signatures.strict_object(body)
    except ValueError as fault:
        raise UserError(f"this {source} webhook is not a plain JSON object", str(fault)) from None
    name = event_name(source, headers, event)
    if source == "github":
        _check_lists(lists, name, event)
    return Hook(source, signatures.event_key(source, headers, event, body), name, body)


def _check_lists(lists: Lists, name: str, event: Mapping[str, Any]) -> None:
    repository = event.get("repository")
    told = repository.get("full_name") if isinstance(repository, dict) else None
    if lists.events and name not in lists.events:
        raise Ignored(f"GitHub's event {name!r} is not taken", "it is not in [webhooks] github_events")
    if lists.repos and told not in lists.repos:
        shown = str(told)[:EVENT_CHARS_MAX]
        raise Ignored(f"events of the repository {shown!r} are not taken", "it is not in [webhooks] github_repos")


def event_name(source: str, headers: Mapping[str, str], event: Mapping[str, Any]) -> str:
    """What happened, in the provider's word. Signed content first: a header is the sender's claim only.

    GitHub signs no event name, so its header is all there is. "" where none is told.
    """
    told = None if source == "github" else event.get("type")
    if not isinstance(told, str):
        told = signatures.header(headers, EVENT_HEADERS.get(source, "")) or ""
    return told[:EVENT_CHARS_MAX] if told.isprintable() else ""


def _refuse_replay(hook: Hook, now_ms: Callable[[], int | None]) -> None:
    if hook.source not in signatures.DATED:
        return
    now = now_ms()
    if now is not None and signatures.outlived(hook.source, signatures.strict_object(hook.body), now):
        raise Unsigned(
            f"this {hook.source} webhook is too old to be believed",
            "it was signed longer ago than anybody remembers what came",
            f"What changed at {hook.source} meanwhile is asked for by the coordinator itself.",
        )


def routes(
    secrets: Mapping[str, Sequence[str]],
    take_hook: Callable[[Hook], Awaitable[HookTaken]],
    meters: Meters,
    lists: Lists = Lists(),
    now_ms: Callable[[], int | None] = lambda: None,
) -> list[web.RouteDef]:
    """`now_ms`: since 1970, or None while no time server has set this board's clock."""

    async def arrive(request: web.Request) -> web.Response:
        source = request.match_info["source"]
        label = source if source in signatures.PROVIDERS else "unknown"
        try:
            body = await _raw_body(request)
            hook = hook_of(source, request.headers, body, secrets.get(source, ()), lists)
            _refuse_replay(hook, now_ms)
            taken = await take_hook(hook)
        except Ignored as why:
            meters.webhook(label, "ignored").inc()
            log.info("webhook of %s ignored: %s", label, why)
            return web.json_response({"stored": False, "ignored": str(why)}, status=why.status)
        except PiclusterError as fault:
            result = "refused" if fault.status < 429 else "unavailable"
            meters.webhook(label, result).inc()
            log.warning("webhook of %s not taken: %s", label, fault)
            raise
        meters.webhook(label, "duplicate" if taken.duplicate else "stored").inc()
        return web.json_response({"stored": True, "run": taken.run, "duplicate": taken.duplicate})

    return [web.post("/hooks/{source}", arrive)]


async def _raw_body(request: web.Request) -> bytes:
    """The bytes as they were signed. Too many are refused, by their declared length before one is read."""
    declared = request.content_length or 0
    body = b"" if declared > BODY_BYTES_MAX else await request.read()
    size = max(declared, len(body))
    if size > BODY_BYTES_MAX:
        raise web.HTTPRequestEntityTooLarge(max_size=BODY_BYTES_MAX, actual_size=size)
    return body
