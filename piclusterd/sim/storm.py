"""The faults of one seed, drawn when the world begins: which exist at all, how often, and on whom.

Themes. `swarm`: any mix of all the faults below (Groce et al., *Swarm Testing*, 2012). `heirs`: leaders fall asleep or
die while disks and paths are slow, so that heirs lack what was acknowledged. `stall`: nothing but pauses in calm
weather, so that whoever is called failed must have been away. `return`: nothing but one follower at a time cut off, so
that a leader who is deposed was deposed by somebody's return. `exile`: leaders cut off from everybody. `change`: the
owner changes voters all the time (`owner`), while leaders and paths fall. `restore`: leaders' cards are
put back, swapped and cloned. `minds`: nothing but that play, in calm.
`fork`: nothing but two cards of one key, which write apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import msgspec

from ..cluster.fitness import BOARD_FLAGS
from ..events import Damaged, FactsChanged, MoveLeadership
from ..ledger import store
from ..ledger.pruning import Retention
from ..wire import Head
from .disk import STALL_MAX_S, Disk
from .electorate import in_force, may_forget
from .images import Images
from .network import CLOG_MAX_S
from .world import Actor, World

THEMES = ("swarm", "heirs", "stall", "return", "exile", "change", "restore", "minds", "fork")
CALM_THEMES = ("stall", "return", "exile", "minds", "fork")
DRAWN = ("swarm",) * 6 + THEMES[1:7]
"""Six seeds in twelve play one of the narrow themes; `minds` (it needs four voters) and `fork` where asked for."""
DAYS_60_MS = 60 * 24 * 3600 * 1000
ABSENT_PART = 0.7
"""A month-long absence, scaled: this part of the time that the storm lasts."""
SLOW_CPU_S = (0.0005, 0.005)
"""An event takes a Pi's Python about half a millisecond; ten times that where the cores are taken."""
FAULTS = (
    "crash", "power", "pause", "slow_cpu", "absence", "kill_leader", "fsync_stall", "disk_errors", "disk_loss", "clock",
    "put_back", "rot", "split", "one_way", "isolate", "bridge", "flap", "swizzle", "clog", "half_open", "usurp",
    "full_leader", "forget_votes", "heat", "move",
    "cut_follower", "exile", "put_back_leader", "disk lost", "disk put back", "rot found", "image", "clone",
    "fork seen", "voter add", "voter remove", "voter replace", "voter haste",
)  # fmt: skip
"""All that may strike, by name: a fault drawn, what came of it, what the owner does, and what an image does."""
FAULT_CHANCE = 0.35
"""Of a kind of fault to exist in a seed: some nine of twenty-five side by side, and each pair in one seed of eight."""

Fault = Callable[[Actor], None]
"""Something bad that happens, to or around one machine."""


def draw_theme(rng: Random) -> str:
    return rng.choice(DRAWN)


def draw_retention(rng: Random) -> Retention:
    """Months in seconds: checkpoints, forgetting and lapses within the minutes of a storm."""
    bodies_s = rng.uniform(2.0, 15.0)
    return Retention(
        entries=rng.choice((16, 40, 100)),
        bodies_s=bodies_s,
        rows_s=bodies_s * rng.uniform(1.0, 2.0),
        lapse_s=rng.choice((10.0, 20.0, 60.0)),
        check_s=rng.uniform(0.5, 3.0),
        gap_s=5.0,
    )


