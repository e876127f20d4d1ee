"""Real daemons in networks like an owner's (`netns`): Pis behind NAT routers, a droplet that cannot dial them.

    founder ── init; others of its site join over mDNS
    elsewhere ── join through a tunnel the owner opens for a minute (`ssh -R`), since nothing can dial the founder
    all but the droplet have the droplet as their seed

The API of each node is reached over its own wire from the street, so that no fault of a network hides what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from .cluster import Cluster, Member, Outside
from .hub_process import free_port
from .netns import DROPLET, STREET, Host, Network

PEER_PORT, API_PORT = 7946, 8746
COPY_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node lives: `site` None is the WAN, which makes it the droplet. `cable`: a bad one (see `cable`)."""

    name: str
    site: int | None = 0
    cable: dict[str, float] | None = None


HOME = (Place("pi-1"), Place("pi-2"), Place("pi-3"))
WITH_DROPLET = (*HOME, Place("droplet", None))


@dataclass(slots=True)
class SiteCluster(Cluster):
    """`size` and `voters` follow from `places`."""

    places: tuple[Place, ...] = HOME
    net: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        self.size = len(self.places)
        self.voters = sum(place.site is not None for place in self.places)

    def _member(self, index: int) -> Member:
        place = self.places[index]
        host = self.net.hosts.get(place.name) or self.net.add(place.name, place.site, place.cable)
        home = self.root / place.name
        home.mkdir(parents=True, exist_ok=True)
        away = any(other.site is None for other in self.places)
        return Member(
            place.name, home, PEER_PORT, API_PORT, host=host.address, api_host=host.api,
            role="relay" if place.site is None else "worker",
            seeds=(f"{DROPLET}:{PEER_PORT}",) if away and place.site is not None else (),
            within=self.net.within(place.name),
        )  # fmt: skip

    async def join(self, member: Member, token: str) -> str:
        founder, host = self.net.hosts[self.members[0].name], self.net.hosts[member.name]
        if founder.site == host.site:
            return await Cluster.join(self, member, token)
        async with tunnel(self.net, host, founder) as address:
            return await self.picluster(member, "join", token, "--name", member.name, "--server", address)


def seen_from_sites(outside: Outside) -> Outside:
    """The doubles of the outside world, as nodes behind routers find them: on the WAN."""

    def moved(url: str) -> str:
        return url.replace("127.0.0.1", STREET)

    return replace(
        outside,
        hub_url=moved(outside.hub_url),
        linear_url=moved(outside.linear_url),
        notion_url=moved(outside.notion_url),
    )


@contextmanager
def network(sites: int = 1) -> Iterator[Network]:
    """A network that is there and gone again, with this thread on its street meanwhile. Raises `NetFailed`."""
    net = Network(sites)
    try:
        net.up()
        with net.inside("street"):
            yield net
    finally:
        net.down()


@asynccontextmanager
async def tunnel(net: Network, listens: Host, reaches: Host) -> AsyncIterator[str]:
    """As `ssh -R` from the founder to the droplet: an address on the loopback of `listens` that leads to `reaches`."""
    port = free_port()
    with net.inside(listens.name):
        door = socket.create_server(("127.0.0.1", port))
    copies: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with net.inside(reaches.name):
            there = socket.socket()
        there.setblocking(False)
        await asyncio.get_running_loop().sock_connect(there, (reaches.address, PEER_PORT))
        far_reader, far_writer = await asyncio.open_connection(sock=there)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_copy(source, sink))
            copies.add(task)
            task.add_done_callback(copies.discard)

    server = await asyncio.start_server(serve, sock=door)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.close()
        for task in list(copies):
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(COPY_BYTES):
            sink.write(data)
            await sink.drain()
    except OSError:
        pass  # one end went: so does the other
    finally:
        with contextlib.suppress(OSError):
            sink.close()
