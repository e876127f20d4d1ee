"""Real links over loopback. The waits below end on events; the timeouts only bound a failure."""

import asyncio
import random
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from piclusterd import wire
from piclusterd.cluster import frames, identity
from piclusterd.cluster.door import HANDSHAKES_AN_ADDRESS_MAX
from piclusterd.cluster.frames import CHUNK_BYTES_MAX, WINDOW_BYTES, Frame, Hello, Kind
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.link import DUPLICATE, REFUSED, VERSION, VIOLATION, Timing
from piclusterd.cluster.links import Links
from piclusterd.errors import Broken, NotFound, Unavailable, UserError
from piclusterd.events import Event, LinkDown, LinkUp, Received
from piclusterd.ids import NodeId
from piclusterd.wire import Dropped, Nack
from tests.cluster.test_identity import member

PATIENCE_S = 20.0
QUICK = Timing(
    ping_idle_s=0.05, silent_s=0.2, retire_s=0.05, backoff_first_s=0.01, backoff_max_s=0.05, direct_first_s=0.0
)
CALM = Timing(backoff_first_s=0.01, backoff_max_s=0.05, retire_s=0.05, direct_first_s=0.0)


class Node:
    """A node's links, with everything they posted and a small set of requests it serves."""

    def __init__(self, me: Identity, timing: Timing = CALM, protocols: tuple[int, int] = wire.PROTOCOLS) -> None:
        self.me, self.id = me, me.node
        self.events: list[Event] = []
        self.closed_streams = 0
        self._changed = asyncio.Condition()
        self.links = Links(
            me, self.post, self.serve, random.Random(me.node), ("10.0.0.1:7946",), timing=timing, protocols=protocols
        )
        self.midway: Callable[[], object] = lambda: None
        self.address = ""

    async def post(self, event: Event) -> None:
        async with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    async def until(self, wanted: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(wanted)

    async def saw(self, *events: Event) -> None:
        await self.until(lambda: all(event in self.events for event in events))

    async def serve(self, peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
        try:
            match name:
                case "echo":
                    yield body
                case "big":
                    for number in range(50):
                        if number == 25:
                            self.midway()
                        yield bytes([number]) * 100_000
                case "endless":
                    while True:
                        yield b"x" * 1000
                case "stuck":
                    yield b"first"
                    await asyncio.Event().wait()
                case "absent":
                    raise NotFound("no such model", "it is not here.", "Pull it.")
                case "faulty":
                    yield b"half"
                    raise RuntimeError("a bug")
                case _:
                    raise NotFound(name)
        finally:
            async with self._changed:
                self.closed_streams += 1
                self._changed.notify_all()


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    try:
        for node in nodes:
            node.address = f"127.0.0.1:{await node.links.start('127.0.0.1', 0)}"
        yield
    finally:
        for node in nodes:
            await node.links.close()
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task() and "Link" in repr(t.get_coro())]
        assert not left


@pytest.fixture
def ids(tmp_path: Path) -> tuple[Identity, Identity, Identity]:
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    return first, member(tmp_path, first, "pi-2"), member(tmp_path, first, "pi-3")


@pytest.fixture
async def pair(ids: tuple[Identity, Identity, Identity]) -> AsyncIterator[tuple[Node, Node]]:
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a, b):
        a.links.dial(b.address)
        await a.saw(LinkUp(b.id))
        await b.saw(LinkUp(a.id))
        yield a, b


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def until_it_breaks(
    chunks: AsyncIterator[bytes], got: list[bytes], after_each: Callable[[], Awaitable[None]] | None = None
) -> None:
    async for chunk in chunks:
        got.append(chunk)
        if after_each:
            await after_each()


