"""The models this node serves: one child process each, a bounded queue before each, and what is measured of each.

    start ──▶ loading ──Ready──▶ ready ──child died──▶ loading (after a backoff) …
                 ├── the file is refused, or two deaths while loading ──▶ failed, with the reason
    ready ──two deaths and no request finished in between──▶ failed (quarantined) ──QUARANTINE_S──▶ loading
                 └── close ──▶ stopped

It owns the children and decides admission: as many requests as the model has slots are with the child, `queue_max`
wait in order, the next is told when to come again (429). A child that dies takes its requests with it (503: another
node may answer) and nothing else. The daemon's process never sees llama.cpp.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from ..config import Config
from ..errors import NotFound, Unavailable
from ..wire import ModelFacts, Shipped
from .calibration import RATES, Average, Calibration
from .child import HANG_S, Child, ChildDied, LoadFault
from .demand import Configured, Demand, only_load
from .models import ModelSpec
from .prefix import Cached, marks
from .protocol import EMBED_BATCH_MAX, Classified, Delta, Done, Embedded, GenerateRequest, Ready
from .turns import CHARS_PER_TOKEN, NOBODY, Asked, Turn, Turns, asked_by, cost

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]

LOADING_DEATHS_MAX = 2
"""One death may be an accident (the OOM killer); two at the same point are the file's doing."""
DEATHS_MAX = 2
"""Without a request finished in between: what kills it would kill it again."""
QUARANTINE_S = 600.0
"""What a model that keeps dying is left alone for; each later death starts it anew."""
BACKOFF_S = 0.25
"""Before a dead child is started again, at most."""
BEGINNINGS = 2
"""Prompts that a child remembers for each of its slots (`budget.sequences`)."""


class Served:
    """One model: its child, kept alive by `_supervise`, and its queue."""

    def __init__(
        self,
        spec: ModelSpec,
        queue_max: int,
        load_timeout_s: float,
        on_change: Callable[[], None],
        worker_socket: Path | None = None,
        hang_s: float = HANG_S,
        others: Callable[[], int] = lambda: 0,
        calibration: Calibration | None = None,
    ) -> None:
        self.spec = spec
        self.state: State = "loading"
        self.why = ""
        """Why it is not ready, for people."""
        self.ready: Ready | None = None
        self.child: Child | None = None
        self.used_at = time.monotonic()
        """When its last answer ended."""
        self._calibration = calibration or Calibration()
        known = self._calibration.of(spec)
        self.prefill, self.decode = Average(known.prefill), Average(known.decode)
        self._load_timeout_s = load_timeout_s
        self._worker_socket = worker_socket
        self._hang_s = hang_s
        self._others = others
        self._on_change = on_change
        self._turns = Turns(spec.name, spec.slots, queue_max, on_change)
        self.cached = Cached(BEGINNINGS * spec.slots, CHARS_PER_TOKEN * spec.context)
        self._changed = asyncio.Event()
        self._deaths = 0
        self._task = asyncio.create_task(self._supervise(), name=f"model {spec.name}")

    async def settled(self) -> State:
        """The state, once it is no longer loading."""
        while self.state == "loading":
            self._changed.clear()
            await self._changed.wait()
        return self.state

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._become("stopped", "The node is shutting down.")

    def _become(self, state: State, why: str = "") -> None:
        self.state, self.why = state, why
        self._changed.set()
        self._on_change()

    async def _supervise(self) -> None:
        loading_deaths = 0
        while True:
            try:
                self.child, self.ready = await Child.start(
                    self.spec, self._load_timeout_s, self._worker_socket, self._hang_s, self._others(),
                    measure=not self._calibration.bandwidth,
                )  # fmt: skip
                self._calibration.measured_bandwidth(self.ready.bandwidth)
            except LoadFault as fault:
                self._give_up(str(fault))
                return
            except ChildDied as fault:
                loading_deaths += 1
                if loading_deaths >= LOADING_DEATHS_MAX:
                    self._give_up(f"{fault} It died {loading_deaths} times while loading: the file is not tried again.")
                    return
                await self._back_off(fault)
                continue
            loading_deaths = 0
            self.cached.clear()
            self._become("ready")
            death = await self._watch(self.child)
            self._deaths += 1
            await (self._back_off(death) if self._deaths < DEATHS_MAX else self._quarantine(death))

    async def _watch(self, child: Child) -> ChildDied:
        try:
            return await child.died()
        finally:
            await child.close()

    def lose(self, why: str) -> None:
        """A part of it is gone: it ends, and nobody but its owner splits it anew."""
        if self.child is not None:
            self.child.doom(why)
        self._task.cancel()
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        log.error("model %s: %s", self.spec.name, why)
        self._become("failed", why)

    async def _back_off(self, fault: ChildDied) -> None:
        log.warning("model %s: %s", self.spec.name, fault)
        self._become("loading", str(fault))
        await asyncio.sleep(BACKOFF_S * random.uniform(0.5, 1.0))

    async def _quarantine(self, fault: ChildDied) -> None:
        self._give_up(
            f"{fault} It died {self._deaths} times and finished nothing in between: it is quarantined, and tried again"
            f" {QUARANTINE_S / 60:.0f} minutes later."
        )
        await asyncio.sleep(QUARANTINE_S)
        self._become("loading")

    @property
    def busy(self) -> int:
        """Requests with the child."""
        return self._turns.busy

    @property
    def queued(self) -> int:
        return self._turns.queued

    @asynccontextmanager
    async def turn(self, asked: Asked) -> AsyncIterator[tuple[Child, Turn]]:
        """The child, once it is this caller's turn.

        Raises `Overloaded` where the queue is full, `Unavailable` where the model is not ready.
        """
        self._check_ready()
        try:
            async with self._turns.turn(asked) as turn:
                yield self._check_ready(), turn
                self._deaths = 0
        finally:
            self.used_at = time.monotonic()

    def wanted(self) -> None:
        """Somebody will ask it soon. Raises `Unavailable` where it is not ready."""
        self._check_ready()
        self.used_at = time.monotonic()

    def _check_ready(self) -> Child:
        if self.state != "ready" or self.child is None:
            raise Unavailable(f"{self.spec.name} is {self.state} on this node", self.why)
        return self.child

    def measured(self, done: Done) -> None:
        self._deaths = 0  # it finished something: the next death is a new story
        self.prefill.add(done.prefill_tps, done.prompt_tokens - done.cached_tokens)
        self.decode.add(done.decode_tps, done.completion_tokens)
        self._calibration.measured(self.spec, self.prefill.value, self.decode.value)

    def facts(self, name: str) -> ModelFacts:
        tasks = self.ready.tasks if self.ready is not None else ()
        return ModelFacts(
            name=name,
            embeddings="embed" in tasks,
            busy=self.busy,
            queued=self.queued,
            prefill_tps=round(self.prefill.value, 1),
            decode_tps=round(self.decode.value, 1),
            context=self.ready.context if self.ready is not None else 0,
            tasks=tasks,
            slots=self.spec.slots,
            turn_s=round(self._turns.held_s, 2),
            prefixes=self.cached.digests(),
            gb_s=round(self._calibration.read_per_s(self.spec, self.decode.value) / 1e9, 2),
            roofline=round(self._calibration.roofline(self.spec, self.decode.value), 3),
            tools=self.ready is not None and self.ready.tools,
        )


