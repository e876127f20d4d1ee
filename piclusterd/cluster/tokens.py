"""Join tokens: what the operator carries from a node that admits to a node that joins.

    pcl1.<base64url SHA-256 of the CA certificate>.<id>.<secret, 128 bit>

The first part pins the CA, so that the joiner knows whom it speaks to *before* it shows the secret (k3s' K10 tokens).
Stored is only SHA-256 of the secret, in `identity/tokens.json`; a random 128-bit secret needs no slow hash.
A use is bound to the key that redeemed it: the same node may repeat a join whose answer was lost, nobody else may.
Redeeming is durable before it returns. The file is read anew and locked for every change, so the daemon and the command
line may both work on it. Life is told by the wall clock, as it must survive a restart; it guards nothing but joins.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..board.private import write_private
from ..errors import Broken, NotFound, Overloaded, Refused, UserError
from .certificates import cluster_id

PREFIX = "pcl1"
TTL_S = 3600.0
TTL_MAX_S = 30 * 86400.0
USES_MAX = 1000
SECRET_BYTES = 16
TOKEN_CHARS_MAX = 256
RECORDS_MAX = 256
"""Tokens on file; the oldest go first (dead ones are kept only so that a refusal can say why)."""
FAILURES_MAX = 10
"""Failed attempts of one address in `FAILURES_WINDOW_S`: 128 bits cannot be guessed, this spares CPU and log."""
FAILURES_WINDOW_S = 60.0
SOURCES_MAX = 1024


class _Record(msgspec.Struct):
    id: str
    digest: str
    created: float
    expires: float
    uses: int
    holders: list[str] = msgspec.field(default_factory=list)
    revoked: bool = False
    role: str = ""


_Book = list[_Record]


@dataclass(frozen=True, slots=True)
class Token:
    """A token as the operator wrote it. `ca_pin` is 32 bytes."""

    ca_pin: bytes
    id: str
    secret: str

    @property
    def cluster_id(self) -> str:
        return cluster_id(self.ca_pin)

    def __str__(self) -> str:
        return f"{PREFIX}.{_b64(self.ca_pin)}.{self.id}.{self.secret}"

    def __repr__(self) -> str:
        return f"Token({self.id}, secret hidden)"


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What may be shown of a token. `state` is valid, used, expired or revoked; times are Unix seconds."""

    id: str
    created: float
    expires: float
    uses_left: int
    state: str
    role: str
    """worker or relay; "" where it admits either."""


def parse(text: str) -> Token:
    """The token in `text`. Raises `Refused`; the text is never repeated in it."""
    parts = text.strip().split(".")
    try:
        if len(text) > TOKEN_CHARS_MAX or len(parts) != 4 or parts[0] != PREFIX:
            raise ValueError
        ca_pin = base64.b64decode(parts[1] + "=", altchars=b"-_", validate=True)
        if len(ca_pin) != 32 or not parts[2].isalnum() or len(parts[3]) < SECRET_BYTES:
            raise ValueError
    except (ValueError, binascii.Error):
        raise Refused(
            "this is not a join token", f"one looks like {PREFIX}.….….…", "Make one with `picluster token create`."
        ) from None
    return Token(ca_pin, parts[2], parts[3])


class Tokens:
    """The tokens of one node. `directory` is its identity directory; `clock` gives Unix seconds."""

    def __init__(self, directory: Path, ca_pin: bytes, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / "tokens.json"
        self._lock = directory / "tokens.lock"
        self._pin = ca_pin
        self._clock = clock
        self._failures: dict[str, deque[float]] = {}

    def create(self, ttl_s: float = TTL_S, uses: int = 1, role: str = "") -> str:
        """A new token as text: the only time its secret is seen. `role`: the only one it admits; "": either."""
        if not (0 < ttl_s <= TTL_MAX_S and 1 <= uses <= USES_MAX):
            raise UserError("no such token", f"it lives up to {TTL_MAX_S:g} s and for 1 to {USES_MAX} uses.")
        token = Token(self._pin, secrets.token_hex(4), _b64(secrets.token_bytes(SECRET_BYTES)))
        now = self._clock()
        with self._records() as records:
            records.append(_Record(token.id, _digest(token.secret), now, now + ttl_s, uses, role=role))
        return str(token)

    def list(self) -> tuple[TokenInfo, ...]:
        return tuple(
            TokenInfo(r.id, r.created, r.expires, max(0, r.uses - len(r.holders)), self._state(r), r.role)
            for r in self._read()
        )

    def revoke(self, token_id: str) -> None:
        with self._records() as records:
            record = next((r for r in records if r.id == token_id), None)
            if record is None:
                raise NotFound(f"there is no token {token_id[:16]!r}")
            record.revoked = True

    def redeem(self, token: Token, holder: str, source: str = "", role: str = "") -> None:
        """Spend one use of `token` on `holder` (a node id) that joins as `role`. Durable on return.

        Raises `Refused` with the reason, or `Overloaded` when `source` has failed too often.
        """
        self._check_rate(source)
        try:
            with self._records() as records:
                self._spend(records, token, holder, role)
        except Refused:
            self._failures[source].append(self._clock())
            raise

    def _spend(self, records: _Book, token: Token, holder: str, role: str) -> None:
        record = next((r for r in records if r.id == token.id), None)
        known = hmac.compare_digest(record.digest if record else _digest(""), _digest(token.secret))
        fix = "Make a new one with `picluster token create`."
        if record is None or not known:
            raise Refused("the join token is not known here", "", fix)
        state = self._state(record)
        if state != "valid" and not (state == "used" and holder in record.holders):
            raise Refused(f"the join token is {state}", "", fix)
        if record.role not in ("", role):
            raise Refused(f"the join token admits a {record.role}, not a {role}", "", fix)
        if holder not in record.holders:
            record.holders.append(holder)

    def _state(self, record: _Record) -> str:
        if record.revoked:
            return "revoked"
        if self._clock() >= record.expires:
            return "expired"
        return "used" if len(record.holders) >= record.uses else "valid"

    def _check_rate(self, source: str) -> None:
        recent = self._failures.pop(source, deque[float]())
        self._failures[source] = recent  # youngest last
        while len(self._failures) > SOURCES_MAX:
            del self._failures[next(iter(self._failures))]
        now = self._clock()
        while recent and recent[0] <= now - FAILURES_WINDOW_S:
            recent.popleft()
        if len(recent) >= FAILURES_MAX:
            raise Overloaded("too many failed joins", "", "Wait a minute.", retry_after_s=FAILURES_WINDOW_S)

    def _read(self) -> _Book:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Book)
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as fault:
            raise Broken("cannot read the join tokens", f"{self._path}: {fault}.", "Remove the file.") from fault

    @contextmanager
    def _records(self) -> Iterator[_Book]:
        """The records, locked; what the block leaves in the list is made durable unless it raises."""
        with open(self._lock, "ab", opener=_private) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._read()
            yield records
            write_private(self._path, msgspec.json.encode(records[-RECORDS_MAX:]))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