class Storm:
    def __init__(self, world: World, rng: Random) -> None:
        """Blows until the world's `calm_from`; then everything is mended and stays so."""
        self._world = world
        self._rng = rng
        self._pace = 3.0 if world.theme == "heirs" else rng.choice((3.0, 8.0, 20.0))
        machines = (
            self._crash, self._power, self._pause, self._slow_cpu, self._absence, self._kill_leader,
            self._fsync_stall, self._disk_errors, self._disk_loss, self._clock, self._put_back, self._rot,
            self._full_leader, self._forget_votes, self._heat, self._move,
        )  # fmt: skip
        paths = (
            self._split, self._one_way, self._isolate, self._bridge, self._flap, self._swizzle, self._clog,
            self._half_open, self._usurp,
        )  # fmt: skip
        everything: tuple[Fault, ...] = machines + (paths if len(world.actors) > 1 else ())
        narrow: dict[str, list[Fault]] = {
            "heirs": [self._kill_leader, self._usurp, self._usurp, self._fsync_stall, self._clog],
            "stall": [self._pause], "return": [self._cut_follower], "exile": [self._exile],
            "change": [self._kill_leader, self._usurp, self._split, self._clog, self._isolate, self._absence],
            "restore": [self._kill_leader, self._disk_errors, self._put_back_leader, self._put_back_leader],
            "minds": [], "fork": [],
        }  # fmt: skip
        drawn = [fault for fault in everything if rng.random() < FAULT_CHANCE]
        self._faults = narrow.get(world.theme, drawn) if len(world.actors) > 1 else drawn

    def begin(self) -> None:
        world = self._world
        if world.theme in CALM_THEMES:
            world.calm()
        elif world.theme == "heirs":
            world.webhook_s, world.vote_crash = 0.5, 0.0
        elif self._rng.random() < 0.2:
            self._rng.choice(world.actors).newer = True
        if self._faults:
            world.at(self._rng.uniform(1.0, self._pace), self._strike)
        self._send_for_the_owner()
        self._copy_cards()
        world.at(world.calm_from, self._calm)

    def _send_for_the_owner(self) -> None:
        chance = Random(f"owner of {self._world.plan.seed}")  # of its own: a storm without an owner stays as it was
        if self._world.theme == "change":
            self._world.webhook_s = 0.5
            self._world.owner.begin(4.0)
        elif self._world.theme == "minds":
            self._world.webhook_s = 0.5
            self._world.owner.begin(8.0, only_minds=True)
        elif self._world.theme == "swarm" and chance.random() < FAULT_CHANCE and len(self._world.actors) > 1:
            self._world.owner.begin(chance.choice((4.0, 12.0)))

    def _copy_cards(self) -> None:
        chance = Random(f"images of {self._world.plan.seed}")
        many = self._world.theme == "restore"
        if self._world.theme == "fork":
            Images(self._world, chance).begin_by_hand()
        elif many or (self._world.theme == "swarm" and chance.random() < FAULT_CHANCE):
            self._world.webhook_s = min(self._world.webhook_s, 0.7) if many else self._world.webhook_s
            Images(self._world, chance).begin(5.0 if many else 15.0)

    def _strike(self) -> None:
        if self._world.now < self._world.calm_from:
            fault = self._rng.choice(self._faults)
            self._world.struck(fault.__name__.strip("_"))
            fault(self._rng.choice(self._world.actors))
            self._world.at(self._rng.uniform(0.2, 2 * self._pace), self._strike)

    def _later(self, least: float, most: float, action: Callable[..., None], *arguments: object) -> float:
        """At a drawn time, but never in the calm at the end; seconds until then."""
        delay = min(self._rng.uniform(least, most), max(self._world.calm_from - self._world.now, 0.0))
        self._world.at(delay, action, *arguments)
        return delay

    # machines ------------------------------------------------------------------------------------------------
    def _down(self, actor: Actor, silently: bool, most: float = 15.0, least: float = 0.05) -> None:
        if actor.node is not None:
            self._world.crash(actor, silently)
            self._later(least, most, self._world.boot, actor)

    def _crash(self, actor: Actor) -> None:
        self._down(actor, silently=False)

    def _power(self, actor: Actor) -> None:
        self._down(actor, silently=True)

    def _absence(self, actor: Actor) -> None:
        away = ABSENT_PART * self._world.calm_from
        self._down(actor, silently=True, most=away, least=away)

    def _pause(self, actor: Actor) -> None:
        if actor.node is not None:
            self._world.pause(actor, self._rng.uniform(0.5, 20.0))

    def _slow_cpu(self, actor: Actor) -> None:
        actor.step_s = self._rng.choice(SLOW_CPU_S)
        self._later(5.0, 30.0, self._speed_up, actor)

    def _speed_up(self, actor: Actor) -> None:
        actor.step_s = 0.0

    def _leaders(self) -> list[Actor]:
        return [actor for actor in self._world.actors if actor.node and actor.node.election.role == "leader"]

    def _kill_leader(self, _: Actor) -> None:
        for leader in self._leaders():
            self._down(leader, silently=False)

    def _usurp(self, _: Actor) -> None:
        """Put the leader to sleep, cut off from one other: long enough to be replaced, and not yet to step down."""
        patience = self._world.timings.election_max_s
        for leader in self._leaders():
            self._cut_for([leader], [self._rng.choice(self._others(leader))], 2 * patience, 6 * patience)
            self._world.pause(leader, self._rng.uniform(0.5, 1.2) * patience)

    def _move(self, actor: Actor) -> None:
        """Leadership, by hand, to the best heir or to anybody."""
        for leader in self._leaders():
            self._world.hands.ask(leader, partial(MoveLeadership, to=self._rng.choice((None, actor.disk.node))))

    def _heat(self, actor: Actor) -> None:
        """A leader's board mostly; flags that flicker and flags that stay."""
        board = self._rng.choice([actor, *self._leaders()])
        self._flag(board, self._rng.choice(BOARD_FLAGS))
        self._later(1.0, 60.0, self._flag, board)

    def _flag(self, actor: Actor, *flags: str) -> None:
        if actor.node is not None:
            facts = msgspec.structs.replace(actor.node.membership.own_facts, flags=flags)
            self._world.deliver_in(0.0, actor, FactsChanged(facts))

    # paths ---------------------------------------------------------------------------------------------------
    def _set(self, some: list[Actor], others: list[Actor], cut: bool, both_ways: bool = True) -> None:
        change = self._world.network.cut if cut else self._world.network.mend
        for one in some:
            for other in others:
                if one is not other:
                    change(one.disk.node, other.disk.node)
                    if both_ways:
                        change(other.disk.node, one.disk.node)

    def _cut_for(self, some: list[Actor], others: list[Actor], least: float, most: float) -> None:
        self._set(some, others, cut=True)
        self._later(least, most, self._set, some, others, False)

    def _others(self, *these: Actor) -> list[Actor]:
        return [actor for actor in self._world.actors if actor not in these]

    def _isolate(self, actor: Actor) -> None:
        self._cut_for([actor], self._others(actor), 1.0, 30.0)

    def _one_way(self, actor: Actor) -> None:
        others = self._others(actor)
        self._set([actor], others, cut=True, both_ways=False)
        self._later(1.0, 30.0, self._set, [actor], others, False)

    def _halves(self, actors: list[Actor]) -> tuple[list[Actor], list[Actor]]:
        side = [actor for actor in actors if self._rng.random() < 0.5]
        return side, [actor for actor in actors if actor not in side]

    def _split(self, _: Actor) -> None:
        self._cut_for(*self._halves(self._world.actors), 1.0, 30.0)

    def _bridge(self, actor: Actor) -> None:
        """Only `actor` sees both sides (the shape that keeps plain Raft electing for ever)."""
        self._cut_for(*self._halves(self._others(actor)), 1.0, 30.0)

    def _flap(self, actor: Actor) -> None:
        others = self._rng.sample(self._others(actor), self._rng.randint(1, len(self._world.actors) - 1))
        delay = 0.0
        for _ in range(self._rng.randint(3, 10)):
            delay += self._rng.uniform(0.3, 3.0)
            if self._world.now + delay + 1.0 < self._world.calm_from:
                self._world.at(delay, self._set, [actor], others, True)
                self._world.at(delay + self._rng.uniform(0.1, 1.0), self._set, [actor], others, False)

    def _swizzle(self, _: Actor) -> None:
        """FoundationDB's: cut them off one after another, mend in another order."""
        actors = self._world.actors
        for order, begin in ((actors, 0.0), (self._rng.sample(actors, len(actors)), 15.0)):
            for actor in order:
                self._later(begin, begin + 15.0, self._set, [actor], self._others(actor), begin == 0.0)

    def _clog(self, actor: Actor) -> None:
        for other in self._rng.sample(self._others(actor), self._rng.randint(1, len(self._world.actors) - 1)):
            until = self._world.now + self._rng.uniform(0.1, CLOG_MAX_S)
            self._world.network.clog(actor.disk.node, other.disk.node, until)

    def _half_open(self, actor: Actor) -> None:
        self._world.links.half_open(actor, self._rng.choice(self._others(actor)))

    # disks and clocks ----------------------------------------------------------------------------------------
    def _fsync_stall(self, actor: Actor) -> None:
        actor.disk.stalled_until = self._world.now + self._rng.uniform(0.5, STALL_MAX_S)

    def _disk_errors(self, actor: Actor) -> None:
        actor.disk.failing_until = self._world.now + self._rng.uniform(0.5, 20.0)

    def _full_leader(self, _: Actor) -> None:
        for leader in self._leaders():
            self._disk_errors(leader)

    def _forget_votes(self, actor: Actor) -> None:
        """Both copies of the vote are gone when it starts again, and it knows that there were some."""
        voters = in_force(self._world)[-1].voters
        if actor.disk.node in voters and not actor.disk.votes_lost and may_forget(self._world, actor):
            self._world.crash(actor)
            self._world.forgot_at = self._world.now
            actor.disk.forget_votes()
            self._world.checks.forgot_votes(actor.disk.node)
            self._later(0.5, 15.0, self._world.boot, actor)

    def _disk_loss(self, actor: Actor) -> None:
        """Of a minority of the voters at most: with a majority's disks go its promises."""
        if may_forget(self._world, actor):
            self._world.lose_disk(actor)
            self._world.struck("disk lost")
            self._later(0.5, 15.0, self._world.boot, actor)

    def _put_back(self, actor: Actor) -> None:
        """The image of this moment is put back some time later, by `picluster restore`: it leaves a note (`lost`).

        Without one, a follower that wrote nothing meanwhile cannot know: see `ledger.rewind`.
        """
        self._later(1.0, 60.0, self._restore, actor, actor.disk, store.heads(actor.disk.conn))

    def _put_back_leader(self, _: Actor) -> None:
        for leader in self._leaders():
            delay = self._later(0.5, 10.0, self._restore, leader, leader.disk, store.heads(leader.disk.conn))
            if self._rng.random() < 0.5:
                self._world.links.cut_off(leader, delay + 0.5)  # so that the image lacks what nobody else has

    def _restore(self, actor: Actor, disk: Disk, heads: tuple[Head, ...]) -> None:
        world = self._world
        well = actor.disk is disk and not disk.lost and not disk.damaged()
        if well and may_forget(world, actor) and world.now < world.calm_from:
            world.crash(actor)
            world.forgot_at = world.now
            disk.put_back(heads)
            world.struck("disk put back")
            world.checks.put_back(disk.node, store.heads(disk.conn))
            self._later(0.5, 15.0, world.boot, actor)

    def _rot(self, actor: Actor) -> None:
        """Of a voter's disk, what another voter holds too: what nobody else has cannot be mended."""
        voters = in_force(self._world)[-1].voters
        others = [a.disk for a in self._world.actors if a is not actor and a.disk.node in voters]
        if actor.node is not None and actor.disk.node in voters and others and may_forget(self._world, actor):
            self._world.forgot_at = self._world.now
            spans = actor.disk.rot(self._rng.choice(others))
            if spans:
                self._world.struck("rot found")
            self._world.deliver_in(0.0, actor, Damaged(spans))

    def _clock(self, actor: Actor) -> None:
        """No battery behind the clock: it comes up weeks off, then NTP corrects it."""
        actor.disk.wall_offset_ms = self._rng.randint(-DAYS_60_MS, DAYS_60_MS)

    # narrow themes -------------------------------------------------------------------------------------------
    def _cut_follower(self, _: Actor) -> None:
        """One at a time, long enough that it campaigns; everybody else hears the leader all the while."""
        if self._world.network.quiet:
            followers = [a for a in self._world.actors if a not in self._leaders()]
            chosen = self._rng.choice(followers)
            if self._leaders():
                self._cut_for([chosen], self._others(chosen), 1.0, 30.0)

    def _exile(self, _: Actor) -> None:
        for leader in self._leaders():
            self._cut_for([leader], self._others(leader), 20.0, 60.0)

    # the end -------------------------------------------------------------------------------------------------
    def _calm(self) -> None:
        self._world.calm()
        for actor in self._world.actors:
            self._world.boot(actor)
