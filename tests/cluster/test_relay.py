"""Relayed links: real nodes over loopback of which two never dial each other; and a relay that cheats."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import WSMsgType

from piclusterd.cluster import identity, relay
from piclusterd.cluster.frames import CHUNK_BYTES_MAX, CIRCUIT_BYTES, Wish, encode_body
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.link import Link
from piclusterd.cluster.tunnel import Circuit, Tunnel
from piclusterd.errors import Overloaded, Refused, Unavailable, UserError
from piclusterd.events import LinkDown, LinkUp, Received
from piclusterd.ids import NodeId
from piclusterd.wire import Nack
from tests.cluster.test_identity import member
from tests.cluster.test_links import PATIENCE_S, Node, collect, running

SECRET = b"the lights are out at half past nine"


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Node, Node, Node]:
    """Two ends and the one in the middle; the first has the lower id, so it opens the circuit."""
    founder = identity.create_cluster(tmp_path / "1", "home", "droplet")
    one, other = sorted((member(tmp_path, founder, "pi-2"), member(tmp_path, founder, "pi-3")), key=lambda me: me.node)
    return Node(one), Node(other), Node(founder)


@asynccontextmanager
async def met(one: Node, other: Node, middle: Node) -> AsyncIterator[None]:
    """`one` and `other` have dialled the droplet, and reach each other through it."""
    async with running(one, other, middle):
        for node in (one, other):
            node.links.dial(middle.address)
            await node.saw(LinkUp(middle.id))
            await middle.saw(LinkUp(node.id))
        other.links.reach([one.id])
        one.links.reach([other.id])
        await one.saw(LinkUp(other.id))
        await other.saw(LinkUp(one.id))
        yield


async def test_two_nodes_without_a_way_to_each_other_meet_through_a_third(nodes: tuple[Node, Node, Node]) -> None:
    one, other, middle = nodes
    async with met(*nodes):
        assert one.links.peers()[other.id].path == "relayed by droplet"
        assert other.links.peers()[one.id].path == "relayed by droplet"
        for number in range(100):
            assert one.links.send(other.id, Nack(number))
            assert other.links.send(one.id, Nack(number))
        await other.saw(Received(one.id, Nack(99)))
        await one.saw(Received(other.id, Nack(99)))
        assert [e for e in other.events if isinstance(e, Received)] == [Received(one.id, Nack(n)) for n in range(100)]
        assert middle.links.relaying[0] == 1
        assert middle.links.relaying[1] > 0
        assert one.events.count(LinkUp(other.id)) == 1


async def test_large_answers_pass_in_both_directions_and_control_overtakes_them(
    nodes: tuple[Node, Node, Node],
) -> None:
    one, other, _ = nodes
    async with met(*nodes), asyncio.timeout(PATIENCE_S):
        other.midway = lambda: other.links.send(one.id, Nack(7))
        there, back = await asyncio.gather(
            collect(one.links.request(other.id, "big", b"", 10)), collect(other.links.request(one.id, "big", b"", 10))
        )
        assert len(there) == len(back) == 5_000_000
        await one.saw(Received(other.id, Nack(7)))


async def test_an_answer_nobody_reads_is_not_piled_up_by_the_relay(nodes: tuple[Node, Node, Node]) -> None:
    one, other, middle = nodes
    async with met(*nodes):
        async with aclosing(one.links.request(other.id, "endless", b"", 10)) as unread:
            assert await anext(unread)
            other.links.send(one.id, Nack(1))
            await one.saw(Received(other.id, Nack(1)))
            assert await collect(one.links.request(middle.id, "echo", b"x", 10)) == b"x"
        await other.until(lambda: other.closed_streams == 1)


def relayed(node: Node) -> list[Link]:
    return [link for link in node.links._running if link.relay]


async def test_a_direct_link_takes_over_and_nobody_goes_down(nodes: tuple[Node, Node, Node]) -> None:
    one, other, middle = nodes
    async with met(*nodes), asyncio.timeout(PATIENCE_S):
        async with aclosing(one.links.request(other.id, "endless", b"", PATIENCE_S)) as streaming:
            assert await anext(streaming)
            other.links.dial(one.address)
            while not one.links.peers()[other.id].path.startswith("accepted"):
                await anext(streaming)
            for _ in range(1000):
                assert await anext(streaming), "what streamed over the relay goes on"
            assert len(relayed(one)) == len(relayed(other)) == 1
        while middle.links.relaying[0] or relayed(one) or relayed(other):
            await collect(one.links.request(middle.id, "echo", b"", 10))
        assert not [event for event in one.events + other.events if isinstance(event, LinkDown)]
        one.links.reach([other.id])
        assert other.links.peers()[one.id].path.startswith("dialled")


async def test_a_relayed_link_never_takes_the_place_of_a_direct_one(nodes: tuple[Node, Node, Node]) -> None:
    one, other, middle = nodes
    async with running(*nodes):
        one.links.dial(middle.address)
        other.links.dial(middle.address)
        one.links.dial(other.address)
        await one.saw(LinkUp(middle.id), LinkUp(other.id))
        await other.saw(LinkUp(middle.id), LinkUp(one.id))
        one.links.reach([other.id, middle.id])
        assert not one.links._relay._trying


async def test_when_the_relay_goes_the_ends_notice_and_find_another(
    nodes: tuple[Node, Node, Node], tmp_path: Path
) -> None:
    one, other, middle = nodes
    second = Node(member(tmp_path, middle.me, "droplet-2"))
    async with met(*nodes), running(second):
        for node in (one, other):
            node.links.dial(second.address)
            await node.saw(LinkUp(second.id))
        await second.saw(LinkUp(one.id), LinkUp(other.id))
        await middle.links.close()
        await one.saw(LinkDown(other.id))
        await other.saw(LinkDown(one.id))
        one.links.reach([other.id])
        await one.until(lambda: one.events.count(LinkUp(other.id)) == 2)
        assert one.links.peers()[other.id].path == "relayed by droplet-2"


async def test_what_is_relayed_is_not_relayed_again(nodes: tuple[Node, Node, Node]) -> None:
    """`middle` is linked with `one`; `other` reaches `one` through it, and may not pass that on."""
    one, other, middle = nodes
    async with met(*nodes):
        wish = encode_body(Wish(middle.id, bytes(CIRCUIT_BYTES)))
        with pytest.raises(Refused, match="one hop"):
            await collect(one.links.request(other.id, "relay", wish, 10))
        with pytest.raises(Refused, match="one hop"):
            await collect(one.links.request(other.id, "relayed", wish, 10))
        with pytest.raises(Unavailable, match="not linked here"):
            await collect(
                one.links.request(middle.id, "relay", encode_body(Wish(NodeId("0" * 16), bytes(CIRCUIT_BYTES))), 10)
            )
        with pytest.raises(UserError, match="not a wish"):
            await collect(one.links.request(middle.id, "relay", b"junk", 10))


async def test_a_relay_that_has_enough_says_so(nodes: tuple[Node, Node, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, middle = nodes
    async with met(*nodes):
        monkeypatch.setattr(relay, "PIPES_A_PEER_MAX", 1)
        wish = encode_body(Wish(other.id, bytes(CIRCUIT_BYTES)))
        with pytest.raises(Overloaded, match="relays enough"):
            await collect(one.links.request(middle.id, "relay", wish, 10))
        monkeypatch.setattr(relay, "CIRCUITS_MAX", 1)
        with pytest.raises(Overloaded, match="enough relayed links"):
            await collect(middle.links.request(other.id, "relayed", wish, 10))


async def test_a_denied_node_is_not_reached_through_others_either(nodes: tuple[Node, Node, Node]) -> None:
    one, other, _ = nodes
    async with met(*nodes):
        other.links.deny([one.id])
        await one.saw(LinkDown(other.id))
        one.links.reach([other.id])
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*one.links._relay._trying.values())
        assert other.id not in one.links.peers()
        assert other.events.count(LinkUp(one.id)) == 1


# a relay that cheats -------------------------------------------------------------------------------------------------
Cheat = Callable[[bytes], list[bytes]]


class Wire:
    """The relay between two circuits, and all that it saw. `cheat`: what it makes of each piece on its way."""

    def __init__(self) -> None:
        self.seen = b""
        self.cheat: Cheat = lambda piece: [piece]
        self.circuits: dict[str, Circuit] = {}
        self.circuits = {name: Circuit(self._pipe(other)) for name, other in (("a", "b"), ("b", "a"))}

    async def _pipe(self, source: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.circuits[source].outgoing()) as pieces:
            async for piece in pieces:
                self.seen += piece
                for altered in self.cheat(piece):
                    yield altered


@asynccontextmanager
async def tunnels(wire: Wire, client: ssl.SSLContext, server: ssl.SSLContext) -> AsyncIterator[tuple[Tunnel, Tunnel]]:
    a, b = Tunnel(wire.circuits["a"], client, server=False), Tunnel(wire.circuits["b"], server, server=True)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(a.handshake(), b.handshake())
            yield a, b
    finally:
        wire.circuits["a"].shut()
        wire.circuits["b"].shut()


async def hear(tunnel: Tunnel) -> list[bytes]:
    """Every frame until the end."""
    heard: list[bytes] = []
    while (message := await tunnel.receive()).type is WSMsgType.BINARY:
        heard.append(message.data)
    return heard


async def test_the_relay_sees_no_word_of_what_passes(nodes: tuple[Node, Node, Node]) -> None:
    wire, (one, other, _) = Wire(), nodes
    async with tunnels(wire, one.me.client_context(), other.me.server_context()) as (a, b):
        telling = asyncio.create_task(a.send_bytes(SECRET))
        assert (await b.receive()).data == SECRET
        await telling
        assert one.me.peer_of(a.get_extra_info("ssl_object").getpeercert(binary_form=True)) == other.id
        assert one.me.peer_of(b.get_extra_info("ssl_object").getpeercert(binary_form=True)) == one.id
        assert len(wire.seen) > 1000
        assert SECRET not in wire.seen
        closing = asyncio.create_task(a.close(code=4004, message=b"bye"))
        end = await b.receive()
        await closing
        assert (end.type, b.close_code, end.extra) == (WSMsgType.CLOSE, 4004, "bye")


def flipped(piece: bytes) -> list[bytes]:
    return [piece[:-1] + bytes([piece[-1] ^ 1])]


@pytest.mark.parametrize(
    "cheat",
    [flipped, lambda piece: [piece, piece], lambda piece: [piece[:3] + b"x" + piece[3:]], lambda piece: [SECRET]],
    ids=["flips a bit", "repeats", "inserts", "invents"],
)
async def test_what_the_relay_forges_ends_the_tunnel_and_is_never_heard(
    nodes: tuple[Node, Node, Node], cheat: Cheat
) -> None:
    wire, (one, other, _) = Wire(), nodes
    async with tunnels(wire, one.me.client_context(), other.me.server_context()) as (a, b):
        telling = asyncio.create_task(a.send_bytes(b"before"))
        assert (await b.receive()).data == b"before"
        await telling
        wire.cheat = cheat
        telling = asyncio.create_task(a.send_bytes(SECRET))
        assert set(await hear(b)) <= {SECRET}, "a repeated record may have been whole the first time"
        wire.circuits["a"].shut()
        await asyncio.gather(telling, return_exceptions=True)


async def test_a_relay_that_answers_in_anothers_name_gets_no_link(nodes: tuple[Node, Node, Node]) -> None:
    wire, (one, other, middle) = Wire(), nodes
    async with met(*nodes):
        via = one.links._links[middle.id]
        impostor = Tunnel(wire.circuits["b"], middle.me.server_context(), server=True)
        answering = asyncio.create_task(impostor.handshake())
        with pytest.raises(Refused, match="at the far side"):
            await one.links._dial_relayed(other.id, wire.circuits["a"], via)
        await asyncio.gather(answering, return_exceptions=True)


async def test_a_stranger_at_the_far_side_gets_no_link(nodes: tuple[Node, Node, Node], tmp_path: Path) -> None:
    foreign: Identity = identity.create_cluster(tmp_path / "foreign", "home", "pi-1")
    wire, (one, other, middle) = Wire(), nodes
    async with met(*nodes):
        stranger = Tunnel(wire.circuits["b"], foreign.server_context(), server=True)
        answering = asyncio.create_task(stranger.handshake())
        with pytest.raises(ssl.SSLError):
            await one.links._dial_relayed(other.id, wire.circuits["a"], one.links._links[middle.id])
        await asyncio.gather(answering, return_exceptions=True)


async def test_a_record_beyond_the_cap_ends_the_tunnel(nodes: tuple[Node, Node, Node]) -> None:
    wire, (one, other, _) = Wire(), nodes
    async with tunnels(wire, one.me.client_context(), other.me.server_context()) as (a, b):
        a._tls.write(b"\x7f\xff\xff\xff" + bytes(CHUNK_BYTES_MAX // 64))
        telling = asyncio.create_task(a._flush())
        end = await b.receive()
        assert (end.type, end.extra) == (WSMsgType.CLOSED, "a record of 2147483647 bytes")
        assert (await b.receive()).type is WSMsgType.CLOSED
        await telling
