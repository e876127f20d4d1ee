"""A large crowd in the rehearsal room: nothing but the membership decider, so that a thousand nodes fit on one core.

Every node is the daemon's own `Membership`; hands, links and disks are left out. What is sent arrives after a drawn
delay or is lost. A node that stalled runs its timers first, then hears that it was stalled, then reads its inbox: the
order that makes it accuse others most easily (timers of an event loop run before its sockets are read).

    Send ──loss, delay──▶ heap ──▶ Received        kill ──▶ LinkDown to its links (SIGKILL), or nothing (power cut)

Up to PUSH_ALL_MAX nodes all are linked. Above, each keeps LINKS links, and a Send to any other member is dialled or
relayed by the hands (see `cluster.membership`), so it arrives too. Links are not drawn to fail: losses are.

Traffic is counted at both ends: the encoded message and what frames it up to TCP (`wire_bytes`).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import msgspec

from ..cluster.membership import PUSH_ALL_MAX, Membership
from ..cluster.suspicion import Guards
from ..cluster.timings import PRESETS
from ..events import (
    DeadlineReached,
    Event,
    FactsChanged,
    LinkDown,
    LinkUp,
    LoopLagged,
    MemberDown,
    Output,
    Received,
    Send,
)
from ..ids import NodeId, node_id
from ..wire import Facts, Member, ModelFacts, PeerMessage, encode

FRAME_BYTES = 31
"""Around a short message: link frame (5), WebSocket header (2, and 4 of mask in one direction), TLS 1.3 record (22)."""
SHORT_BYTES = 120
LONG_BYTES = 3
"""More around a longer one: two of the WebSocket header, one of the frame."""
TCP_BYTES = 78
"""Of TCP/IPv4 a message: one segment's headers with timestamps (52), and half of a bare acknowledgement."""
LINKS = 8
"""Links a node of a large crowd keeps open: more than ln(1000), so that the graph of links is connected."""
FACTS_EVERY_S = 5.0
"""How often the daemon reads its board."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What is rehearsed. Delays in seconds, one way; `loss` is a probability per message."""

    nodes: int
    seed: int = 0
    preset: str = "pi"
    loss: float = 0.0
    delay_s: tuple[float, float] = (0.0005, 0.01)
    guards: Guards = Guards()  # noqa: RUF009 (frozen)
    told_of_stalls: bool = True
    """Whether hands tell a node that it was stalled; it also notices by itself."""


@dataclass(slots=True)
class Person:
    """One node: its decider, and until when it sleeps."""

    node: NodeId
    decider: Membership
    facts: Facts
    up: bool = True
    asleep_until: float = 0.0
    wake: float = float("inf")
    bytes_sent: int = 0
    bytes_heard: int = 0
    messages: int = 0
    """Sent and heard, as the bytes are: only while metering."""


def board_facts(number: int) -> Facts:
    """What a Pi with one model says of itself, of ordinary length: about 250 bytes."""
    address = f"192.168.{number // 250}.{number % 250 + 2}"
    model = ModelFacts("qwen2.5-1.5b-instruct-q4_k_m", False, 0, 0, 41.5, 9.25, 8192)
    gib = 1024**3
    return Facts(
        name=f"pi-{number}",
        addresses=(f"{address}:7143",),
        api=f"http://{address}:7140",
        release="0.1.0",
        board="Raspberry Pi 5 Model B Rev 1.0",
        cpu_percent=3.0,
        memory_used=2 * gib,
        memory_total=8 * gib,
        temperature_c=51.0,
        models=(model,),
    )


def reading(facts: Facts, rng: Random, restless: bool) -> Facts:
    """The board of `facts` read once more: at rest its sensors flutter, `restless` its load is another each time."""
    cpu, heat = (rng.uniform(0, 100), rng.uniform(50, 80)) if restless else (rng.uniform(1, 5), rng.gauss(51, 0.4))
    used = facts.memory_used + int(rng.gauss(0, 2**24))
    return msgspec.structs.replace(facts, cpu_percent=cpu, temperature_c=heat, memory_used=used)


def wire_bytes(message: PeerMessage) -> int:
    """Bytes given to TCP for `message`."""
    body = len(encode(message))
    return body + FRAME_BYTES + (LONG_BYTES if body > SHORT_BYTES else 0)


