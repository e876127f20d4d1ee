"""What the tests of this room share: the demo model, and answers put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib import resources
from pathlib import Path

from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import ChatMessage, Delta, Done, GenerateRequest
from piclusterd.inference.serving import Started

DEMO = Path(str(resources.files("piclusterd.inference.demo_model") / "triage-demo.gguf"))
NAME = "triage-demo"
READY_S = 60
"""For a child to load on a busy machine; only a hang takes that long."""

ISSUE = "Title: Crash when saving a file\n\nThe editor crashes with a segfault on every save since 2.1."
GREEDY = GenerateRequest(messages=(ChatMessage("user", ISSUE),), max_tokens=32, temperature=0.0)


def spec(path: Path = DEMO, name: str = NAME, slots: int = 2, aliases: tuple[str, ...] = ()) -> ModelSpec:
    size = path.stat().st_size
    return ModelSpec(name, path, size, context=1024, slots=slots, threads=1, batch_threads=1, aliases=aliases)


class Changes:
    """A pool's `on_change` that can be waited on."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.also: Callable[[], None] = lambda: None
        """Called at every change."""

    def __call__(self) -> None:
        self.also()
        self._event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds; it is asked after every change."""
        async with asyncio.timeout(READY_S):
            while not condition():
                self._event.clear()
                await self._event.wait()


@asynccontextmanager
async def pool_of(
    specs: Sequence[ModelSpec], queue_max: int = 8, changes: Changes | None = None, hang_s: float = READY_S
) -> AsyncIterator[Pool]:
    """A pool whose models have settled, ready or failed."""
    pool = Pool(queue_max, READY_S, changes or Changes(), hang_s=hang_s)
    await pool.start(specs)
    try:
        for one in specs:
            await pool.settled(one.name)
        yield pool
    finally:
        await pool.close()


async def collected(answer: AsyncGenerator[Started | Delta | Done, None]) -> tuple[str, Done]:
    """Text and end of an answer."""
    text = ""
    async with aclosing(answer) as items:
        async for item in items:
            if isinstance(item, Delta):
                text += item.text
            elif isinstance(item, Done):
                return text, item
    raise AssertionError("an answer ends with Done")


async def rest(answer: AsyncGenerator[Started | Delta | Done, None]) -> None:
    """Read `answer` to its end, whatever it says."""
    async for _ in answer:
        pass
