"""A bad network cable between two namespaces: delay, jitter, loss, duplicates, reordering; changed while it runs.

    python -m piclusterd.demo.cable NS_A IF_A ADDRESS_A NS_B IF_B BRIDGE_B [JSON]      a line of JSON on stdin: changes

Two TAP devices and this process between them, for kernels without netem. `{"delay": 0.04, "jitter": 0.005, "loss": 0.1,
"dup": 0, "reorder": 0.1}`: seconds, and probabilities per frame; a reordered frame does not wait for its delay.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from typing import Any

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAMES_A_TURN = 64
FRAME_BYTES_MAX = 65536


class Cable:
    def __init__(self, one: int, other: int, faults: dict[str, float]) -> None:
        self._faults = {"delay": 0.0, "jitter": 0.0, "loss": 0.0, "dup": 0.0, "reorder": 0.0, **faults}
        self._rng = random.Random(1)
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._count = itertools.count()
        self._last = {one: 0.0, other: 0.0}
        self._ends = {one: other, other: one}

    def run(self) -> None:
        """Until stdin ends."""
        watch = selectors.DefaultSelector()
        for end in (*self._ends, 0):
            watch.register(end, selectors.EVENT_READ)
        while True:
            wait = max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else None
            for key, _ in watch.select(wait):
                if key.fd == 0:
                    line = sys.stdin.readline()
                    if not line:
                        return
                    self._faults.update(json.loads(line))
                else:
                    self._take(key.fd)
            self._give()

    def _take(self, end: int) -> None:
        for _ in range(FRAMES_A_TURN):
            try:
                frame = os.read(end, FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            if self._hits("loss"):
                continue
            for _ in range(2 if self._hits("dup") else 1):
                heapq.heappush(self._queue, (self._due(end), next(self._count), self._ends[end], frame))

    def _due(self, end: int) -> float:
        now = time.monotonic()
        if self._hits("reorder"):
            return now
        late = self._faults["delay"] + self._rng.uniform(-1.0, 1.0) * self._faults["jitter"]
        self._last[end] = max(self._last[end], now + late)
        return self._last[end]

    def _hits(self, fault: str) -> bool:
        return self._rng.random() < self._faults[fault]

    def _give(self) -> None:
        now = time.monotonic()
        while self._queue and self._queue[0][0] <= now:
            _, _, end, frame = heapq.heappop(self._queue)
            try:
                os.write(end, frame)
            except OSError:
                pass  # the interface is down: so is the frame


def _tap(ns: str, name: str, temporary: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH", temporary.encode(), IFF_TAP | IFF_NO_PI))
    _ip("link", "set", temporary, "netns", ns, "name", name)
    return handle


def _ip(*words: Any) -> None:
    subprocess.run(["ip", *words], check=True)


def main() -> None:
    ns_a, if_a, address, ns_b, if_b, bridge, *rest = sys.argv[1:]
    one = _tap(ns_a, if_a, f"pca{os.getpid()}"[:15])
    other = _tap(ns_b, if_b, f"pcb{os.getpid()}"[:15])
    _ip("-n", ns_a, "addr", "add", address, "dev", if_a)
    _ip("-n", ns_a, "link", "set", if_a, "up")
    _ip("-n", ns_b, "link", "set", if_b, "master", bridge, "up")
    print("ready", flush=True)
    Cable(one, other, json.loads(rest[0]) if rest else {}).run()


if __name__ == "__main__":
    main()
