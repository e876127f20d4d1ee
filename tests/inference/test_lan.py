"""Nodes on a pretend wire that cuts, lies and dies; one hub on real sockets; a cluster downloads once."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from piclusterd.demo.doubles import Fault
from piclusterd.errors import NotFound, PiclusterError, Unavailable, UserError
from piclusterd.ids import NodeId
from piclusterd.inference import fetching, lan, sealing, swarm
from piclusterd.inference.lan import Lan, Question
from piclusterd.inference.library import Library
from piclusterd.inference.store import HEADROOM_BYTES, NoSpace
from piclusterd.inference.swarm import Has
from piclusterd.integrations.model_hub import HubFile

from .hub_rig import BODY, FILE, NAME, PLENTY, REPO, SHA256, hub_with_cdn, library_of, pulled
from .rig import DEMO

PIECE = 64 * 1024
PIECES = -(-len(BODY) // PIECE)
LOOK_S = 0.02
BLOB = HubFile(REPO, "0" * 40, FILE, SHA256, len(BODY))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model is less than one real piece."""
    for module in (sealing, swarm, lan):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(sealing, "READ_BYTES", PIECE)
    monkeypatch.setattr(fetching, "PAUSE_MAX_S", 0.01)


async def a_turn() -> None:
    """One round of the loop: what time is made of on this wire."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    loop.call_soon(over.set_result, None)
    await over


class Wire:
    """Between `names`; `spoil(by, question, answer)` may change an answer or raise."""

    def __init__(self) -> None:
        self.libraries: dict[NodeId, Library] = {}
        self.gone: set[NodeId] = set()
        self.sent: dict[NodeId, int] = {}
        """Bytes of pieces, by who gave them."""
        self.turns = 1
        """Of the loop, that a node's uplink takes for a piece; it sends one at a time."""
        self.uplinks: dict[NodeId, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.asked_turns: Callable[[], int] = lambda: 0
        """Of the loop, that a question takes on its way, and its answer too."""
        self.spoil: Callable[[NodeId, Question, bytes], bytes] = lambda by, asked, answer: answer

    def join(self, name: str, library: Library) -> Lan:
        me = NodeId(name)
        self.libraries[me] = library

        async def request(to: NodeId, what: str, body: bytes, _s: float) -> AsyncGenerator[bytes, None]:
            assert what == lan.REQUEST
            if to in self.gone:
                raise Unavailable(f"no link to {to}")
            asked = msgspec.json.decode(body, type=Question)
            gives = self.libraries[to].lan
            assert gives is not None
            for _ in range(self.asked_turns()):
                await a_turn()
            async for answer in gives.serve(body):
                for _ in range(self.asked_turns()):
                    await a_turn()
                said = self.spoil(to, asked, answer)
                if asked.what == "piece":
                    self.sent[to] = self.sent.get(to, 0) + len(said)
                    async with self.uplinks[to]:
                        for _ in range(self.turns):
                            await a_turn()
                for at in range(0, len(said), 40_000):
                    yield said[at : at + 40_000]

        def peers() -> dict[NodeId, str]:
            return {node: f"name-of-{node}" for node in self.libraries if node != me and node not in self.gone}

        library.lan = Lan(me, library.store, request, peers, random.Random(7), LOOK_S)
        return library.lan


@asynccontextmanager
async def nodes(
    tmp_path: Path, names: str, hub_url: str = "http://127.0.0.1:9"
) -> AsyncIterator[tuple[Wire, list[Library]]]:
    wire, libraries = Wire(), []
    async with AsyncExitStack() as stack:
        for name in names:
            libraries.append(await stack.enter_async_context(library_of(tmp_path / name, hub_url)))
            wire.join(name, libraries[-1])
        yield wire, libraries


def whole(library: Library) -> bool:
    return library.store.has(SHA256) and library.store.blob(SHA256).read_bytes() == BODY


async def test_nodes_that_pull_at_once_download_once_and_share_the_rest(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "abc", hub.url) as (wire, libraries):
        async with asyncio.timeout(60):
            steps = await asyncio.gather(*(pulled(library, REPO) for library in libraries))
        assert all(map(whole, libraries))
        assert hub.served_bytes == len(BODY)
        assert any("waiting for name-of-a" in step.status for step in steps[1])
        assert sum(wire.sent.values()) == 2 * len(BODY)
        assert not any(one.lan and one.lan._going for one in libraries)


@pytest.mark.parametrize("seed", range(20))
async def test_of_those_who_ask_at_about_the_same_moment_one_goes_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(lan, "LOOK_AGAIN_S", 0.0)
    rng = random.Random(seed)
    async with nodes(tmp_path, "abcd") as (wire, libraries):
        wire.asked_turns = lambda: rng.randrange(30)
        waits: list[str] = []

        async def asks(library: Library, late: int) -> bool:
            assert library.lan is not None
            library.lan._look_s = 0.0
            for _ in range(late):
                await a_turn()
            return await library.lan.fetch(BLOB, lambda status, _done: waits.append(status))

        tasks = [asyncio.create_task(asks(library, rng.randrange(40))) for library in libraries]
        async with asyncio.timeout(30):
            while len(waits) < 100 or not any(task.done() for task in tasks):
                await a_turn()
        assert [task.result() for task in tasks if task.done()] == [False]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_comes_later_asks_the_peers_and_not_the_hub(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "ab", hub.url) as (_, (one, two)):
        await pulled(one, REPO)
        steps = await pulled(two, REPO)
        assert whole(two)
        assert hub.served_bytes == len(BODY)
        assert any(step.status == "from name-of-a" for step in steps)
        assert two.show(NAME).model.revision == one.show(NAME).model.revision


async def test_three_who_take_from_one_give_each_other_what_they_have(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "abcd", hub.url) as (wire, (seed, *others)):
        await pulled(seed, REPO)
        wire.turns = 50
        for library in others:
            assert library.lan is not None
            library.lan._look_s = 0
        async with asyncio.timeout(60):
            await asyncio.gather(*(pulled(library, REPO) for library in others))
        assert all(map(whole, others))
        assert sum(wire.sent.values()) == 3 * len(BODY)
        assert wire.sent[NodeId("a")] < 2.5 * len(BODY)


async def test_what_is_on_the_disk_already_is_kept_if_it_is_right(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "ab", hub.url) as (wire, (one, two)):
        await pulled(one, REPO)
        half = bytearray(BODY[: 10 * PIECE])
        half[3 * PIECE] ^= 1
        two.store.partial(SHA256).write_bytes(half)  # the hub's, as a kill left it, and one bit turned
        await pulled(two, REPO)
        assert whole(two)
        assert wire.sent[NodeId("a")] == len(BODY) - 9 * PIECE


async def test_a_peer_that_dies_on_the_way_is_made_up_for_by_another_and_then_by_the_hub(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "abc", hub.url) as (wire, (one, two, three)):
        await pulled(one, REPO)
        await pulled(two, REPO)

        def die(by: NodeId, asked: Question, answer: bytes) -> bytes:
            if asked.what == "piece" and wire.sent.get(by, 0) > 5 * PIECE:
                wire.gone.add(by)
                raise Unavailable(f"the link to {by} broke")
            return answer

        wire.sent.clear()
        wire.spoil = die
        async with asyncio.timeout(60):
            await pulled(three, REPO)
        assert whole(three)
        assert wire.gone == {"a", "b"}
        assert hub.served_bytes == 2 * len(BODY)


async def test_a_peer_that_sends_wrong_pieces_is_left_out(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "abc", hub.url) as (wire, (one, two, three)):
        await pulled(one, REPO)
        await pulled(two, REPO)
        wire.spoil = lambda by, asked, answer: answer[:-1] + b"?" if asked.what == "piece" and by == "a" else answer
        wire.sent.clear()
        await pulled(three, REPO)
        assert whole(three)
        assert wire.sent[NodeId("a")] <= swarm.SIDE_BY_SIDE * PIECE


async def test_a_peer_that_lies_about_everything_gets_nowhere(tmp_path: Path) -> None:
    """Its digests are those of its own bytes: only the whole's SHA-256 finds it out."""
    other = BODY[:-1] + b"!"

    def lie(by: NodeId, asked: Question, answer: bytes) -> bytes:
        if by != "a" or asked.what not in ("digests", "piece"):
            return answer
        parts = [other[at : at + PIECE] for at in range(0, len(other), PIECE)]
        told = tuple(sealing.piece_digest(part).digest() for part in parts)
        return parts[asked.number] if asked.what == "piece" else msgspec.json.encode(told)

    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "abc", hub.url) as (wire, (one, two, three)):
        await pulled(one, REPO)
        await pulled(two, REPO)
        wire.spoil = lie
        for seed in range(4):  # whom it believes first is drawn
            assert three.lan is not None
            three.lan._rng.seed(seed)
            async with asyncio.timeout(60):
                await pulled(three, REPO)
            assert whole(three)
            await three.remove(NAME)


