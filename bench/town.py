"""Three nodes in one process for the benches of routing: each a pool with a real child, each with the real decider.

    Town.node(i) ──Serving──▶ who? ──Placement, told of every pool's facts at once──▶ pool i, or the pool of another

There is no HTTP and no link between them: what is measured is what routing decides, and what the children make of it.
`robin` answers by turns instead, as a plain balancer would. `slow` bounds the processor of each child by a cgroup.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from piclusterd.errors import PiclusterError
from piclusterd.events import Choice, WhoServes
from piclusterd.ids import NodeId
from piclusterd.inference.models import ModelSpec
from piclusterd.inference.placement import Placement
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Delta, Done, GenerateRequest
from piclusterd.inference.serving import Serving
from piclusterd.wire import Facts, Member, Shipped

NAME = "bench"
READY_S = 300.0
QUEUE_MAX = 256
CPU = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000
"""Short, so that a child is slowed evenly and not stopped for a tenth of a second at a time."""


@dataclass(slots=True)
class Timed:
    """One answer: seconds to its first text and to its end."""

    first_s: float
    took_s: float
    tokens: int
    cached: int
    node: str
    shipped: Shipped | None = None


class Town:
    def __init__(self, pools: list[Pool], robin: bool) -> None:
        self.pools = {NodeId(f"{number:016x}"): pool for number, pool in enumerate(pools, 1)}
        self._robin = itertools.cycle(self.pools) if robin else None
        self.nodes = [self._serving(node) for node in self.pools]

    def _serving(self, me: NodeId) -> Serving:
        placement = Placement(me)

        async def who(asked: WhoServes) -> Choice:
            if self._robin is not None:
                node = next(self._robin)
                return Choice(node, node, NAME, "its turn")
            placement.members_changed([self._member(node) for node in self.pools], self.pools)
            choice = placement.choose(asked, time.monotonic())
            if isinstance(choice, PiclusterError):
                raise choice
            return choice

        async def relay(peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
            async with aclosing(self.nodes[list(self.pools).index(peer)].answer_peer(me, name, body)) as messages:
                async for message in messages:
                    yield message

        return Serving(me, self.pools[me], who, relay, NAME)

    def _member(self, node: NodeId) -> Member:
        version = int(time.monotonic() * 10)  # as gossip does, within a tenth of a second
        return Member(node, 0, "alive", Facts(version=version, name=node, models=self.pools[node].facts()))

    async def ask(self, at: int, request: GenerateRequest) -> Timed:
        began = time.monotonic()
        first, done, node = 0.0, None, ""
        async with aclosing(self.nodes[at % len(self.nodes)].generate(request)) as items:
            async for item in items:
                if isinstance(item, Done):
                    done = item
                elif isinstance(item, Delta):
                    first = first or time.monotonic() - began
                else:
                    node = item.choice.node
        assert done is not None, "an answer ends with Done"
        took = time.monotonic() - began
        return Timed(first or took, took, done.completion_tokens, done.cached_tokens, node, done.shipped)


@asynccontextmanager
async def town(
    model: Path, nodes: int, *, robin: bool = False, slots: int = 2, context: int = 2048
) -> AsyncIterator[Town]:
    """`nodes` children of `model` with one thread each, ready."""
    size = await asyncio.to_thread(lambda: model.stat().st_size)
    spec = ModelSpec(NAME, model, size, context, slots, threads=1, batch_threads=1)
    pools = [Pool(QUEUE_MAX, READY_S) for _ in range(nodes)]
    try:
        for pool in pools:
            await pool.start([spec])
        await asyncio.gather(*(pool.settled(NAME) for pool in pools))
        yield Town(pools, robin)
    finally:
        await asyncio.gather(*(pool.close() for pool in pools))


@contextmanager
def slow(town: Town, share: float) -> Iterator[bool]:
    """Each child gets at most `share` of a core, as a board of its own would; False where no cgroup can be had."""
    groups = []
    try:
        for node, pool in town.pools.items():
            group = CPU / f"piclusterd-bench-{node}"
            group.mkdir()
            groups.append(group)
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(int(PERIOD_US * share)))
            (group / "cgroup.procs").write_text(str(pool.pid(NAME)))
        yield True
    except OSError:
        yield False
    finally:
        for group in groups:
            for process in (group / "cgroup.procs").read_text().split():
                (CPU / "cgroup.procs").write_text(process)
            group.rmdir()
