"""Beginnings of prompts on disk, for when the memory has lost them: to other prompts, or with the child that had them.

    asked again ─▶ the child still holds it ──Export──▶ <state_dir>/prefixes/<key and tokens>.state   (once each)
    asked, not held ─▶ on disk, and cheaper to load than to read? ──SHA-256──▶ Part*, Import ──▶ the child's memory
    else ─▶ the next in line: another node (`ferry`)

The child has no rights to any file: what it exports and takes in passes through here, as between nodes, and a state is
for the same file, adapter, build and settings only (`Ferry.key`). Tokens are compared as they are. What is damaged is
deleted, and read instead. Files go by last use once they are over `bytes_max`. Nothing is synced: what a
power cut spoils is found out by its digest.
Flash wears out by being written to, and a state has some 10 to 100 KB a token. So it is off by default, a beginning is
written only when it is asked for a second time, and a day's writes are at most `DAILY` times the cap.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import PiclusterError
from ..wire import Dropped, Mark, Shipped
from .child import Child
from .pool import Pool, Served
from .prefix import held, marks
from .protocol import FRAME_BYTES_MAX, LENGTH_BYTES, Frame, GenerateRequest, decode, framed
from .shipping import pays, reading
from .states import PIECE_BYTES, TOKEN_BYTES, Key, Sha256, Size, Tokens

log = logging.getLogger(__name__)

DISK = "disk"
"""What answers call it, in the place of a node's name."""
BEGINNING_BYTES_MIN = 1024
"""Of a prompt: what is shorter is read in little more than the time of a look at the disk."""
READ_BYTES_S = 40e6
"""Of a middling SD card, with the hash over what came."""
DAILY = 4
"""Times the cap may be written in a day: a card of 32 GB that bears 1,000 rewrites outlives ten years of 1 GB a day."""
DAY_S = 86_400.0
SEEN_MAX = 4096
"""Beginnings remembered as asked for once."""
COVERED = 0.75
"""Of a beginning: where so much of it is on disk, it is not written again for the rest."""


class Head(Frame, frozen=True):
    """What a file begins with: whose state follows, of which tokens. `mark`: the beginning of the prompt, in bytes."""

    key: Key
    mark: tuple[int, int]
    tokens: Tokens
    size: Size
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class Kept:
    path: Path
    mark: Mark
    tokens: int
    size: int
    """Bytes of the whole file."""


