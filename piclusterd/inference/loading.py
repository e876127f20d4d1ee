"""Models of the store in memory: loaded at the first request, unloaded when idle or when others need the room.

    request ─▶ Loads.ready ─┬─ in the pool ─────────────────────────────▶ its queue
                            └─ in the store ─▶ verify ─▶ room? ─▶ evict ─▶ load ─▶ its queue

One load at a time: each counts the memory that the one before has taken, and a card reads one file faster than two. A
model that is answering, waited for, pinned or configured is never evicted (`eviction`). The file is looked at before
and after the load, so that it cannot be exchanged in between. Whoever waits for a load counts against its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import psutil

from ..errors import Overloaded, PiclusterError, Unavailable, UserError
from .budget import Room, Shape, need, refusal, sequences
from .eviction import Resident, evictions, idle
from .gguf import read_shape
from .models import ModelSpec
from .pool import Pool
from .sealing import Stamp

log = logging.getLogger(__name__)

START_S = 1.0
"""What a load takes before it reads the file."""
BYTES_S = 80e6
"""What a load is taken to read a second until one was measured: an A2 card, which does 89 MB/s."""
MEASURED_BYTES = 64 * 2**20
"""A smaller file tells nothing about the disk."""
LOOK_S = 5.0
"""Between two looks for models that are idle."""
FOREVER_S = float("inf")


class Shelf(Protocol):
    """Where models wait that are not loaded."""

    def spec(self, name: str) -> ModelSpec | None:
        """How the model of that name or alias would be run."""

    def pinned(self, name: str) -> bool: ...

    async def verified(self, name: str) -> Stamp:
        """How its file looks, whose bytes are those that were promised. Raises a `PiclusterError`."""

    def stamp(self, name: str) -> Stamp: ...

    def instead(self, name: str, bytes_max: int) -> str:
        """What to take where only so many bytes of weights fit; "" where nothing is known."""


@dataclass(slots=True)
class _Loaded:
    bytes: int
    keep_alive_s: float


def board_room() -> tuple[int, int]:
    """Bytes of memory: all, and what the kernel calls available."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


