"""What the tests of the store share: a hub with the demo model on real sockets, and a library that pulls from it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from piclusterd.config import Store as Settings
from piclusterd.demo.huggingface_double import CdnDouble, HuggingFaceDouble
from piclusterd.inference.fetching import Progress
from piclusterd.inference.library import Library
from piclusterd.inference.pool import Pool
from piclusterd.inference.store import Store

from .rig import DEMO, READY_S

BODY = DEMO.read_bytes()
SHA256 = hashlib.sha256(BODY).hexdigest()
REPO = "org/demo-GGUF"
FILE = "demo-q4_k_m.gguf"
NAME = "demo-q4_k_m"
PLENTY = 2**40


@asynccontextmanager
async def hub_with_cdn() -> AsyncIterator[tuple[HuggingFaceDouble, CdnDouble]]:
    """A hub with one repository, whose files come from another address."""
    async with HuggingFaceDouble() as hub, CdnDouble(hub) as cdn:
        hub.files[REPO] = {FILE: BODY, "README.md": b"# demo"}
        yield hub, cdn


def opened(root: Path, free: Callable[[Path], int] = lambda _: PLENTY) -> Store:
    store = Store(root, free)
    store.open()
    return store


@asynccontextmanager
async def library_of(
    root: Path,
    hub_url: str = "http://127.0.0.1:9",
    token: str = "",
    free: int = PLENTY,
    settings: Settings | None = None,
) -> AsyncIterator[Library]:
    """A library and its pool, as a daemon starts them."""
    pool = Pool(8, READY_S)
    told = settings or Settings(hub_url=hub_url, context=512, slots=1)
    store = Store(root, lambda _: free)
    library = Library(root, pool, told, 8, token=token, rng=random.Random(1), store=store)
    await library.start()
    try:
        yield library
    finally:
        await library.close()
        await pool.close()


async def pulled(library: Library, what: str, name: str = "") -> list[Progress]:
    """Every step of a pull."""
    async with aclosing(library.pull(what, name)) as steps:
        return [step async for step in steps]