async def test_control_messages_go_both_ways_in_order(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for number in range(100):
        assert a.links.send(b.id, Nack(number))
        assert b.links.send(a.id, Nack(number))
    await a.saw(Received(b.id, Nack(99)))
    await b.saw(Received(a.id, Nack(99)))
    assert b.events == [LinkUp(a.id), *(Received(a.id, Nack(n)) for n in range(100))]
    assert not a.links.send(NodeId("0" * 16), Nack(0))


async def test_the_largest_message_passes_and_a_larger_one_does_not_go(pair: tuple[Node, Node]) -> None:
    a, b = pair
    payload = bytes(wire.MESSAGE_BYTES_MAX - 100)
    assert a.links.send(b.id, wire.Batch((wire.Entry(b"h", payload),)))
    assert not a.links.send(b.id, wire.Batch((wire.Entry(b"h", payload + bytes(200)),)))
    await b.saw(Received(a.id, wire.Batch((wire.Entry(b"h", payload),))))


async def test_peers_are_described(pair: tuple[Node, Node]) -> None:
    a, b = pair
    info = a.links.peers()[b.id]
    assert info.path == f"dialled {b.address}"
    assert (info.name, info.addresses) == ("pi-2", ("10.0.0.1:7946",))
    assert b.links.peers()[a.id].path == "accepted from 127.0.0.1"


async def test_a_link_that_is_closed_goes_down_and_comes_back(pair: tuple[Node, Node]) -> None:
    a, b = pair
    b.links.deny([a.id])
    await a.saw(LinkDown(b.id))
    await b.saw(LinkDown(a.id))
    assert a.id not in b.links.peers()
    b.links.deny([])
    await b.until(lambda: b.events.count(LinkUp(a.id)) == 2)
    await a.until(lambda: a.events.count(LinkUp(b.id)) == 2)


async def test_a_dialler_waits_for_a_node_that_comes_later(ids: tuple[Identity, Identity, Identity]) -> None:
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a):
        async with running(b):
            address = b.address
        a.links.dial(address)
        late = Node(ids[1])
        try:
            await late.links.start("127.0.0.1", int(address.rpartition(":")[2]))
            await a.saw(LinkUp(b.id))
        finally:
            await late.links.close()
        await a.saw(LinkDown(b.id))


async def test_dialling_twice_is_one_link(pair: tuple[Node, Node]) -> None:
    a, b = pair
    assert a.links.dial(b.address)
    assert a.links.dial(b.address.replace("127.0.0.1", "localhost"))
    assert b.links.dial(a.address)
    assert await collect(a.links.request(b.id, "echo", b"hello", 5)) == b"hello"
    assert a.events == [LinkUp(b.id)]
    assert len(a.links.peers()) == len(b.links.peers()) == 1


@pytest.mark.parametrize("round_", range(5))
async def test_both_dialling_at_once_end_with_the_same_link(
    ids: tuple[Identity, Identity, Identity], round_: int
) -> None:
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a, b):
        a.links.dial(b.address)
        b.links.dial(a.address)
        await a.saw(LinkUp(b.id))
        await b.saw(LinkUp(a.id))
        await settled(a, b)
        assert a.links.peers()[b.id].path.split()[0] != b.links.peers()[a.id].path.split()[0]
        a.links.send(b.id, Nack(round_))
        b.links.send(a.id, Nack(round_))
        await a.saw(Received(b.id, Nack(round_)))
        await b.saw(Received(a.id, Nack(round_)))
        assert not [e for e in a.events + b.events if isinstance(e, LinkDown)]
        assert a.events.count(LinkUp(b.id)) == b.events.count(LinkUp(a.id)) == 1


async def settled(a: Node, b: Node) -> None:
    """Until retired links are gone on both sides; requests in between keep the loop turning."""
    async with asyncio.timeout(PATIENCE_S):
        while any(node.links._asked or len(node.links._running) != 1 for node in (a, b)):
            try:
                await collect(a.links.request(b.id, "echo", b"x", 5))
            except Unavailable:
                pass  # it was on the link that retired


