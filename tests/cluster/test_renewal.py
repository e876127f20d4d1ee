"""Certificates are renewed over a real link, for their own node only."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography import x509

from piclusterd.cluster import identity
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.links import Links
from piclusterd.cluster.renewal import Renewal, issue_for
from piclusterd.errors import NotFound, Refused
from piclusterd.events import Event, LinkUp
from piclusterd.ids import NodeId
from tests.cluster.test_identity import member

PATIENCE_S = 20.0


async def nobody() -> list[NodeId]:
    return []


async def linked(stack: AsyncExitStack, issuer: Identity, other: Identity) -> Links:
    """The links of `other`, with one to `issuer`, who serves renewals."""
    up = asyncio.Event()

    async def serve(peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
        if name != "renew":
            raise NotFound(name)
        yield issue_for(peer, "pi-2", body, issuer)

    async def ignore(event: Event) -> None:
        """What the other side hears is not waited for."""

    async def note(event: Event) -> None:
        if isinstance(event, LinkUp):
            up.set()

    there = Links(issuer, ignore, serve, random.Random(1))
    here = Links(other, note, serve, random.Random(2))
    for links in (there, here):
        stack.push_async_callback(links.close)
    port = await there.start("127.0.0.1", 0)
    await here.start("127.0.0.1", 0)
    here.dial(f"127.0.0.1:{port}")
    async with asyncio.timeout(PATIENCE_S):
        await up.wait()
    return here


def serial(me: Identity) -> int:
    return x509.load_pem_x509_certificate(me.cert_pem).serial_number


async def test_a_node_gets_a_fresh_certificate_from_the_one_that_holds_the_ca(tmp_path: Path) -> None:
    issuer = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    other = member(tmp_path / "b", issuer, "pi-2")
    async with AsyncExitStack() as stack:
        links = await linked(stack, issuer, other)
        assert await Renewal(links, nobody).renew()
    renewed = links.identity
    assert serial(renewed) != serial(other)
    assert renewed.node == other.node
    loaded = identity.load(tmp_path / "b" / "pi-2")
    assert loaded is not None
    assert loaded.cert_pem == renewed.cert_pem


async def test_the_holder_of_the_ca_renews_its_own(tmp_path: Path) -> None:
    issuer = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    other = member(tmp_path / "b", issuer, "pi-2")
    async with AsyncExitStack() as stack:
        links = await linked(stack, other, issuer)  # the peer could not issue
        assert await Renewal(links, nobody).renew()
    assert serial(links.identity) != serial(issuer)


async def test_without_a_holder_of_the_ca_nothing_changes(tmp_path: Path) -> None:
    issuer = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    other = member(tmp_path / "b", issuer, "pi-2")
    third = member(tmp_path / "c", issuer, "pi-3")
    async with AsyncExitStack() as stack:
        links = await linked(stack, third, other)
        assert not await Renewal(links, nobody).renew()
    assert serial(links.identity) == serial(other)


async def test_it_is_renewed_when_two_thirds_of_its_life_are_over_and_not_before(tmp_path: Path) -> None:
    issuer = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    other = member(tmp_path / "b", issuer, "pi-2")
    async with AsyncExitStack() as stack:
        links = await linked(stack, issuer, other)
        await Renewal(links, nobody, lambda: other.renew_after - 1).look()
        assert serial(links.identity) == serial(other)
        await Renewal(links, nobody, lambda: other.renew_after).look()
        assert serial(links.identity) != serial(other)


def test_a_key_that_is_not_the_peers_is_refused(tmp_path: Path) -> None:
    issuer = identity.create_cluster(tmp_path / "a", "home", "pi-1")
    other = member(tmp_path / "b", issuer, "pi-2")
    with pytest.raises(Refused):
        issue_for(NodeId("0" * 16), "pi-2", other.signer.request(), issuer)
