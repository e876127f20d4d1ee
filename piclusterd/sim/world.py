"""The rehearsal room: N real nodes, real ledgers, one heap of events, one clock, one seed.

The hall and the deciders are those of the daemon; only the hands differ: `perform` puts each effect on the heap with a
drawn delay instead of on a socket or a disk. A failure is named by (commit, seed, minutes) and replays exactly: nothing
here reads a clock, and every draw comes from generators seeded by the seed.

    heap ──(time, event)──▶ node.handle ──effects──▶ perform ──▶ heap …      checks after every step

Two phases (TigerBeetle's VOPR): faults as drawn for the seed, then calm for REST_S, after which liveness must hold.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from ..cluster.timings import PRESETS
from ..events import (
    DeadlineReached,
    Event,
    HardState,
    LinkDown,
    LinkUp,
    Received,
    Rules,
)
from ..ledger import store
from ..node import Node, Setup
from ..wire import Facts, Voters
from .checks import Checks, Violation
from .disk import Disk
from .hands import SimHands
from .keys import SimKey
from .network import Network, draw_weather
from .outside import Hub, Rehearsed, Service

REST_S = 60.0
"""Calm at the end: ten election timeouts and every backoff of a run that failed in the storm."""
LINK_SILENCE_S = 5.0
"""A cut link is noticed after this long (the daemon's silent deadline)."""
SAME_TIME_MAX = 100_000
"""Events without the clock moving: a livelock."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of the world is: replayable from these values alone."""

    seed: int
    minutes: float = 3.0
    voters: int = 3
    learners: int = 1
    rules: Rules = field(default_factory=Rules)
    lying_disks: bool = False
    """Ablation: the disk says a vote is durable before it is."""


@dataclass(slots=True)
class Actor:
    """One machine: a disk that stays and a process that comes and goes."""

    disk: Disk
    number: int
    node: Node | None = None
    life: int = 0
    paused_until: float = 0.0
    wake: float = float("inf")


class World:
    def __init__(self, plan: Plan, row: Callable[[str], None] | None = None) -> None:
        """`row` is given one line an event; None keeps silent."""
        self.plan = plan
        self.now = 0.0
        self.events = 0
        self._rng = Random(plan.seed)
        self._row = row
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._same_time = 0
        self._timings = PRESETS[self._rng.choice(("pi", "lan"))]
        self.network = Network(Random(self._rng.random()), draw_weather(self._rng))
        self.hub = Hub()
        self.service = Service()
        self.hands = SimHands(self, Random(self._rng.random()))
        self._links: dict[tuple[int, int], None] = {}
        slow = self._rng.choice((0.002, 0.02, 0.5))
        self.actors = [
            Actor(Disk(SimKey(i), f"pi-{i}", Random(self._rng.random()), slow), i)
            for i in range(plan.voters + plan.learners)
        ]
        self.by_id = {actor.disk.node: actor for actor in self.actors}
        voters = tuple(sorted(actor.disk.node for actor in self.actors[: plan.voters]))
        for actor in self.actors:
            actor.disk.hard = HardState(voters=Voters(1, 0, voters))
        self.checks = Checks(voters)
        self.vote_crash = self._rng.choice((0.0, 0.1, 0.5))
        """Probability that a node loses power just after it voted: the moment a vote must be on disk already."""

    # running -------------------------------------------------------------------------------------------------
    def run(self) -> str:
        """Play the plan; the digest of its trace. Raises `Violation`."""
        from .storm import Storm  # the storm acts on a world; a world knows it only while it plays

        end = self.plan.minutes * 60
        for actor in self.actors:
            self.boot(actor)
        storm = Storm(self, Random(self._rng.random()), end - REST_S)
        storm.begin()
        self._every(0.5, self._dial, end)
        self._every(1.0, self.hands.pump_hub, end)
        self._every(self._rng.choice((0.7, 2.0, 5.0)), self.hands.webhook, end - REST_S)
        while self._heap and self._heap[0][0] <= end:
            self._step()
        self.checks.at_rest(self, self.service.effects())
        return self._trace.hexdigest()

    def _step(self) -> None:
        time, _, action = heapq.heappop(self._heap)
        self._same_time = self._same_time + 1 if time == self.now else 0
        if self._same_time > SAME_TIME_MAX:
            raise Violation("I11 the world stands still: events without end at one instant")
        self.now = time
        action()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), action))

    def _every(self, period: float, action: Callable[[], None], until: float) -> None:
        def again() -> None:
            action()
            if self.now + period <= until:
                self.at(period, again)

        self.at(period, again)

    def close(self) -> None:
        for actor in self.actors:
            actor.disk.close()

    # machines ------------------------------------------------------------------------------------------------
    def boot(self, actor: Actor) -> None:
        disk = actor.disk
        actor.life += 1
        actor.paused_until = self.now
        hard = disk.hard
        disk.hard = HardState(hard.term, hard.voted_for, hard.voters, hard.incarnation + 1)
        setup = Setup(
            me=disk.node,
            cluster="sim",
            facts=Facts(name=f"pi-{actor.number}"),
            timings=self._timings,
            hard=disk.hard,
            heads=store.heads(disk.conn),
            ledger=store.facts(disk.conn),
            workflows={"rehearsed": Rehearsed()},
            attempts_max=1000,
            rules=self.plan.rules,
        )
        actor.node = Node(setup, Random(self._rng.random()), self.now)
        self.note(actor, "boots")
        self._schedule(actor)

    def crash(self, actor: Actor, silently: bool = False) -> None:
        """SIGKILL (peers see the links close) or, `silently`, a power cut."""
        if actor.node is None:
            return
        self.note(actor, "crashes")
        actor.node = None
        actor.life += 1
        actor.disk.crash()
        self.hub.hang_up(actor.disk.node)
        if not silently:
            for other in self.actors:
                self.unlink(actor, other)

    def pause(self, actor: Actor, seconds: float) -> None:
        """SIGSTOP: the machine hears nothing and says nothing, then finds it all in its buffers."""
        actor.paused_until = max(actor.paused_until, self.now + seconds)

    def up(self, actor: Actor) -> bool:
        return actor.node is not None

    # links ---------------------------------------------------------------------------------------------------
    def _dial(self) -> None:
        for one, other in itertools.combinations(self.actors, 2):
            pair = (one.number, other.number)
            should = self.up(one) and self.up(other) and self._reach(one, other)
            if should and pair not in self._links and self._rng.random() < 0.7:
                self._links[pair] = None
                self.deliver_in(self._rng.uniform(0.001, 0.1), one, LinkUp(other.disk.node))
                self.deliver_in(self._rng.uniform(0.001, 0.1), other, LinkUp(one.disk.node))
            elif not should and pair in self._links:
                self.at(LINK_SILENCE_S, lambda a=one, b=other: self._unlink_if_cut(a, b))  # type: ignore[misc]

    def _reach(self, one: Actor, other: Actor) -> bool:
        a, b = one.disk.node, other.disk.node
        return self.network.passes(a, b) and self.network.passes(b, a)

    def _unlink_if_cut(self, one: Actor, other: Actor) -> None:
        if not (self.up(one) and self.up(other) and self._reach(one, other)):
            self.unlink(one, other)

    def unlink(self, one: Actor, other: Actor) -> None:
        pair = (min(one.number, other.number), max(one.number, other.number))
        if pair not in self._links:
            return
        del self._links[pair]
        self.deliver_in(0.001, one, LinkDown(other.disk.node))
        self.deliver_in(0.001, other, LinkDown(one.disk.node))

    def linked(self, one: Actor, other: Actor) -> bool:
        return (min(one.number, other.number), max(one.number, other.number)) in self._links

    # events --------------------------------------------------------------------------------------------------
    def deliver_in(self, delay: float, actor: Actor, event: Event) -> None:
        life = actor.life
        self.at(delay, lambda: self.deliver(actor, life, event))

    def deliver(self, actor: Actor, life: int, event: Event) -> None:
        if actor.node is None or actor.life != life:
            return
        if actor.paused_until > self.now:
            self.at(actor.paused_until - self.now, lambda: self.deliver(actor, life, event))
            return
        self.events += 1
        self.note(actor, event)
        for effect in actor.node.handle(event, self.now):
            self.hands.perform(actor, effect)
            if actor.life != life:
                return
        self._schedule(actor)

    def _schedule(self, actor: Actor) -> None:
        if actor.node is None:
            return
        due = max(actor.node.deadline(), self.now)
        if due != actor.wake or due == self.now:
            actor.wake = due
            life = actor.life
            self.at(due - self.now, lambda: self._wake(actor, life, due))

    def _wake(self, actor: Actor, life: int, due: float) -> None:
        if actor.life == life and actor.wake == due:
            actor.wake = float("inf")
            self.deliver(actor, life, DeadlineReached())

    def note(self, actor: Actor, what: object) -> None:
        """Into the trace, and to whoever watches."""
        text = what if isinstance(what, str) else type(what).__name__
        if isinstance(what, Received):
            text = f"{type(what.message).__name__} from {self.by_id[what.sender].number}"
        row = f"{self.now:10.6f} pi-{actor.number} {text}"
        self._trace.update(row.encode())
        if self._row is not None:
            self._row(row if actor.node is None else f"{row:<48} term {actor.node.election.term} {actor.node._role()}")