async def test_three_nodes_make_a_mesh(ids: tuple[Identity, Identity, Identity]) -> None:
    a, b, c = (Node(i) for i in ids)
    async with running(a, b, c):
        for node in (a, b, c):
            for other in (a, b, c):
                node.links.dial(other.address)
        for node in (a, b, c):
            await node.saw(*(LinkUp(other.id) for other in (a, b, c) if other is not node))
        assert all(node.id not in node.links.peers() for node in (a, b, c))


async def test_ones_own_address_is_forgotten(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0])
    async with running(a):
        assert a.links.dial(a.address)
        dialler = a.links._dialler._tasks[a.address]
        async with asyncio.timeout(PATIENCE_S):
            await dialler
        assert not a.links.dial(a.address)
        assert a.events == []


@pytest.mark.parametrize(
    "address", ["", "host", "host:0", "host:99999", "a b:1", "http://x:1", "u@h:1", "h:1/x", "::1:7"]
)
async def test_what_is_no_address_is_not_dialled(ids: tuple[Identity, Identity, Identity], address: str) -> None:
    a = Node(ids[0])
    async with running(a):
        assert not a.links.dial(address)


async def test_undialling_ends_the_link(pair: tuple[Node, Node]) -> None:
    a, b = pair
    a.links.undial(b.address)
    await b.saw(LinkDown(a.id))
    await a.saw(LinkDown(b.id))


# streams -------------------------------------------------------------------------------------------------------------
async def test_five_megabytes_pass_and_a_control_message_overtakes_them(pair: tuple[Node, Node]) -> None:
    a, b = pair
    b.midway = lambda: b.links.send(a.id, Nack(7))
    size, at_message = 0, 0
    async with aclosing(a.links.request(b.id, "big", b"", 10)) as chunks:
        async for chunk in chunks:
            assert len(chunk) <= CHUNK_BYTES_MAX
            size += len(chunk)
            if not at_message and Received(b.id, Nack(7)) in a.events:
                at_message = size
    assert size == 5_000_000
    # when it was sent 2.5 MB were made, of which at most a window was unread
    assert 2_500_000 - WINDOW_BYTES - CHUNK_BYTES_MAX <= at_message <= 2_500_000 + WINDOW_BYTES


async def test_an_unread_answer_stops_at_its_window_while_control_and_other_streams_pass(
    pair: tuple[Node, Node],
) -> None:
    a, b = pair
    async with aclosing(a.links.request(b.id, "endless", b"", 10)) as unread:
        assert await anext(unread)
        b.links.send(a.id, Nack(1))
        await a.saw(Received(b.id, Nack(1)))
        assert await collect(a.links.request(b.id, "echo", b"other", 10)) == b"other"
        streams = a.links._links[b.id]._streams
        assert [answer.held for answer in streams._asked.values() if answer.held <= WINDOW_BYTES]


async def test_many_answers_at_once_stay_apart(pair: tuple[Node, Node]) -> None:
    a, b = pair
    bodies = [bytes([n]) * (n * 3000 + 1) for n in range(60)]
    there = await asyncio.gather(*(collect(a.links.request(b.id, "echo", body, 10)) for body in bodies))
    back = await asyncio.gather(*(collect(b.links.request(a.id, "echo", body, 10)) for body in bodies))
    assert there == back == bodies


