"""What waits to go out on one link: urgent frames before bulk ones, both bounded.

    control, ping, credit, open ─urge──▶ urgent ─┐
    data, end, reset ─────────────put──▶ bulk ───┴──next──▶ socket

`urge` never waits: a peer so slow that the urgent queue reaches its cap gets `overflow`, and loses the link.
`put` waits for room, so the makers of bulk hold what there is no place for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from . import frames
from .frames import Frame

URGENT_FRAMES_MAX = 2048
URGENT_BYTES_MAX = 16 * 1024 * 1024
"""A few of the largest messages; a reader further behind is better served by a new link."""
BULK_FRAMES_MAX = 4


class Outbox:
    def __init__(self, overflow: Callable[[], None]) -> None:
        self._overflow = overflow
        self._urgent: deque[bytes] = deque()
        self._urgent_bytes = 0
        self._bulk: deque[bytes] = deque()
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._shut = False

    def shut(self) -> None:
        """Nothing goes in any more."""
        self._shut = True

    def has_room_for(self, size: int) -> bool:
        """May a request of `size` bytes be urged? Half the queue is kept for control messages."""
        return self._urgent_bytes + size <= URGENT_BYTES_MAX // 2

    def urge(self, frame: Frame) -> bool:
        """Queue `frame` before all bulk. False: the link is over."""
        if self._shut:
            return False
        data = frames.encode(frame)
        if len(self._urgent) >= URGENT_FRAMES_MAX or self._urgent_bytes + len(data) > URGENT_BYTES_MAX:
            self._overflow()
            return False
        self._urgent.append(data)
        self._urgent_bytes += len(data)
        self._wake.set()
        return True

    async def put(self, frame: Frame) -> None:
        """Queue `frame` behind the other bulk, once there is room."""
        while len(self._bulk) >= BULK_FRAMES_MAX:
            self._room.clear()
            await self._room.wait()
        self._bulk.append(frames.encode(frame))
        self._wake.set()

    async def next(self) -> bytes:
        """The bytes to send next."""
        while not self._urgent and not self._bulk:
            self._wake.clear()
            await self._wake.wait()
        if self._urgent:
            data = self._urgent.popleft()
            self._urgent_bytes -= len(data)
            return data
        self._room.set()
        return self._bulk.popleft()