class Pool:
    """Every model of this node. `on_change` is called, often, whenever `facts` may differ: coalesce it."""

    def __init__(
        self,
        queue_max: int,
        load_timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
        worker_socket: Path | None = None,
        hang_s: float = HANG_S,
        calibration: Calibration | None = None,
    ) -> None:
        """`worker_socket`: where systemd starts a worker for every connection; missing: children of our own.

        A busy child that says nothing for `hang_s` is ended.
        """
        self._hang_s = hang_s
        self.worker_socket = worker_socket
        self._queue_max = queue_max
        self._load_timeout_s = load_timeout_s
        self.on_change = on_change
        self.calibration = calibration or Calibration()
        self._served: dict[str, Served] = {}
        self._aliases: dict[str, str] = {}
        self.demand: Demand = Configured()
        self.bring: Callable[[Served, Child, GenerateRequest], Awaitable[Shipped | None]] = _nothing
        """Before a prompt is read: its beginning from another node, where that costs less (`ferry`)."""
        self.told: Callable[[Served, ModelFacts], ModelFacts] = lambda _, facts: facts
        """Facts, and what such a beginning costs."""
        self.drafts = 0
        """Tokens guessed at a time, by models that do not say."""
        self.guessed: Counter[str] = Counter()
        """Tokens of drafts: how many were accepted, how many rejected."""
        self.stored: Callable[[], tuple[ModelFacts, ...]] = tuple
        """The models that it would load."""

    @classmethod
    def of(cls, config: Config, on_change: Callable[[], None]) -> Pool:
        """As `config` says, with the rates that were measured before."""
        inference = config.inference
        socket = Path(inference.worker_socket) if inference.worker_socket else None
        known = Calibration(config.state_dir / RATES)
        pool = cls(inference.queue_max, inference.load_timeout_s, on_change, socket, calibration=known)
        pool.drafts = inference.drafts
        return pool

    async def start(self, models: Sequence[ModelSpec]) -> None:
        """Begin to load `models`, and return. See `states` for what becomes of them."""
        for spec in models:
            self.add(spec)

    def add(self, spec: ModelSpec) -> Served:
        """Begin to load one more."""
        assert spec.name not in self._served, f"{spec.name} is served twice"
        spec = replace(spec, drafts=self.drafts) if spec.drafts < 0 else spec
        self._served[spec.name] = served = Served(
            spec, self._queue_max, self._load_timeout_s, self.on_change, self.worker_socket, self._hang_s,
            partial(self.mapped, spec.name), self.calibration,
        )  # fmt: skip
        self._aliases |= dict.fromkeys(spec.aliases, spec.name)
        return served

    async def drop(self, model: str) -> None:
        """End the child of `model`, and forget the model. Running requests get `Unavailable`."""
        served = self._served.pop(model)
        self._aliases = {alias: name for alias, name in self._aliases.items() if name != model}
        await served.close()

    def served(self, model: str) -> Served | None:
        """The model of that name or alias, in whatever state."""
        return self._served.get(self._aliases.get(model, model))

    def being(self, model: str) -> object | None:
        """The child that answers for `model` now: another one may have loaded another file under the same name."""
        served = self.served(model)
        return served.child if served is not None and served.state == "ready" else None

    def mapped(self, but: str = "") -> int:
        """Bytes of the weights that models `but` one have mapped: the kernel calls their pages available."""
        own = self._served[but].spec.path if but in self._served else None
        ready = [each.spec for each in self._served.values() if each.state == "ready" and each.spec.kind == "llama"]
        return sum({spec.path: spec.size for spec in ready if spec.name != but and spec.path != own}.values())

    async def close(self) -> None:
        """End every child. Running requests get `Unavailable`."""
        await asyncio.gather(*(served.close() for served in self._served.values()))

    async def give_up(self, model: str) -> None:
        """End the child of `model` for good; its requests get `Unavailable`."""
        await self._of(model).close()

    @property
    def names(self) -> tuple[str, ...]:
        """The models, ready or not, in the order of the configuration."""
        return tuple(self._served)

    def states(self) -> dict[str, tuple[State, str]]:
        """State of each model, and why where it is not ready."""
        return {name: (served.state, served.why) for name, served in self._served.items()}

    async def settled(self, model: str) -> State:
        """The state of `model` once it is no longer loading."""
        return await self._of(model).settled()

    def pid(self, model: str) -> int | None:
        """Process id of the child of `model`; None where there is none, or where systemd started it."""
        served = self._of(model)
        return served.child.pid if served.child is not None and served.state == "ready" else None

    def facts(self) -> tuple[ModelFacts, ...]:
        """What may be gossiped: each model that is ready, by its name and again by each alias. Of the loop's thread."""
        ready = [served for served in self._served.values() if served.state == "ready"]
        named = [(served, name) for served in ready for name in (served.spec.name, *served.spec.aliases)]
        return (*(self.told(served, served.facts(name)) for served, name in named), *self.stored())

    async def generate(self, model: str, request: GenerateRequest) -> AsyncGenerator[Delta | Done, None]:
        """The answer as it comes; closing the generator cancels it and frees its slot within a step.

        Raises `NotFound`, `Overloaded`, `Unavailable` (not ready, or the child died) or the child's `UserError`.
        """
        if request.only_loads:
            yield await only_load(self.demand, self._of, model, request.keep_alive_s)
            return
        async with self._turn(model, asked_by(request)) as (served, child, turn):
            shipped = await self.bring(served, child, request)
            async with aclosing(child.generate(request)) as answer:
                served.cached.add(marks(request))
                async for frame in answer:
                    if isinstance(frame, Done):
                        served.measured(frame)
                        self.guessed.update(accepted=frame.accepted, rejected=frame.drafted - frame.accepted)
                        turn.ended(cost(frame.prompt_tokens - frame.cached_tokens, frame.completion_tokens))
                        frame = msgspec.structs.replace(frame, waited_s=turn.waited_s, shipped=shipped)
                    yield frame

    async def embed(self, model: str, texts: Sequence[str], asked: Asked = NOBODY) -> Embedded:
        """One vector a text. Raises as `generate` does."""
        vectors: list[bytes] = []
        tokens = 0
        async with self._turn(model, asked) as (_, child, _):
            for at in range(0, len(texts), EMBED_BATCH_MAX):
                part = await child.embed(tuple(texts[at : at + EMBED_BATCH_MAX]))
                vectors += part.vectors
                tokens += part.tokens
        return Embedded(0, tuple(vectors), tokens)

    async def classify(self, model: str, texts: Sequence[str], asked: Asked = NOBODY) -> Classified:
        """The labels of each text, with scores. Raises as `generate` does."""
        async with self._turn(model, asked) as (_, child, _):
            parts = [
                await child.classify(tuple(texts[at : at + EMBED_BATCH_MAX]))
                for at in range(0, len(texts), EMBED_BATCH_MAX)
            ]
        return Classified(0, tuple(scores for part in parts for scores in part.scores), sum(p.tokens for p in parts))

    @asynccontextmanager
    async def _turn(self, model: str, asked: Asked) -> AsyncIterator[tuple[Served, Child, Turn]]:
        await self.demand.ready(model)
        served = self._of(model)
        try:
            async with served.turn(asked) as (child, turn):
                yield served, child, turn
        finally:
            self.demand.keep(model, asked.keep_alive_s)

    def _of(self, model: str) -> Served:
        served = self.served(model)
        if served is None:
            there = ", ".join(self._served) or "none"
            raise NotFound(f"this node has no model {model!r}", f"It has: {there}.", param="model")
        return served


async def _nothing(served: Served, child: Child, request: GenerateRequest) -> None:
    """Nobody is asked."""