async def test_leaving_early_closes_the_generator_on_the_other_side(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for name in ("endless", "stuck"):
        before = b.closed_streams
        async with aclosing(a.links.request(b.id, name, b"", 10)) as chunks:
            assert await anext(chunks)
            assert b.closed_streams == before
        await b.until(lambda: b.closed_streams == before + 1)  # noqa: B023
    assert not a.links._links[b.id]._streams._asked
    assert LinkDown(b.id) not in a.events


async def test_cancelling_the_reader_closes_the_generator_on_the_other_side(pair: tuple[Node, Node]) -> None:
    a, b = pair
    began = asyncio.Event()

    async def read() -> None:
        async with aclosing(a.links.request(b.id, "stuck", b"", 10)) as chunks:
            async for _ in chunks:
                began.set()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        await began.wait()
    reader.cancel()
    await b.until(lambda: b.closed_streams == 1)


async def test_errors_of_the_other_side_arrive_as_themselves(pair: tuple[Node, Node]) -> None:
    a, b = pair
    with pytest.raises(NotFound, match=r"no such model: it is not here\. Pull it\."):
        await collect(a.links.request(b.id, "absent", b"", 10))
    got: list[bytes] = []
    with pytest.raises(Broken, match="the answer failed"):
        await until_it_breaks(a.links.request(b.id, "faulty", b"", 10), got)
    assert got == [b"half"]


async def test_no_link_silence_and_too_much_are_said(pair: tuple[Node, Node]) -> None:
    a, b = pair
    with pytest.raises(Unavailable, match="no link"):
        await collect(a.links.request(NodeId("0" * 16), "echo", b"", 10))
    with pytest.raises(Unavailable, match="nothing came"):
        await collect(a.links.request(b.id, "stuck", b"", 0.01))
    with pytest.raises(UserError, match="too long"):
        await collect(a.links.request(b.id, "echo", bytes(wire.MESSAGE_BYTES_MAX), 10))


async def test_a_peer_that_stops_midway_makes_the_request_unavailable(pair: tuple[Node, Node]) -> None:
    a, b = pair
    got: list[bytes] = []
    with pytest.raises(Unavailable, match="broke"):
        await until_it_breaks(a.links.request(b.id, "stuck", b"", 10), got, b.links.close)
    assert got == [b"first"]
    await a.saw(LinkDown(b.id))
    assert b.closed_streams == 1


_CHILD = """
import asyncio, random, sys
from pathlib import Path
from piclusterd.cluster import identity
from piclusterd.cluster.links import Links

async def main():
    async def on_event(event):
        pass
    async def serve(peer, name, body):
        yield b"first"
        await asyncio.Event().wait()
    links = Links(identity.load(Path(sys.argv[1])), on_event, serve, random.Random(1))
    print(await links.start("127.0.0.1", 0), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_process_is_noticed_at_once(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0])  # default timing: silence alone would take five seconds
    state = str(ids[1].directory.parent)
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", _CHILD, state, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    killed = 0.0

    async def kill() -> None:
        nonlocal killed
        killed = asyncio.get_running_loop().time()
        child.kill()

    try:
        async with asyncio.timeout(PATIENCE_S):
            port = int(await child.stdout.readline())
        async with running(a):
            a.links.dial(f"127.0.0.1:{port}")
            await a.saw(LinkUp(ids[1].node))
            with pytest.raises(Unavailable, match="broke"):
                await until_it_breaks(a.links.request(ids[1].node, "stuck", b"", 10), [], kill)
            await a.saw(LinkDown(ids[1].node))
            assert asyncio.get_running_loop().time() - killed < 1.0
    finally:
        if child.returncode is None and not killed:
            child.kill()
        await child.wait()


# liveness ------------------------------------------------------------------------------------------------------------
async def test_a_stall_of_our_own_kills_no_link(ids: tuple[Identity, Identity, Identity]) -> None:
    a, b = Node(ids[0], QUICK), Node(ids[1], QUICK)
    async with running(a, b):
        a.links.dial(b.address)
        await a.saw(LinkUp(b.id))
        for number in range(3):
            threading.Event().wait(3 * QUICK.silent_s)  # the stall under test: nothing on this loop runs
            a.links.send(b.id, Nack(number))
            await b.saw(Received(a.id, Nack(number)))
        assert LinkDown(b.id) not in a.events
        assert LinkDown(a.id) not in b.events


# strangers -----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def raw(address: str, tls: ssl.SSLContext) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls, force_close=True)) as session,
        session.ws_connect(f"https://{address}/link", max_msg_size=frames.FRAME_BYTES_MAX) as socket,
    ):
        yield socket


def hello_of(me: Identity, **changes: object) -> bytes:
    fields = {"lowest": 1, "highest": 1, "node": me.node, "cluster_id": me.cluster_id, "name": me.name, **changes}
    return frames.encode(Frame(0, Kind.HELLO, frames.encode_body(Hello(**fields))))  # type: ignore[arg-type]


async def closed_with(socket: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str]:
    """The code and words the other side closes with, whatever it says before."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                return socket.close_code, message.extra or ""


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (lambda me: b"junk", "not a hello"),
        (lambda me: frames.encode(Frame(0, Kind.PING, b"12345678")), "not a hello"),
        (lambda me: hello_of(me, cluster_id="other"), "of cluster other"),
        (lambda me: hello_of(me, node="0" * 16), "its certificate says"),
        (lambda me: hello_of(me, lowest=7, highest=9), "speaks protocol 7 to 9"),
        (lambda me: hello_of(me, name="x" * 65), "not a Hello"),
        (lambda me: hello_of(me, name="pi\n"), "not a Hello"),
        (lambda me: hello_of(me, addresses=("\x1b[2J:1",)), "not a Hello"),
        (None, "no hello came"),
    ],
)
async def test_a_hello_that_does_not_fit_gives_no_link(
    ids: tuple[Identity, Identity, Identity], first: Callable[[Identity], bytes] | None, words: str
) -> None:
    a = Node(ids[0], CALM if first else Timing(hello_s=0.05))
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        if first:
            await socket.send_bytes(first(ids[1]))
        code, why = await closed_with(socket)
        assert code == (VERSION if "protocol" in words else REFUSED)
        assert words in why
        assert a.events == []


