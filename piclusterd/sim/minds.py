"""Two leaders in a row that each remove a voter, and neither hears of the other's change: the bug of Raft's thesis.

    L leads {L N X T}   asked to remove X, cut off from all, so its disk alone has the config {L N T}
    N wins the rest     T, which voted for it, restarts and reports what it holds, but never hears N's config
    N becomes active?   (a) says no: too few voters store its config in its term. Else it removes L: {N X T}
    N and X acknowledge two of three
    L and T meet        two of {L N T}, and neither has what was acknowledged

Random faults do not find this in a thousand seeds, so it is played by hand, with times and parts drawn. It needs four
voters.
Sources: D. Ongaro, "bug in single-server membership changes", raft-dev, 2015; `tests/model/reconfig.py` (TWO_MINDS).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from ..events import Activated, Elected, Note

if TYPE_CHECKING:
    from .world import Actor, World

LOOK_S = 0.001
"""Finer than a link's way up, so that the cut comes before the first heartbeat on it."""
LOOKS_MAX = 5000
MEET_S = (1.0, 5.0)
"""The owner waits so long for the heir's change, and webhooks are taken meanwhile, before the old leader comes back."""


class Minds:
    def __init__(self, world: World, rng: Random, remove: Callable[[Actor, Actor], bool]) -> None:
        """`remove(asked, whom)`: the owner's wish; could it be told?"""
        self._world = world
        self._rng = rng
        self._remove = remove
        self._old: Actor | None = None
        self._gone: Actor | None = None
        self._heir: Actor | None = None

    @property
    def playing(self) -> bool:
        return self._old is not None

    def begin(self, leader: Actor) -> None:
        """`leader` is the active coordinator."""
        assert leader.node is not None
        world = self._world
        voters = [world.by_id[v] for v in leader.node.election.voters.voters if v != leader.disk.node]
        if self.playing or len(voters) != 3 or any(actor.node is None for actor in voters):
            return
        gone = self._rng.choice(voters)
        if self._remove(leader, gone):
            world.struck("voter minds")
            self._old, self._gone = leader, gone
            for other in self._all_but(leader):
                world.at(0.0, self._cut, leader, other)
            world.at(min(8 * world.timings.election_max_s, max(world.calm_from - world.now, 0.0)), self._end)

    def heard(self, actor: Actor, note: Note) -> None:
        if isinstance(note, Elected) and self._heir is None and actor is not self._old:
            self._heir = actor
            self._silence(actor)
        elif isinstance(note, Activated) and actor is self._heir and self._old is not None:
            self._remove(actor, self._old)

    def _silence(self, heir: Actor) -> None:
        """Of those that voted for the heir, one that the old leader still counts as a voter."""
        assert heir.node is not None
        world = self._world
        others = [world.by_id[v] for v in heir.node.election.voters.voters]
        thirds = [a for a in others if a not in (heir, self._old, self._gone)]
        if not thirds:
            return  # a change that was under way before came true
        third = self._rng.choice(thirds)
        world.crash(third)
        world.at(self._rng.uniform(0.05, 0.3), world.boot, third)
        world.at(LOOK_S, self._await_link, heir, third, LOOKS_MAX)

    def _await_link(self, heir: Actor, third: Actor, looks: int) -> None:
        world = self._world
        if not self.playing:
            return
        if world.links.linked(heir, third) and third.node is not None:
            world.network.cut(heir.disk.node, third.disk.node)
            world.at(self._rng.uniform(*MEET_S), self._meet, heir, third)
        elif looks:
            world.at(LOOK_S, self._await_link, heir, third, looks - 1)

    def _meet(self, heir: Actor, third: Actor) -> None:
        if self._old is not None:
            for other in self._all_but(third, self._old):
                self._cut(third, other)
            self._mend(third, self._old)

    def _end(self) -> None:
        for actor in self._world.actors:
            for other in self._all_but(actor):
                self._mend(actor, other)
        self._old = self._gone = self._heir = None

    def _all_but(self, *these: Actor) -> list[Actor]:
        return [actor for actor in self._world.actors if actor not in these]

    def _cut(self, one: Actor, other: Actor) -> None:
        self._world.network.cut(one.disk.node, other.disk.node)
        self._world.network.cut(other.disk.node, one.disk.node)

    def _mend(self, one: Actor, other: Actor) -> None:
        self._world.network.mend(one.disk.node, other.disk.node)
        self._world.network.mend(other.disk.node, one.disk.node)
