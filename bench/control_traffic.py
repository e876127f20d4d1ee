"""What a node puts on the wire when nothing happens, and what it hears: part of `bench.gossip`.

Counted is what is given to TCP: the encoded message, the frame of the link, the WebSocket header and mask, and TLS's
record. Headers of TCP and IP depend on what the kernel joins and delays; they are estimated in a row of their own.

    whole_nodes   N = 4, three voters and a learner: membership, the leader's heartbeats and their answers, the ledger's
                  digests, facts of boards whose sensors flutter, and the pulse that links keep by themselves
    traffic       any N, membership alone: an election has at most five voters, whatever N is
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from statistics import fmean

from bench.memberlist import Measured
from bench.report import Report, quantile
from piclusterd.cluster.frames import PING_BYTES
from piclusterd.cluster.link import RTT_REFRESH_S, Timing
from piclusterd.cluster.own_facts import GAP_PER_MEMBER_S
from piclusterd.cluster.timings import PRESETS
from piclusterd.events import Effect, FactsChanged, Send
from piclusterd.ids import NodeId
from piclusterd.sim.gossip import (
    FACTS_EVERY_S,
    FRAME_BYTES,
    TCP_BYTES,
    Crowd,
    Gathering,
    board_facts,
    reading,
    wire_bytes,
)  # fmt: skip
from piclusterd.sim.hands import SimHands
from piclusterd.sim.world import Actor, Plan, World

IDLE_MAX = {4: 1000.0, 1000: 10_000.0}
"""Bytes a second and node (DESIGN §9)."""


def traffic(report: Report, nodes: int, restless: bool, seconds: float, real: Measured | None) -> None:
    gathering = Gathering(Crowd(nodes))
    gap = max(20.0, GAP_PER_MEMBER_S * nodes)
    gathering.run(gap)
    gathering.read_boards(restless, gap)  # not all at once: the cluster was not born in one second
    gathering.run(gathering.now + gap)  # past the first round of facts
    gathering.metering = True
    gathering.run(gathering.now + seconds)
    loads = "every load changing every 5 s" if restless else "at rest"
    people = gathering.people
    _tell(
        report,
        f"N={nodes}, {loads}: membership",
        [person.bytes_sent / seconds for person in people],
        [person.bytes_heard / seconds for person in people],
        [person.messages / seconds for person in people],
        IDLE_MAX.get(nodes),
        real if not restless else None,
    )


def _tell(
    report: Report,
    what: str,
    sent: list[float],
    heard: list[float],
    messages: list[float],
    at_most: float | None,
    real: Measured | None = None,
) -> None:
    """Bytes and messages a second, one of each a node."""
    both = [out + back for out, back in zip(sent, heard, strict=True)]
    unit = "B/s a node"
    peer = ("memberlist, run here", real.sent) if real else (None, None)
    report.add(f"{what} sends", fmean(sent), unit, peer=peer[0], peer_value=peer[1], at_most=at_most)
    report.add(f"{what} sends and hears", fmean(both), unit, at_most=at_most)
    report.add(f"{what} sends and hears, p99 of the nodes", quantile(both, 0.99), unit, at_most=at_most)
    report.add(f"{what} sends and hears, the busiest node", max(both), unit)
    report.add(f"{what}: TCP/IP headers on top, estimated, sent and heard", fmean(messages) * TCP_BYTES, unit)


class MeteredHands(SimHands):
    """The rehearsal room's hands, counting what crosses each link, with the pulse that the links keep themselves."""

    def __init__(self, world: World, rng: Random) -> None:
        super().__init__(world, rng)
        self.nodes = [actor.disk.node for actor in world.actors]
        self.heard = dict.fromkeys(self._pairs(), 0.0)
        """(who, whom) → when."""
        self.pinged = dict(self.heard)
        self.reset()

    def _pairs(self) -> Iterator[tuple[NodeId, NodeId]]:
        return ((one, other) for one in self.nodes for other in self.nodes if one != other)

    def reset(self) -> None:
        self.sent = dict.fromkeys(self.nodes, 0)
        self.received = dict.fromkeys(self.nodes, 0)
        self.messages = dict.fromkeys(self.nodes, 0)
        self.books = (self.sent, self.received, self.messages)

    def perform(self, actor: Actor, effect: Effect) -> None:
        if isinstance(effect, Send):
            self._count(actor.disk.node, effect.to, wire_bytes(effect.message))
        super().perform(actor, effect)

    def _count(self, sender: NodeId, to: NodeId, size: int) -> None:
        self.sent[sender] += size
        self.received[to] += size
        self.messages[sender] += 1
        self.messages[to] += 1
        self.heard[to, sender] = self._world.now

    def pulse(self) -> None:
        """What `cluster.link` does every `ping_idle_s`."""
        now, idle = self._world.now, Timing().ping_idle_s
        for one, other in self._pairs():
            quiet = now - max(self.heard[one, other], self.pinged[one, other])
            if quiet >= idle or now - self.pinged[one, other] > RTT_REFRESH_S:
                self.pinged[one, other] = now
                self._count(one, other, PING_BYTES + FRAME_BYTES)
                self._count(other, one, PING_BYTES + FRAME_BYTES)


def whole_nodes(report: Report, seconds: float, restless: bool) -> None:
    """Three voters and a learner with ledgers, elected and at rest, at the timings of a Pi."""
    world = World(Plan(seed=1))
    rng = Random(1)

    def read_board(actor: Actor) -> None:
        facts = reading(board_facts(actor.number), rng, restless)
        world.deliver_in(rng.uniform(0.0, FACTS_EVERY_S), actor, FactsChanged(facts))

    def read_boards() -> None:
        for actor in world.actors:
            read_board(actor)

    try:
        hands = world.hands = MeteredHands(world, Random(1))
        world.timings = PRESETS["pi"]
        world.calm()
        world.open()
        world.every(Timing().ping_idle_s, hands.pulse)
        world.every(FACTS_EVERY_S, read_boards)
        world.play(60.0)
        hands.reset()
        world.play(60.0 + seconds)
    finally:
        world.close()
    loads = "every load changing every 5 s" if restless else "at rest"
    sent, heard, messages = ([count / seconds for count in book.values()] for book in hands.books)
    _tell(report, f"N=4, {loads}: a whole node", sent, heard, messages, None if restless else IDLE_MAX[4])
