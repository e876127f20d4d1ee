"""States of beginnings between nodes: the hand of `shipping`, on both sides of a link.

    bring:  plan? ─▶ child: which tokens? ─▶ Ask ──link──▶ Offer: still worth it? ─▶ bytes ─▶ child: hashed, taken in
    serve:  Ask ─▶ same file, build, settings? ─▶ child: Exported ─▶ Offer ─▶ a piece at a time ─▶ let go

Requests go over the links, so only members of the cluster ask and are asked. A fetch that fails, or takes longer than
reading would, costs that time and never the request: it is answered as if there were no other node. A peer that failed
is left alone for a while, so a state that ends a child cannot end it at every request.
Which file a model is of is its SHA-256: the store's blobs have it in their name, others are hashed at their first need.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from functools import lru_cache

import msgspec

from ..errors import Broken, NotFound, Overloaded, PiclusterError, Refused, UserError
from ..ids import NodeId
from ..wire import Dropped, Facts, ModelFacts, Shipped
from . import shipping
from .child import Child
from .gguf import read_shape
from .lan import Request
from .models import ModelSpec, sha256
from .pool import Pool, Served
from .prefix import held, marks
from .protocol import FRAME_BYTES_MAX, GenerateRequest, decode, encode
from .shipping import Here, Plan
from .states import PIECE_BYTES, TOKEN_BYTES, Ask, Offer
from .turns import CHARS_PER_TOKEN

log = logging.getLogger(__name__)

REQUEST = "prefix-state"
"""Request between peers: an `Ask`, answered by an `Offer` and the bytes of the state."""
F16_BYTES = 2
"""Of each number of a state."""
BRING_S_MAX = 30.0
"""A fetch is never waited for longer, however slowly this board reads."""
LEAVE_S = 300.0
"""For which a peer that failed is not asked for that model again."""
GIVING_MAX = 2
"""States given at once: each is in a child's memory until it is gone."""
BLOB = re.compile("sha256-([0-9a-f]{64})")
"""A file of the store, which verified it."""
RATE_BYTES_MIN = 256 * 1024
"""Less says nothing of a link's speed: it fits the buffers on the way."""
SMOOTHING = 0.5
"""Weight of the newest measurement of a link."""

Others = Callable[[], Awaitable[Iterable[tuple[NodeId, Facts]]]]
"""The nodes that can be asked now, and what they say of themselves."""


