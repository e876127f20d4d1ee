"""One file from several peers at once: which piece is asked of whom, and what is believed of it.

    look ─▶ who has which pieces ─▶ two workers a peer ─▶ rarest missing piece ─▶ digest right? ─▶ write ─▶ told
      ▲                                                                          └ no: that peer is left out
      └──── every second, until all are there, or nobody has any of those that are missing

Digests are told by one peer that has the whole file. If the whole does not verify in the end, that peer lied: what came
goes, and another is believed. Whatever is on the disk from before is kept if its digest says so.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from ..errors import PiclusterError
from ..ids import NodeId
from .sealing import PIECE_BYTES, piece_digest
from .store import NoSpace, NotAsPromised, Store

log = logging.getLogger(__name__)

SIDE_BY_SIDE = 2
"""Pieces asked of one peer at once: the next is on its way while one is written."""
FULL = (errno.ENOSPC, errno.EDQUOT)
LOOKED_AT = 64
"""One piece of so many looks whether the disk still has room for the rest."""
IDLE_LOOKS_MAX = 5
"""Looks in a row after which nobody has anything we lack."""


class Has(msgspec.Struct, frozen=True):
    """What a node has of a blob, `pieces`, and what it is being sent, `coming`: bit n of a little-endian number is
    piece n. `fetching`: bytes that the hub has sent it; 0: it would ask the hub; None: it waits or does not want it."""

    whole: bool = False
    pieces: bytes = b""
    coming: bytes = b""
    fetching: int | None = None


@dataclass(slots=True)
class Going:
    """A blob that is on its way to us. `done` and `asked`: as in `Has`; nothing while the hub sends it. `claimed`: we
    say that we would ask the hub."""

    from_hub: int = 0
    claimed: bool = False
    done: int = 0
    asked: int = 0
    digests: tuple[bytes, ...] = ()

    def has(self) -> Has:
        if not self.digests:
            return Has(fetching=self.from_hub if self.claimed else None)
        size = (len(self.digests) + 7) // 8
        return Has(pieces=self.done.to_bytes(size, "little"), coming=self.asked.to_bytes(size, "little"))


@dataclass(frozen=True, slots=True)
class Peers:
    """How others are asked. `look`: what each has; `digests` and `piece` raise a `PiclusterError` or OSError."""

    look: Callable[[], Awaitable[dict[NodeId, Has]]]
    digests: Callable[[NodeId], Awaitable[tuple[bytes, ...]]]
    piece: Callable[[NodeId, int], Awaitable[bytes]]
    name: Callable[[NodeId], str]


class Swarm:
    def __init__(
        self, store: Store, sha256: str, size: int, going: Going, peers: Peers, report: Callable[[str, int], None],
        rng: random.Random, look_s: float,
    ) -> None:  # fmt: skip
        self._store, self._sha256, self._size, self._going = store, sha256, size, going
        self._peers, self._report, self._rng, self._look_s = peers, report, rng, look_s
        self._count = -(-size // PIECE_BYTES)
        self._partial = store.partial(sha256, "lan")
        self._all = (1 << self._count) - 1
        self._holders: dict[NodeId, Has] = {}
        self._bad: set[NodeId] = set()
        self._came = asyncio.Event()

    async def run(self) -> bool:
        """Make it a blob. False: peers do not have it all, or not rightly. Raises `NoSpace` or OSError."""
        liars: set[NodeId] = set()
        while True:
            self._holders = await self._peers.look()
            teller = await self._believe(liars)
            if teller is None:
                return False
            await asyncio.to_thread(self._recover)
            await asyncio.to_thread(self._store.check_space, self._missing() * PIECE_BYTES)
            if not await self._gather():
                return False
            self._report("verifying", self._size)
            try:
                await asyncio.to_thread(self._store.adopt, self._partial, self._sha256, self._size, self._going.digests)
                return True
            except NotAsPromised:
                log.warning("%s told digests of blob %s that are not so", self._peers.name(teller), self._sha256[:16])
                liars.add(teller)
                self._going.done = 0
                self._bad.clear()

    async def _believe(self, liars: set[NodeId]) -> NodeId | None:
        """Who has told the digests; None where nobody that can be believed has the file."""
        whole = [node for node, has in self._holders.items() if has.whole and node not in liars]
        self._rng.shuffle(whole)
        for node in whole:
            try:
                told = await self._peers.digests(node)
            except (PiclusterError, OSError) as fault:
                log.info("%s told no digests: %s", self._peers.name(node), fault)
                continue
            if len(told) == self._count:
                self._going.digests = told
                return node
            liars.add(node)
        return None

    def _recover(self) -> None:
        """What an earlier attempt, of ours or from the hub, left on the disk."""
        begun = self._store.partial(self._sha256)
        if begun.exists() and not self._partial.exists():
            begun.rename(self._partial)
        self._partial.touch(mode=0o600)
        with self._partial.open("r+b") as file:
            for number, digest in enumerate(self._going.digests):
                if piece_digest(file.read(PIECE_BYTES)).digest() == digest:
                    self._going.done |= 1 << number
            file.truncate(self._size)

    async def _gather(self) -> bool:
        workers: dict[tuple[NodeId, int], asyncio.Task[None]] = {}
        idle = 0
        try:
            while self._missing() and idle < IDLE_LOOKS_MAX:
                for task in workers.values():
                    if task.done():
                        task.result()  # a full disk
                workers = {key: task for key, task in workers.items() if not task.done()}
                wanted = [node for node in self._holders if self._pick(node) is not None]
                for key in ((node, lane) for node in wanted for lane in range(SIDE_BY_SIDE)):
                    if key not in workers:
                        workers[key] = asyncio.create_task(self._work(key[0]), name=f"pieces from {key[0]}")
                idle = 0 if workers else idle + 1
                await self._pause()
                self._holders = await self._peers.look()
            return not self._missing()
        finally:
            for task in workers.values():
                task.cancel()
            await asyncio.gather(*workers.values(), return_exceptions=True)

    async def _pause(self) -> None:
        """Until the next look, or the last piece."""
        self._came.clear()
        try:
            async with asyncio.timeout(self._look_s):
                while self._missing():
                    await self._came.wait()
                    self._came.clear()
        except TimeoutError:
            pass

    async def _work(self, node: NodeId) -> None:
        """Pieces from `node`, as long as it has any that we lack."""
        while (number := self._pick(node)) is not None:
            bit = 1 << number
            self._going.asked |= bit
            try:
                piece = await self._peers.piece(node, number)
                if piece_digest(piece).digest() != self._going.digests[number]:
                    log.warning("%s sent a piece that is not right", self._peers.name(node))
                    self._bad.add(node)
                    return
                await asyncio.to_thread(self._write, number, piece)
                self._going.done |= bit
            except (PiclusterError, OSError) as fault:
                if isinstance(fault, NoSpace) or (isinstance(fault, OSError) and fault.errno in FULL):
                    raise
                log.info("%s did not send a piece: %s", self._peers.name(node), fault)
                self._holders.pop(node, None)
                return
            finally:
                self._going.asked &= ~bit
            done = min(self._size, (self._count - self._missing()) * PIECE_BYTES)
            self._report(f"from {self._peers.name(node)}", done)
            self._came.set()

    def _missing(self) -> int:
        return self._count - self._going.done.bit_count()

    def _pick(self, node: NodeId) -> int | None:
        """A piece that `node` has and nobody is sending us: one that as few others as possible have, or soon will."""
        has = self._holders.get(node)
        if has is None or node in self._bad:
            return None
        wanted = self._all & ~self._going.done & ~self._going.asked
        wanted &= self._all if has.whole else int.from_bytes(has.pieces, "little")
        for other, theirs in self._holders.items():
            if other != node and not theirs.whole:
                soon = int.from_bytes(theirs.pieces, "little") | int.from_bytes(theirs.coming, "little")
                wanted = wanted & ~soon or wanted
        return _some_bit(wanted, self._rng.randrange(self._count)) if wanted else None

    def _write(self, number: int, piece: bytes) -> None:
        if number % LOOKED_AT == 0:
            self._store.check_space(self._missing() * PIECE_BYTES)
        with self._partial.open("r+b") as file:
            file.seek(number * PIECE_BYTES)
            file.write(piece)


def _some_bit(bits: int, start: int) -> int:
    """The first bit that is set from `start` on, or from 0."""
    above = bits >> start
    if not above:
        above, start = bits, 0
    return start + (above & -above).bit_length() - 1
