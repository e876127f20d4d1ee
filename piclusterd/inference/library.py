"""The models of this node, for whoever asks: what there is, fetched, named, loaded and removed.

    pull NAME ─▶ catalogue | hub ─▶ commit, SHA-256, size ─▶ peers have it? ─▶ LAN, else hub ─▶ store ─▶ name
    list, show, pin, alias, remove ─▶ store          load, unload, loaded ─▶ Loads ─▶ pool

It owns which pulls are running: asking for one that runs joins it, and when the last who asked has left it stops; what
has come stays, and the next pull goes on from there. Any task may call it; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec

from ..config import Model
from ..config import Store as Settings
from ..errors import NotFound, PiclusterError, Unavailable, UserError
from ..integrations.model_hub import Hub, HubFile, looks_like_reference, parse
from ..wire import ModelFacts
from . import catalogue
from .fetching import Progress, fetch, receive
from .gguf import describe, takes_tools
from .lan import Lan
from .loading import Loads
from .models import ModelSpec, resolve
from .pool import Pool
from .sealing import Stamp
from .store import Manifest, Store

log = logging.getLogger(__name__)

HUB_URL = "https://huggingface.co"
TOLD_MAX = 64
"""Models on disk that are told to others: gossip is for small things."""
RATE_S = 1.0
"""Over which the rate of a pull is averaged."""
SWEEP_S = 24 * 3600.0


class Entry(msgspec.Struct, frozen=True):
    """A model of the store, and whether it is loaded. `state`: "" (on disk), loading, ready or failed."""

    model: Manifest
    state: str = ""
    why: str = ""


class Loaded(msgspec.Struct, frozen=True):
    """A model in memory. `expires_s`: seconds until it is unloaded if nobody asks for it; None: it stays."""

    name: str
    state: str
    why: str
    size: int
    context: int
    busy: int
    queued: int
    expires_s: float | None
    sha256: str = ""
    aliases: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    """Of a split model: who holds how many of its layers."""


class _Pull:
    """A running pull: where it is, and who waits for it."""

    def __init__(self) -> None:
        self.progress = Progress("resolving")
        self.changed = asyncio.Event()
        self.watchers = 0
        self.task: asyncio.Task[Manifest] | None = None
        self._since, self._from = time.monotonic(), 0

    def report(self, status: str, completed: int, total: int, digest: str) -> None:
        now, rate = time.monotonic(), self.progress.rate
        if completed < self._from or now - self._since >= RATE_S:
            rate = max(0, completed - self._from) / max(now - self._since, 1e-3)
            self._since, self._from = now, completed
        self.progress = Progress(status, completed, total, digest, rate)
        self.changed.set()


class Library:
    def __init__(
        self, root: Path, pool: Pool, settings: Settings, waiting_max: int, hub_url: str = "", token: str = "",
        on_change: Callable[[], None] = lambda: None, rng: random.Random | None = None, store: Store | None = None,
    ) -> None:  # fmt: skip
        """`root`: the store's directory. `on_change` is called when `facts` may differ."""
        self.store = store or Store(root)
        self.loads = Loads(pool, self, settings.keep_alive_minutes * 60, waiting_max)
        self._pool, self._settings, self._on_change = pool, settings, on_change
        self._hub_url, self._token = settings.hub_url or hub_url or HUB_URL, token
        self._rng = rng or random.Random()
        self._pulls: dict[tuple[str, str], _Pull] = {}
        """By what was asked for, and the name it is to get."""
        self._files: dict[str, asyncio.Lock] = {}
        """By digest: two pulls of one file under two names write to one partial, one after the other."""
        self._order = asyncio.Lock()  # of what changes the store's names
        self._abouts: dict[str, dict[str, Any]] = {}
        self.lan: Lan | None = None
        """Peers that may have what is pulled; set by whoever has links."""
        pool.stored = self.facts
        if settings.on_demand:
            pool.demand = self.loads

    async def start(self) -> None:
        await asyncio.to_thread(self.store.open)
        self._on_change()

    async def run(self) -> None:
        """Keep pinned models loaded, unload idle ones, sweep the store once a day."""
        sweeping = asyncio.create_task(self._sweep(), name="store sweep")
        try:
            await self.loads.run(lambda: tuple(one.name for one in self.store.entries.values() if one.pinned))
        finally:
            sweeping.cancel()

    async def close(self) -> None:
        pulls = [pull.task for pull in self._pulls.values() if pull.task is not None]
        for task in pulls:
            task.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        await self.loads.close()

    # looking ---------------------------------------------------------------------------------------------------------
    def list(self) -> tuple[Entry, ...]:
        """Every model of the store, by name."""
        return tuple(self._entry(manifest) for manifest in self.store.entries.values())

    def show(self, name: str) -> Entry:
        """Raises `NotFound`."""
        return self._entry(self.store.get(name))

    def loaded(self) -> tuple[Loaded, ...]:
        """Every model of the pool, of the store or of the configuration."""
        return tuple(self._loaded(name) for name in self._pool.names)

    def facts(self) -> tuple[ModelFacts, ...]:
        """The models that would be loaded if somebody asked, or are just loading, for gossip."""
        if not self._settings.on_demand:
            return ()
        return tuple(
            ModelFacts(name=name, embeddings=True, load_s=self.loads.load_s(one.size), tools=one.tools)
            for one in self.store.entries.values()
            for name in (one.name, *one.aliases)
            if self._loadable(name) or self.loads.loading(one.name)
        )[:TOLD_MAX]

    def _loadable(self, name: str) -> bool:
        """Also one that has lost a part: who asks for it is told so."""
        served = self._pool.served(name)
        return served is None or (served.state == "failed" and bool(served.spec.shares))

    def _entry(self, manifest: Manifest) -> Entry:
        served = self._pool.served(manifest.name)
        return Entry(manifest, served.state, served.why) if served is not None else Entry(manifest)

    def _loaded(self, name: str) -> Loaded:
        served, manifest = self._pool.served(name), self.store.find(name)
        assert served is not None, "the pool named it"
        expires = self.loads.expires_s(name)
        return Loaded(
            name, served.state, served.why, served.spec.size, served.ready.context if served.ready else 0,
            served.busy, served.queued, None if expires == float("inf") else expires,
            manifest.sha256 if manifest else "", served.spec.aliases,
            served.spec.parts.told() if served.spec.parts is not None else (),
        )  # fmt: skip

    # fetching --------------------------------------------------------------------------------------------------------
    async def pull(self, what: str, name: str = "") -> AsyncGenerator[Progress, None]:
        """Fetch a model and give it `name` (else one made of `what`); each step as it happens, "done" at the end.

        `what`: a name of the catalogue, or a reference to the hub. Raises what stopped it.
        """
        pull = self._pulls.get((what, name))
        if pull is None:
            pull = self._pulls[what, name] = _Pull()
            pull.task = asyncio.create_task(self._pull(pull, what, name), name=f"pull {what}")
            pull.task.add_done_callback(lambda _: self._pull_ended((what, name)))
        assert pull.task is not None
        pull.watchers += 1
        try:
            while not pull.task.done():
                yield pull.progress
                pull.changed.clear()
                waits = asyncio.create_task(pull.changed.wait())
                await asyncio.wait({waits, pull.task}, return_when=asyncio.FIRST_COMPLETED)
                waits.cancel()
            manifest = pull.task.result()
            yield Progress("done", manifest.size, manifest.size, manifest.sha256)
        finally:
            pull.watchers -= 1
            if not pull.watchers and not pull.task.done():
                pull.task.cancel()
                await asyncio.gather(pull.task, return_exceptions=True)

    def _pull_ended(self, key: tuple[str, str]) -> None:
        pull = self._pulls.pop(key)
        pull.changed.set()
        if pull.task is not None and not pull.task.cancelled():
            pull.task.exception()  # its watchers raise it; without one, nobody is to be told

    async def _pull(self, pull: _Pull, what: str, name: str) -> Manifest:
        known = None if looks_like_reference(what) else catalogue.named(what)
        if known is None and not looks_like_reference(what):
            return await self._pull_from_peers(pull, what, name, _unknown(what))
        reference = known.reference if known is not None else parse(what)
        async with Hub(self._hub_url, self._token) as hub:
            try:
                file = await hub.find(reference)
            except Unavailable as fault:
                return await self._pull_from_peers(pull, known.name if known else what, name, fault)
            await self._get(hub, file, pull)
        given = name or (known.name if known is not None else _name_of(file))
        return await self._put(given, file.sha256, file.size, f"hf:{file.repo}/{file.file}", file.commit)

    async def _pull_from_peers(self, pull: _Pull, what: str, name: str, fault: PiclusterError) -> Manifest:
        """A model that only this cluster knows, or that the hub cannot tell of just now. Raises `fault` else."""
        found = await self.lan.find(what) if self.lan is not None else None
        if found is None:
            raise fault
        file = HubFile("", found.revision, found.name, found.sha256, found.size)
        await self._get(None, file, pull, fault)
        return await self._put(name or found.name, found.sha256, found.size, found.source, found.revision)

    async def _get(self, hub: Hub | None, file: HubFile, pull: _Pull, fault: PiclusterError | None = None) -> None:
        """From peers that have it; else from the hub, and for those who wait for us. Raises `fault` without a hub."""

        def report(status: str, completed: int) -> None:
            pull.report(status, completed, file.size, file.sha256)
            if self.lan is not None and status == "downloading":
                self.lan.downloaded(file.sha256, completed)

        async with self._files.setdefault(file.sha256, asyncio.Lock()):
            if self.store.has(file.sha256):
                return
            try:
                if self.lan is not None and await self.lan.fetch(file, report):
                    return
                if hub is None:
                    raise fault or Unavailable("nobody has it")
                await fetch(self.store, file, lambda offset: hub.read(file, offset), report, self._rng)
            finally:
                if self.lan is not None:
                    self.lan.over(file.sha256)

    async def _put(self, name: str, sha256: str, size: int, source: str, revision: str = "") -> Manifest:
        async with self._order:
            old = self.store.entries.get(name)
            tools = await asyncio.to_thread(takes_tools, self.store.blob(sha256))
            aliases, pinned = (old.aliases, old.pinned) if old else ((), False)
            manifest = Manifest(name, sha256, size, source, revision, aliases, pinned, time.time(), tools)
            put = await asyncio.to_thread(self.store.put, manifest)
            if old is not None and old.sha256 != sha256:
                await self.loads.unload(name)  # the next request gets the new one
        self._on_change()
        return put

    async def take_file(self, path: Path, name: str = "", hard_link: bool = False) -> Manifest:
        """A GGUF file of this machine into the store. Raises `UserError` or `NoSpace`."""
        sha256, size = await asyncio.to_thread(self.store.take_file, path, hard_link)
        return await self._put(name or _plain(path.stem), sha256, size, f"file:{path}")

    async def take_stream(self, chunks: AsyncGenerator[bytes, None], size: int, name: str) -> Manifest:
        """The bytes of a GGUF file into the store. Raises `UserError`, `NotAsPromised` or `NoSpace`."""
        sha256 = await receive(self.store, chunks, size)
        return await self._put(name or sha256[:12], sha256, size, "sent by the owner")

    async def about(self, name: str) -> dict[str, Any]:
        """What the file says of itself: architecture, parameters, quantization, context, … where it says so."""
        sha256 = self.store.get(name).sha256
        if sha256 not in self._abouts:
            self._abouts[sha256] = await asyncio.to_thread(describe, self.store.blob(sha256))
        return self._abouts[sha256]

    # changing --------------------------------------------------------------------------------------------------------
    async def remove(self, name: str) -> int:
        """Out of memory and off the disk; bytes freed. Raises `NotFound`."""
        manifest = self.store.get(name)
        await self.loads.unload(manifest.name)
        async with self._order:
            freed = await asyncio.to_thread(self.store.remove, manifest.name)
        self._on_change()
        return freed

    async def pin(self, name: str, pinned: bool) -> Manifest:
        """A pinned model is never evicted nor unloaded when idle, and is loaded when the node starts."""
        return await self._change(name, pinned=pinned)

    async def alias(self, name: str, aliases: tuple[str, ...]) -> Manifest:
        """Replace its aliases. They take effect with its next load."""
        return await self._change(name, aliases=aliases)

    async def _change(self, name: str, **changes: Any) -> Manifest:
        async with self._order:
            manifest = msgspec.structs.replace(self.store.get(name), **changes)
            put = await asyncio.to_thread(self.store.put, manifest)
        self._on_change()
        return put

    async def load(self, name: str, keep_alive_s: float | None = None) -> Loaded:
        """Into memory, now. Raises `NotFound` or `Unavailable` with the numbers. See `Loads.load`."""
        if self._pool.served(name) is None:
            self.store.get(name)
        found = self.store.find(name)
        await self.loads.load(found.name if found else name, keep_alive_s)
        return self._loaded(found.name if found else name)

    async def load_split(self, spec: ModelSpec) -> Loaded:
        """As `load`, with layers on other boards (`splits`)."""
        await self.loads.load_split(spec)
        return self._loaded(spec.name)

    async def unload(self, name: str) -> bool:
        """Out of memory. False: it is not loaded. Raises `UserError` where the configuration wants it served."""
        found = self.store.find(name)
        served = self._pool.served(name)
        if found is not None and await self.loads.unload(found.name):
            self._on_change()
            return True
        if served is not None:
            raise UserError(f"{name} is in [[models]] of this node's configuration", "", "Take it out there.")
        if found is None:
            self.store.get(name)
        return False

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(
                    self.store.sweep, time.time(), {p.progress.digest for p in self._pulls.values()}
                )
            except OSError as fault:
                log.warning("the store was not swept: %s", fault)
            await asyncio.sleep(SWEEP_S)

    # the shelf of `Loads` --------------------------------------------------------------------------------------------
    def spec(self, name: str) -> ModelSpec | None:
        manifest = self.store.find(name)
        if manifest is None:
            return None
        settings = self._settings
        model = Model(
            manifest.name, str(self.store.blob(manifest.sha256)), settings.context, settings.slots, 0, manifest.aliases
        )
        return resolve(model)

    def pinned(self, name: str) -> bool:
        manifest = self.store.find(name)
        return manifest is not None and manifest.pinned

    async def verified(self, name: str) -> Stamp:
        manifest = self.store.get(name)
        await asyncio.to_thread(self.store.pieces, manifest.sha256)
        return self.stamp(name)

    def stamp(self, name: str) -> Stamp:
        return self.store.stamp(self.store.get(name).sha256)

    def instead(self, name: str, bytes_max: int) -> str:
        here = [one for one in self.store.entries.values() if one.name != name and one.size <= bytes_max]
        if here:
            return f"{max(here, key=lambda one: one.size).name} of this node's store would fit."
        known = [one for one in catalogue.catalogue() if one.does == "chat" and one.bytes <= bytes_max]
        return f"`picluster pull {max(known, key=lambda one: one.bytes).name}` would fit." if known else ""


def _name_of(file: HubFile) -> str:
    return _plain(file.file.rpartition("/")[2].removesuffix(".gguf"))


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._").lower()[:128] or "model"


def _unknown(what: str) -> NotFound:
    short = ", ".join(one.name for one in catalogue.catalogue())
    why = f"It has: {short}. Nor has a peer it."
    return NotFound(f"{what[:128]!r} is no model of the catalogue", why, "Or name owner/repo:Q4_K_M.")
