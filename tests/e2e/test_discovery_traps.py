"""mDNS on real LANs and its measured traps, on hosts of their own: `cluster.discovery` alone, or beside an avahi."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from piclusterd.demo.netns import Network
from piclusterd.demo.sites import network

from .village import SLOW, WHY_NOT

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow_lane, pytest.mark.timeout(300),
    pytest.mark.skipif(bool(SLOW or WHY_NOT), reason=SLOW or WHY_NOT or "-"),
]  # fmt: skip

ONE, TWO, THREE = "1" * 16, "2" * 16, "3" * 16
SOON_S = 20.0
AGAIN_S = 45.0
"""Interfaces are compared every 10 s, and a browser is replaced after 30 s."""
PARTITION_S = 70.0
"""A browser asks after 1, 3, 7, 15, 31, 63 and 127 s: by itself, one of this age asks again only after `AGAIN_S`."""
QUIET_S, QUIET_FRAMES = 15.0, 90
"""A fight for a name is 21 questions a second, for hours (zeroconf#1837)."""
AVAHI = shutil.which("avahi-daemon")


@pytest.fixture
def lan() -> Iterator[Network]:
    with network() as net:
        for name in ("pi-1", "pi-2", "pi-3"):
            net.add(name, 0)
        yield net


class Lookout:
    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    async def listen(self, told: asyncio.StreamReader) -> None:
        async for line in told:
            node, addresses = json.loads(line)
            self.seen.setdefault(node, set()).update(addresses)


@asynccontextmanager
async def lookout(net: Network, host: str, node: str) -> AsyncIterator[Lookout]:
    process = await asyncio.create_subprocess_exec(
        *net.within(host), sys.executable, "-m", "tests.e2e.lookout", node, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    made = Lookout()
    listening = asyncio.create_task(made.listen(process.stdout))
    try:
        yield made
    finally:
        process.kill()
        await process.wait()
        await listening


async def until(holds: Callable[[], bool], what: str, timeout_s: float) -> None:
    ends = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends, f"{what}: not within {timeout_s:g} s"
        await asyncio.sleep(0.1)


def ip(net: Network, host: str, *words: str) -> None:
    subprocess.run(["ip", "-n", net.ns(host), *words], check=True)


def frames_sent(net: Network, host: str) -> int:
    said = subprocess.run(
        [*net.within(host), "cat", "/sys/class/net/eth0/statistics/tx_packets"], check=True, capture_output=True
    )
    return int(said.stdout)


async def test_a_peer_that_came_during_a_partition_is_found_after_it(lan: Network) -> None:
    async with lookout(lan, "pi-1", ONE) as one:
        lan.unplug("pi-2")
        async with lookout(lan, "pi-2", TWO) as two:
            await asyncio.sleep(PARTITION_S)  # its announcements and both sides' questions are lost
            lan.replug("pi-2")
            await until(lambda: TWO in one.seen and ONE in two.seen, "both see each other", AGAIN_S)


async def test_a_network_card_that_is_replaced_hears_and_speaks_again(lan: Network) -> None:
    async with lookout(lan, "pi-1", ONE) as one, lookout(lan, "pi-2", TWO) as two:
        await until(lambda: TWO in one.seen and ONE in two.seen, "both see each other", SOON_S)
        lan.change_card("pi-1")
        async with lookout(lan, "pi-3", THREE) as three:
            await until(lambda: THREE in one.seen and ONE in three.seen, "the replaced card meets a new node", AGAIN_S)


async def test_a_node_that_starts_before_its_address_is_found_once_it_has_one(lan: Network) -> None:
    ip(lan, "pi-1", "addr", "flush", "dev", "eth0")
    async with lookout(lan, "pi-2", TWO) as two, lookout(lan, "pi-1", ONE) as one:
        await asyncio.sleep(3)
        assert ONE not in two.seen
        ip(lan, "pi-1", "addr", "add", "10.77.0.77/24", "dev", "eth0")
        await until(lambda: TWO in one.seen and "10.77.0.77:7946" in two.seen.get(ONE, ()), "it is seen", AGAIN_S)


async def test_addresses_of_containers_are_neither_told_nor_tried(lan: Network) -> None:
    for host in ("pi-1", "pi-2"):
        ip(lan, host, "link", "add", "docker0", "type", "bridge")
        ip(lan, host, "addr", "add", "172.17.0.1/16", "dev", "docker0")
        ip(lan, host, "link", "set", "docker0", "up")
        ip(lan, host, "link", "add", "veth0a1b", "type", "veth", "peer", "name", "inside")
        ip(lan, host, "addr", "add", "172.18.0.1/16", "dev", "veth0a1b")
        ip(lan, host, "link", "set", "veth0a1b", "up")
    async with lookout(lan, "pi-1", ONE) as one, lookout(lan, "pi-2", TWO) as two:
        await until(lambda: TWO in one.seen and ONE in two.seen, "both see each other", SOON_S)
    told = one.seen[TWO] | two.seen[ONE]
    assert {address for address in told if address.startswith("172.")} == set(), "each would find itself there"
    assert f"{lan.hosts['pi-2'].address}:7946" in told


@asynccontextmanager
async def avahi(net: Network, host: str, folder: Path) -> AsyncIterator[None]:
    """Debian's responder on `host`, with a /run of its own and no bus."""
    config = folder / f"avahi-{host}.conf"
    config.write_text(f"[server]\nhost-name={host}\nuse-ipv6=no\nenable-dbus=no\nallow-interfaces=eth0\n")
    run = f"mount -t tmpfs tmpfs /run && exec {AVAHI} --no-drop-root --no-chroot --no-rlimits -f {config}"
    process = await asyncio.create_subprocess_exec(
        *net.within(host), "sh", "-c", run, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SOON_S):
            said = ""
            while "Server startup complete" not in said:
                said = (await process.stdout.readline()).decode()
                assert said, "avahi ended"
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.skipif(AVAHI is None, reason="no avahi-daemon on this machine")
async def test_an_avahi_on_the_same_host_and_on_another_disturbs_nobody(lan: Network, tmp_path: Path) -> None:
    async with (
        avahi(lan, "pi-1", tmp_path), avahi(lan, "pi-3", tmp_path),
        lookout(lan, "pi-1", ONE) as one, lookout(lan, "pi-2", TWO) as two,
    ):  # fmt: skip
        await until(lambda: TWO in one.seen and ONE in two.seen, "both see each other", SOON_S)
        await is_quiet(lan)


async def test_a_name_that_two_hosts_claim_is_fought_for_by_neither(lan: Network) -> None:
    """A copied card: the same node id on two boards. Links refuse the second (`cluster.links`), mDNS shows both."""
    async with lookout(lan, "pi-1", ONE), lookout(lan, "pi-2", ONE), lookout(lan, "pi-3", THREE) as three:
        await until(lambda: ONE in three.seen, "one of them is seen", SOON_S)
        await is_quiet(lan)


async def is_quiet(net: Network) -> None:
    """After the start, hosts say little."""
    before = {host: frames_sent(net, host) for host in net.hosts}
    await asyncio.sleep(QUIET_S)
    sent = {host: frames_sent(net, host) - before[host] for host in net.hosts}
    assert max(sent.values()) < QUIET_FRAMES, sent
