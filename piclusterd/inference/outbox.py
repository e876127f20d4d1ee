"""What a child says, on its way to the pool: a thread of its own encodes and sends it while the engine computes.

    engine ──put──▶ queue ──▶ thread: all that has come, Deltas of one answer made one ──one write──▶ socket

A write wakes the daemon, which may then run where the engine was: the engine's thread does not wait for that. Where
the daemon is slow, frames become fewer and larger; where it does not read at all, `put` waits.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterable

from .protocol import Delta, Frame, framed

STEPS_WAITING_MAX = 64
"""Steps whose frames are not sent yet: past that the engine waits, as nobody reads what it writes."""


class Outbox:
    """Sends over the blocking `sock`. Once the other end is gone, frames are dropped: reading `sock` tells of it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._queue: queue.Queue[tuple[Frame, ...]] = queue.Queue(STEPS_WAITING_MAX)
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, *frames: Frame) -> None:
        self._queue.put(frames)

    def close(self) -> None:
        """Returns once all is sent. Nothing may be put from now on."""
        self._queue.put(())
        self._thread.join()

    def _run(self) -> None:
        gone = done = False
        while not done:
            steps = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    steps.append(self._queue.get_nowait())
            done = steps[-1] == ()
            if not gone:
                try:
                    self._socket.sendall(b"".join(map(framed, merged(frame for step in steps for frame in step))))
                except OSError:
                    gone = True


def merged(frames: Iterable[Frame]) -> list[Frame]:
    """`frames` with the Deltas of each answer made one, and before all else (an answer's end follows its text)."""
    deltas: dict[int, Delta] = {}
    others: list[Frame] = []
    for frame in frames:
        if not isinstance(frame, Delta):
            others.append(frame)
        elif (before := deltas.get(frame.id)) is None:
            deltas[frame.id] = frame
        else:
            deltas[frame.id] = Delta(
                frame.id,
                before.text + frame.text,
                before.tokens + frame.tokens,
                before.logprobs + frame.logprobs,
                before.ids + frame.ids,
                before.calls + frame.calls,
            )
    return [*deltas.values(), *others]
