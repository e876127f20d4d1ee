"""Attacks on transport and identity: what a stranger, a thief, a liar and a clone are met with.

The ids A1 to A13 are those of the threat model; G1, the msgpack bombs, is in `tests/test_wire.py`, and A4 on real
daemons in `tests/e2e/test_removal.py`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from piclusterd.cluster import certificates, identity
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.join import join
from piclusterd.cluster.link import REFUSED, TWIN
from piclusterd.cluster.links import Links
from piclusterd.cluster.tokens import FAILURES_MAX, Token, Tokens, parse
from piclusterd.errors import Overloaded, Refused
from piclusterd.events import (
    Append,
    Event,
    HardState,
    KeyShared,
    LedgerAlarm,
    LinkDown,
    LinkUp,
    Noted,
    Received,
    SaveHardState,
    Store,
)
from piclusterd.ledger.entry import HLC_COUNTER_BITS, next_hlc
from piclusterd.ledger.frontier import GAP_S, LedgerTime
from piclusterd.node import Node as Hall
from piclusterd.node import Setup
from piclusterd.upkeep import trust_clock
from piclusterd.wire import Entry, Facts, Gossip, Heartbeat, Nack, Push, RequestVote, TimeoutNow, Twin, Voters

from .pair import PI, A, B, C
from .test_identity import handshake, member
from .test_join import Desk, Spy, desk_at
from .test_links import CALM, PATIENCE_S, QUICK, Node, closed_with, hello_of, raw, running
from .test_membership import hears, lone, of

YEAR_MS = 366 * 86_400_000


@pytest.fixture
def ids(tmp_path: Path) -> tuple[Identity, Identity, Identity]:
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    return first, member(tmp_path, first, "pi-2"), member(tmp_path, first, "pi-3")


def stranger(**settings: object) -> ssl.SSLContext:
    """TLS of somebody who trusts anybody and shows nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in settings.items():
        setattr(context, name, value)
    return context


# strangers -----------------------------------------------------------------------------------------------------------
async def test_whoever_shows_no_certificate_gets_no_link(ids: tuple[Identity, ...]) -> None:
    """A1"""
    a = Node(ids[0])
    async with running(a):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with raw(a.address, stranger()):
                pass
        assert refused.value.status == 403
        assert a.events == []


async def test_a_certificate_of_another_ca_ends_the_handshake(ids: tuple[Identity, ...], tmp_path: Path) -> None:
    """A2"""
    a = Node(ids[0])
    foreign = identity.create_cluster(tmp_path / "foreign", "home", "pi-1").client_context()
    foreign.verify_mode = ssl.CERT_NONE
    async with running(a):
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with raw(a.address, foreign):
                pass
        assert a.events == []


async def test_nobody_speaks_for_another_node(ids: tuple[Identity, ...], caplog: pytest.LogCaptureFixture) -> None:
    """A3: a hello with another's id is refused and told; on a link, who speaks is who the certificate says."""
    a, (_, two, three) = Node(ids[0]), ids
    caplog.set_level("INFO")
    async with running(a):
        async with raw(a.address, two.client_context()) as socket:
            await socket.send_bytes(hello_of(three))
            code, why = await closed_with(socket)
            assert (code, f"its certificate says {two.node}" in why) == (REFUSED, True)
        assert [r for r in caplog.records if f"it says it is {three.node}" in r.getMessage()]
        assert a.events == []


async def test_a_revoked_certificate_opens_nothing_and_the_open_link_ends(ids: tuple[Identity, ...]) -> None:
    """A4"""
    a, b = Node(ids[0]), Node(ids[1])
    async with running(a, b):
        b.links.dial(a.address)
        await a.saw(LinkUp(b.id))
        await b.saw(LinkUp(a.id))
        began = asyncio.get_running_loop().time()
        a.links.deny([b.id])
        await b.saw(LinkDown(a.id))
        assert asyncio.get_running_loop().time() - began < 5.0
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with raw(a.address, ids[1].client_context()):
                pass
        assert refused.value.status == 403
        assert a.events.count(LinkUp(b.id)) == 1