class Ferry:
    """`request` is `Links.request`; with a `bytes_max` of 0 nothing is brought or given."""

    def __init__(
        self, pool: Pool, others: Others, request: Request, bytes_max: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._others, self._request, self._bytes_max, self._now = pool, others, request, bytes_max, now
        self._hashing: dict[ModelSpec, asyncio.Task[str]] = {}
        self._failed: dict[tuple[NodeId, str], float] = {}
        self._under_way: dict[tuple[str, int], asyncio.Event] = {}
        """By model and each beginning (`prefix`) that will be here then: who wants one of those waits."""
        self._rates: dict[NodeId, float] = {}
        """Bytes a second that links were measured to carry."""
        self._giving = 0
        pool.bring, pool.told = self.bring, self.told

    # taking ----------------------------------------------------------------------------------------------------------
    async def bring(self, served: Served, child: Child, request: GenerateRequest) -> Shipped | None:
        """Have the beginning of `request` in `child`, where another node's costs less than reading. Never raises."""
        found = await self._plan(served, request)
        if found is None:
            return None
        plan, name = found
        if (coming := self._under_way.get((served.spec.name, plan.mark.digest))) is not None:
            await coming.wait()
            return None
        going = asyncio.Event()
        parts = [(served.spec.name, one.digest) for one in marks(request) if one.length <= plan.mark.length]
        self._under_way |= dict.fromkeys(parts, going)
        try:
            async with asyncio.timeout(min(plan.read_s, BRING_S_MAX)):
                return await self._fetch(served, child, request, plan, name)
        except (PiclusterError, OSError, TimeoutError) as fault:
            log.info("%s is read here, and not fetched from %s: %s", served.spec.name, name, fault or "too slow")
            if not isinstance(fault, NotFound | Overloaded):
                self._failed[plan.node, served.spec.name] = self._now() + LEAVE_S
            return None
        finally:
            going.set()
            self._under_way = {part: one for part, one in self._under_way.items() if one is not going}

    async def _plan(self, served: Served, request: GenerateRequest) -> tuple[Plan, str] | None:
        if not self._bytes_max or served.ready is None or not served.ready.state_key:
            return None
        asked, own = marks(request), served.cached.digests()
        tokens = request.text_length // CHARS_PER_TOKEN
        if not shipping.pays(shipping.fetching(0, 0.0, 0), shipping.reading(tokens, served.prefill.value)):
            return None  # nobody need be looked for
        now, model = self._now(), served.spec.name
        there = [(node, facts) for node, facts in await self._others() if self._failed.get((node, model), 0.0) <= now]
        token_bytes = await asyncio.to_thread(_token_bytes, served.spec)
        here = Here(
            tokens, asked, held(own, asked), served.busy - 1, served.prefill.value, token_bytes, self._bytes_max
        )
        plan = shipping.plan(here, model, there, self._rates)
        if plan is None or self.key(served) is None:
            return None
        return plan, next(facts.name or node for node, facts in there if node == plan.node)

    async def _fetch(self, served: Served, child: Child, request: GenerateRequest, plan: Plan, name: str) -> Shipped:
        began, key = self._now(), self.key(served)
        assert key is not None, "a plan is made where the key is known"
        looked = await child.look(request)
        most = min(len(looked.tokens), TOKEN_BYTES * (self._bytes_max // _token_bytes(served.spec)))
        ask = Ask(served.spec.name, key, looked.tokens[:most], looked.held + 1, self._bytes_max)
        async with aclosing(self._request(plan.node, REQUEST, encode(ask), BRING_S_MAX)) as chunks:
            offer = self._acceptable(decode(await anext(chunks, b""), Offer), ask)
            rate = self._rates.get(plan.node, 0.0)
            read_s = shipping.reading(offer.tokens - looked.held, served.prefill.value)
            if not shipping.pays(shipping.fetching(offer.size, rate, 0), read_s):
                raise NotFound("it holds too little of it", f"{offer.tokens} tokens, and {looked.held} are here.")
            number = child.berth()
            try:
                await self._load(child, number, offer.size, chunks, plan.node)
                await child.moor(number, ask.tokens[: TOKEN_BYTES * offer.tokens], offer.sha256)
            except BaseException:
                child.let_go(number)
                raise
        took_ms = round(1000 * (self._now() - began))
        return Shipped(name, offer.tokens - looked.held, offer.size, took_ms)

    def _acceptable(self, offer: Offer | Dropped, ask: Ask) -> Offer:
        if isinstance(offer, Dropped):
            raise Broken("that is no offer of a state", offer.reason)
        if offer.key != ask.key:
            raise Refused("that is a state of another model, build or settings")
        if not ask.least <= offer.tokens <= len(ask.tokens) // TOKEN_BYTES or offer.size > self._bytes_max:
            raise Refused("that is not what was asked for", f"{offer.tokens} tokens in {offer.size} bytes.")
        return offer

    async def _load(
        self, child: Child, number: int, size: int, chunks: AsyncGenerator[bytes, None], node: NodeId
    ) -> None:
        """All of `chunks` into the child, a piece at a time."""
        came, piece, began = 0, bytearray(), self._now()
        async for chunk in chunks:
            came += len(chunk)
            if came > size:
                raise Refused("more came than was announced", f"{size} bytes were.")
            piece += chunk
            if len(piece) >= PIECE_BYTES or came == size:
                for at in range(0, len(piece), PIECE_BYTES):
                    await child.part(number, size, bytes(piece[at : at + PIECE_BYTES]))
                piece.clear()
        if came < size:
            raise Broken("the state was cut short", f"{came} of {size} bytes came.")
        if came >= RATE_BYTES_MIN and (took := self._now() - began) > 0:
            known = self._rates.get(node, came / took)
            self._rates[node] = known + (came / took - known) * SMOOTHING

    # giving ----------------------------------------------------------------------------------------------------------
    async def serve(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The answer to a member's `Ask`. Raises `PiclusterError` where there is nothing to give."""
        ask: Ask | Dropped = decode(body, Ask)
        if isinstance(ask, Dropped) or len(body) > FRAME_BYTES_MAX:
            raise UserError("the request for a state is not valid", ask.reason if isinstance(ask, Dropped) else "")
        served = self._pool.served(ask.model)
        child = served.child if served is not None and served.state == "ready" else None
        if served is None or child is None or not self._bytes_max:
            raise NotFound(f"no states of {ask.model!r} are given here", param="model")
        key = self.key(served)
        if key is None:
            raise Overloaded("the model's file is being hashed", retry_after_s=1.0)
        if key != ask.key:
            raise Refused("the model, its build or its settings are other ones here")
        if self._giving >= GIVING_MAX:
            raise Overloaded("enough states are given just now", retry_after_s=1.0)
        self._giving += 1
        try:
            async with aclosing(self._given(child, ask)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._giving -= 1

    async def _given(self, child: Child, ask: Ask) -> AsyncGenerator[bytes, None]:
        state = await child.export(ask.tokens, ask.least, min(ask.bytes_max, self._bytes_max))
        try:
            yield encode(Offer(ask.key, state.tokens, state.size, state.sha256))
            at = 0
            while at < state.size:
                piece = await child.take(state.id, at)
                at += len(piece)
                yield piece
        finally:
            child.let_go(state.id)

    # telling ---------------------------------------------------------------------------------------------------------
    def told(self, served: Served, facts: ModelFacts) -> ModelFacts:
        """`facts`, with what states cost here: not before its file was needed and is hashed, as none moves before."""
        spec = served.spec
        needed = spec in self._hashing or BLOB.fullmatch(spec.path.name)
        if not self._bytes_max or not needed or self.key(served) is None:
            return facts
        rate = sum(self._rates.values()) / max(1, len(self._rates))
        return msgspec.structs.replace(
            facts, token_bytes=_token_bytes(spec), states_max=self._bytes_max, states_bps=round(rate)
        )

    # which model -----------------------------------------------------------------------------------------------------
    async def known(self, model: str) -> None:
        """Returns once the file of `model` is hashed. Raises OSError where it cannot be."""
        served = self._pool.served(model)
        if served is not None:
            await asyncio.shield(self._file_hash(served.spec))

    def key(self, served: Served) -> bytes | None:
        """What its states are of; None while its file is being hashed, or where it gives none."""
        task = self._file_hash(served.spec)
        if served.ready is None or not served.ready.state_key:
            return None
        if not task.done() or task.cancelled() or task.exception() is not None:
            return None
        whole = "\0".join((task.result(), str(served.spec.scale), served.ready.state_key))
        return hashlib.sha256(whole.encode()).digest()

    def _file_hash(self, spec: ModelSpec) -> asyncio.Task[str]:
        if spec not in self._hashing:
            task = asyncio.create_task(_content(spec), name=f"hash of {spec.name}")
            task.add_done_callback(lambda _: self._pool.on_change())  # what states cost here may be told now
            self._hashing[spec] = task
        return self._hashing[spec]


async def _content(spec: ModelSpec) -> str:
    """The digest of the model's file, and of its adapter's where it has one."""
    await asyncio.to_thread(_token_bytes, spec)  # a header with a vocabulary takes a while: later calls find it kept
    blob = BLOB.fullmatch(spec.path.name)
    whole = blob[1] if blob else await sha256(spec.path)
    return whole if spec.adapter is None else f"{whole} {await sha256(spec.adapter)}"


@lru_cache(64)
def _token_bytes(spec: ModelSpec) -> int:
    """Of a state, by the file's header; 0 where that does not tell."""
    shape = read_shape(spec.path)
    return F16_BYTES * shape.layers * shape.kv_width
