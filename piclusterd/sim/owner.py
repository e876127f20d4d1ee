"""The owner, who changes voters by hand: whenever, of whomever, and at the worst of times.

    change ─ any node, as `picluster voter add|remove`: asked itself if it leads or knows no leader, else its leader
    haste  ─ the leader is asked, and falls before or after it told anybody
    herald ─ whoever was just elected, or just became active, is asked at once
    minds  ─ a leader that is cut off removes one voter, and its heir another (`minds`)

What the owner may not do with an eye on lost disks is in `electorate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Literal

from ..events import ChangeVoters, Note
from ..ids import NodeId
from ..wire import Voters
from .electorate import window_s
from .minds import Minds

if TYPE_CHECKING:
    from .world import Actor, World

What = Literal["add", "remove"]
HERALD_CHANCE = 0.3
"""Of a new leader to be asked for a change before it has drawn breath."""
STRANGER_CHANCE = 0.1
"""Of a node to be named that is no more, or whose board is off."""
LOOK_S = 0.5
REPLACE_TRIES = 30


class Owner:
    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._asked: dict[int, tuple[Actor, int]] = {}
        """Ticket → whom, in which of its lives."""
        self._least = rng.choice((1, 2, 2, 3))
        """The owner leaves so many voters."""
        self._minds = Minds(world, rng, self._remove)
        self._ways: tuple[Callable[[Actor], None], ...] = ()
        self.pace = 0.0
        """Seconds between two changes, about; 0: this owner changes nothing."""

    @property
    def busy(self) -> bool:
        """Is a change asked for, or on its way?"""
        answers, actors = self._world.hands.answers, self._world.actors
        done = [t for t, (actor, life) in self._asked.items() if t in answers or actor.life != life]
        for ticket in done:
            del self._asked[ticket]
        return bool(self._asked) or any(a.node and a.node.reconfigure.under_way for a in actors)

    def begin(self, pace: float, only_minds: bool = False) -> None:
        self.pace = pace
        self._ways = (self.minds,) if only_minds else (self.change, self.change, self.haste, self.minds)
        self._world.at(self._rng.uniform(1.0, pace), self._strike)

    def _strike(self) -> None:
        world = self._world
        if world.now < world.calm_from:
            self._rng.choice(self._ways)(self._rng.choice(world.actors))
            world.at(self._rng.uniform(0.2, 2 * self.pace), self._strike)

    # asking --------------------------------------------------------------------------------------------------
    def ask(self, asked: Actor, what: What, node: NodeId) -> int | None:
        """The ticket; None where nobody was there to be asked."""
        world = self._world
        if asked.node is None or world.now - world.forgot_at < window_s(world):
            return None
        leader = asked.node.election.leader
        to = asked if leader is None else world.by_id[leader]
        if to is not asked and not world.links.linked(asked, to):
            return None
        world.struck(f"voter {what}")
        ticket = world.hands.ask(to, partial(ChangeVoters, what=what, node=node))
        self._asked[ticket] = (to, to.life)
        return ticket

    def change(self, asked: Actor) -> None:
        """Add, remove or replace one, as the asked node sees the voters."""
        if asked.node is None:
            return
        voters = asked.node.election.voters.voters
        others = [actor.disk.node for actor in self._world.actors if actor.disk.node not in voters]
        if self._rng.random() < STRANGER_CHANCE:
            others = [node for node in self._world.by_id if node not in voters]
        what = self._rng.choice(("add", "remove", "replace"))
        if what != "remove" and others:
            added = self.ask(asked, "add", self._rng.choice(others))
            if added is not None and what == "replace" and voters:
                self._world.at(LOOK_S, self._then_remove, asked, added, self._rng.choice(voters), REPLACE_TRIES)
        elif len(voters) > self._least:
            self.ask(asked, "remove", self._rng.choice(voters))

    def _then_remove(self, asked: Actor, added: int, node: NodeId, tries: int) -> None:
        world = self._world
        answer = world.hands.answers.get(added)
        if isinstance(answer, Voters):
            world.struck("voter replace")
            self.ask(asked, "remove", node)
        elif answer is None and tries and world.now < world.calm_from:
            world.at(LOOK_S, self._then_remove, asked, added, node, tries - 1)

    # the worst of times --------------------------------------------------------------------------------------
    def haste(self, _: Actor) -> None:
        """The leader falls silent, or falls, just before or after its next config leaves it."""
        for leader in self._leaders():
            self.change(leader)
            self._world.struck("voter haste")
            fall = self._rng.choice((self._cut_off, self._kill))
            self._world.at(self._rng.choice((0.0, 0.01, 0.1, 1.0)) * self._rng.random(), fall, leader)

    def _leaders(self) -> list[Actor]:
        return [a for a in self._world.actors if a.node and a.node.election.role == "leader"]

    def _kill(self, actor: Actor) -> None:
        world = self._world
        if actor.node is not None and world.now < world.calm_from:
            world.crash(actor, silently=self._rng.random() < 0.5)
            world.at(min(self._rng.uniform(0.05, 15.0), world.calm_from - world.now), world.boot, actor)

    def _cut_off(self, actor: Actor) -> None:
        self._world.links.cut_off(actor, self._rng.uniform(1.0, 30.0))

    def heard(self, actor: Actor, note: Note) -> None:
        """A leader was elected, or became active."""
        if self._minds.playing:
            self._minds.heard(actor, note)
        elif self.pace and self._world.now < self._world.calm_from and self._rng.random() < HERALD_CHANCE:
            self._world.at(0.2 * self._rng.random(), self.change, actor)

    def minds(self, _: Actor) -> None:
        for leader in self._leaders():
            if leader.node is not None and leader.node.replicate.active:
                self._minds.begin(leader)

    def _remove(self, asked: Actor, whom: Actor) -> bool:
        return self.ask(asked, "remove", whom.disk.node) is not None
