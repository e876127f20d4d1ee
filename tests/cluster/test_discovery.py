import asyncio
import random

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from piclusterd.cluster import discovery
from piclusterd.cluster.discovery import SERVICE, Advert, Discovery, Sighting, find, lan_addresses, sighting_of
from piclusterd.ids import NodeId

LOOPBACK = ("127.0.0.1",)
PATIENCE_S = 20.0


def fresh_node() -> NodeId:
    """An id nobody else on this machine advertises: mDNS on loopback is shared by all tests that run at once."""
    return NodeId(f"{random.SystemRandom().getrandbits(64):016x}")


def advert(node: NodeId, *, admits: bool = False) -> Advert:
    return Advert(node, f"c{node}", f"pi-{node[:4]}", 7946, admits, LOOPBACK)


def info(name: str = "a" * 16, addresses: tuple[str, ...] = ("10.0.0.7",), port: int = 7946) -> AsyncServiceInfo:
    properties = {"c": "cluster", "n": "pi-1", "p": "1", "j": "1"}
    return AsyncServiceInfo(
        SERVICE, f"{name}.{SERVICE}", port=port, parsed_addresses=list(addresses), properties=properties
    )


async def test_two_nodes_see_each_other_and_not_themselves() -> None:
    a, b = fresh_node(), fresh_node()
    seen: dict[NodeId, list[Sighting]] = {a: [], b: []}
    both = {a: asyncio.Event(), b: asyncio.Event()}

    def note(me: NodeId, other: NodeId, sighting: Sighting) -> None:
        seen[me].append(sighting)
        if sighting.node == other:
            both[me].set()

    first = Discovery(advert(a, admits=True), lambda s: note(a, b, s), LOOPBACK)
    second = Discovery(advert(b), lambda s: note(b, a, s), LOOPBACK)
    first.start()
    second.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await both[a].wait()
            await both[b].wait()
    finally:
        await first.close()
        await second.close()
    assert Sighting(a, f"c{a}", f"pi-{a[:4]}", ("127.0.0.1:7946",), True) in seen[b]
    assert Sighting(b, f"c{b}", f"pi-{b[:4]}", ("127.0.0.1:7946",), False) in seen[a]
    assert a not in {s.node for s in seen[a]}


async def test_a_look_round_finds_the_cluster_it_asks_for() -> None:
    a, b = fresh_node(), fresh_node()
    first = Discovery(advert(a, admits=True), lambda _: None, LOOPBACK)
    second = Discovery(advert(b), lambda _: None, LOOPBACK)
    first.start()
    second.start()
    try:
        found = await find(PATIENCE_S, f"c{a}", LOOPBACK, enough=lambda s: s.admits)
    finally:
        await first.close()
        await second.close()
    assert [s.node for s in found] == [a]


async def test_a_look_round_ends_when_nobody_is_there() -> None:
    assert await find(0.05, "no-such-cluster", LOOPBACK) == ()


async def test_no_network_is_no_error() -> None:
    assert await find(0.05, interfaces=("203.0.113.1",)) == ()
    alone = Discovery(advert(fresh_node()), lambda _: None, ("203.0.113.1",))
    alone.start()
    await alone.close()


def test_addresses_that_lead_nowhere_are_left_out() -> None:
    sighting = sighting_of(info(addresses=("127.0.0.1", "169.254.3.4", "0.0.0.0", "10.0.0.7", "224.0.0.251")))
    assert sighting is not None
    assert sighting.addresses == ("10.0.0.7:7946",)


@pytest.mark.parametrize("junk", [info(name="printer"), info(addresses=("127.0.0.1",)), info(port=0)])
def test_garbage_on_the_lan_is_no_sighting(junk: AsyncServiceInfo) -> None:
    assert sighting_of(junk) is None


def test_containers_and_bridges_are_not_used() -> None:
    for name in ("docker0", "br-1f2e", "veth12", "virbr0", "cni0"):
        assert name.startswith(discovery._NOT_LAN)
    for name in ("eth0", "wlan0", "enp3s0", "end0"):
        assert not name.startswith(discovery._NOT_LAN)


def test_lan_addresses_are_those_asked_for_or_all_but_loopback() -> None:
    assert lan_addresses(LOOPBACK) == LOOPBACK
    assert "127.0.0.1" not in lan_addresses()
