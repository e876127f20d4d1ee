"""A stream that is silent for long is given something to say, so that proxies and clients keep it open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

KEEP_ALIVE_S = 10.0
"""Silence after which a stream gets a byte that means nothing: under the 15 to 60 s after which proxies give up."""

T = TypeVar("T")


async def with_silences(items: AsyncIterator[T], silence_s: float) -> AsyncGenerator[T | None, None]:
    """`items`, and a None for each `silence_s` without one. Closing it cancels what is awaited of `items`."""
    while True:
        coming = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({coming}, timeout=silence_s))[0]:
                yield None
            item = coming.result()
        except StopAsyncIteration:
            return
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        yield item