async def test_adjacent_releases_form_one_cluster_and_the_next_but_one_is_told_what_to_do(
    ids: tuple[Identity, Identity, Identity], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer, newest = (
        Node(me, protocols=spoken) for me, spoken in zip(ids, ((1, 2), (2, 3), (3, 4)), strict=True)
    )
    async with running(older, newer, newest):
        older.links.dial(newer.address)
        newest.links.dial(newer.address)
        newest.links.dial(older.address)
        await older.saw(LinkUp(newer.id))
        await newer.saw(LinkUp(older.id), LinkUp(newest.id))
        async with raw(older.address, ids[2].client_context()) as socket:
            await socket.send_bytes(hello_of(ids[2], lowest=3, highest=4))
            assert await closed_with(socket) == (
                VERSION,
                "pi-3 speaks protocol 3 to 4, pi-1 speaks 1 to 2: upgrade this node to a release between the two first",
            )
        assert newest.id not in older.links.peers()
    assert [r for r in caplog.records if r.levelname == "WARNING" and "upgrade" in r.getMessage()]


async def test_a_stranger_who_begins_many_handshakes_is_kept_to_a_share(
    ids: tuple[Identity, Identity, Identity],
) -> None:
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a, b), asyncio.timeout(PATIENCE_S):
        host, _, port = a.address.partition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(HANDSHAKES_AN_ADDRESS_MAX)]
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await reader.read() == b"", "one too many is closed at once"
        assert not any(held.at_eof() for held, _ in silent), "the others have their time"
        writer.close()
        for _, held in silent:
            held.close()
        b.links.dial(a.address)
        await b.saw(LinkUp(a.id))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xc1", "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (b"\x93\x00\x63\xc4\x00", "not a frame"),
        (frames.encode(Frame(3, Kind.CONTROL, b"")), "CONTROL on stream 3"),
        (frames.encode(Frame(2, Kind.OPEN, frames.encode_body(frames.Request("echo", b"")))), "not its next"),
        (frames.encode(Frame(1, Kind.OPEN, b"junk")), "not msgpack"),
        (frames.encode(Frame(1, Kind.CREDIT, b"\xff\xff\xff\xff")), "a credit of"),
        (frames.encode(Frame(1, Kind.DATA, bytes(CHUNK_BYTES_MAX + 1))), "over the cap"),
        (frames.encode(Frame(0, Kind.HELLO, b"")), "a second hello"),
    ],
)
async def test_junk_ends_its_link_and_nothing_else(
    ids: tuple[Identity, Identity, Identity], data: bytes, words: str
) -> None:
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a, b), raw(a.address, ids[2].client_context()) as socket:
        a.links.dial(b.address)
        await a.saw(LinkUp(b.id))
        await socket.send_bytes(hello_of(ids[2]))
        await a.saw(LinkUp(ids[2].node))
        await socket.send_bytes(data)
        code, why = await closed_with(socket)
        assert code == VIOLATION
        assert words in why
        await a.saw(LinkDown(ids[2].node))
        assert await collect(a.links.request(b.id, "echo", b"fine", 5)) == b"fine"
        assert LinkDown(b.id) not in a.events


