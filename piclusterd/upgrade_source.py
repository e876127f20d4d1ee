"""Where releases come from: a directory or an https address with wheels and one list of their digests.

    <source>/SHA256SUMS                              "<64 hex>  piclusterd-0.2.0-py3-none-any.whl", as of sha256sum
    <source>/piclusterd-0.2.0-py3-none-any.whl

Only what is on the list exists, and a wheel counts only with the digest that stands there. Nothing else is believed of
the source: neither what it answers for other names nor how much it sends. Blocking: call it in a thread.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .errors import Broken, NotFound, Refused, Unavailable, UserError

SUMS = "SHA256SUMS"
SUMS_BYTES_MAX = 256 * 1024
WHEEL_BYTES_MAX = 64 * 1024 * 1024
"""Ours is some 3 MB, the demo model included."""
TIMEOUT_S = 30.0

_VERSION = r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}(?:(?:a|b|rc)[0-9]{1,4})?"
VERSION = re.compile(_VERSION)
_LINE = re.compile(rf"([0-9a-f]{{64}}) [ *](piclusterd-({_VERSION})-py3-none-any\.whl)")
_PARTS = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:(a|b|rc)(\d+))?")


@dataclass(frozen=True, slots=True)
class Release:
    version: str
    sha256: str
    file: str


def order(version: str) -> tuple[int, int, int, str, int]:
    """By which versions compare: 0.2.0rc1 < 0.2.0 < 0.10.0. What is no version comes before all."""
    parts = _PARTS.fullmatch(version)
    if parts is None:
        return (-1, 0, 0, "", 0)
    major, minor, patch, stage, number = parts.groups()
    return (int(major), int(minor), int(patch), stage or "z", int(number or 0))


def listing(source: str) -> list[Release]:
    """All releases there, the newest first. Raises `PiclusterError`."""
    text = _read(source, SUMS, SUMS_BYTES_MAX).decode("ascii", "replace")
    found = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is not None:
            sha256, file, version = match.groups()
            found[version] = Release(version, sha256, file)
    return sorted(found.values(), key=lambda release: order(release.version), reverse=True)


def find(source: str, version: str) -> Release:
    """The release of that version, the newest where `version` is "". Raises `PiclusterError`."""
    releases = listing(source)
    found = next((release for release in releases if version in ("", release.version)), None)
    if found is None:
        there = ", ".join(release.version for release in releases[:5]) or "nothing"
        raise NotFound(f"no release {version or 'at all'} at the source", f"There is {there}.")
    return found


def fetch(source: str, release: Release, into: Path) -> Path:
    """The wheel, in the directory `into`, with the very digest that is asked for. Raises `PiclusterError`."""
    into.mkdir(parents=True, exist_ok=True)
    wheel = into / release.file
    body = _read(source, release.file, WHEEL_BYTES_MAX)
    told = hashlib.sha256(body).hexdigest()
    if told != release.sha256:
        raise Refused(
            f"{release.file} is not what {SUMS} says", f"its sha256 is {told[:16]}…, not {release.sha256[:16]}…",
            "Upload it again; nothing was changed here.",
        )  # fmt: skip
    part = wheel.with_suffix(".part")
    part.write_bytes(body)
    part.replace(wheel)
    return wheel


def _read(source: str, name: str, bytes_max: int) -> bytes:
    if not source:
        raise UserError("no source of releases is configured", fix="Set [upgrade] source.")
    if "://" not in source:
        return _read_file(Path(source) / name, bytes_max)
    if not source.startswith("https://"):
        raise UserError(f"{source[:60]} is not https", "releases come by https or from a directory", "Change it.")
    try:
        with urllib.request.urlopen(f"{source.rstrip('/')}/{name}", timeout=TIMEOUT_S) as answer:
            body: bytes = answer.read(bytes_max + 1)
    except urllib.error.HTTPError as fault:
        raise Unavailable(
            f"the source has no {name}", f"it answered HTTP {fault.code}", "Check [upgrade] source."
        ) from fault
    except (OSError, http.client.HTTPException, ValueError) as fault:
        raise Unavailable("the source does not answer", type(fault).__name__, "Try again.") from fault
    return _bounded(body, name, bytes_max)


def _read_file(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            return _bounded(file.read(bytes_max + 1), path.name, bytes_max)
    except OSError as fault:
        raise Unavailable(f"the source has no {path.name}", str(fault), "Check [upgrade] source.") from fault


def _bounded(body: bytes, name: str, bytes_max: int) -> bytes:
    if len(body) > bytes_max:
        raise Broken(f"{name} is over {bytes_max} bytes")
    return body
