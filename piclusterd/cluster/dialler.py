"""Whom to dial, and how often: one task an address, again and again, with full jitter, while its node is not linked.

    dial(address) ─▶ attempt ─▶ linked: wait for the link's end ─┐
                        ▲   └─▶ failed: wait up to twice as long ┤
                        └───────────── uniform(0, ceiling) ──────┘

Full jitter (Brooker 2015): after a router's reboot the nodes of a site do not all come at once, and at most
`HANDSHAKES_MAX` handshakes of ours are half-open. Addresses are hints: our own are found out by dialling them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping

import aiohttp

from ..errors import Refused
from ..ids import NodeId
from . import frames
from .greeting import NotKept
from .link import Link, Timing

log = logging.getLogger(__name__)

DIALLERS_MAX = 256
HINT_FAILURES_MAX = 20
"""More than a minute: whoever floods the LAN with false addresses does not keep the true ones out."""
SELF_MEMORY_S = 600.0
"""How long an address that was our own is not dialled again: DHCP may give it to another node one day."""


class OwnAddress(Exception):
    """Whoever answered there was this node itself."""


class Dialler:
    def __init__(
        self,
        attempt: Callable[[str], Awaitable[NodeId]],
        links: Mapping[NodeId, Link],
        rng: random.Random,
        timing: Timing,
    ) -> None:
        """`attempt(address)`: one handshake and the life of its link; the node that answered."""
        self._attempt, self._links, self._rng, self._timing = attempt, links, rng, timing
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._own: dict[str, float] = {}

    def dial(self, address: str, *, hint: bool) -> bool:
        """See `Links.dial`."""
        if not frames.is_address(address):
            return False
        if asyncio.get_running_loop().time() - self._own.get(address, -SELF_MEMORY_S) < SELF_MEMORY_S:
            return False
        if address not in self._tasks:
            if len(self._tasks) >= DIALLERS_MAX:
                return False
            self._tasks[address] = asyncio.create_task(self._keep_dialling(address, hint))
        return True

    def undial(self, address: str) -> None:
        if task := self._tasks.pop(address, None):
            task.cancel()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_dialling(self, address: str, hint: bool) -> None:
        failures = 0
        while not hint or failures < HINT_FAILURES_MAX:
            peer: NodeId | None = None
            try:
                peer = await self._attempt(address)
                failures = 0
            except OwnAddress:
                log.info("%s is this node itself", address)
                self._own[address] = asyncio.get_running_loop().time()
                break
            except (NotKept, Refused, aiohttp.ClientError, OSError, TimeoutError, ValueError) as fault:
                failures += 1
                first = fault.level if isinstance(fault, NotKept) else logging.INFO
                log.log(
                    first if failures == 1 else logging.DEBUG,
                    "no link to %s yet: %s: %s", address, type(fault).__name__, fault,
                )  # fmt: skip
            while peer is not None and (link := self._links.get(peer)) and link.relay is None:
                await link.ended.wait()
            ceiling = self._timing.backoff_first_s * 2 ** min(failures, 16)
            await asyncio.sleep(self._rng.uniform(0, min(ceiling, self._timing.backoff_max_s)))
        del self._tasks[address]