class Gathering:
    """A crowd that plays. `row` hears every note, as (time, who noted, note)."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.now = 0.0
        self.notes: list[tuple[float, NodeId, Output]] = []
        self.watching: Callable[[Person], None] | None = None
        """Called after every event, with whom it happened to."""
        self.metering = False
        self.events = 0
        self._rng = Random(f"gossip/{crowd.seed}")
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.people = [self._person(number) for number in range(crowd.nodes)]
        self.by_id = {person.node: person for person in self.people}
        self._links: dict[NodeId, list[NodeId]] = {person.node: [] for person in self.people}
        self._acquaint()

    def _person(self, number: int) -> Person:
        node = node_id(number.to_bytes(32, "big"))
        facts = board_facts(number)
        rng = Random(f"{self.crowd.seed}/{number}")
        begins = -rng.uniform(0.0, PRESETS[self.crowd.preset].push_pull_s)  # nobody's periods are in step
        decider = Membership(
            node, facts, 1 << 20, PRESETS[self.crowd.preset], rng, lambda: bytes(8), begins, self.crowd.guards
        )
        return Person(node, decider, facts)

    def _acquaint(self) -> None:
        """Everybody knows everybody already: what is measured is a cluster at work, not its birth."""
        for one, other in self._pairs():
            self._links[one.node].append(other.node)
            self._links[other.node].append(one.node)
            for person, peer in ((one, other), (other, one)):
                person.decider.handle(LinkUp(peer.node), 0.0)  # what it says is left unsaid: they know each other
        everybody = [person.decider.mine for person in self.people]
        for person in self.people:
            person.decider.learn(everybody, 0.0)
        for person in self.people:
            self.at(self._rng.uniform(0.0, PRESETS[self.crowd.preset].probe_s), lambda p=person: self._schedule(p))  # type: ignore[misc]

    def _pairs(self) -> list[tuple[Person, Person]]:
        if self.crowd.nodes <= PUSH_ALL_MAX:
            return list(itertools.combinations(self.people, 2))
        drawn = ((one, self._rng.choice(self.people)) for one in self.people for _ in range(LINKS // 2))
        return [(one, other) for one, other in drawn if one is not other]

    # what happens --------------------------------------------------------------------------------------------
    def at(self, time: float, action: Callable[[], None]) -> None:
        """`action` at `time`, in seconds of the crowd's clock."""
        heapq.heappush(self._heap, (time, next(self._order), action))

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> bool:
        """Play to `until`, or till `stop()` after an event; whether it stopped."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            if stop is not None and stop():
                return True
        self.now = until
        return False

    def kill(self, person: Person, links_close: bool) -> None:
        """SIGKILL, which closes its links at once, or a power cut, of which nobody hears."""
        person.up = False
        for peer in self._links[person.node] if links_close else ():
            other = self.by_id[peer]
            self.at(self.now + self._delay(), lambda o=other: self.deliver(o, LinkDown(person.node)))  # type: ignore[misc]

    def stall(self, person: Person, seconds: float) -> None:
        """It neither hears nor says anything; then it finds all of it in its inbox."""
        person.asleep_until = self.now + seconds
        self.at(person.asleep_until, lambda: self._wake(person, person.wake))
        if self.crowd.told_of_stalls:
            self.at(person.asleep_until, lambda: self.deliver(person, LoopLagged(seconds)))

    def read_boards(self, restless: bool, within: float = FACTS_EVERY_S) -> None:
        """Every node reads its board every few seconds, the first time `within` seconds of now.

        `restless`: each time with another load.
        """
        for person in self.people:
            self.at(self.now + self._rng.uniform(0.0, within), lambda p=person: self._read(p, restless))  # type: ignore[misc]

    def _read(self, person: Person, restless: bool) -> None:
        self.deliver(person, FactsChanged(reading(person.facts, self._rng, restless)))
        self.at(self.now + FACTS_EVERY_S, lambda: self._read(person, restless))

    def deliver(self, person: Person, event: Event) -> None:
        if not person.up:
            return
        if person.asleep_until > self.now:
            self.at(person.asleep_until, lambda: self.deliver(person, event))
            return
        self.events += 1
        for output in person.decider.handle(event, self.now):
            if isinstance(output, Send):
                self._send(person, output)
            else:
                self.notes.append((self.now, person.node, output))
        if self.watching is not None:
            self.watching(person)
        self._schedule(person)

    def _send(self, sender: Person, send: Send) -> None:
        to, event = self.by_id[send.to], Received(sender.node, send.message)
        if self.metering:
            size = wire_bytes(send.message)
            sender.bytes_sent += size
            to.bytes_heard += size
            sender.messages += 1
            to.messages += 1
        if self._rng.random() >= self.crowd.loss:
            self.at(self.now + self._delay(), lambda: self.deliver(to, event))

    def _delay(self) -> float:
        return self._rng.uniform(*self.crowd.delay_s)

    def _schedule(self, person: Person) -> None:
        due = max(person.decider.deadline(), self.now)
        if person.up and due != person.wake:
            person.wake = due
            self.at(due, lambda: self._wake(person, due))

    def _wake(self, person: Person, due: float) -> None:
        if person.wake != due or person.asleep_until > self.now:
            return
        person.wake = float("inf")
        if due <= self.now:
            self.deliver(person, DeadlineReached())
        else:
            self._schedule(person)

    # looks ---------------------------------------------------------------------------------------------------
    def believes(self, person: Person, of: NodeId) -> Member | None:
        """What `person` lists of `of`."""
        return person.decider.roster.line_of(of)

    def failures(self) -> list[tuple[float, NodeId, NodeId]]:
        """(when, who noted, whom) of every note that a member failed."""
        return [
            (time, by, note.node)
            for time, by, note in self.notes
            if isinstance(note, MemberDown) and note.state == "failed"
        ]
