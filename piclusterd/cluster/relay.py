"""Relayed links: two nodes that cannot reach each other meet through a neighbour that has a link to both.

    A                         R                          B
    ── relay(B, circuit) ────▶ ── relayed(A, circuit) ──▶      "what does B say on this circuit?"
                               ◀── relay(A, circuit) ────      B does not know it yet: it asks in turn
    ◀── relayed(B, circuit) ──                                 "what does A say on this circuit?"
    ⇒ two pipes: each is an answer that R asks of one end and hands on to the other; inside them, `tunnel`

So a circuit is made of the streams every link has, with their credits and caps, and R keeps no state but a count. It
needs nobody's trust: ends prove who they are to each other, and it sees ciphertext. One hop only: R pipes between
direct links, and an end meets another only through a direct link. The lower id opens; who refuses (the other is not
linked there, or it is full) is not asked again for a while. A direct link, once there is one, takes over (`links`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial

from ..errors import Overloaded, PiclusterError, Refused, Unavailable, UserError
from ..ids import NodeId
from ..wire import Dropped
from . import frames
from .frames import CIRCUIT_BYTES, RELAY, RELAYED, Wish
from .link import Link, Timing
from .tunnel import Circuit

log = logging.getLogger(__name__)

PIPES_MAX = 256
"""Through this node: a window (256 KiB) each at worst, where every reader stands still."""
PIPES_A_PEER_MAX = 64
CIRCUITS_MAX = 128
"""That this node is an end of."""
PIPE_SILENCE_S = 60.0
"""Links ping every second; a pipe silent for so long has lost its ends."""
REFUSED_REST_S = 3.0
"""Before the same neighbour is asked for the same member again; it is jittered."""


Meet = Callable[[NodeId, Circuit, Link], Awaitable[None]]
"""Bring about a link with that node over that circuit through that relay, and live it. Ends when it does."""


class Relay:
    def __init__(
        self,
        me: NodeId,
        links: Mapping[NodeId, Link],
        dial: Meet,
        accept: Meet,
        rng: random.Random,
        timing: Timing,
    ) -> None:
        """`links`: the links there are, as their owner changes them."""
        self.bytes = 0
        """Piped through this node since it started."""
        self._me, self._links, self._dial, self._accept = me, links, dial, accept
        self._rng, self._timing = rng, timing
        self._circuits: dict[tuple[NodeId, bytes], Circuit] = {}
        self._pipes: dict[NodeId, int] = {}
        self._missing: dict[NodeId, float] = {}
        self._rests: dict[tuple[NodeId, NodeId], float] = {}
        self._trying: dict[NodeId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pipes(self) -> int:
        """Open through this node: two a circuit."""
        return sum(self._pipes.values())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # the one in the middle ---------------------------------------------------------------------------------------
    def serve(self, asker: Link, name: str, body: bytes) -> AsyncIterator[bytes]:
        """The answer to `relay` or `relayed`. Raises `PiclusterError` while it is read."""
        return self._pipe(asker, body) if name == RELAY else self._relayed(asker, body)

    async def _pipe(self, asker: Link, body: bytes) -> AsyncGenerator[bytes, None]:
        wish = _wish(body)
        other = self._links.get(wish.other)
        if asker.relay is not None:
            raise Refused("a relayed link is not relayed again", "one hop at most.")
        if other is None or other.relay is not None:
            raise Unavailable(f"{wish.other} is not linked here")
        node = asker.peer.node
        if self.pipes >= PIPES_MAX or self._pipes.get(node, 0) >= PIPES_A_PEER_MAX:
            raise Overloaded("this node relays enough already", f"{self.pipes} pipes are open.")
        self._pipes[node] = self._pipes.get(node, 0) + 1
        try:
            asked = frames.encode_body(Wish(node, wish.circuit))
            async with aclosing(other.request(RELAYED, asked, PIPE_SILENCE_S)) as chunks:
                async for chunk in chunks:
                    self.bytes += len(chunk)
                    yield chunk
        finally:
            self._pipes[node] -= 1
            if not self._pipes[node]:
                del self._pipes[node]

    # the ends ----------------------------------------------------------------------------------------------------
    async def _relayed(self, relay: Link, body: bytes) -> AsyncGenerator[bytes, None]:
        """What this node says on a circuit, which the other end may just be opening."""
        wish = _wish(body)
        circuit = self._circuits.get((relay.peer.node, wish.circuit))
        if circuit is None:
            circuit = await self._take_up(relay, wish.other, wish.circuit)
        async with aclosing(circuit.outgoing()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _take_up(self, relay: Link, other: NodeId, name: bytes) -> Circuit:
        if relay.relay is not None:
            raise Refused("a relayed link is not relayed again", "one hop at most.")
        if len(self._circuits) >= CIRCUITS_MAX:
            raise Overloaded("this node has enough relayed links")
        made: asyncio.Future[Circuit] = asyncio.get_running_loop().create_future()

        async def live() -> None:
            async with self._circuit(relay, other, name) as circuit:
                made.set_result(circuit)
                await self._meet(self._accept, other, circuit, relay)

        self._start(live())
        return await made

    @asynccontextmanager
    async def _circuit(self, relay: Link, other: NodeId, name: bytes) -> AsyncIterator[Circuit]:
        ask = frames.encode_body(Wish(other, name))
        circuit = Circuit(relay.request(RELAY, ask, PIPE_SILENCE_S))
        self._circuits[relay.peer.node, name] = circuit
        try:
            yield circuit
        finally:
            del self._circuits[relay.peer.node, name]
            await circuit.close()

    async def _meet(self, how: Meet, other: NodeId, circuit: Circuit, relay: Link) -> bool:
        """Was there a link?"""
        try:
            await how(other, circuit, relay)
        except (PiclusterError, ssl.SSLError, OSError, TimeoutError) as fault:
            log.debug("no relayed link with %s through %s: %s", other, relay.peer.name, fault)
            return False
        return True

    # who is missing ----------------------------------------------------------------------------------------------
    def want(self, nodes: Iterable[NodeId]) -> None:
        """These members should be linked, and whoever is not is sought through the neighbours. Call it often."""
        now = asyncio.get_running_loop().time()
        missing = [node for node in nodes if self._me < node and node not in self._links]
        self._missing = {node: self._missing.get(node, now) for node in missing}
        for node, since in self._missing.items():
            if (
                now - since >= self._timing.direct_first_s
                and node not in self._trying
                and len(self._circuits) < CIRCUITS_MAX
            ):
                task = self._trying[node] = self._start(self._seek(node))
                task.add_done_callback(partial(self._tried, node))

    def _tried(self, node: NodeId, _: asyncio.Task[None]) -> None:
        del self._trying[node]

    async def _seek(self, node: NodeId) -> None:
        """Ask the nearest neighbour that has not refused of late."""
        now = asyncio.get_running_loop().time()
        self._rests = {pair: until for pair, until in self._rests.items() if until > now}
        direct = [link for link in self._links.values() if link.relay is None and link.peer.node != node]
        free = [link for link in direct if (link.peer.node, node) not in self._rests]
        if not free:
            return
        relay = min(free, key=lambda link: (link.rtt_s if link.rtt_s is not None else 1.0, link.peer.node))
        self._rests[relay.peer.node, node] = now + REFUSED_REST_S * self._rng.uniform(0.5, 1.5)
        async with self._circuit(relay, node, secrets.token_bytes(CIRCUIT_BYTES)) as circuit:
            if await self._meet(self._dial, node, circuit, relay):
                self._rests.pop((relay.peer.node, node), None)

    def _start(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _wish(body: bytes) -> Wish:
    wish = frames.decode_wish(body)
    if isinstance(wish, Dropped):
        raise UserError("not a wish for a relay", wish.reason)
    return wish