async def test_a_message_of_a_newer_release_is_dropped_and_the_link_stays(
    ids: tuple[Identity, Identity, Identity],
) -> None:
    a = Node(ids[0])
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        await socket.send_bytes(hello_of(ids[1]))
        await socket.send_bytes(frames.encode(Frame(0, Kind.CONTROL, b"\x91\xa6future")))
        await socket.send_bytes(frames.encode(Frame(0, Kind.CONTROL, wire.encode(Nack(5)))))
        await a.saw(Received(ids[1].node, Nack(5)))
        assert a.events == [LinkUp(ids[1].node), Received(ids[1].node, Nack(5))]


@pytest.mark.parametrize("packs", [False, True])
async def test_frames_that_wait_share_a_message_where_the_peer_reads_that(
    ids: tuple[Identity, Identity, Identity], packs: bool
) -> None:
    a, peer = Node(ids[0], Timing(ping_idle_s=60)), ids[1].node
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        await socket.send_bytes(hello_of(ids[1], packs=packs))
        await a.saw(LinkUp(peer))
        for number in range(3):
            assert a.links.send(peer, Nack(number))
        came: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(frames.decode((await socket.receive()).data), Frame), "the hello comes alone"
            while sum(came) < 3:
                told = frames.decode_all((await socket.receive()).data)
                assert not isinstance(told, Dropped)
                came.append(sum(frame.kind is Kind.CONTROL for frame in told))
        assert max(came) > 1 if packs else came == [1, 1, 1]


async def test_round_trips_are_measured(ids: tuple[Identity, Identity, Identity]) -> None:
    a, peer = Node(ids[0], Timing(ping_idle_s=0.01)), ids[1].node
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        await socket.send_bytes(hello_of(ids[1]))
        async with asyncio.timeout(PATIENCE_S):
            while a.links._links.get(peer) is None or a.links.peers()[peer].rtt_s is None:
                frame = frames.decode((await socket.receive()).data)
                assert not isinstance(frame, Dropped)
                if frame.kind is Kind.PING:
                    await socket.send_bytes(frames.encode(Frame(0, Kind.PONG, frame.body)))
        rtt = a.links.peers()[peer].rtt_s
        assert rtt is not None
        assert 0 < rtt < 5


async def test_a_hint_that_leads_nowhere_is_given_up(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0], Timing(backoff_first_s=0.0001, backoff_max_s=0.001))
    async with running(a):
        async with running(gone := Node(ids[2])):
            pass
        assert a.links.dial(gone.address, hint=True)
        dialler = a.links._dialler._tasks[gone.address]
        async with asyncio.timeout(PATIENCE_S):
            await dialler
        assert gone.address not in a.links._dialler._tasks
        assert a.links.dial(gone.address, hint=True)


async def test_a_silent_peer_is_given_up(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0], QUICK)
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        await socket.send_bytes(hello_of(ids[1]))
        await a.saw(LinkUp(ids[1].node), LinkDown(ids[1].node))


async def test_a_node_that_dials_anew_replaces_its_lost_link(ids: tuple[Identity, Identity, Identity]) -> None:
    a, peer = Node(ids[0]), ids[1].node
    async with (
        running(a),
        raw(a.address, ids[1].client_context()) as old,
        raw(a.address, ids[1].client_context()) as new,
    ):
        await old.send_bytes(hello_of(ids[1]))
        await a.saw(LinkUp(peer))
        await new.send_bytes(hello_of(ids[1]))
        assert (await closed_with(old))[0] == DUPLICATE
        await a.until(lambda: a.events.count(LinkUp(peer)) == 2)
        assert a.events == [LinkUp(peer), LinkDown(peer), LinkUp(peer)]


