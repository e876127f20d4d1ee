"""The file of API keys: one a line, by its digest, with what its holder may do. Pure.

    sha256:9f86… name=ha models=small,qwen* requests_per_minute=60 tokens_per_minute=20000 expires=2027-01-31

A key is 32 random bytes, so its plain SHA-256 cannot be searched for, and whoever reads the file cannot use it. A line
that is no digest is a key itself, without limits: what people write by hand. `#` begins a comment.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase

from ..errors import UserError

PREFIX = "pck_"
"""Begins each key, so that scanners of published code know one."""
KEY_BYTES = 32
DIGEST = "sha256:"
KEYS_MAX = 1024
"""A house has some dozens; each request compares with all of them."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MODELS_MAX = 64


@dataclass(frozen=True, slots=True)
class Grant:
    """What the holder of one key may do. Zero and empty: no limit."""

    digest: str
    """SHA-256 of the key, hex."""
    name: str
    models: tuple[str, ...] = ()
    """Names, or patterns with `*`."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    expires: float = 0.0
    """Unix time."""

    def allows(self, model: str) -> bool:
        return not self.models or any(fnmatchcase(model, pattern) for pattern in self.models)

    def line(self) -> str:
        told = [f"{DIGEST}{self.digest}", f"name={self.name}"]
        told += [f"models={','.join(self.models)}"] if self.models else []
        told += [f"{field}={value}" for field in RATES if (value := getattr(self, field))]
        told += [f"expires={day_of(self.expires)}"] if self.expires else []
        return " ".join(told)


RATES = ("requests_per_minute", "tokens_per_minute")


def mint() -> str:
    """A new key, for its holder's eyes only."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def read(lines: Iterable[str]) -> tuple[tuple[Grant, ...], list[str]]:
    """The grants in a file's `lines`, and what is wrong with the lines that give none. No fault shows a key."""
    grants: list[Grant] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            grants.append(_grant(line.strip(), number))
        except UserError as fault:
            faults.append(f"line {number}: {fault}")
    if len(grants) > KEYS_MAX:
        faults.append(f"there are more than {KEYS_MAX} keys; those after are not valid")
    return tuple(grants[:KEYS_MAX]), faults


def _grant(line: str, number: int) -> Grant:
    if not line.startswith(DIGEST):
        return Grant(digest_of(line.encode()), f"line-{number}")
    digest, *fields = line.split()
    digest = digest.removeprefix(DIGEST).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise UserError("the digest is not 64 hex digits")
    told = dict(field.partition("=")[::2] for field in fields)
    if unknown := told.keys() - {"name", "models", "expires", *RATES}:
        raise UserError(f"{sorted(unknown)[0]!r} is no field of a key")
    return Grant(
        digest,
        name=_name(told.get("name", "")),
        models=models_of(told.get("models", "").split(",")),
        requests_per_minute=_rate(told.get(RATES[0], "0"), RATES[0]),
        tokens_per_minute=_rate(told.get(RATES[1], "0"), RATES[1]),
        expires=moment(told["expires"]) if "expires" in told else 0.0,
    )


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise UserError(f"{text!r} is no name", "Letters, digits, `.`, `_` and `-`, at most 64.", param="name")
    return text


def models_of(names: Sequence[str]) -> tuple[str, ...]:
    found = tuple(name for name in names if name)
    if len(found) > MODELS_MAX or any(re.search(r"[\s,=]", name) for name in found):
        raise UserError(f"at most {MODELS_MAX} names of models, without blanks, `,` and `=`", param="models")
    return found


def _rate(text: str, field: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{field} is not a whole number", param=field)
    return int(text)


def moment(text: str) -> float:
    """The Unix time of a day or a time, ISO 8601; without a zone it is UTC."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no date", "Write it as 2027-01-31.", param="expires") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def day_of(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def added(lines: Sequence[str], grant: Grant) -> list[str]:
    """`lines` with `grant`. Raises `UserError` where its name is taken or no name."""
    _name(grant.name)
    if grant.name in {held.name for held in read(lines)[0]}:
        raise UserError(f"there is a key called {grant.name}", fix="Revoke it first, or choose another name.")
    return [*lines, grant.line()]


def removed(lines: Sequence[str], name: str) -> list[str]:
    """`lines` without the key `name`. Raises `UserError` where there is none."""
    kept = [
        line
        for number, line in enumerate(lines, 1)
        if line.startswith("#") or not line.strip() or name != _name_at(line, number)
    ]
    if len(kept) == len(lines):
        names = ", ".join(grant.name for grant in read(lines)[0]) or "none"
        raise UserError(f"there is no key called {name}", f"There are: {names}.")
    return kept


def _name_at(line: str, number: int) -> str:
    try:
        return _grant(line.strip(), number).name
    except UserError:
        return ""
