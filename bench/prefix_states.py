"""The beginning of a prompt as a state from another node, against reading it: `prefix` with a larger model.

    three children of a random 0.5B model, links of mutual TLS between them, one request at a time

    affinity      who has read the beginning answers                         (`placement`)
    shipping      nodes answer in turn; who lacks the beginning fetches it   (`ferry`)
    round robin   nodes answer in turn, each from what it remembers itself
    recompute     no two requests have a beginning in common

The beginning has a thousand tokens, some 12 MiB of state. Each of several is asked for once in a round, in random
order; the first round, in which all are read, is not counted. p99 of so few is the slowest. Then the same by turns with
the demo model, which reads faster than a link carries: nothing is to be fetched.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from bench.inference_sides import random_model
from bench.report import Report, quantile
from bench.town import NAME, Timed, Town, town
from piclusterd.cluster import identity
from piclusterd.cluster.links import Links
from piclusterd.events import Event
from piclusterd.ids import NodeId
from piclusterd.inference.ferry import Ferry
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import GenerateRequest
from piclusterd.wire import Facts

DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
NODES, BEGINNINGS, WORDS = 3, 4, 1000
SLOTS, CONTEXT = 2, 8192
DEMO_WORDS = 400
ANSWER_TOKENS = 4
STATE_BYTES_MAX = 2**27
LINKED_S = 20.0
SEED = 7


async def measure_states(report: Report, rounds: int) -> None:
    model = random_model()
    routed = await _side(model, rounds)
    shipped = await _side(model, rounds, robin=True, ships=True)
    robin = await _side(model, rounds, robin=True)
    fresh = await _side(model, rounds, robin=True, alike=False)
    fetched = [one.shipped for one in shipped if one.shipped is not None]
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        ours, affinity, turns, anew = (
            1000 * quantile([one.first_s for one in side], part) for side in (shipped, routed, robin, fresh)
        )
        what = f"first token, {name}, {WORDS} tokens alike"
        report.add(f"{what}: affinity", affinity, "ms", peer="recompute", peer_value=anew)
        report.add(f"{what}: shipping", ours, "ms", peer="recompute", peer_value=anew)
        report.add(f"{what}: shipping", ours, "ms", peer="round robin", peer_value=turns)
        report.add(f"{what}: round robin", turns, "ms", peer="recompute", peer_value=anew)
    report.add(f"states fetched in {len(shipped)} requests by turns", len(fetched), "", at_least=1)
    if fetched:
        report.add("a state", sum(one.bytes for one in fetched) / len(fetched) / 2**20, "MiB")
        report.add("fetched and taken in within, median", quantile([one.ms for one in fetched], 0.5), "ms")
    tiny = await _side(DEMO, rounds, robin=True, ships=True, words=DEMO_WORDS)
    needless = sum(one.shipped is not None for one in tiny)
    report.add("states fetched for the demo model, which reads faster", needless, "", at_most=0)


async def _side(
    model: Path, rounds: int, robin: bool = False, ships: bool = False, alike: bool = True, words: int = WORDS
) -> list[Timed]:
    rng = random.Random(SEED)
    async with AsyncExitStack() as stack:
        nodes = await stack.enter_async_context(town(model, NODES, robin=robin, slots=SLOTS, context=CONTEXT))
        if ships:
            await stack.enter_async_context(shipping(nodes))
        timed = []
        for number in range(0 if alike else 1, rounds + 1):
            for at, beginning in enumerate(rng.sample(range(BEGINNINGS), BEGINNINGS)):
                seed = beginning if alike else 1000 * (number + 1) + beginning
                timed.append(await nodes.ask(at, _request(seed, number, words)))
        return timed[-rounds * BEGINNINGS :]


def _request(beginning: int, number: int, words: int) -> GenerateRequest:
    drawn = random.Random(beginning)
    system = " ".join(drawn.choice(("save", "crash", "file", "button", "login")) for _ in range(words))
    return GenerateRequest(prompt=f"{system}\nTitle: number {number}", max_tokens=ANSWER_TOKENS, temperature=0.0)


@asynccontextmanager
async def shipping(nodes: Town) -> AsyncIterator[None]:
    """Lets the nodes fetch states from each other, over links as between daemons."""
    pools = list(nodes.pools.values())
    ferries: list[Ferry] = []
    moved = asyncio.Event()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        members = enumerate(_members(folder))
        links = [await stack.enter_async_context(_links(who, ferries, at, moved)) for at, who in members]
        for at, pool in enumerate(pools):
            told = [(link.identity.node, other) for link, other in zip(links, pools, strict=True) if other is not pool]
            ferries.append(Ferry(pool, partial(_others, told), links[at].request, STATE_BYTES_MAX))
        ports = [await link.start("127.0.0.1", 0) for link in links]
        for at, link in enumerate(links):
            for port in ports[:at]:
                link.dial(f"127.0.0.1:{port}")
        async with asyncio.timeout(LINKED_S):
            while any(len(link.peers()) < len(links) - 1 for link in links):
                moved.clear()
                await moved.wait()
        await asyncio.gather(*(ferry.known(NAME) for ferry in ferries))
        yield


async def _others(told: list[tuple[NodeId, Pool]]) -> list[tuple[NodeId, Facts]]:
    return [(node, Facts(name=node, models=pool.facts())) for node, pool in told]


def _members(folder: Path) -> list[identity.Identity]:
    first = identity.create_cluster(folder / "1", "bench", "pi-1")
    members = [first]
    for number in range(2, NODES + 1):
        name, state = f"pi-{number}", folder / str(number)
        key = identity.new_key(state)
        members.append(identity.settle(state, key, first.cluster, name, first.ca_pem, first.issue(key.request(), name)))
    return members


@asynccontextmanager
async def _links(me: identity.Identity, ferries: list[Ferry], at: int, moved: asyncio.Event) -> AsyncIterator[Links]:
    async def note(event: Event) -> None:
        moved.set()

    def serve(peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        return ferries[at].serve(body)

    links = Links(me, note, serve, random.Random(at))
    try:
        yield links
    finally:
        await links.close()
