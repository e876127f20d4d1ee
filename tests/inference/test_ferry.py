"""Two nodes with a real child each, on a pretend link that may lie, stall and die: what is fetched, and what is read.

The receiving board is told that it reads slowly; else a model of this size would always be read, and is (see below).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec
import pytest

from piclusterd.cluster import identity
from piclusterd.cluster.links import Links
from piclusterd.errors import Overloaded, PiclusterError, Refused, Unavailable, UserError
from piclusterd.events import Event
from piclusterd.ids import NodeId
from piclusterd.inference import ferry
from piclusterd.inference.ferry import REQUEST, Ferry
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import ChatMessage, Done, GenerateRequest, decode, encode
from piclusterd.inference.states import Ask, Offer
from piclusterd.web.node_headers import end_headers
from piclusterd.wire import Dropped, Facts
from tests.cluster.test_identity import member

from .rig import DEMO, NAME, READY_S, collected, pool_of, spec

THERE = NodeId("2" * 16)
PLENTY = 2**27
SLOW_TPS = 5.0
SHARED = "Title: Crash\n\n" + "".join(f"The editor crashes when file {number} is saved. " for number in range(40))
"""Some 500 tokens. What the demo model says of them has no close call: the second best is always far behind."""


def chat(text: str) -> GenerateRequest:
    return GenerateRequest(NAME, messages=(ChatMessage("user", text),), max_tokens=16, temperature=0.0)


FIRST, SECOND, THIRD = (chat(SHARED + end) for end in ("Why?", "Since when?", "So?"))

Chunks = AsyncGenerator[bytes, None]
Spoil = Callable[[int, bytes], bytes]
"""Number and bytes of a chunk of an answer → what comes of it."""


class Link:
    """What one node asks of the other; `spoil` may change a chunk, or raise."""

    def __init__(self) -> None:
        self.there: Ferry | None = None
        self.spoil: Spoil = lambda number, chunk: chunk
        self.asked = 0
        self.got = 0

    async def request(self, peer: NodeId, name: str, body: bytes, timeout_s: float) -> Chunks:
        assert (peer, name) == (THERE, REQUEST)
        assert self.there is not None
        self.asked += 1
        number = 0
        async with aclosing(self.there.serve(body)) as messages:
            async for message in messages:
                for at in range(0, len(message), 65_536):
                    chunk = self.spoil(number, message[at : at + 65_536])
                    number += 1
                    self.got += len(chunk)
                    if chunk:
                        yield chunk


@asynccontextmanager
async def two(here_bytes: int = PLENTY, there_bytes: int = PLENTY) -> AsyncIterator[Two]:
    """pi-1, which reads slowly, and pi-2, which has answered FIRST."""
    async with pool_of([spec()]) as there, pool_of([spec()]) as here:
        yield await Two.made(there, here, here_bytes, there_bytes)


class Two:
    link: Link
    there: Pool
    here: Pool
    computed: str
    """What pi-2 answers to SECOND."""
    ferry: Ferry

    @classmethod
    async def made(cls, there: Pool, here: Pool, here_bytes: int, there_bytes: int) -> Two:
        two = cls()
        two.link, two.there, two.here = Link(), there, here

        async def others() -> list[tuple[NodeId, Facts]]:
            return [(THERE, Facts(name="pi-2", models=there.facts()))]

        async def nobody() -> list[tuple[NodeId, Facts]]:
            return []

        two.link.there = Ferry(there, nobody, two.link.request, there_bytes)
        two.ferry = Ferry(here, others, two.link.request, here_bytes)
        await asyncio.gather(two.link.there.known(NAME), two.ferry.known(NAME))
        await collected(there.generate(NAME, FIRST))
        two.computed, _ = await collected(there.generate(NAME, SECOND))
        two.slow()
        return two

    def slow(self) -> None:
        served = self.here.served(NAME)
        assert served is not None
        served.prefill.value = SLOW_TPS

    async def ask(self, request: GenerateRequest = SECOND) -> tuple[str, Done]:
        return await collected(self.here.generate(NAME, request))


async def test_a_beginning_that_another_node_has_read_is_fetched_and_changes_no_answer() -> None:
    async with two() as nodes:
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert len(text) > 30
        assert done.shipped is not None
        assert done.shipped.peer == "pi-2"
        assert done.shipped.tokens >= done.prompt_tokens - 12
        assert done.shipped.bytes < nodes.link.got < done.shipped.bytes + 1000
        assert done.cached_tokens >= done.prompt_tokens - 12
        assert end_headers(done, 1.0)["X-Picluster-Shipped"] == (
            f"from=pi-2; tokens={done.shipped.tokens}; bytes={done.shipped.bytes}; ms={done.shipped.ms}"
        )
        nodes.slow()
        again = (await nodes.ask(THIRD))[1]
        assert again.shipped is None  # it is here now
        assert again.cached_tokens > 400
        assert nodes.link.asked == 1


async def test_a_board_that_reads_faster_than_a_link_carries_asks_nobody() -> None:
    async with two() as nodes:
        served = nodes.here.served(NAME)
        assert served is not None
        served.prefill.value = 5000.0  # a tiny model, as it is
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert (done.shipped, done.cached_tokens, nodes.link.asked) == (None, 0, 0)
        assert "X-Picluster-Shipped" not in end_headers(done, 1.0)


@pytest.mark.parametrize("side", ["here", "there", "small here", "small there"])
async def test_states_larger_than_either_node_allows_stay_where_they_are(side: str) -> None:
    limits = {"here": (0, PLENTY), "there": (PLENTY, 0), "small here": (1000, PLENTY), "small there": (PLENTY, 1000)}
    async with two(*limits[side]) as nodes:
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert done.shipped is None
        assert nodes.link.asked == (1 if "there" in side else 0)


def changed(at: int, to: Callable[[bytes], bytes]) -> Spoil:
    return lambda number, chunk: to(chunk) if number == at else chunk


def offer_with(**fields: object) -> Spoil:
    def to(chunk: bytes) -> bytes:
        offer = decode(chunk, Offer)
        assert isinstance(offer, Offer)
        return encode(msgspec.structs.replace(offer, **fields))

    return changed(0, to)


def dies(number: int, chunk: bytes) -> bytes:
    if number == 3:
        raise ConnectionResetError("the link is gone")
    return chunk


BAD: dict[str, Spoil] = {
    "a bit of it is another": changed(2, lambda chunk: chunk[:99] + bytes([chunk[99] ^ 1]) + chunk[100:]),
    "its hash is another": offer_with(sha256=b"\2" * 32),
    "another model": offer_with(key=b"\3" * 32),
    "cut short": lambda number, chunk: chunk if number < 3 else b"",
    "more than announced": lambda number, chunk: chunk + b"x" if number == 2 else chunk,
    "larger than allowed": offer_with(size=2**30),
    "more tokens than asked for": offer_with(tokens=5000),
    "no offer": changed(0, lambda chunk: b"junk"),
    "nothing": lambda number, chunk: b"",
    "its node dies": dies,
}


@pytest.mark.parametrize("what", list(BAD))
async def test_whatever_is_wrong_with_a_state_the_prompt_is_read_here(what: str) -> None:
    async with two() as nodes:
        nodes.link.spoil = BAD[what]
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert (done.shipped, done.cached_tokens) == (None, 0)
        nodes.link.spoil = lambda number, chunk: chunk
        nodes.slow()
        assert (await nodes.ask(chat(SHARED[:-30])))[1].shipped is None
        assert nodes.link.asked == 1  # who failed is left alone


async def test_a_child_that_gives_a_state_and_dies_costs_the_other_node_nothing() -> None:
    async with two() as nodes:
        pid = nodes.there.pid(NAME)
        assert pid is not None

        def kill(number: int, chunk: bytes) -> bytes:
            if number == 0:
                os.kill(pid, signal.SIGKILL)
            return chunk

        nodes.link.spoil = kill
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert done.reason in ("stop", "length")


async def test_a_peer_that_says_nothing_is_waited_for_no_longer_than_reading_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ferry, "BRING_S_MAX", 0.2)
    async with two() as nodes:

        async def silence(peer: NodeId, name: str, body: bytes, timeout_s: float) -> Chunks:
            nodes.link.asked += 1
            await asyncio.Event().wait()
            yield b""

        nodes.ferry._request = silence
        text, done = await nodes.ask()
        assert text == nodes.computed
        assert (done.shipped, nodes.link.asked) == (None, 1)


async def test_a_beginning_that_is_not_there_any_more_is_no_reason_to_leave_a_peer_alone() -> None:
    async with two() as nodes:
        stale = nodes.there.facts()
        nodes.there.facts = lambda: stale  # type: ignore[method-assign]  # gossip of a child that was
        pid, changes = nodes.there.pid(NAME), nodes.there._served[NAME]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while nodes.there.pid(NAME) in (pid, None):
                changes._changed.clear()
                await changes._changed.wait()
        assert (await nodes.ask(FIRST))[1].shipped is None
        assert nodes.link.asked == 1
        assert nodes.ferry._failed == {}


async def test_two_that_begin_alike_fetch_it_once() -> None:
    async with two() as nodes:
        both = await asyncio.gather(nodes.ask(), nodes.ask(THIRD))
        assert nodes.link.asked == 1
        assert [done.shipped is None for _, done in both].count(False) == 1
        assert min(done.cached_tokens for _, done in both) > 400
        assert both[0][0] == nodes.computed


async def given(side: Ferry, ask: Ask | bytes) -> PiclusterError:
    body = ask if isinstance(ask, bytes) else encode(ask)
    async with aclosing(side.serve(body)) as messages:
        with pytest.raises(PiclusterError) as caught:
            await anext(messages)
    return caught.value


async def test_only_a_question_about_this_very_model_build_and_settings_is_answered() -> None:
    async with two() as nodes:
        assert nodes.link.there is not None
        served = nodes.here.served(NAME)
        assert served is not None
        key = nodes.ferry.key(served)
        assert key is not None
        right = Ask(NAME, key, bytes(4 * 10), 1, PLENTY)
        assert served.ready is not None
        served.ready = msgspec.structs.replace(served.ready, state_key="llama-cpp-python 0.3.35, f16")
        other_build = nodes.ferry.key(served)
        assert other_build is not None
        assert isinstance(await given(nodes.link.there, msgspec.structs.replace(right, key=other_build)), Refused)
        assert isinstance(await given(nodes.link.there, msgspec.structs.replace(right, key=b"\0" * 32)), Refused)
        assert (await given(nodes.link.there, msgspec.structs.replace(right, model="qwen"))).status == 404
        assert (await given(nodes.link.there, msgspec.structs.replace(right, tokens=b"\0" * 7))).status == 400
        assert isinstance(await given(nodes.link.there, b"\xff junk"), UserError)
        nodes.link.there._giving = ferry.GIVING_MAX
        assert isinstance(await given(nodes.link.there, right), Overloaded)
        text, done = await nodes.ask()
        assert (text, done.shipped) == (nodes.computed, None)


async def test_while_a_file_is_being_hashed_nothing_is_given_or_taken() -> None:
    async with pool_of([spec()]) as pool:

        async def nobody() -> list[tuple[NodeId, Facts]]:
            return []

        side = Ferry(pool, nobody, Link().request, PLENTY)
        assert isinstance(await given(side, Ask(NAME, b"\0" * 32, b"", 1, 1)), Overloaded)
        await side.known(NAME)
        assert isinstance(await given(side, Ask(NAME, b"\0" * 32, b"", 1, 1)), Refused)
        await side.known("nobody's")


async def test_gossip_tells_what_a_state_costs_once_the_file_is_known_and_how_fast_one_came() -> None:
    async with two() as nodes:
        (before,), (there,) = nodes.here.facts(), nodes.there.facts()
        assert (before.states_max, before.states_bps) == (PLENTY, 0.0)
        assert before.token_bytes == there.token_bytes == 2 * 4 * 320
        shipped = (await nodes.ask())[1].shipped
        assert shipped is not None
        (after,) = nodes.here.facts()
        assert after.states_bps >= shipped.bytes / (shipped.ms / 1000)
    async with two(here_bytes=0) as nodes:
        assert nodes.here.facts()[0].token_bytes == 0


async def test_a_file_that_nobody_needed_to_know_is_not_hashed_to_tell_of_it() -> None:
    async with pool_of([spec()]) as pool:
        side = Ferry(pool, list_of_none, Link().request, PLENTY)
        assert pool.facts()[0].token_bytes == 0
        assert not side._hashing


async def list_of_none() -> list[tuple[NodeId, Facts]]:
    return []


async def test_an_asker_that_leaves_in_the_midst_leaves_no_state_behind() -> None:
    async with two() as nodes:
        assert nodes.link.there is not None
        served, child = nodes.here.served(NAME), nodes.there._served[NAME].child
        assert served is not None
        assert child is not None
        key = nodes.ferry.key(served)
        assert key is not None
        looked = await child.look(SECOND)
        async with aclosing(nodes.link.there.serve(encode(Ask(NAME, key, looked.tokens, 1, PLENTY)))) as messages:
            offer = decode(await anext(messages), Offer)
            assert not isinstance(offer, Dropped)
            assert await anext(messages)
        with pytest.raises(PiclusterError):  # the first id that this child gave away is free again
            await child.take(child.berth() - 1, 0)
        assert nodes.link.there._giving == 0


async def test_a_model_without_such_states_is_asked_for_none() -> None:
    async with two() as nodes:
        served = nodes.here.served(NAME)
        assert served is not None
        assert served.ready is not None
        served.ready = msgspec.structs.replace(served.ready, state_key="")
        text, done = await nodes.ask()
        assert (text, done.shipped, nodes.link.asked) == (nodes.computed, None, 0)
        assert nodes.ferry.key(served) is None


async def test_a_file_of_the_store_is_known_by_its_name_and_an_adapter_makes_it_another_model() -> None:
    digest = "ab" * 32
    blob = replace(spec(), path=DEMO.parent / f"sha256-{digest}")
    assert await ferry._content(blob) == digest
    assert await ferry._content(replace(blob, adapter=DEMO)) == f"{digest} {await ferry._content(spec())}"


async def test_the_way_there_may_be_gone() -> None:
    async with two() as nodes:

        async def no_link(peer: NodeId, name: str, body: bytes, timeout_s: float) -> Chunks:
            if peer == THERE:
                raise Unavailable("no link")
            yield b""

        nodes.ferry._request = no_link
        assert (await nodes.ask())[0] == nodes.computed


async def test_over_a_link_of_mutual_tls_a_state_comes_whole(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "1", "home", "pi-2")
    second = member(tmp_path, first, "pi-1")
    async with two() as nodes:
        giver = nodes.link.there
        assert giver is not None
        up = asyncio.Event()

        async def note(event: Event) -> None:
            up.set()

        def serve(peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
            assert (peer, name) == (second.node, REQUEST)
            return giver.serve(body)

        there, here = Links(first, note, serve, Random(1)), Links(second, note, serve, Random(2))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(there.close)
            stack.push_async_callback(here.close)
            await here.start("127.0.0.1", 0)
            here.dial(f"127.0.0.1:{await there.start('127.0.0.1', 0)}")
            async with asyncio.timeout(READY_S):
                while first.node not in here.peers():
                    up.clear()
                    await up.wait()

            async def others() -> list[tuple[NodeId, Facts]]:
                return [(first.node, Facts(name="pi-2", models=nodes.there.facts()))]

            side = Ferry(nodes.here, others, here.request, PLENTY)
            await side.known(NAME)
            text, done = await nodes.ask()
        assert text == nodes.computed
        assert done.shipped is not None
        assert done.cached_tokens > 450
