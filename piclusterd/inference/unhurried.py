"""Requests that nobody waits for: after all others in every queue, and on the droplet before the Pis.

    batch ─▶ Unhurried.generate ─▶ priority "batch", its owner's tenant ─▶ a few: the droplet first; the rest: anywhere

The droplet is preferred however busy it is, so only as many ask for it as it answers side by side: with all of them on
their way there, the Pis would be idle until its queue is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from ..events import Choice
from .answering import Answering, Item
from .protocol import TENANT_CHARS_MAX, Classified, ClassifyRequest, Embedded, EmbedRequest, GenerateRequest

DROPLET_WIDTH = 4
"""The slots of a model as configured, unless it says otherwise."""
DROPLET = "relay"


def droplet_places() -> asyncio.Semaphore:
    """To be shared by all that are in no hurry on this node."""
    return asyncio.Semaphore(DROPLET_WIDTH)


class Unhurried:
    def __init__(self, inner: Answering, owner: str, droplet: asyncio.Semaphore) -> None:
        """`owner`: the name of a key, whose share of the queues it uses; "" where there is none."""
        self._inner, self._droplet = inner, droplet
        self._tenant = f"key {owner}"[:TENANT_CHARS_MAX] if owner else "batches"

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        marked = msgspec.structs.replace(request, priority="batch", tenant=self._tenant)
        if self._droplet.locked():
            async with aclosing(self._inner.generate(marked, prefer)) as items:
                async for item in items:
                    yield item
            return
        async with self._droplet, aclosing(self._inner.generate(marked, prefer or DROPLET)) as items:
            async for item in items:
                yield item

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        return await self._inner.embed(msgspec.structs.replace(request, priority="batch", tenant=self._tenant))

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        return await self._inner.classify(request)
