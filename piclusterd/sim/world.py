"""The rehearsal room: N real nodes, real ledgers, one heap of events, one clock, one seed.

The hall and the deciders are those of the daemon; only the hands differ: `perform` puts each effect on the heap with a
drawn delay instead of on a socket or a disk. A failure is named by (commit, seed, minutes) and replays exactly: nothing
here reads a clock, and every draw comes from generators seeded by the seed.

    heap ──(time, action)──▶ node.handle ──effects──▶ perform ──▶ heap …      checks after every step

Two phases (TigerBeetle's VOPR): faults as drawn for the seed, then calm, after which liveness must hold.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ..cluster.timings import PRESETS
from ..events import DeadlineReached, Effect, Event, HardState, LoopLagged, Received, Rules
from ..ids import node_id
from ..ledger import store
from ..ledger.pruning import Retention
from ..node import Node, Setup
from ..wire import Facts, Voters
from .checks import Checks
from .disk import Disk
from .hands import SimHands
from .keys import SimKey
from .links import DIAL_S, Links
from .network import CALM, Network, Weather, draw_weather
from .outside import Hub, Service
from .owner import Owner
from .rest import Violation

REST_S = 60.0
"""Calm at the end: ten election timeouts and every backoff of a run that failed in the storm. A short seed has half of
its time for it, and goes on until all is at rest: it must have a coordinator after REST_S all the same."""
LENGTHS = (0.5,) * 6 + (1.0,) * 3 + (4.0,)
"""Minutes of a seed that is told no length; one on average. Most of what goes wrong needs one fault after another
within seconds, and where each seed draws another mix of faults, more seeds see more mixes; one in ten is long, for what
takes absences, full logs or many terms."""
PATIENCE_S = 330.0
"""A step that failed often in the storm may wait this long for its next try (run.BACKOFF_MAX_S and the try itself)."""
SAME_TIME_MAX = 100_000
"""Events without the clock moving: a livelock."""
LAG_MIN_S = 0.1
"""A stall shorter than this is no news to the daemon's ticker."""
NEVER = float("inf")
DUE = DeadlineReached()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of the world is: replayable from these values alone."""

    seed: int
    minutes: float = 3.0
    """Virtual, the calm at the end included; 0: drawn of LENGTHS."""
    voters: int = 3
    learners: int = 1
    rules: Rules = field(default_factory=Rules)
    theme: str = ""
    """One of `storm.THEMES`; empty: drawn."""
    preset: str = ""
    """Of `timings.PRESETS`; empty: drawn."""
    lies: tuple[str, ...] = ()
    """Ablations below the deciders: see `disk`, and `idempotency` in `outside`."""


@dataclass(slots=True)
class Actor:
    """One machine: a disk that stays and a process that comes and goes."""

    disk: Disk
    number: int
    node: Node | None = None
    life: int = 0
    wake: float = NEVER
    stalled_since: float = 0.0
    stalled_until: float = 0.0
    """SIGSTOP, starvation, or a step of a slow CPU: until then events wait in `inbox`."""
    inbox: deque[Event] = field(default_factory=deque)
    step_s: float = 0.0
    """CPU seconds an event takes; 0: too short to matter."""
    seen: HardState | None = None
    """The hard state that the checks looked at last."""
    newer: bool = False
    """Speaks a newer release: its messages carry a field nobody here knows."""


class World:
    def __init__(self, plan: Plan, row: Callable[[str], None] | None = None) -> None:
        """`row` is given one line an event; None keeps silent."""
        self.plan = plan
        self.now = 0.0
        self.events = 0
        self.until = 60 * (plan.minutes or Random(f"length of {plan.seed}").choice(LENGTHS))
        self.calm_from = max(self.until - REST_S, self.until / 2)
        self._rng = Random(plan.seed)
        self._row = row
        self.watch: Callable[[Actor, Event, list[Effect]], None] | None = None
        """Is shown every event of a node and what came of it."""
        self._times = array("d")
        self._whats = array("Q")
        self._kinds: dict[str | type, int] = {}
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._same_time = 0
        drawn = self._rng.choice(("pi", "pi", "lan"))  # nodes run with `pi` where nobody chose
        self.timings = PRESETS[plan.preset or drawn]
        self.network = Network(Random(self._rng.random()), draw_weather(self._rng))
        self.hub = Hub()
        self.service = Service("idempotency" in plan.lies)
        self.hands = SimHands(self, Random(self._rng.random()))
        self.links = Links(self, self._rng)
        self._slow_disk = self._rng.choice((0.002, 0.02, 0.5))
        self._last_key = itertools.count()
        first_keys = (SimKey(number).public_key for number in range(plan.voters))
        self.voters = Voters(1, 0, tuple(sorted(map(node_id, first_keys))))
        self.actors = [Actor(self._new_disk(i), i) for i in range(plan.voters + plan.learners)]
        self.by_id = {actor.disk.node: actor for actor in self.actors}
        self.theme = ""
        self.checks = Checks(self)
        self.vote_crash = self._rng.choice((0.0, 0.1, 0.5))
        """Probability that a node loses power just after it voted: the moment a vote must be on disk already."""
        self.webhook_s = self._rng.choice((0.7, 2.0, 5.0))
        self.retention = Retention()
        self.owner = Owner(self, Random(f"owner {plan.seed}"))
        self.forgot_at = -NEVER
        """When a disk last lost something."""
        self.faults: Counter[str] = Counter()
        """Name → how often it struck."""

    # running -------------------------------------------------------------------------------------------------
    def run(self) -> str:
        """Play the plan; the digest of its trace. Raises `Violation`."""
        from .storm import Storm, draw_retention, draw_theme  # they act on a world, which knows them only here

        self.theme = self.plan.theme or draw_theme(self._rng)
        self.retention = draw_retention(Random(self.plan.seed))
        self.open()
        Storm(self, Random(self._rng.random())).begin()
        self.every(1.0, self.hands.pump_hub)
        self.every(self.webhook_s, self.hands.webhook, self.calm_from)
        self.play(self.calm_from)
        self.settle(self.until - self.calm_from)
        self.checks.at_rest()
        return self.digest()

    def open(self, machines: int | None = None) -> None:
        """Start the machines (the first `machines` of them), and somebody who dials."""
        for actor in self.actors[:machines]:
            self.boot(actor)
        self.every(DIAL_S, self.links.dial)
        self.every(DIAL_S, self.checks.tick)

    def calm(self, weather: Weather = CALM) -> None:
        """Mend all that is broken, and break nothing more by itself."""
        self.network.heal()
        self.network.weather, self.vote_crash = weather, 0.0
        for actor in self.actors:
            actor.step_s, actor.newer = 0.0, False
            actor.disk.stalled_until = actor.disk.failing_until = 0.0
            self.resume(actor)

    def play(self, until: float) -> None:
        """Everything that happens up to `until`, seconds from the beginning."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            time, _, action, arguments = pop(heap)
            if time > self.now:
                self.now, self._same_time = time, 0
            else:
                self._count_standstill()
            action(*arguments)
        self.now = max(self.now, until)

    def _rests(self) -> bool:
        writing = any(actor.disk.group for actor in self.actors)
        nodes = [actor.node for actor in self.actors if actor.node is not None]
        same = len({node.reconcile.digest for node in nodes}) == 1
        whole = not any(node.care.mending.damaged for node in nodes)
        return not writing and not self.hub.outbox and same and whole and not nodes[0].journal.open_runs()

    def _is_led(self) -> bool:
        return sum(actor.node is not None and actor.node.replicate.active for actor in self.actors) == 1

    def settle(self, seconds: float) -> None:
        """Play on for `seconds`, and then until nothing is on its way any more (for PATIENCE_S at most)."""
        end = self.now + seconds
        led_by = max(end, self.now + REST_S)
        self.play(end)
        while (not self._rests() and self.now < end + PATIENCE_S) or (not self._is_led() and self.now < led_by):
            self.play(self.now + 5.0)

    def digest(self) -> str:
        """Of everything that happened so far."""
        trace = hashlib.blake2b(self._times.tobytes(), digest_size=16)
        trace.update(self._whats.tobytes())
        trace.update(" ".join(k if isinstance(k, str) else k.__name__ for k in self._kinds).encode())
        return trace.hexdigest()

    def _count_standstill(self) -> None:
        self._same_time += 1
        if self._same_time > SAME_TIME_MAX:
            raise Violation("I11 the world stands still: events without end at one instant")

    def at(self, delay: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), action, arguments))

    def every(self, period: float, action: Callable[[], None], until: float = NEVER) -> None:
        def again() -> None:
            action()
            if self.now + period <= until:
                self.at(period, again)

        self.at(period, again)

    def close(self) -> None:
        for actor in self.actors:
            actor.disk.close()

    # machines ------------------------------------------------------------------------------------------------
    def _new_disk(self, number: int) -> Disk:
        key = SimKey(next(self._last_key))
        return Disk(
            key,
            f"pi-{number}",
            Random(self._rng.random()),
            self._slow_disk,
            self.plan.lies,
            HardState(voters=self.voters),
        )

    def boot(self, actor: Actor, facts: Facts | None = None) -> None:
        """Start the process where it is down."""
        if actor.node is not None:
            return
        disk = actor.disk
        actor.life += 1
        actor.stalled_until, actor.wake = self.now, NEVER
        hard = disk.hard
        disk.hard = HardState(hard.term, hard.voted_for, hard.voters, hard.incarnation + 1)
        setup = Setup(
            me=disk.node,
            cluster="sim",
            facts=facts or Facts(name=disk.name),
            timings=self.timings,
            hard=disk.hard,
            heads=store.heads(disk.conn),
            ledger=store.facts(disk.conn),
            **self.service.engine,
            rules=self.plan.rules,
            retention=self.retention,
            log=disk.log,
            lost=disk.lost,
            votes_lost=disk.votes_lost,
            damaged=disk.damaged(),
        )
        actor.node = Node(setup, Random(self._rng.random()), self.now)
        self.checks.booted(actor)
        self.note(actor, "boots")
        self._schedule(actor)

    def crash(self, actor: Actor, silently: bool = False) -> None:
        """SIGKILL (peers see the links close) or, `silently`, a power cut."""
        if actor.node is None:
            return
        self.note(actor, "crashes")
        actor.node = None
        actor.life += 1
        actor.inbox.clear()
        actor.disk.crash(self.now)
        self.hands.landed(actor)
        self.hub.hang_up(actor.disk.node)
        self.links.lose(actor, silently)

    def struck(self, name: str) -> None:
        """A fault of this name has just been done."""
        self.faults[name] += 1

    def lose_disk(self, actor: Actor) -> None:
        """A new card in a dead board: it comes back with another key, so as another node, and no vote."""
        self.crash(actor)
        self.forgot_at = self.now
        actor.disk.close()
        actor.disk = self._new_disk(actor.number)
        self.by_id[actor.disk.node] = actor

    def pause(self, actor: Actor, seconds: float) -> None:
        """SIGSTOP: the machine hears nothing and says nothing, then finds it all in its buffers."""
        if self.now >= actor.stalled_until:
            actor.stalled_since = self.now
        actor.stalled_until = max(actor.stalled_until, self.now + seconds)
        self.at(seconds, self._resume, actor, actor.life)

    def resume(self, actor: Actor) -> None:
        actor.stalled_until = min(actor.stalled_until, self.now)
        self._resume(actor, actor.life)

    def _resume(self, actor: Actor, life: int) -> None:
        """The ticker notices the stall first, then the buffers are read."""
        if actor.life != life or actor.node is None or actor.stalled_until > self.now:
            return
        lag = self.now - actor.stalled_since
        if lag >= LAG_MIN_S and actor.stalled_since < actor.stalled_until:
            actor.stalled_since = self.now
            self._handle(actor, LoopLagged(lag))
        self._drain(actor, life)

    def _drain(self, actor: Actor, life: int) -> None:
        while actor.inbox and actor.life == life and actor.stalled_until <= self.now:
            self._handle(actor, actor.inbox.popleft())

    # events --------------------------------------------------------------------------------------------------
    def deliver_in(self, delay: float, actor: Actor, event: Event) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._order), self.deliver, (actor, actor.life, event)))

    def deliver(self, actor: Actor, life: int, event: Event) -> None:
        if actor.life != life or actor.node is None:
            return
        if actor.stalled_until > self.now or actor.inbox:
            actor.inbox.append(event)
        else:
            self._handle(actor, event)

    def _handle(self, actor: Actor, event: Event) -> None:
        node, life = actor.node, actor.life
        assert node is not None
        self.events += 1
        self._trace(actor, event)
        effects = node.handle(event, self.now)
        if self.watch is not None:
            self.watch(actor, event, effects)
        perform = self.hands.perform
        for effect in effects:
            perform(actor, effect)
            if actor.life != life:
                return
        self.checks.stepped(actor, node)
        if actor.step_s:
            actor.stalled_since = actor.stalled_until = self.now + actor.step_s
            self.at(actor.step_s, self._drain, actor, life)
        due = node.deadline()
        if due < actor.wake:
            self._wake_at(actor, due)

    def _schedule(self, actor: Actor) -> None:
        assert actor.node is not None
        self._wake_at(actor, actor.node.deadline())

    def _wake_at(self, actor: Actor, due: float) -> None:
        actor.wake = due if due > self.now else self.now
        heapq.heappush(self._heap, (actor.wake, next(self._order), self._wake, (actor, actor.life, actor.wake)))

    def _wake(self, actor: Actor, life: int, due: float) -> None:
        """A deadline that has moved on since is only looked at again: cheaper than to take each one off the heap."""
        if actor.life != life or actor.wake != due or actor.node is None:
            return
        actor.wake = NEVER
        later = actor.node.deadline()
        if later > self.now:
            self._wake_at(actor, later)
        else:
            self.deliver(actor, life, DUE)

    # the trace -----------------------------------------------------------------------------------------------
    def note(self, actor: Actor, what: object) -> None:
        """Into the trace, and to whoever watches."""
        self._trace(actor, what)

    def _trace(self, actor: Actor, what: object) -> None:
        kind: str | type
        if isinstance(what, Received):
            sender, kind = self.by_id[what.sender].number + 1, type(what.message)
        else:
            sender, kind = 0, what if isinstance(what, str) else type(what)
        code = self._kinds.get(kind)
        if code is None:
            code = self._kinds[kind] = len(self._kinds)
        self._times.append(self.now)
        self._whats.append(code << 16 | sender << 8 | actor.number)
        if self._row is not None:
            self._row(self._line(actor, what))

    def _line(self, actor: Actor, what: object) -> str:
        text = what if isinstance(what, str) else type(what).__name__
        if isinstance(what, Received):
            text = f"{type(what.message).__name__} from {self.by_id[what.sender].number}"
        row = f"{self.now:10.6f} pi-{actor.number} {text}"
        if actor.node is None:
            return row
        election, replicate = actor.node.election, actor.node.replicate
        return f"{row:<48} term {election.term} {election.role} {replicate.phase}"
