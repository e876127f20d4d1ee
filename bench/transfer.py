"""One model from the node that has it to one node, and to three at once, over links of a known speed.

    four daemons in namespaces on one switch; each port limited both ways by the kernel (tc tbf)
    picluster pull FILE on pi-1 ─▶ pull NAME on pi-2 ─▶ pull NAME on pi-2, pi-3 and pi-4 at once

The limit: a node cannot have the file sooner than its own port lets it in. Sent one after another, or by pi-1 alone,
three copies take three times that; nodes that give each other what they have come near to one. Measured is from the
order to the answer, so looking for peers, writing, fsync and both hashes are in it. Needs root, `ip`, `nft` and `tc`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.report import Report, main
from piclusterd.demo import netns
from piclusterd.demo.cluster import Member
from piclusterd.demo.sites import HOME, Place, SiteCluster, network
from piclusterd.inference.models import HEADER

PLACES = (*HOME, Place("pi-4"))
MB = 1_000_000
NAME = "big"
BURST_BYTES = 128 * 1024
WHOLE_S = 600.0
WIRE = 0.93
"""Of a port's bits that are payload: the rest is headers of Ethernet, IP, TCP and TLS."""


def model(path: Path, size: int) -> None:
    """A file that is a GGUF by its header and cannot be compressed."""
    with path.open("wb") as file:
        file.write(HEADER.pack(b"GGUF", 3, 1, 1))
        for _ in range(size // MB):
            file.write(os.urandom(MB))


async def wish(member: Member, **what: Any) -> list[dict[str, Any]]:
    """What `picluster` would ask; every line of the answer."""
    limits = aiohttp.ClientTimeout(total=WHOLE_S)
    socket = aiohttp.UnixConnector(str(member.state / "api.sock"))
    async with (
        aiohttp.ClientSession(connector=socket, timeout=limits) as http,
        http.post("http://picluster.localhost/admin/models", json=what) as answer,
    ):
        lines = [json.loads(line) for line in (await answer.text()).splitlines()]
    if any("error" in line for line in lines):
        raise RuntimeError(str(lines[-1]))
    return lines


async def pulled(members: list[Member]) -> float:
    """Seconds until all of them have it; it is gone again afterwards."""
    began = time.monotonic()
    await asyncio.gather(*(wish(member, what="pull", name=NAME) for member in members))
    took = time.monotonic() - began
    await asyncio.gather(*(wish(member, what="remove", name=NAME) for member in members))
    return took


def limit(net: netns.Network, megabits: int) -> None:
    """Every port, both ways."""
    for host in net.hosts.values():
        ends = ((net.ns(host.name), "eth0"), (net.ns(f"lan{host.site}"), host.port))
        for space, device in ends:
            shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", str(BURST_BYTES), "latency", "50ms")
            subprocess.run(["ip", "netns", "exec", space, "tc", "qdisc", "add", "dev", device, *shape], check=True)


async def run(report: Report, size: int, megabits: int) -> None:
    with tempfile.TemporaryDirectory() as directory, network() as net:
        root = Path(directory)
        cluster = SiteCluster(root, places=PLACES, with_model=(), net=net)
        try:
            await cluster.found()
            await cluster.until(cluster.coordinator, "a coordinator", 60)
            model(root / "big.gguf", size)
            seed, *others = cluster.members
            await wish(seed, what="import", name=str(root / "big.gguf"), to=NAME)
            limit(net, megabits)
            before = (await cluster.views())[0]["term"]
            best = size / (megabits * MB / 8)
            one = await pulled(others[:1])
            three = await pulled(others)
            terms = (await cluster.views())[0]["term"] - before
        finally:
            await cluster.close()
    link = f"{size // MB} MB, ports of {megabits} Mbit/s"
    report.add(f"{link}: to one node", one, "s", peer="the port", peer_value=best)
    report.add(f"{link}: to one node", size / one / MB, "MB/s", at_least=WIRE * 0.9 * megabits / 8)
    report.add(f"{link}: to three nodes at once", three, "s", peer="the port", peer_value=best)
    report.add(
        f"{link}: to three nodes at once", three, "s", peer="three copies by one port", peer_value=3 * best,
        larger_is_better=False, ratio_at_least=1.5,
    )  # fmt: skip
    report.add("terms of the coordinator that passed meanwhile", terms, "terms", at_most=0)


def measure(report: Report, quick: bool) -> None:
    missing = netns.why_not() or ("" if shutil.which("tc") else "not installed: tc")
    if missing:
        report.add(f"not run: {missing}", 0, "")
        return
    asyncio.run(run(report, 96 * MB, 80))
    if not quick:
        asyncio.run(run(report, 512 * MB, 200))


if __name__ == "__main__":
    main("transfer", measure)
