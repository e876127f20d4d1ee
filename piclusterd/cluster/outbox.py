"""What waits to go out on one link: urgent lanes before slow ones, all bounded.

    ping, credit, open, votes, gossip … ─urge──▶ CONTROL   ─┐
    push, forwarded webhooks            ─urge──▶ REPLICATE ─┤ in this order
    batches that catch a ledger up      ─urge──▶ SYNC      ─┤
    pipes of relayed links              ─put───▶ RELAYED  ─┐│
    answers, models                     ─put───▶ BULK     ─┴┴─ taking turns ──next──▶ socket

`urge` never waits: a peer so slow that the urgent lanes reach their cap gets `overflow`, and loses the link. `put`
waits for room, so the makers of bulk hold what there is no place for. Deciders bear messages that overtake each other:
in the simulator all of them do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from ..wire import Batch, ForwardHook, PeerMessage, Push
from . import frames
from .frames import PACK_FRAMES_MAX, Frame

URGENT_FRAMES_MAX = 2048
URGENT_BYTES_MAX = 16 * 1024 * 1024
"""A few of the largest messages; a reader further behind is better served by a new link."""
SLOW_FRAMES_MAX = 4
"""Of each slow lane."""


class Lane(IntEnum):
    CONTROL = 0
    REPLICATE = 1
    SYNC = 2
    RELAYED = 3
    BULK = 4


_URGENT = (Lane.CONTROL, Lane.REPLICATE, Lane.SYNC)


def lane_of(message: PeerMessage) -> Lane:
    """The large messages wait for the small ones, and history waits for what is happening."""
    match message:
        case Push() | ForwardHook():
            return Lane.REPLICATE
        case Batch():
            return Lane.SYNC
        case _:
            return Lane.CONTROL


class Outbox:
    def __init__(self, overflow: Callable[[], None]) -> None:
        self._overflow = overflow
        self._lanes: tuple[deque[bytes], ...] = tuple(deque() for _ in Lane)
        self._urgent_frames = self._urgent_bytes = 0
        self._turn = Lane.RELAYED
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._shut = False

    def shut(self) -> None:
        """Nothing goes in any more."""
        self._shut = True

    def has_room_for(self, size: int) -> bool:
        """May a request of `size` bytes be urged? Half the queue is kept for control messages."""
        return self._urgent_bytes + size <= URGENT_BYTES_MAX // 2

    def urge(self, frame: Frame, lane: Lane = Lane.CONTROL) -> bool:
        """Queue `frame` before all that is slow. False: the link is over."""
        if self._shut:
            return False
        data = frames.encode(frame)
        if self._urgent_frames >= URGENT_FRAMES_MAX or self._urgent_bytes + len(data) > URGENT_BYTES_MAX:
            self._overflow()
            return False
        self._lanes[lane].append(data)
        self._urgent_frames += 1
        self._urgent_bytes += len(data)
        self._wake.set()
        return True

    async def put(self, frame: Frame, lane: Lane = Lane.BULK) -> None:
        """Queue `frame` behind the others of its slow lane, once there is room."""
        while len(self._lanes[lane]) >= SLOW_FRAMES_MAX:
            self._room.clear()
            await self._room.wait()
        self._lanes[lane].append(frames.encode(frame))
        self._wake.set()

    async def next(self) -> bytes:
        """The frame to send next."""
        while not any(self._lanes):
            self._wake.clear()
            await self._wake.wait()
        return self._take(self._first())

    def more(self, room: int) -> list[bytes]:
        """What else waits, in the order of `next`, as far as it fits into `room` bytes beside another frame."""
        found: list[bytes] = []
        while any(self._lanes) and len(found) < PACK_FRAMES_MAX - 1:
            lane = self._first()
            room -= len(self._lanes[lane][0])
            if room < 0:
                break
            found.append(self._take(lane))
        return found

    def _first(self) -> Lane:
        """The lane whose turn it is; something waits."""
        for lane in _URGENT:
            if self._lanes[lane]:
                return lane
        return self._turn if self._lanes[self._turn] else _other(self._turn)

    def _take(self, lane: Lane) -> bytes:
        data = self._lanes[lane].popleft()
        if lane in _URGENT:
            self._urgent_frames -= 1
            self._urgent_bytes -= len(data)
        else:
            self._turn = _other(lane)
            self._room.set()
        return data


def _other(lane: Lane) -> Lane:
    return Lane.BULK if lane is Lane.RELAYED else Lane.RELAYED