async def test_a_peer_that_opens_too_many_streams_is_told(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0])
    async with running(a), raw(a.address, ids[1].client_context()) as socket:
        await socket.send_bytes(hello_of(ids[1]))
        request = frames.encode_body(frames.Request("stuck", b""))
        for number in range(frames.STREAMS_MAX + 1):
            await socket.send_bytes(frames.encode(Frame(2 * number + 1, Kind.OPEN, request)))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                frame = frames.decode((await socket.receive()).data)
                assert not isinstance(frame, Dropped)
                if frame.kind is Kind.RESET:
                    break
        assert frame.stream == 2 * frames.STREAMS_MAX + 1
        assert frames.decode_reset(frame.body).status == 429


async def test_without_a_certificate_there_is_no_link(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0])
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    async with running(a):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with raw(a.address, bare):
                pass
        assert caught.value.status == 403
        bare.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(aiohttp.ClientError):
            async with raw(a.address, bare):
                pass


async def test_a_certificate_of_another_ca_is_refused(ids: tuple[Identity, Identity, Identity], tmp_path: Path) -> None:
    a = Node(ids[0])
    foreign = identity.create_cluster(tmp_path / "foreign", "home", "pi-1")
    tls = foreign.client_context()
    tls.verify_mode = ssl.CERT_NONE  # it does not mind who answers
    async with running(a):
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with raw(a.address, tls):
                pass
        assert a.events == []


async def test_a_listener_of_another_ca_is_never_greeted(
    ids: tuple[Identity, Identity, Identity], tmp_path: Path
) -> None:
    a, foreign = Node(ids[0]), identity.create_cluster(tmp_path / "foreign", "home", "pi-1")
    reached = False

    async def link(request: web.Request) -> web.Response:
        nonlocal reached
        reached = True
        return web.Response()

    app = web.Application()
    app.router.add_get("/link", link)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=foreign.server_context()).start()
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        async with running(a):
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await a.links._dial_once(address)
        assert not reached
    finally:
        await runner.cleanup()


async def test_closing_does_not_wait_for_an_inbox_that_nobody_empties(
    ids: tuple[Identity, Identity, Identity],
) -> None:
    a, b, stuck = Node(ids[0]), Node(ids[1]), asyncio.Event()

    async def full(_: Event) -> None:
        stuck.set()
        await asyncio.Event().wait()

    a.links._on_event = full
    async with running(a, b):
        a.links.dial(b.address)
        b.links.dial(a.address)
        async with asyncio.timeout(PATIENCE_S):
            await stuck.wait()
            await a.links.close()


async def test_extra_routes_answer_on_the_same_port(ids: tuple[Identity, Identity, Identity]) -> None:
    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="hello")

    a = Node(ids[0])
    port = await a.links.start("127.0.0.1", 0, [web.get("/hello", hello)])
    try:
        connector = aiohttp.TCPConnector(ssl=ids[1].client_context(), force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            answer: Awaitable[str] = (await session.get(f"https://127.0.0.1:{port}/hello")).text()
            assert await answer == "hello"
    finally:
        await a.links.close()
        await a.links.close()


async def test_a_renewed_certificate_is_shown_from_then_on(ids: tuple[Identity, Identity, Identity]) -> None:
    a = Node(ids[0])
    renewed = ids[0].renewed(ids[0].issue(ids[0].signer.request(), "pi-1"))
    async with running(a):
        a.links.renew(renewed)
        async with raw(a.address, ids[1].client_context()) as socket:
            tls = socket.get_extra_info("ssl_object")
            assert ssl.DER_cert_to_PEM_cert(tls.getpeercert(True)).split() == renewed.cert_pem.decode().split()