class Depot:
    """`key` tells whose states a model's are; None: not known yet. `bytes_max` of 0: nothing is kept."""

    def __init__(
        self,
        pool: Pool,
        directory: Path,
        bytes_max: int,
        key: Callable[[Served], bytes | None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._directory, self._bytes_max, self._key, self._wall = directory, bytes_max, key, wall
        self._kept: OrderedDict[tuple[bytes, int], Kept] = OrderedDict()
        """By key and digest of the mark; the least recently used first."""
        self._seen: OrderedDict[tuple[bytes, int], None] = OrderedDict()
        self._saving: asyncio.Task[None] | None = None
        self._day, self._written = 0, 0
        self.told: Counter[str] = Counter()
        """How many states were saved, loaded, spoiled."""
        self._next = pool.bring
        if bytes_max:
            self._scan()
            pool.bring = self.bring

    async def bring(self, served: Served, child: Child, request: GenerateRequest) -> Shipped | None:
        """Have the beginning of `request` in `child`, from the disk or by the next in line. Never raises."""
        key, asked = self._key(served), marks(request)
        if key is None or not asked:
            return await self._next(served, child, request)
        own = held(served.cached.digests(), asked)
        kept = self._found(key, asked)
        loaded = None
        if kept is not None and kept.mark.length > own:
            loaded = await self._load(served, child, request, kept, own)
        if loaded is None:
            await self._consider(key, child, request, asked, own)
        return loaded or await self._next(served, child, request)

    # from the disk ---------------------------------------------------------------------------------------------------
    def _found(self, key: bytes, asked: tuple[Mark, ...]) -> Kept | None:
        return next((kept for mark in reversed(asked) if (kept := self._kept.get((key, mark.digest)))), None)

    async def _load(
        self, served: Served, child: Child, request: GenerateRequest, kept: Kept, own: int
    ) -> Shipped | None:
        """`kept` into the child, where that is cheaper than reading what the child lacks of it."""
        size, tps = kept.size, served.prefill.value
        if not pays(size / READ_BYTES_S, reading(kept.tokens * (kept.mark.length - own) // kept.mark.length, tps)):
            return None
        began = time.monotonic()
        try:
            looked = await child.look(request)
            head, state = await asyncio.to_thread(read, kept.path)
            alike = common(head.tokens, looked.tokens) // TOKEN_BYTES
            if not pays(size / READ_BYTES_S, reading(alike - looked.held, tps)):
                return None
            number = child.berth()
            try:
                for at in range(0, len(state), PIECE_BYTES):
                    await child.part(number, len(state), state[at : at + PIECE_BYTES])
                await child.moor(number, head.tokens, head.sha256)
            except BaseException:
                child.let_go(number)
                raise
        except (PiclusterError, OSError, ValueError) as fault:
            log.warning("%s is not used: %s", kept.path.name, fault)
            self._drop(kept)
            self.told["spoiled"] += 1
            return None
        self._kept.move_to_end((head.key, kept.mark.digest))
        self.told["loaded"] += 1
        return Shipped(DISK, alike - looked.held, len(state), round(1000 * (time.monotonic() - began)))

    # to the disk -----------------------------------------------------------------------------------------------------
    async def _consider(
        self, key: bytes, child: Child, request: GenerateRequest, asked: tuple[Mark, ...], own: int
    ) -> None:
        """What is asked for again, and still held, is written beside the answer; the child is looked at before it."""
        again = [mark for mark in asked if (key, mark.digest) in self._seen and mark.length <= own]
        for mark in asked:
            self._seen[key, mark.digest] = None
        while len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        if not again or again[-1].length < BEGINNING_BYTES_MIN or (self._saving and not self._saving.done()):
            return
        there = self._found(key, asked)
        if there is not None and there.mark.length >= COVERED * again[-1].length:
            return
        try:
            looked = await child.look(request)
        except PiclusterError:
            return  # the answer will say it
        if looked.held:
            tokens = looked.tokens[: TOKEN_BYTES * looked.held]
            self._saving = asyncio.create_task(self._save(key, child, again[-1], tokens), name="a prefix to disk")

    async def _save(self, key: bytes, child: Child, mark: Mark, tokens: bytes) -> None:
        try:
            exported = await child.export(tokens, len(tokens) // TOKEN_BYTES, self._allowance())
            try:
                state = bytearray()
                while len(state) < exported.size:
                    state += await child.take(exported.id, len(state))
            finally:
                child.let_go(exported.id)
            head = Head(key, (mark.digest, mark.length), tokens, exported.size, exported.sha256)
            path = self._directory / name_of(head)
            size = await asyncio.to_thread(write, path, head, state)
        except (PiclusterError, OSError) as fault:
            log.info("a beginning is not kept on disk: %s", fault)
            return
        self._written += size
        self._add(head, Kept(path, mark, len(tokens) // TOKEN_BYTES, size))
        self.told["saved"] += 1

    def _allowance(self) -> int:
        """Bytes that may be written now."""
        today = int(self._wall() // DAY_S)
        if today != self._day:
            self._day, self._written = today, 0
        return min(self._bytes_max, DAILY * self._bytes_max - self._written)

    async def settled(self) -> None:
        """Returns once nothing is being written."""
        if self._saving is not None:
            await self._saving

    # what is there ---------------------------------------------------------------------------------------------------
    def _scan(self) -> None:
        """Index the files of the last run; what cannot be read is deleted."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._directory.iterdir(), key=lambda one: one.stat().st_mtime):
            try:
                with path.open("rb") as file:
                    head = _head(path, file)
                self._add(head, Kept(path, Mark(*head.mark), len(head.tokens) // TOKEN_BYTES, path.stat().st_size))
            except (OSError, ValueError):
                path.unlink(missing_ok=True)

    def _add(self, head: Head, kept: Kept) -> None:
        self._kept[head.key, kept.mark.digest] = kept
        while sum(one.size for one in self._kept.values()) > self._bytes_max:
            self._drop(next(iter(self._kept.values())))

    def _drop(self, kept: Kept) -> None:
        self._kept = OrderedDict((place, one) for place, one in self._kept.items() if one is not kept)
        kept.path.unlink(missing_ok=True)


def name_of(head: Head) -> str:
    return hashlib.sha256(head.key + head.tokens).hexdigest() + ".state"


def _head(path: Path, file: BinaryIO) -> Head:
    """Raises ValueError where it is not to the byte what was written."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    head: Head | Dropped = decode(file.read(min(length, FRAME_BYTES_MAX)), Head)
    if isinstance(head, Dropped):
        raise ValueError(head.reason)
    if name_of(head) != path.name:
        raise ValueError("it is damaged")
    return head


def common(one: bytes, other: bytes) -> int:
    """Bytes that they begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def write(path: Path, head: Head, state: bytes | bytearray) -> int:
    """Put it there whole or not at all; how many bytes it has. Blocks. Raises OSError."""
    part = path.with_suffix(".part")
    beginning = framed(head)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(beginning)
        file.write(state)
    part.replace(path)
    return len(beginning) + len(state)


def read(path: Path) -> tuple[Head, bytes]:
    """What `write` put there. Blocks. Raises OSError, and ValueError where it is not to the byte what was written."""
    with path.open("rb") as file:
        head = _head(path, file)
        state = file.read()
    if len(state) != head.size or hashlib.sha256(state).digest() != head.sha256:
        raise ValueError("it is damaged")
    return head, state
