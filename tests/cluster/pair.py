"""Machines with a pretend wire: several deciders, one clock that jumps, a disk that saves when it is told.

    Send ─▶ wire (cut pairs lose it) ─▶ Received        SaveHardState ─▶ disk ─▶ HardStateSaved, at once or on `save`

The wire delivers in order and at once; `run_until` jumps the clock from deadline to deadline, and every drive is
bounded, so that two machines that talk without end fail the test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, TypeVar

from piclusterd.cluster.election import Election
from piclusterd.cluster.membership import Membership
from piclusterd.cluster.timings import PRESETS
from piclusterd.events import (
    DeadlineReached,
    Event,
    HardState,
    HardStateSaved,
    LinkDown,
    LinkUp,
    Output,
    Received,
    SaveHardState,
    Send,
)
from piclusterd.ids import NodeId
from piclusterd.wire import Facts, Heartbeat, Held, PeerMessage, Voters

STEPS_MAX = 10_000
"""Deliveries in one drive; more is a livelock."""

PI = PRESETS["pi"]
T = TypeVar("T")


def name(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


A, B, C, D = (name(number) for number in range(10, 14))


class Wire:
    """What all machines share: the clock, the links, who is cut from whom, and a record of everything said."""

    def __init__(self) -> None:
        self.now = 100.0
        self.said: list[tuple[NodeId, NodeId, PeerMessage]] = []
        self.notes: dict[NodeId, list[Output]] = {}
        self.saves: dict[NodeId, list[SaveHardState]] = {}
        self.autosave = True
        self._machines: dict[NodeId, Election | Membership] = {}
        self._queue: deque[tuple[NodeId, Event]] = deque()
        self._cut: set[tuple[NodeId, NodeId]] = set()

    def add(self, node: NodeId, machine: Election | Membership) -> None:
        self._machines[node] = machine
        self.notes.setdefault(node, [])
        self.saves.setdefault(node, [])

    def remove(self, node: NodeId) -> None:
        """The process is gone; nobody is told."""
        del self._machines[node]

    def cut(self, one: NodeId, other: NodeId) -> None:
        """Nothing passes between the two, and neither notices."""
        self._cut |= {(one, other), (other, one)}

    def cut_way(self, one: NodeId, other: NodeId) -> None:
        """Nothing passes from `one` to `other`; the way back is open."""
        self._cut.add((one, other))

    def heal(self) -> None:
        self._cut.clear()

    def isolate(self, node: NodeId) -> None:
        for other in self._machines:
            if other != node:
                self.cut(node, other)

    def link_all(self) -> None:
        for node in self._machines:
            for other in self._machines:
                if other != node:
                    self.tell(node, LinkUp(other))

    def unlink(self, one: NodeId, other: NodeId) -> None:
        for node, peer in ((one, other), (other, one)):
            if node in self._machines:
                self.tell(node, LinkDown(peer))

    # driving -------------------------------------------------------------------------------------------------
    def tell(self, node: NodeId, event: Event) -> list[Output]:
        """`event` happens to `node`, and all that follows from it; what `node` itself returned."""
        out = self._machines[node].handle(event, self.now)
        self._perform(node, out)
        self.settle()
        return out

    def settle(self) -> None:
        for _ in range(STEPS_MAX):
            if not self._queue:
                return
            node, event = self._queue.popleft()
            if node in self._machines:
                self._perform(node, self._machines[node].handle(event, self.now))
                self._perform(node, self._held(node, event))
        raise AssertionError("they talk without end")

    def run_until(self, until: Callable[[], bool], within: float) -> None:
        """Jump from deadline to deadline until the condition holds; fails after `within` seconds."""
        ends = self.now + within
        for _ in range(STEPS_MAX):
            if until():
                return
            due, node = min((machine.deadline(), node) for node, machine in self._machines.items())
            assert due <= ends, f"it did not happen within {within} s"
            self.now = max(self.now, due)
            self.tell(node, DeadlineReached())
        raise AssertionError("the clock stands still")

    def run_for(self, seconds: float) -> None:
        ends = self.now + seconds
        self.run_until(lambda: min(m.deadline() for m in self._machines.values()) > ends, seconds + 1.0)
        self.now = ends

    def save(self, node: NodeId) -> None:
        """The disk has everything that `node` wanted saved."""
        self.tell(node, HardStateSaved(self.saves[node][-1].token))

    def _held(self, node: NodeId, event: Event) -> list[Send]:
        """The ledger's part, by which a leader knows that it is heard (`ledger.replicate`)."""
        machine = self._machines[node]
        if isinstance(machine, Election) and isinstance(event, Received) and isinstance(event.message, Heartbeat):
            return [Send(event.sender, Held(machine.term, b"digest"))]
        return []

    def _perform(self, node: NodeId, out: Iterable[Output]) -> None:
        for output in out:
            match output:
                case Send(to, message):
                    self.said.append((node, to, message))
                    if (node, to) not in self._cut:
                        self._queue.append((to, Received(node, message)))
                case SaveHardState():
                    self.saves[node].append(output)
                    if self.autosave:
                        self._queue.append((node, HardStateSaved(output.token)))
                case _:
                    self.notes[node].append(output)

    def heard_of(self, node: NodeId, kind: type[T]) -> list[T]:
        """The notes of `kind` that `node` gave."""
        return [note for note in self.notes[node] if isinstance(note, kind)]

    def sent(self, kind: type[T], by: NodeId | None = None) -> list[T]:
        """Messages of `kind` said so far."""
        return [m for sender, _, m in self.said if isinstance(m, kind) and by in (None, sender)]


def elector(
    node: NodeId, voters: Voters, wire: Wire, seed: int = 0, hard: HardState | None = None, **looks: Any
) -> Election:
    """An election of `node`, on the wire but not linked yet."""
    rng = Random(f"{seed}/{node}")
    machine = Election(node, hard or HardState(voters=voters), PI, rng, lambda: b"digest", wire.now, **looks)
    wire.add(node, machine)
    return machine


def member(node: NodeId, wire: Wire, seed: int = 0, incarnation: int = 0) -> Membership:
    rng = Random(f"{seed}/{node}")
    facts = Facts(version=1, name=f"pi-{node[-1]}")
    machine = Membership(node, facts, incarnation, PI, rng, lambda: b"digest", wire.now)
    wire.add(node, machine)
    return machine
