"""More nodes than push to all (`membership.PUSH_ALL_MAX`) over real links: who knew one address ends in the mesh."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from piclusterd.cluster import identity
from piclusterd.cluster.identity import Identity
from piclusterd.cluster.link import TIMINGS
from piclusterd.cluster.links import Links
from piclusterd.cluster.membership import Membership
from piclusterd.cluster.timings import PRESETS
from piclusterd.events import Send
from piclusterd.ids import NodeId
from piclusterd.mailbox import Mailbox
from piclusterd.upkeep import keep_linked
from piclusterd.wire import Facts
from tests.cluster.test_identity import member

from .village import SLOW

pytestmark = [pytest.mark.e2e, pytest.mark.slow_lane, pytest.mark.skipif(bool(SLOW), reason=SLOW or "-")]

NODES = 32
PRESET = "pi"
"""All on one machine's cores: `lan` is for idle ones."""
MESHED_S = 120.0
WATCHED_S = 30.0
"""Three suspicions long. Before the mesh is whole, a thousand handshakes in one process hold everybody up."""


class Person:
    """A node that does nothing but be a member: links, inbox, membership."""

    def __init__(self, me: Identity) -> None:
        self.me = me
        self.mailbox = Mailbox(time.monotonic)
        self.links = Links(me, self.mailbox.post, self._serve, random.Random(me.node), timing=TIMINGS[PRESET])
        self.unsent = 0
        self.buried: set[NodeId] = set()

    async def live(self, address: str) -> None:
        self.links.addresses = (address,)
        facts = Facts(name=self.me.name, addresses=(address,))
        rng = random.Random(self.me.node)
        self.membership = Membership(self.me.node, facts, 1, PRESETS[PRESET], rng, lambda: b"", time.monotonic())
        reaching = asyncio.create_task(keep_linked(self.me.node, self.membership.alive, self.links))
        try:
            while True:
                event = await self.mailbox.next(self.membership.deadline())
                for effect in self.membership.handle(event, time.monotonic()):
                    if isinstance(effect, Send):
                        self.unsent += not self.links.send(effect.to, effect.message)
                self.buried |= {m.node for m in self.membership.members() if m.state == "failed"}
        finally:
            reaching.cancel()

    async def _serve(self, peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
        yield b""


@asynccontextmanager
async def crowd(tmp_path: Path) -> AsyncIterator[list[Person]]:
    first = identity.create_cluster(tmp_path / "0", "home", "pi-0")
    people = [Person(first), *(Person(member(tmp_path, first, f"pi-{i}")) for i in range(1, NODES))]
    lives: list[asyncio.Task[None]] = []
    door = ""
    try:
        for person in people:
            address = f"127.0.0.1:{await person.links.start('127.0.0.1', 0)}"
            lives.append(asyncio.create_task(person.live(address)))
            if door:
                person.links.dial(door)
            door = door or address
        yield people
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        await asyncio.gather(*(person.links.close() for person in people))


def is_whole(person: Person) -> bool:
    listed = [member.state for member in person.membership.members()]
    return len(person.links.peers()) == NODES - 1 and listed == ["alive"] * NODES


async def until_meshed(people: list[Person]) -> None:
    ends = time.monotonic() + MESHED_S
    while not all(is_whole(person) for person in people):
        assert time.monotonic() < ends, "no mesh"
        await asyncio.sleep(0.2)


async def test_thirty_two_nodes_that_knew_one_address_become_a_mesh_and_bury_nobody(tmp_path: Path) -> None:
    async with crowd(tmp_path) as people:
        await until_meshed(people)
        for person in people:
            person.unsent, person.buried = 0, set()
        await asyncio.sleep(WATCHED_S)
        assert all(is_whole(person) for person in people)
        assert [(person.unsent, person.buried) for person in people] == [(0, set())] * NODES
