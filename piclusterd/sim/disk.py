"""A disk that forgets what was not synced: one node's ledger (the real SQL, in memory) and its hard state.

Writes land in order, each group after a drawn fsync time. A crash in between loses everything that had not landed,
which is what a power cut does to a disk that tells the truth. With `lying` it answers before it has written.
"""

from __future__ import annotations

from random import Random

from ..events import HardState
from ..ids import NodeId
from ..ledger import store
from .keys import SimKey


class Disk:
    def __init__(self, key: SimKey, name: str, rng: Random, slow: float) -> None:
        """`slow`: seconds the longest fsync takes."""
        self.key = key
        self.hard = HardState()
        self.conn = store.open_database(":memory:")
        self.log = store.open_log(self.conn, key, name, epoch=1, wall_ms=0)
        self._rng = rng
        self._slow = slow
        self._syncing_until = 0.0
        self._next_ends: float | None = None

    @property
    def node(self) -> NodeId:
        return self.log.origin

    def lands_at(self, now: float) -> float:
        """When a write queued now is durable: what waits behind an fsync shares the next one (group commit)."""
        if now >= self._syncing_until and self._next_ends is not None:
            self._syncing_until, self._next_ends = self._next_ends, None
        if now >= self._syncing_until:
            self._syncing_until = now + self._took()
            return self._syncing_until
        if self._next_ends is None:
            self._next_ends = self._syncing_until + self._took()
        return self._next_ends

    def _took(self) -> float:
        return self._rng.uniform(0.0005, self._slow)

    def crash(self) -> None:
        self._syncing_until, self._next_ends = 0.0, None

    def close(self) -> None:
        self.conn.close()
