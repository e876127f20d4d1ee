"""The same question is asked of a model once: who asks it too hears the same answer, from its beginning.

    generate ──can differ?──▶ pool                                            (a temperature without a seed)
        └──key──▶ remembered ──hit──▶ the frames
                     └──▶ in flight? ──joined──▶ the frames so far, then as they come
                              └──miss──▶ a task reads the pool ──▶ all who listen; its end is remembered

Stands where the model is, between `Serving` and the pool, so that what came by two nodes is asked once too, and each
listener's failure is retried by its own path (`attempts`). Refuses to share between tenants unless told to, to answer
for a child that is gone (its key goes with it: the file may be another), to remember faults and what broke off, and to
let an urgent request wait for a less urgent one. Who leaves takes nobody along; the last one to leave cancels.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import msgspec

from .pool import Pool
from .protocol import Delta, Done, Embedded, GenerateRequest, Told, decode, encode
from .remembered import Remembered
from .turns import NOBODY, Asked

Frame = Delta | Done | Embedded
Key = tuple[Hashable, ...]
URGENCY = {"interactive": 0, "workflow": 1, "batch": 2}
"""A request may join one that is as urgent, or more so."""
AGE_S = 3600.0
"""Where nothing is configured; nothing is remembered then."""


def deterministic(request: GenerateRequest) -> bool:
    """Is there one answer only? One that goes on (`told`) is of its own: it begins elsewhere."""
    fixed = request.temperature == 0 or request.seed is not None or bool(request.choices)
    return fixed and request.told == Told()


def _plain(request: GenerateRequest) -> GenerateRequest:
    """What the answer depends on, apart from the model."""
    return msgspec.structs.replace(request, model="", tenant="", priority="interactive", id="", keep_alive_s=None)


@dataclass(slots=True)
class _Flight:
    """One answer on its way. `moved` is set, and made anew, at every frame and at the end."""

    urgency: int
    frames: list[Frame] = field(default_factory=list)
    listeners: int = 0
    ended: bool = False
    fault: Exception | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def move(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()


class Echoes:
    """`capacity` bytes are remembered for `age_s`; 0: nothing, and only what is in flight is joined."""

    def __init__(
        self,
        pool: Pool,
        capacity: int = 0,
        age_s: float = AGE_S,
        shared: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._shared, self._now = pool, shared, now
        self._capacity = capacity
        self._remembered = Remembered(capacity, age_s)
        self._flights: dict[Key, _Flight] = {}
        self.told: Counter[str] = Counter()
        """How many were a hit, joined, a miss."""

    async def generate(self, model: str, request: GenerateRequest) -> AsyncGenerator[Delta | Done, None]:
        """As `Pool.generate`; `Done.cache` says where it came from."""
        if not deterministic(request):
            async with aclosing(self._pool.generate(model, request)) as plain:
                async for frame in plain:
                    yield frame
            return
        await self._pool.demand.ready(model)
        plain_request = msgspec.structs.replace(
            request, model="", tenant="", priority="interactive", id="", keep_alive_s=None
        )
        key = self._key(model, request.tenant, b"generate", encode(plain_request))
        ask = partial(self._pool.generate, model, request)
        try:
            async with aclosing(self._heard(key, URGENCY[request.priority], ask)) as frames:
                async for heard in frames:
                    yield cast(Delta | Done, heard)
        finally:
            self._pool.demand.keep(model, request.keep_alive_s)

    async def embed(self, model: str, texts: Sequence[str], asked: Asked = NOBODY) -> Embedded:
        """As `Pool.embed`: only the texts that are not known are asked for. `tokens` are those of the request, where
        texts of one batch share theirs evenly."""
        await self._pool.demand.ready(model)
        keys = [self._key(model, asked.tenant, b"embed", text.encode()) for text in texts]
        known = {key: frame for key in keys if (frame := self._found(key)) is not None}
        wanted = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        cache: Literal["hit", "joined", "miss"] = "hit"
        if wanted:
            cache = await self._embed_rest(model, asked, wanted, known)
        else:
            self.told["hit"] += 1
            self._pool.demand.keep(model, asked.keep_alive_s)
        parts = [known[key] for key in keys]
        return Embedded(0, tuple(part.vectors[0] for part in parts), sum(part.tokens for part in parts), cache)

    async def _embed_rest(
        self, model: str, asked: Asked, wanted: dict[Key, str], known: dict[Key, Embedded]
    ) -> Literal["joined", "miss"]:
        texts = tuple(wanted.values())
        key = self._key(model, asked.tenant, b"texts", msgspec.msgpack.encode(texts))

        async def ask() -> AsyncGenerator[Frame, None]:
            yield await self._pool.embed(model, texts, asked)

        async with aclosing(self._heard(key, URGENCY[asked.priority], ask, keep=False)) as frames:
            [whole] = [cast(Embedded, frame) async for frame in frames]
        for one, part in zip(wanted, whole.parts(), strict=True):
            known[one] = part
            self._keep(one, [part])
        return "joined" if whole.cache == "joined" else "miss"

    def _key(self, model: str, tenant: str, kind: bytes, body: bytes) -> Key:
        return model, self._pool.being(model), "" if self._shared else tenant, kind, hashlib.sha256(body).digest()

    async def _heard(
        self, key: Key, urgency: int, ask: Callable[[], AsyncGenerator[Frame, None]], keep: bool = True
    ) -> AsyncGenerator[Frame, None]:
        if keep and (value := self._value(key)) is not None:
            self.told["hit"] += 1
            for frame in value:
                yield _from("hit", frame)
            return
        flight = self._flights.get(key)
        cache: Literal["joined", "miss"] = "joined"
        if flight is None or flight.urgency > urgency or flight.ended:
            cache, flight = "miss", self._begin(key, urgency, ask, keep)
        self.told[cache] += 1
        async with aclosing(self._listen(key, flight)) as frames:
            async for frame in frames:
                yield _from(cache, frame)

    def _begin(self, key: Key, urgency: int, ask: Callable[[], AsyncGenerator[Frame, None]], keep: bool) -> _Flight:
        flight = self._flights[key] = _Flight(urgency)
        flight.task = asyncio.create_task(self._fly(key, flight, ask, keep), name="an answer for all who ask it")
        return flight

    async def _fly(self, key: Key, flight: _Flight, ask: Callable[[], AsyncGenerator[Frame, None]], keep: bool) -> None:
        try:
            async with aclosing(ask()) as frames:
                async for frame in frames:
                    flight.frames.append(frame)
                    flight.move()
            if keep:
                self._keep(key, flight.frames)
        except Exception as fault:  # whatever it is, those who listen are to have it
            flight.fault = fault
        finally:
            self._land(key, flight)

    async def _listen(self, key: Key, flight: _Flight) -> AsyncGenerator[Frame, None]:
        flight.listeners += 1
        at = 0
        try:
            while True:
                while at < len(flight.frames):
                    at += 1
                    yield flight.frames[at - 1]
                if flight.ended:
                    break
                await flight.moved.wait()
            if flight.fault is not None:
                raise flight.fault
        finally:
            flight.listeners -= 1
            if not flight.listeners and flight.task is not None and not flight.ended:
                self._land(key, flight)  # who asks now begins anew
                flight.task.cancel()
                await asyncio.gather(flight.task, return_exceptions=True)

    def _land(self, key: Key, flight: _Flight) -> None:
        flight.ended = True
        flight.move()
        if self._flights.get(key) is flight:
            del self._flights[key]

    # what is remembered --------------------------------------------------------------------------------------
    def _value(self, key: Key) -> list[Frame] | None:
        value = self._remembered.find(key, self._now()) if self._capacity else None
        return [cast(Frame, decode(part, Frame)) for part in value] if value is not None else None

    def _found(self, key: Key) -> Embedded | None:
        value = self._value(key)
        return cast(Embedded, value[0]) if value is not None else None

    def _keep(self, key: Key, frames: Sequence[Frame]) -> None:
        """Of an answer: only what came to its end, from a child that is still there."""
        if not self._capacity or not frames or isinstance(frames[-1], Delta):
            return
        if isinstance(frames[-1], Done) and frames[-1].reason == "cancelled":
            return
        if key[1] is None or self._pool.being(str(key[0])) is not key[1]:
            return
        self._remembered.keep(key, tuple(map(encode, frames)), self._now())


def _from(cache: Literal["hit", "joined", "miss"], frame: Frame) -> Frame:
    return frame if isinstance(frame, Delta) else msgspec.structs.replace(frame, cache=cache)