class Loads:
    """`memory` tells what `board_room` does."""

    def __init__(
        self,
        pool: Pool,
        shelf: Shelf,
        keep_alive_s: float,
        waiting_max: int,
        memory: Callable[[], tuple[int, int]] = board_room,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._shelf = pool, shelf
        self._keep_alive_s, self._waiting_max = keep_alive_s, waiting_max
        self._memory, self._clock = memory, clock
        self._bytes_s = BYTES_S
        self._loaded: dict[str, _Loaded] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._ending = asyncio.Event()
        """Set where a model is wanted no longer, so that nobody waits for the next look."""

    async def ready(self, name: str) -> None:
        """Returns once the model may be asked, or is none of ours. Raises `Overloaded` or what `load` raises."""
        served = self._pool.served(name)
        if served is not None and (served.state != "loading" or served.spec.name not in self._loaded):
            return
        spec = self._shelf.spec(name)
        if spec is None:
            return
        waiting = self._waiting.get(spec.name, 0)
        if waiting >= self._waiting_max:
            raise Overloaded(f"{spec.name} is being loaded", f"{waiting} requests wait for it.", retry_after_s=5.0)
        self._waiting[spec.name] = waiting + 1
        try:
            await self.load(spec.name)
        finally:
            self._waiting[spec.name] -= 1

    def load_s(self, size: int) -> float:
        """Seconds that a file of `size` bytes would take, by the newest load."""
        return round(START_S + size / self._bytes_s, 1)

    def loading(self, name: str) -> bool:
        return name in self._loading

    async def load(self, name: str, keep_alive_s: float | None = None) -> None:
        """Have it in memory. `keep_alive_s` after its last answer, instead of the configured time; inf: until
        another needs the room.

        Raises `NotFound`, or `Unavailable` with the reason and the numbers. Leaving does not stop the load.
        """
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.create_task(self._load(name), name=f"load {name}")
            task.add_done_callback(lambda task: self._ended(name, task))
        await asyncio.shield(task)
        if keep_alive_s is not None and name in self._loaded:
            self._loaded[name].keep_alive_s = keep_alive_s

    def keep(self, model: str, keep_alive_s: float | None) -> bool:
        """From now on it is unloaded so long after its last answer; negative: only when another needs the room.

        False: it is pinned or configured, and stays whatever a client asks. None changes nothing.
        """
        served = self._pool.served(model)
        if served is None:
            return True
        loaded = self._loaded.get(served.spec.name)
        if loaded is None or self._shelf.pinned(served.spec.name):
            return False
        if keep_alive_s is not None:
            loaded.keep_alive_s = keep_alive_s if keep_alive_s >= 0 else FOREVER_S
        if keep_alive_s == 0:
            self._ending.set()
        return True

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._loading.pop(name, None)
        if not task.cancelled():
            task.exception()  # those who wait are told; if all have left, nobody is to be

    async def _load(self, name: str) -> None:
        async with self._turn:
            served = self._pool.served(name)
            if served is not None and served.state == "failed" and name in self._loaded:
                await self.unload(name)
            elif served is not None:
                await served.settled()
                return
            spec = self._shelf.spec(name)
            if spec is None:
                return
            before = await self._shelf.verified(name)
            shape = await asyncio.to_thread(read_shape, spec.path)
            asked = need(shape, spec.size, spec.context, sequences(spec.slots))
            await self._make_room(spec, shape)
            took = await self._add(spec, asked.total, before, self._keep_alive_s)
            if spec.size >= MEASURED_BYTES:
                self._bytes_s = spec.size / max(took - START_S, 0.1)

    async def _add(self, spec: ModelSpec, taken: int, before: Stamp, keep_alive_s: float) -> float:
        """Seconds it took; `before`: how its file looked when it was verified."""
        name = spec.name
        self._loaded[name] = _Loaded(taken, keep_alive_s)
        began = time.monotonic()
        state = await self._pool.add(spec).settled()
        if self._shelf.stamp(name) != before:
            await self.unload(name)
            raise Unavailable(f"the file of {name} was exchanged while it was loaded", "", "Pull it again.")
        if state != "ready":
            served = self._pool.served(name)
            raise Unavailable(f"{name} cannot be loaded", served.why if served else "It was unloaded meanwhile.")
        took = time.monotonic() - began
        log.info("model %s is loaded: %d MiB in %.1f s", name, taken // 2**20, took)
        return took

    async def load_split(self, spec: ModelSpec) -> None:
        """Have `spec`, whose layers are partly elsewhere, in memory until it is unloaded. Raises as `load` does."""
        async with self._turn:
            served = self._pool.served(spec.name)
            if served is not None and (served.state != "failed" or not await self.unload(spec.name)):
                raise UserError(f"{spec.name} is loaded already", "", f"First: picluster unload {spec.name}")
            shape = await asyncio.to_thread(read_shape, spec.path)
            asked = need(shape, spec.size, spec.context, sequences(spec.slots))
            await self._add(spec, asked.total - spec.apart, await self._shelf.verified(spec.name), FOREVER_S)

    async def _make_room(self, spec: ModelSpec, shape: Shape) -> None:
        asked = need(shape, spec.size, spec.context, sequences(spec.slots))
        residents = self.residents()
        chosen = evictions(asked.total, self.room().free, residents)
        if chosen is None:
            raise self._refused(spec, shape, residents)
        for name in chosen:
            log.info("model %s makes room for %s", name, spec.name)
            await self.unload(name)

    def _refused(self, spec: ModelSpec, shape: Shape, residents: list[Resident]) -> PiclusterError:
        asked, room = need(shape, spec.size, spec.context, sequences(spec.slots)), self.room()
        why, fix = refusal(shape, asked, room)
        if asked.total <= room.free + sum(one.bytes for one in residents if not one.kept):
            busy = ", ".join(one.name for one in residents if one.busy and not one.kept)
            return Overloaded(f"{spec.name} has to wait for memory", f"{busy} is answering. {why}", retry_after_s=10.0)
        instead = self._shelf.instead(spec.name, room.free - (asked.total - asked.weights))
        return Unavailable(f"{spec.name} does not fit this board", why, f"{fix} {instead}".strip(), retry_after_s=60.0)

    def room(self) -> Room:
        total, available = self._memory()
        return Room(total, available, self._pool.mapped())

    def residents(self) -> list[Resident]:
        """The models of the store that are loaded or just loading."""
        found = []
        for name, loaded in self._loaded.items():
            served = self._pool.served(name)
            if served is not None:
                busy = served.state == "loading" or bool(served.busy or served.queued or self._waiting.get(name))
                taken = 0 if served.state == "failed" else loaded.bytes
                found.append(Resident(name, taken, served.used_at, busy, self._shelf.pinned(name)))
        return found

    def expires_s(self, name: str) -> float:
        """Seconds until an idle model is unloaded; inf for those that stay."""
        served, loaded = self._pool.served(name), self._loaded.get(name)
        if served is None or loaded is None or self._shelf.pinned(name):
            return FOREVER_S
        return max(0.0, served.used_at + loaded.keep_alive_s - self._clock())

    async def unload(self, name: str) -> bool:
        """Free its memory; requests that run on it fail. False: it is not one that was loaded from the store."""
        if self._loaded.pop(name, None) is None:
            return False
        await self._pool.drop(name)
        return True

    async def look(self) -> None:
        """Unload what has been idle for too long."""
        now = self._clock()
        for one in self.residents():
            for name in idle([one], self._loaded[one.name].keep_alive_s, now):
                log.info("model %s was idle and is unloaded", name)
                await self.unload(name)

    async def run(self, pinned: Callable[[], tuple[str, ...]]) -> None:
        """Load the pinned models, then look after idle ones for ever."""
        for name in pinned():
            await self._tried(self.load(name))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._ending.wait()
            self._ending.clear()
            await self._tried(self.look())

    async def _tried(self, work: Awaitable[None]) -> None:
        try:
            await work
        except PiclusterError as fault:
            log.error("%s", fault)

    async def close(self) -> None:
        tasks = tuple(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
