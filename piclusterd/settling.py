"""A node's first seconds: it knows neither the others nor, on a slow card, its own models, and so says of none that
nobody serves it. Clients that waited for its restart are not sent away.

    ask ─▶ NotFound | Unavailable ─▶ younger than SETTLING_S? ─▶ ask again … ─▶ as it is
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .errors import NotFound, Unavailable

SETTLING_S = 10.0
"""Links stand in two seconds, a model of 2 GB is mapped from a card in ten."""
LOOK_S = 0.1

T = TypeVar("T")


class Settling:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """The answer, or what is raised once this node is no longer young."""
        while True:
            try:
                return await question()
            except (NotFound, Unavailable):
                if self._clock() > self._began + SETTLING_S:
                    raise
                await asyncio.sleep(LOOK_S)
