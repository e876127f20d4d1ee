"""Two nodes with real links and real children over loopback, and a model that is divided between them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest

from piclusterd.cluster import identity
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.links import Links
from piclusterd.config import Inference, Store
from piclusterd.errors import NotFound, Refused, Unavailable, UserError
from piclusterd.events import Event, LinkUp
from piclusterd.ids import NodeId
from piclusterd.inference import rpc
from piclusterd.inference.budget import HEADROOM_MIN, MIB, Room, need, sequences
from piclusterd.inference.gguf import read_shape
from piclusterd.inference.library import Library, Loaded
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Delta
from piclusterd.inference.splits import REQUEST, Question, Splits
from tests.cluster.test_identity import member

from .rig import DEMO, GREEDY, NAME, READY_S, collected, pool_of, spec
from .test_lan import a_turn

needs_rpc = pytest.mark.skipif(not rpc.built(), reason="llama.cpp was built without RPC: make setup RPC=1")

CONTEXT, SLOTS = 1024, 2
ON = Inference(load_timeout_s=READY_S, split=True)
ASKED = need(read_shape(DEMO), DEMO.stat().st_size, CONTEXT, sequences(SLOTS))
LAYER = 338560 + ASKED.kv // 4
"""Of the demo model, which has four."""


def room_for(total: int) -> Callable[[], Room]:
    return lambda: Room(HEADROOM_MIN, total + HEADROOM_MIN)


HALF = room_for(ASKED.total - 2 * LAYER + 1000)
"""Room for all of it but two layers."""
TWO_LAYERS = room_for(ASKED.compute + 2 * LAYER + 1000)
ROOMY = room_for(1024 * MIB)
HELD = Loaded("part of another", "held", "", 1, 0, 0, 0, None)


@dataclass
class Side:
    me: Identity
    links: Links
    pool: Pool
    library: Library
    splits: Splits

    @property
    def node(self) -> NodeId:
        return self.me.node


@asynccontextmanager
async def two(
    tmp_path: Path, here: Inference = ON, there: Inference = ON, room: Callable[[], Room] = HALF,
    other_room: Callable[[], Room] = TWO_LAYERS,
) -> AsyncIterator[tuple[Side, Side]]:  # fmt: skip
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    up = asyncio.Event()

    async def on_event(event: Event) -> None:
        if isinstance(event, LinkUp):
            up.set()

    sides: list[Side] = []

    def side(me: Identity, settings: Inference, room: Callable[[], Room], at: int) -> Side:
        def serve(peer: NodeId, _name: str, body: bytes) -> AsyncGenerator[bytes, None]:
            return sides[at].splits.serve(peer, body)

        links = Links(me, on_event, serve, random.Random(at))
        pool = Pool(8, READY_S, hang_s=READY_S)
        library = Library(tmp_path / me.name, pool, Store(context=CONTEXT, slots=SLOTS), 8)
        splits = Splits(me.node, me.name, settings, library, pool, links.request, links.peers, room)
        return Side(me, links, pool, library, splits)

    sides += [side(first, here, room, 0), side(second, there, other_room, 1)]
    try:
        for one in sides:
            await one.library.start()
            port = await one.links.start("127.0.0.1", 0)
        sides[0].links.dial(f"127.0.0.1:{port}")
        async with asyncio.timeout(READY_S):
            await up.wait()
        await sides[0].library.take_file(DEMO, NAME)
        yield sides[0], sides[1]
    finally:
        for one in sides:
            await one.splits.close()
        for one in sides:
            await one.library.close()
            await one.pool.close()
            await one.links.close()


def parts() -> list[psutil.Process]:
    """The children of this process, which hold parts or heads."""
    return [child for child in psutil.Process().children() if "--alone" in child.cmdline()]


async def unsplit() -> str:
    async with pool_of([spec()]) as pool:
        text, _ = await collected(pool.generate(NAME, GREEDY))
    return text


@needs_rpc
async def test_a_split_model_answers_as_a_whole_one_does(tmp_path: Path) -> None:
    expected = await unsplit()
    async with two(tmp_path) as (head, other):
        planned = await head.splits.plan(NAME)
        assert [(share.name, share.layers) for share in planned.shares] == [("pi-1", 2), ("pi-2", 2)]
        loaded = await head.splits.load(NAME)
        assert (loaded.state, loaded.shares) == ("ready", ("pi-1 2", "pi-2 2"))
        (held,) = other.splits.held()
        assert (held.name, held.state, held.why) == (f"part of {NAME}", "held", "for pi-1")
        assert len(parts()) == 2
        assert (await collected(head.pool.generate(NAME, GREEDY)))[0] == expected
        assert (await collected(head.pool.generate(NAME, GREEDY)))[0] == expected  # from the prefix it remembers
        children = parts()
        assert await head.library.unload(NAME)
        await gone(children)
        await until(lambda: not other.splits.held())


@needs_rpc
async def test_a_part_that_dies_ends_the_answers_and_says_so_and_the_model_can_be_split_again(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, _):
        before = parts()
        await head.splits.load(NAME)
        (part,) = [child for child in parts() if child not in before and not reads(child, NAME, head)]
        long = msgspec.structs.replace(GREEDY, max_tokens=0)
        async with aclosing(head.pool.generate(NAME, long)) as answer:
            assert isinstance(await anext(answer), Delta)
            part.kill()
            with pytest.raises(Unavailable, match=r"has lost a part\. The part on pi-2 was lost") as told:
                async for _ in answer:
                    pass
        assert "picluster load triage-demo --split" in str(told.value)
        served = head.pool.served(NAME)
        assert served is not None
        assert served.state == "failed"
        with pytest.raises(Unavailable, match=r"failed on this node\. The part on pi-2 was lost"):
            await collected(head.pool.generate(NAME, GREEDY))
        assert [facts.name for facts in head.pool.facts()] == [NAME]  # who asks is told, instead of 404
        await gone(parts())
        assert (await head.splits.load(NAME)).state == "ready"
        assert (await collected(head.pool.generate(NAME, GREEDY)))[1].completion_tokens


@needs_rpc
async def test_a_node_that_is_cut_off_is_a_part_that_is_lost(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, other):
        await head.splits.load(NAME)
        children = parts()
        head.links.deny((other.node,))
        await gone(children)
        served = head.pool.served(NAME)
        assert served is not None
        assert served.state == "failed"
        assert "The part on pi-2 was lost" in served.why
        await until(lambda: not other.splits.held())


@needs_rpc
async def test_a_part_that_cannot_be_had_any_more_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, other):
        other.splits._held |= dict.fromkeys(("full", "of", "parts", "already"), HELD)
        with pytest.raises(Unavailable, match="cannot be split: pi-2 holds enough parts"):
            await head.splits.load(NAME)
        other.splits._held.clear()
        assert not parts()


async def test_both_sides_must_want_it(tmp_path: Path) -> None:
    off = Inference()
    async with two(tmp_path, there=off) as (head, other):
        with pytest.raises(Refused, match=r"pi-2 splits no models\. Set \[inference\] split = true"):
            await other.splits.plan(NAME)
        body = msgspec.json.encode(Question("hold", rpc.built(), "1", NAME, 1))
        with pytest.raises(Refused, match="pi-2 splits no models"):
            await asked(head, other, body)


@needs_rpc
async def test_who_takes_no_part_is_named_with_the_reason(tmp_path: Path) -> None:
    async with two(tmp_path, there=Inference()) as (head, _):
        with pytest.raises(UserError, match=r"fits no board.* Left out: pi-2: pi-2 splits no models"):
            await head.splits.plan(NAME)


@needs_rpc
async def test_a_model_that_one_board_can_hold_is_not_split(tmp_path: Path) -> None:
    async with two(tmp_path, room=ROOMY) as (head, _):
        with pytest.raises(UserError, match=r"fits one board.* Run `picluster load triage-demo`"):
            await head.splits.load(NAME)
        assert head.pool.served(NAME) is None


async def test_a_build_without_rpc_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    async with two(tmp_path) as (head, other):
        with pytest.raises(Refused, match=r"cannot split models. It has no libggml-rpc.so. Build it with .*RPC=1"):
            await head.splits.plan(NAME)
        with pytest.raises(Refused, match=r"libggml-rpc"):
            await asked(head, other, msgspec.json.encode(Question("hold", "0.3.36", "1", NAME, 1)))
        with pytest.raises(UserError, match=r"libggml-rpc"):
            rpc.serve(1, 1)


@needs_rpc
async def test_another_build_takes_no_part(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, other):
        with pytest.raises(Refused, match=r"another llama.cpp: llama-cpp-python .*, not 0.0.1"):
            await asked(head, other, msgspec.json.encode(Question("hold", "0.0.1", "1", NAME, 1)))


@needs_rpc
async def test_no_more_memory_is_given_than_is_free(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, other):
        body = msgspec.json.encode(Question("hold", rpc.built(), "1", NAME, 2**40))
        with pytest.raises(Unavailable, match=r"pi-2 has not enough memory. 1099511627776 bytes are asked"):
            await asked(head, other, body)


async def test_junk_and_parts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    async with two(tmp_path) as (head, other):
        with pytest.raises(UserError, match="not valid"):
            await asked(head, other, b'{"what": "exec"}')
        with pytest.raises(NotFound, match="no such part"):
            await asked(head, other, msgspec.json.encode(Question("say", id="1")))


async def asked(side: Side, other: Side, body: bytes) -> bytes:
    async with aclosing(side.links.request(other.node, REQUEST, body, READY_S)) as chunks:
        return b"".join([chunk async for chunk in chunks])


def reads(child: psutil.Process, name: str, side: Side) -> bool:
    """Whether `child` is the one that answers for `name`."""
    return side.pool.pid(name) == child.pid


async def gone(children: list[psutil.Process]) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, READY_S)
    assert not alive


async def until(condition: Callable[[], bool]) -> None:
    """Turns of the loop, until it holds."""
    async with asyncio.timeout(READY_S):
        while not condition():
            await a_turn()
