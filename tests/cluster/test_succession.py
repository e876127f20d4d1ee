"""The cluster's CA is changed over real links: two are trusted for a while, then one; who is there stays."""

from __future__ import annotations

import random
import shutil
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from piclusterd.cluster import identity, succession
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.join import join
from piclusterd.cluster.links import Links
from piclusterd.cluster.renewal import Renewal
from piclusterd.cluster.succession import Asked, Succession, Told
from piclusterd.cluster.tokens import Tokens
from piclusterd.errors import NotFound, Refused
from piclusterd.events import LinkDown
from piclusterd.ids import NodeId

from .test_identity import handshake, member
from .test_join import desk_at, listening
from .test_links import CALM, Node, raw, running


class Member(Node):
    """A node's links that also look after their certificate; `house`: the ids of all members."""

    def __init__(self, me: Identity, house: list[NodeId]) -> None:
        super().__init__(me)
        self.links = Links(me, self.post, self.serve, random.Random(me.node), timing=CALM)
        self.house = house
        self.renewal = Renewal(self.links, self.members)

    async def members(self) -> list[NodeId]:
        return self.house

    async def serve(self, peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
        match name:
            case "renew":
                yield await self.renewal.issue(peer, self.links.peers()[peer].name, body)
            case "ca":
                yield await self.renewal.answer(peer, body)
            case _:
                raise NotFound(name)

    async def linked(self, *others: Member) -> None:
        await self.until(lambda: all(other.id in self.links.peers() for other in others))


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[tuple[Member, Member, Member]]:
    """The holder of the CA's key and two members, all linked."""
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    ids = [first, member(tmp_path, first, "pi-2"), member(tmp_path, first, "pi-3")]
    a, b, c = (Member(me, [one.node for one in ids]) for me in ids)
    async with running(a, b, c):
        for near, far in ((b, a), (c, a), (c, b)):
            near.links.dial(far.address)
        await a.linked(b, c)
        await b.linked(a, c)
        yield a, b, c


async def test_all_trust_both_then_all_are_reissued_then_the_old_one_is_dropped(
    house: tuple[Member, Member, Member], tmp_path: Path
) -> None:
    a, b, c = house
    stolen = replace(b.links.identity, directory=shutil.copytree(b.me.directory, tmp_path / "stolen"))
    told = await a.renewal.rotate(finish=False)
    assert (told.stage, told.waiting) == ("announced", tuple(sorted([b.id, c.id])))
    await b.renewal.look()
    assert len(b.links.identity.cas) == 2
    assert (await a.renewal.rotate(finish=False)).waiting == (c.id,), "asking again tells how far it is"
    await c.renewal.look()
    await a.renewal.look()
    assert (await a.renewal.rotate(finish=False)).stage == "issuing"
    handshake(a.links.identity.server_context(), b.links.identity.client_context())
    await b.renewal.look()
    await c.renewal.look()
    assert not [event for node in house for event in node.events if isinstance(event, LinkDown)]
    await a.renewal.look()
    for near, far in ((b, a), (c, a)):
        await near.until(lambda: LinkDown(a.id) in near.events)  # noqa: B023
        await near.linked(far)
        await near.renewal.look()
    for node in house:
        found = identity.load(node.me.directory.parent)
        assert found is not None
        assert (found.cas, found.cluster_id, found.node) == (a.links.identity.cas, a.me.cluster_id, node.id)
    assert not [p.name for p in a.me.directory.iterdir() if "next" in p.name or p.name == succession.FILE]
    await a.linked(b, c)
    tls = stolen.client_context()
    tls.verify_mode = ssl.CERT_NONE
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with raw(a.address, tls):
            pass
    assert refused.value.status == 403, "a certificate of the old CA opens nothing any more"


async def test_who_is_away_holds_it_up_until_the_owner_says_finish(house: tuple[Member, Member, Member]) -> None:
    a, b, c = house
    await c.links.close()
    await a.renewal.rotate(finish=False)
    await b.renewal.look()
    await a.renewal.look()
    assert (await a.renewal.rotate(finish=False)).waiting == (c.id,)
    told = await a.renewal.rotate(finish=True)
    assert (told.stage, told.waiting) == ("issuing", tuple(sorted([b.id, c.id])))
    await b.renewal.look()
    assert (await a.renewal.rotate(finish=True)).stage == "over"
    await a.linked(b)
    with pytest.raises(ssl.SSLError):
        handshake(a.links.identity.server_context(), c.links.identity.client_context())


async def test_a_member_without_the_key_leads_nothing(house: tuple[Member, Member, Member]) -> None:
    with pytest.raises(Refused, match="does not hold the CA's key"):
        await house[1].renewal.rotate(finish=False)


async def test_a_node_joins_before_and_after_and_not_meanwhile(tmp_path: Path) -> None:
    async with desk_at(tmp_path / "1") as desk:
        succession_ = Succession(desk.me.directory)
        token = desk.tokens.create()
        me = succession_.begin(desk.me)
        with pytest.raises(Refused, match="CA is being changed"):
            await join(token, desk.address, tmp_path / "2", "pi-2")
        me = succession_.advance(me, [me.node])
        me = me.renewed(me.issue(me.signer.request(), "pi-1", by_next=True))
        me = succession_.advance(me, [me.node])
        assert succession_.progress(me.node, []).stage == "over"
    async with listening(me, desk.routes()) as address:
        with pytest.raises(Refused, match="not of the cluster this token is for"):
            await join(token, address, tmp_path / "2", "pi-2")
        joined = await join(Tokens(me.directory, me.ca_pin).create(), address, tmp_path / "2", "pi-2")
        assert joined.identity.cluster_id == desk.me.cluster_id
        assert identity.load(tmp_path / "2") is not None
        assert handshake(me.server_context(), joined.identity.client_context())


@pytest.mark.parametrize("lie", ["next", "only"])
def test_nobody_is_believed_without_the_cas_own_signature(tmp_path: Path, lie: str) -> None:
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    thief = identity.create_cluster(tmp_path / "thief", "home", "pi-1")
    if lie == "next":
        told = Told(next=thief.ca_pem.decode(), proof=thief.signer.sign(b"x"))
    else:
        second = second.trusting(thief.ca_pem)
        second = replace(second, cert_pem=thief.issue(second.signer.request(), "pi-2"))
        told = Told(only=thief.ca_pin.hex(), proof=first.signer.sign(b"x"))
    with pytest.raises(Refused, match="without proof"):
        succession.obey(second, told)


def test_a_crash_between_the_steps_of_the_swap_is_mended_by_the_next_start(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path, "home", "pi-1")
    lead = Succession(first.directory)
    me = lead.begin(first)
    me = lead.advance(me, [me.node])
    me = me.renewed(me.issue(me.signer.request(), "pi-1", by_next=True))
    (me.directory / "ca.key").write_bytes((me.directory / "ca-next.key").read_bytes())  # as far as it came
    found = identity.load(tmp_path)
    assert found is not None
    done = Succession(found.directory)
    assert done.issuing
    found = done.advance(found, [found.node])
    assert (found.cas, done.issuing) == ((me.next_ca_pem,), False)
    assert found.issue(found.signer.request(), "pi-1")
    (found.directory / succession.FILE).write_text('{"stage": "issuing"}')  # all done but the last unlink
    assert Succession(found.directory).progress(found.node, []).stage == "over"
    assert not (found.directory / succession.FILE).exists()


def test_who_has_nothing_to_do_is_told_nothing(tmp_path: Path) -> None:
    first = identity.create_cluster(tmp_path / "1", "home", "pi-1")
    second = member(tmp_path, first, "pi-2")
    told = Succession(first.directory).answer(first, second.node, succession.ask(second))
    assert told == Told()
    assert succession.obey(second, told) is second
    assert succession.ask(second) == Asked((first.ca_pin.hex(),), first.ca_pin.hex())
