"""A joiner and an admitting node over real TLS; the man in the middle is a real listener that keeps what it hears."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from piclusterd.cluster import identity
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.join import Founding, JoinDesk, join
from piclusterd.cluster.tokens import FAILURES_MAX, Token, Tokens, parse
from piclusterd.errors import Broken, NotFound, Overloaded, Refused, Unavailable, UserError
from piclusterd.ids import NodeId
from piclusterd.wire import Voters


class Desk:
    """An admitting node: its clock, its tokens, and what it was told to seal."""

    def __init__(self, state: Path, expect: int = 1) -> None:
        self.me = identity.create_cluster(state, "home", "pi-1", expect)
        self.now = 1_000_000.0
        self.tokens = Tokens(self.me.directory, self.me.ca_pin, lambda: self.now)
        self.founding = Founding(self.me.directory)
        self.sealed: list[Voters] = []
        self.denied: list[NodeId] = []
        self.address = ""

    def routes(self) -> list[web.RouteDef]:
        async def on_sealed(voters: Voters) -> None:
            self.sealed.append(voters)

        peers = ["10.0.0.1:7946", "10.0.0.2:7946", "10.0.0.1:7946"]
        return JoinDesk(self.me, self.tokens, self.founding, lambda: peers, on_sealed, lambda: self.denied).routes()


@asynccontextmanager
async def listening(me: Identity, routes: list[web.RouteDef]) -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=me.server_context()).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def desk_at(state: Path, expect: int = 1) -> AsyncIterator[Desk]:
    desk = Desk(state, expect)
    async with listening(desk.me, desk.routes()) as desk.address:
        yield desk


async def test_a_token_makes_a_member(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        joined = await join(desk.tokens.create(), desk.address, tmp_path / "2", "pi-2")
        assert joined.peers == ("10.0.0.1:7946", "10.0.0.2:7946")
        assert joined.voters == Voters(1, 0, (desk.me.node,))
        assert (joined.identity.cluster, joined.identity.cluster_id) == ("home", desk.me.cluster_id)
        found = identity.load(tmp_path / "2")
        assert found is not None
        assert (found.node, found.name, found.can_issue) == (joined.identity.node, "pi-2", False)
        assert desk.me.node != found.node
        told = identity.joined(found.directory)
        assert told is not None
        assert (told.peers, told.voters) == (joined.peers, joined.voters)
        assert identity.joined(desk.me.directory) is None


async def test_the_right_ca_and_a_wrong_secret_are_refused(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        real = parse(desk.tokens.create())
        forged = str(Token(real.ca_pin, real.id, "A" * 22))
        with pytest.raises(Refused, match="not known"):
            await join(forged, desk.address, tmp_path / "2", "pi-2")
        assert identity.load(tmp_path / "2") is None
        await join(str(real), desk.address, tmp_path / "2", "pi-2")


class Spy:
    """A TLS listener of another CA that answers like a cluster and keeps every byte it is sent."""

    def __init__(self, state: Path, ca_pem: Callable[[Identity], bytes]) -> None:
        self.me = identity.create_cluster(state, "home", "pi-1")
        self.ca_pem = ca_pem(self.me)
        self.heard = b""
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                self.requests += 1
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(self.ca_pem)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + self.ca_pem)
        except (ConnectionError, ssl.SSLError):
            pass  # the joiner hung up, as it should
        finally:
            writer.close()


@pytest.mark.parametrize("lie", ["its own CA", "the real CA", "junk"])
async def test_the_secret_is_not_sent_to_a_man_in_the_middle(tmp_path: Path, lie: str) -> None:
    async with desk_at(tmp_path / "1") as desk:
        token = desk.tokens.create()
        told = {"its own CA": lambda me: me.ca_pem, "the real CA": lambda _: desk.me.ca_pem, "junk": lambda _: b"junk"}
        spy = Spy(tmp_path / "spy", told[lie])
        tls = spy.me.server_context()
        server = await asyncio.start_server(spy.serve, "127.0.0.1", 0, ssl=tls)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(Unavailable if lie == "the real CA" else Refused):
                await join(token, f"127.0.0.1:{port}", tmp_path / "2", "pi-2")
    assert spy.requests == 1
    assert spy.heard.startswith(b"GET /ca ")
    for part in (parse(token).secret, parse(token).id):
        assert part.encode() not in spy.heard
    assert identity.load(tmp_path / "2") is None


async def test_expired_used_and_revoked_tokens_say_so(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        old, once, gone = desk.tokens.create(ttl_s=10), desk.tokens.create(), desk.tokens.create()
        desk.tokens.revoke(parse(gone).id)
        await join(once, desk.address, tmp_path / "2", "pi-2")
        desk.now += 11
        for number, (token, word) in enumerate([(old, "expired"), (once, "used"), (gone, "revoked")]):
            with pytest.raises(Refused, match=f"token is {word}"):
                await join(token, desk.address, tmp_path / f"late-{number}", "pi-3")


async def test_a_join_whose_answer_was_lost_is_repeated_by_the_same_key(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1", expect=2) as desk:
        token = desk.tokens.create()
        first = await join(token, desk.address, tmp_path / "2", "pi-2")
        (tmp_path / "2" / "identity" / "cluster.json").unlink()  # as if the answer had never come
        again = await join(token, desk.address, tmp_path / "2", "pi-2")
        assert again.identity.node == first.identity.node
        assert desk.sealed == [Voters(1, 0, tuple(sorted([desk.me.node, first.identity.node])))]


async def test_a_member_does_not_join_again(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        with pytest.raises(UserError, match="already belongs"):
            await join(desk.tokens.create(), desk.address, tmp_path / "1", "pi-1")


async def test_guessers_are_slowed(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        forged = str(Token(parse(desk.tokens.create()).ca_pin, "ffffffff", "A" * 22))
        for _ in range(FAILURES_MAX):
            with pytest.raises(Refused):
                await join(forged, desk.address, tmp_path / "2", "pi-2")
        with pytest.raises(Overloaded):
            await join(forged, desk.address, tmp_path / "2", "pi-2")


async def test_a_node_without_the_desk_says_where_to_go(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk, listening(desk.me, []) as address:
        with pytest.raises(NotFound, match="does not admit"):
            await join(desk.tokens.create(), address, tmp_path / "2", "pi-2")


async def test_nobody_there_is_unavailable_and_no_address_is_said(tmp_path: Path) -> None:
    token = str(Token(bytes(32), "ffffffff", "A" * 22))
    async with desk_at(tmp_path / "1") as desk:
        address = desk.address
    with pytest.raises(Unavailable, match="cannot reach"):
        await join(token, address, tmp_path / "2", "pi-2")
    with pytest.raises(UserError, match="address"):
        await join(token, "http://x:y:z", tmp_path / "2", "pi-2")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"token": 1}', b"x" * 100_000, b'{"token":"t","request":"r","name":"n","role":"king"}']
)
async def test_junk_at_the_desk_is_answered_400(tmp_path: Path, body: bytes) -> None:
    async with desk_at(tmp_path / "1") as desk:
        connector = aiohttp.TCPConnector(ssl=desk.me.client_context(), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"https://{desk.address}/join", data=body) as response,
        ):
            assert response.status == 400
            assert set(await response.json()) == {"what", "why", "fix"}


async def test_a_bad_name_costs_no_token(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        token = desk.tokens.create()
        ask = {"token": token, "request": "junk", "name": "a b", "role": "worker"}
        connector = aiohttp.TCPConnector(ssl=desk.me.client_context(), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"https://{desk.address}/join", json=ask) as response,
        ):
            assert response.status == 400
        assert [t.state for t in desk.tokens.list()] == ["valid"]


async def test_the_last_founder_seals_the_voters_once_and_later_nodes_only_learn_them(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1", expect=3) as desk:
        token = desk.tokens.create(uses=9)
        second = await join(token, desk.address, tmp_path / "2", "pi-2")
        relay = await join(token, desk.address, tmp_path / "r", "droplet", "relay")
        assert second.voters is None
        assert relay.voters is None
        assert desk.sealed == []
        third = await join(token, desk.address, tmp_path / "3", "pi-3")
        fourth = await join(token, desk.address, tmp_path / "4", "pi-4")
        founders = tuple(sorted([desk.me.node, second.identity.node, third.identity.node]))
        assert desk.sealed == [Voters(1, 0, founders)]
        assert third.voters == fourth.voters == Voters(1, 0, founders)


async def test_founders_that_join_at_once_seal_once(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1", expect=4) as desk:
        token = desk.tokens.create(uses=5)
        joins = [join(token, desk.address, tmp_path / f"n{n}", f"pi-{n}") for n in range(5)]
        joined = await asyncio.gather(*joins)
        assert len(desk.sealed) == 1
        assert len(desk.sealed[0].voters) == 4
        assert set(desk.sealed[0].voters) < {desk.me.node, *(j.identity.node for j in joined)}


def test_one_founder_is_sealed_at_init(tmp_path: Path) -> None:
    me = identity.create_cluster(tmp_path, "home", "pi-1")
    assert Founding(me.directory).voters == Voters(1, 0, (me.node,))
    assert Founding(me.directory).admit(NodeId("b" * 16), "worker") is None


def test_founding_survives_a_restart_at_every_step(tmp_path: Path) -> None:
    me = identity.create_cluster(tmp_path, "home", "pi-1", expect=3)
    b, c, d = (NodeId(letter * 16) for letter in "bcd")
    assert Founding(me.directory).admit(b, "worker") is None
    assert Founding(me.directory).admit(b, "worker") is None
    assert Founding(me.directory).voters is None
    sealed = Founding(me.directory).admit(c, "worker")
    assert sealed == Voters(1, 0, tuple(sorted([me.node, b, c])))
    assert Founding(me.directory).admit(d, "worker") is None
    assert Founding(me.directory).voters == sealed


def test_a_lost_founding_record_is_broken(tmp_path: Path) -> None:
    me = identity.create_cluster(tmp_path, "home", "pi-1", expect=3)
    (me.directory / "founding.json").unlink()
    with pytest.raises(Broken, match="founding"):
        Founding(me.directory)
