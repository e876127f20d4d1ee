"""API keys at the door: who calls, whether the key still holds, and how much of its minute is left.

    Authorization: Bearer KEY ──sha256──▶ Grant ──expired?──▶ requests left this minute? ──▶ handler
                                                                    └── tokens: counted by `metered` ──┘

Owns the buckets of this node: each node counts for itself, as each has its own file. The file is read again while the
daemon runs, so that a revoked key is dead within `RELOAD_S`; a file that cannot be read opens the door to nobody.
Refuses: no key or a wrong or expired one (401), a model that the key is not for (403), more than its rate (429, with
the time after which there is room). The caller of a request is in `caller` while its handler runs; the unix socket has
shown who it is by its file mode, and has no limits. Keys are never logged: a grant is called by its name.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from ..errors import Overloaded, PiclusterError, Refused
from .key_file import Grant, digest_of, read

log = logging.getLogger(__name__)

RELOAD_S = 2.0
"""Between two looks at the file, at most one a request."""
MINUTE_S = 60.0
JOIN_TOKEN = b"pcl1."
"""How a join token begins (`cluster.tokens`): whoever shows one here has mixed up two secrets."""


class NoKey(Refused):
    status = 401


class Bucket:
    """What is left of a rate a minute: full at first, and never above one minute's worth. It may be overdrawn."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute, self._level, self._at = per_minute, float(per_minute), now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there (what never will be counts as a whole minute's worth); 0: it is."""
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / MINUTE_S)
        self._at = now
        return max(0.0, (min(amount, self._per_minute) - self._level) * MINUTE_S / self._per_minute)

    def take(self, amount: float) -> None:
        """Or give back, where `amount` is negative."""
        self._level -= amount


class Caller:
    """The holder of one key on this node. Its rates outlive a request, and a change of the file that keeps them."""

    def __init__(self, grant: Grant, clock: Callable[[], float]) -> None:
        self.grant = grant
        self._clock = clock
        self._requests = Bucket(grant.requests_per_minute, clock()) if grant.requests_per_minute else None
        self._tokens = Bucket(grant.tokens_per_minute, clock()) if grant.tokens_per_minute else None

    def ask(self) -> None:
        """One request more. Raises `Overloaded`."""
        self._draw(self._requests, 1, f"{self.grant.requests_per_minute} requests")

    def reserve(self, tokens: int) -> None:
        """What a request is expected to take. Raises `Overloaded`."""
        self._draw(self._tokens, tokens, f"{self.grant.tokens_per_minute} tokens")

    def settle(self, more: int) -> None:
        """It took `more` than was reserved, or less."""
        if self._tokens is not None:
            self._tokens.take(more)

    def check(self, model: str) -> None:
        """Raises `Refused` where the key is not for `model`."""
        if not self.grant.allows(model):
            allowed = ", ".join(self.grant.models)
            raise Refused(f"the key {self.grant.name} may not use {model!r}", f"It is for: {allowed}.", param="model")

    def _draw(self, bucket: Bucket | None, amount: int, rate: str) -> None:
        if bucket is None:
            return
        if (wait_s := bucket.wait_s(amount, self._clock())) > 0:
            raise Overloaded(f"the key {self.grant.name} has {rate} a minute", "All are used.", retry_after_s=wait_s)
        bucket.take(amount)


caller: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""Who asks; None: nobody was asked for a key."""


def visible(model: str) -> bool:
    """May the caller know of `model`?"""
    who = caller.get()
    return who is None or who.grant.allows(model)


class Keyring:
    """`load` reads the file's lines and may raise a `PiclusterError`. It blocks, and is called in a thread."""

    def __init__(
        self,
        load: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._load, self._clock, self._wall = load, clock, wall
        self._lines: Sequence[str] | None = None
        self._callers: dict[str, Caller] = {}
        self._looked = -RELOAD_S
        self._looking = asyncio.Lock()

    async def identify(self, authorization: str) -> Caller:
        """Whose key stands in an `Authorization` header. Raises `NoKey`, or `Refused` for a join token."""
        await self._refresh()
        scheme, _, given = authorization.partition(" ")
        offered = given.strip().encode("utf-8", "surrogateescape")  # headers are bytes: any may come
        digest = digest_of(offered)
        found = [who for known, who in self._callers.items() if hmac.compare_digest(known, digest)]  # no early exit
        if scheme.lower() != "bearer" or not found:
            if offered.startswith(JOIN_TOKEN):
                raise Refused("a join token is no API key", "it admits nodes", "Use a key of [api] keys_file.")
            raise NoKey("no valid API key", "this node asks for one", "Send `Authorization: Bearer <key>`.")
        grant = found[0].grant
        if grant.expires and self._wall() >= grant.expires:
            raise NoKey(f"the key {grant.name} has expired", fix="Ask the owner for a new one.")
        return found[0]

    async def _refresh(self) -> None:
        async with self._looking:
            if self._clock() - self._looked < RELOAD_S:
                return
            self._looked = self._clock()
            try:
                lines: Sequence[str] = await asyncio.to_thread(self._load)
            except PiclusterError as fault:
                lines = ()
                if self._lines != lines:
                    log.error("the API keys cannot be read, so none is valid: %s", fault)
            if lines != self._lines:
                self._lines = lines
                self._take(lines)

    def _take(self, lines: Sequence[str]) -> None:
        grants, faults = read(lines)
        for fault in faults:
            log.error("a line of the API keys gives no key: %s", fault)
        before = self._callers
        self._callers = {
            grant.digest: held
            if (held := before.get(grant.digest)) is not None and held.grant == grant
            else Caller(grant, self._clock)
            for grant in grants
        }
