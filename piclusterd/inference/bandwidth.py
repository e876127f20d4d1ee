"""How fast this board reads memory: the roof under which tokens are decoded. Runs only in a child.

Numbers are summed that fit no cache, by as many threads as decode, a few times; the best time counts.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 64 * 1024 * 1024
"""Past any cache of a board; a quarter of a second on the slowest."""
PASSES = 4


def measure(threads: int) -> float:
    """Bytes read a second."""
    numbers = np.ones(BYTES // 8, dtype=np.int64)
    parts = np.array_split(numbers, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as workers:
        for _ in range(PASSES):
            began = time.perf_counter()
            list(workers.map(np.add.reduce, parts))
            best = min(best, time.perf_counter() - began)
    return BYTES / best