@pytest.mark.parametrize("answer", [b"", b"junk", b"[]", b'{"whole": 3}', b'["AAAA"]', b"x" * 1_100_000])
async def test_what_a_peer_says_that_is_no_answer_costs_nothing(tmp_path: Path, answer: bytes) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "ab", hub.url) as (wire, (one, two)):
        await pulled(one, REPO)
        wire.spoil = lambda by, asked, right: right if asked.what == "have" and answer == b'["AAAA"]' else answer
        async with asyncio.timeout(60):
            await pulled(two, REPO)
        assert whole(two)
        assert hub.served_bytes == 2 * len(BODY)


async def test_while_the_hub_is_away_peers_are_enough(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "ab", hub.url) as (_, (one, two)):
        await pulled(one, REPO, "chat")
        await one.take_file(DEMO, "own")
        hub.faults.append(Fault("unavailable"))
        with pytest.raises(Unavailable, match="503"):
            await pulled(two, "org/other")
        hub.faults.append(Fault("unavailable"))
        await pulled(two, f"hf:{REPO}/{FILE}")
        assert two.show("chat").model.sha256 == SHA256
        await pulled(two, "own")  # which no hub knows
        assert whole(two)
        assert two.show("own").model.source.startswith("file:")
        with pytest.raises(NotFound, match="Nor has a peer it"):
            await pulled(two, "nobodys")