@pytest.mark.parametrize("when", ["expired", "not valid yet"])
async def test_dates_count_once_the_clock_was_set_and_then_for_open_links_too(
    ids: tuple[Identity, ...], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A5"""
    first, second, third = ids
    shift = dt.timedelta(hours=2)
    monkeypatch.setattr(certificates, "LEAF_LIFE", -shift / 4 if when == "expired" else certificates.LEAF_LIFE)
    monkeypatch.setattr(certificates, "BACKDATED", shift if when == "expired" else -shift)
    dated = second.renewed(first.issue(second.signer.request(), "pi-2"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(first.server_context(), dated.client_context())
    a, b, c = Node(first, CALM), Node(dated, CALM), Node(third, CALM)
    for node in (a, b, c):
        node.links = Links(node.me, node.post, node.serve, Random(1), timing=CALM, check_time=False)
    async with running(a, b, c):
        b.links.dial(a.address)
        c.links.dial(a.address)
        await a.saw(LinkUp(b.id), LinkUp(c.id))
        looks = iter([False, True])
        clock = asyncio.create_task(trust_clock(a.links, lambda: next(looks), every_s=0.0))
        await a.saw(LinkDown(b.id))
        await b.saw(LinkDown(a.id))
        clock.cancel()
        with pytest.raises((aiohttp.ClientError, OSError)):
            async with raw(a.address, dated.client_context(check_time=False)):
                pass
        assert LinkDown(c.id) not in a.events


async def test_neither_old_tls_nor_plain_text_is_spoken(ids: tuple[Identity, ...]) -> None:
    """A6"""
    a = Node(ids[0])
    async with running(a):
        with pytest.raises(aiohttp.ClientError):
            async with raw(a.address, stranger(maximum_version=ssl.TLSVersion.TLSv1_2)):
                pass
        host, _, port = a.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /link HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert not (await reader.read()).startswith(b"HTTP")
        writer.close()
        assert a.events == []


# tokens --------------------------------------------------------------------------------------------------------------
async def test_a_man_in_the_middle_never_sees_the_secret(tmp_path: Path) -> None:
    """A7"""
    async with desk_at(tmp_path / "1") as desk:
        token = desk.tokens.create()
        spy = Spy(tmp_path / "spy", lambda me: me.ca_pem)
        server = await asyncio.start_server(spy.serve, "127.0.0.1", 0, ssl=spy.me.server_context())
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(Refused, match="secret was not sent"):
                await join(token, f"127.0.0.1:{port}", tmp_path / "2", "pi-2")
    assert parse(token).secret.encode() not in spy.heard


async def test_dead_tokens_are_refused(tmp_path: Path) -> None:
    """A8"""
    async with desk_at(tmp_path / "1") as desk:
        once, old, gone = desk.tokens.create(), desk.tokens.create(ttl_s=10), desk.tokens.create()
        await join(once, desk.address, tmp_path / "2", "pi-2")
        desk.tokens.revoke(parse(gone).id)
        desk.now += 11
        for token, word in ((once, "used"), (old, "expired"), (gone, "revoked")):
            with pytest.raises(Refused, match=f"token is {word}"):
                await join(token, desk.address, tmp_path / word, "pi-3")


def test_a_thousand_guesses_are_mostly_not_even_looked_at(tmp_path: Path) -> None:
    """A8"""
    tokens = Tokens(tmp_path, bytes(32))
    real = parse(tokens.create())
    met: list[type[Exception]] = []
    for number in range(1000):
        try:
            tokens.redeem(Token(bytes(32), real.id, f"{number:022}"), "thief", "10.0.0.9")
        except (Refused, Overloaded) as fault:
            met.append(type(fault))
    assert met == [Refused] * FAILURES_MAX + [Overloaded] * (1000 - FAILURES_MAX)
    tokens.redeem(real, "pi-2", "10.0.0.1")


async def test_an_api_key_admits_nobody(tmp_path: Path) -> None:
    """A9; the other way round is in `tests/web/test_app.py`."""
    desk = Desk(tmp_path)
    ask = {"token": "sk-house-key", "request": desk.me.signer.request().decode(), "name": "x", "role": "worker"}
    async with desk_at(tmp_path / "1") as open_desk:
        connector = aiohttp.TCPConnector(ssl=stranger(), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"https://{open_desk.address}/join", json=ask) as answer,
        ):
            assert answer.status == 403


async def test_a_removed_key_is_not_admitted_again(tmp_path: Path) -> None:
    """A4 at the join desk; no token is spent on it."""
    async with desk_at(tmp_path / "1") as desk:
        joined = await join(desk.tokens.create(), desk.address, tmp_path / "2", "pi-2")
        desk.denied.append(joined.identity.node)
        (tmp_path / "2" / "identity" / "cluster.json").unlink()
        token = desk.tokens.create()
        with pytest.raises(Refused, match="was removed"):
            await join(token, desk.address, tmp_path / "2", "pi-2")
        await join(token, desk.address, tmp_path / "3", "pi-2")


# liars ---------------------------------------------------------------------------------------------------------------
def test_replayed_gossip_changes_nothing() -> None:
    """A10: an older incarnation says nothing any more."""
    node, wire = lone()
    hears(node, B, Gossip((of(B, 5, "alive"),)), wire.now)
    before = node.members()
    for state in ("alive", "suspect", "failed", "left", "removed"):
        assert hears(node, C, Gossip((of(B, 4, state),)), wire.now) == []
    assert node.members() == before


def test_a_clock_a_year_ahead_moves_nobody_elses() -> None:
    """A10: our own entries go by our own clock, and age counts a gap of a year as a day."""
    now_ms = 1_800_000_000_000
    ours, theirs = now_ms << HLC_COUNTER_BITS, (now_ms + YEAR_MS) << HLC_COUNTER_BITS
    assert next_hlc(ours, now_ms + 1) == (now_ms + 1) << HLC_COUNTER_BITS < theirs
    assert LedgerTime([ours, theirs]).age(ours) == GAP_S


def test_an_old_leaders_words_are_fenced() -> None:
    """A11: nothing of an older term is stored, followed or voted for."""
    voters = Voters(1, 0, (A, B, C))
    node = Hall(Setup(A, "home", Facts(name="pi-a"), PI, HardState(term=5, voters=voters)), Random(1), 0.0)
    for peer in (B, C):
        node.handle(LinkUp(peer), 0.0)
    forged = (
        Heartbeat(3, b"digest", voters), Push(3, (Entry(b"header", b"payload"),)), TimeoutNow(3),
        RequestVote(3, False, voters), RequestVote(3, False, voters, transfer=True),
    )  # fmt: skip
    for message in forged:
        effects = node.handle(Received(B, message), 1.0)
        assert not [effect for effect in effects if isinstance(effect, Store | SaveHardState | Append)], message
    assert (node.election.term, node.election.leader, node.election.voters) == (5, None, voters)


async def test_a_spoofed_sighting_is_dialled_and_not_trusted(ids: tuple[Identity, ...], tmp_path: Path) -> None:
    """A12"""
    a, spy = Node(ids[0]), Spy(tmp_path / "spy", lambda me: me.ca_pem)
    server = await asyncio.start_server(spy.serve, "127.0.0.1", 0, ssl=spy.me.server_context())
    async with server, running(a):
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await a.links._dial_once(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert spy.heard == b""
    assert a.events == []


# clones --------------------------------------------------------------------------------------------------------------
@pytest.fixture
async def cloned(ids: tuple[Identity, ...]) -> AsyncIterator[tuple[Node, Node, Node]]:
    """A node, one linked with it, and a machine that runs with the latter's key."""
    a, first, second = Node(ids[0]), Node(ids[1]), Node(ids[1])
    async with running(a, first, second):
        first.links.dial(a.address)
        await a.saw(LinkUp(first.id))
        await first.saw(LinkUp(a.id))
        yield a, first, second


def twins(node: Node) -> list[KeyShared]:
    return [event for event in node.events if isinstance(event, KeyShared)]


async def test_the_second_machine_with_a_key_is_refused_and_all_three_are_told(cloned: tuple[Node, Node, Node]) -> None:
    """A13"""
    a, first, second = cloned
    second.links.dial(a.address)
    await second.until(lambda: bool(twins(second)))
    await a.until(lambda: bool(twins(a)))
    await first.until(lambda: any(isinstance(event, Received) for event in first.events))
    assert "in use on two machines" in twins(a)[0].why
    assert str(TWIN) in twins(second)[0].why
    assert next(e.message for e in first.events if isinstance(e, Received)) == Twin("accepted from 127.0.0.1")
    assert LinkUp(a.id) not in second.events
    assert LinkDown(first.id) not in a.events, "the first one stays"
    a.links.send(first.id, Nack(1))
    await first.saw(Received(a.id, Nack(1)))
    assert len(twins(a)) == 1, "told once, however often it tries"


async def test_a_node_that_restarted_is_no_clone_of_itself(ids: tuple[Identity, ...]) -> None:
    """Its old link is silent: no power, no FIN."""
    a, peer = Node(ids[0], QUICK), ids[1].node
    async with (
        running(a),
        raw(a.address, ids[1].client_context()) as old,
        raw(a.address, ids[1].client_context()) as new,
    ):
        await old.send_bytes(hello_of(ids[1], life=1))
        await a.saw(LinkUp(peer))
        await new.send_bytes(hello_of(ids[1], life=2))
        await a.until(lambda: a.events.count(LinkUp(peer)) == 2)
        assert not twins(a)


def test_shared_keys_are_alarms() -> None:
    node = Hall(Setup(A, "home", Facts(name="pi-a"), PI), Random(1), 0.0)
    seen: list[Event] = [KeyShared("two machines"), Received(B, Twin("accepted from 10.0.0.9"))]
    for event, words in zip(seen, ("two machines", "this node is in use on another machine (accepted"), strict=True):
        (noted,) = [e for e in node.handle(event, 0.0) if isinstance(e, Noted)]
        assert isinstance(noted.note, LedgerAlarm)
        assert words in noted.note.text