async def test_who_waits_for_a_node_that_gives_up_fetches_it_itself(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, cdn), nodes(tmp_path, "ab", hub.url) as (_, (one, two)):
        cdn.faults.append(Fault("hang"))
        first = one.pull(REPO)
        async with asyncio.timeout(60):
            async for step in first:
                if step.status == "downloading":
                    break
            second = asyncio.create_task(pulled(two, REPO))
            async for step in two.pull(REPO):
                if "waiting" in step.status:
                    break
            cdn.faults.clear()
            await first.aclose()
            await second
        assert whole(two)


async def test_a_full_disk_ends_a_transfer_with_numbers(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), nodes(tmp_path, "ab", hub.url) as (_, (one, two)):
        await pulled(one, REPO)
        two.store._free = lambda _: HEADROOM_BYTES
        with pytest.raises(NoSpace, match="stay free for the ledger"):
            await pulled(two, REPO)
        looks = iter([PLENTY])
        two.store._free = lambda _: next(looks, HEADROOM_BYTES)
        with pytest.raises(NoSpace):
            await pulled(two, REPO)
        assert not two.list()
        assert hub.served_bytes == len(BODY)


async def test_questions_that_are_none_are_refused(tmp_path: Path) -> None:
    async with nodes(tmp_path, "a") as (_, (one,)):
        assert one.lan is not None
        for body in (b"", b"{}", b'{"what": "piece", "sha256": "../../x"}', b'{"what": "piece", "number": -1}'):
            with pytest.raises(UserError, match="not valid"):
                await anext(one.lan.serve(body))
        for question in (Question("piece", SHA256), Question("digests", SHA256)):
            with pytest.raises(PiclusterError):
                await anext(one.lan.serve(msgspec.json.encode(question)))
        await one.take_file(DEMO, "m")
        with pytest.raises(NotFound, match="piece 4000"):
            await anext(one.lan.serve(msgspec.json.encode(Question("piece", SHA256, 4000))))


def test_what_a_node_has_is_one_bit_a_piece() -> None:
    going = swarm.Going(done=0b1000000001, asked=0b100, digests=(b"",) * 10)
    assert going.has() == Has(pieces=b"\x01\x02", coming=b"\x04\x00")
    assert swarm.Going(from_hub=5, claimed=True).has() == Has(fetching=5)
    assert swarm.Going().has() == Has()
    assert [swarm._some_bit(0b1001000, start) for start in (0, 3, 4, 6, 7, 90)] == [3, 3, 6, 6, 3, 3]
