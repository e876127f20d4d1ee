"""Links between the machines: what each end believes, which need not be the same.

    reachable both ways ──dial──▶ LinkUp at both ends    cut ──LINK_SILENCE_S──▶ LinkDown    killed ──▶ LinkDown at once

A link that only one end believes in (half-open) carries nothing; a new dial takes its place, or that end gives it up
after its own silence, as the daemon's links do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING

from ..events import LinkDown, LinkUp
from ..ids import NodeId

if TYPE_CHECKING:
    from .world import Actor, World

DIAL_S = 0.5
LINK_SILENCE_S = 5.0
"""A cut link is noticed after this long (the daemon's silent deadline)."""
DIAL_CHANCE = (0.7, 0.1)
"""Of a dial where no end, or one end, believes in a link."""


class Links:
    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._ends: dict[tuple[int, int], int] = {}
        """(one, other): `one` believes in this link to `other`."""
        self._made = 0
        """Links so far: the number of the newest."""
        self._denied: dict[tuple[int, NodeId], None] = {}
        """(one, node): `one` lets no link with `node` come about any more."""

    def dial(self) -> None:
        for one, other in itertools.combinations(self._world.actors, 2):
            ends = ((one.number, other.number) in self._ends) + ((other.number, one.number) in self._ends)
            should = one.node is not None and other.node is not None and self.reach(one, other)
            if should and ends < 2 and self._rng.random() < DIAL_CHANCE[ends]:
                self._connect(one, other)
            elif ends and not should:
                self._world.at(LINK_SILENCE_S, self._unlink_if_cut, one, other)

    def _connect(self, one: Actor, other: Actor) -> None:
        """A new link; it takes the place of one that only one end still believes in."""
        self.unlink(one, other)
        self._made += 1
        for near, far in ((one, other), (other, one)):
            self._ends[near.number, far.number] = self._made
            self._world.deliver_in(self._rng.uniform(0.002, 0.1), near, LinkUp(far.disk.node))

    def reach(self, one: Actor, other: Actor) -> bool:
        a, b = one.disk.node, other.disk.node
        if (one.number, b) in self._denied or (other.number, a) in self._denied:
            return False
        return self._world.network.passes(a, b) and self._world.network.passes(b, a)

    def _unlink_if_cut(self, one: Actor, other: Actor) -> None:
        if one.node is None or other.node is None or not self.reach(one, other):
            self.unlink(one, other)

    def unlink(self, one: Actor, other: Actor) -> None:
        self._drop(one, other)
        self._drop(other, one)

    def cut_off(self, actor: Actor, seconds: float) -> None:
        """From everybody, both ways, for so long."""
        world, one = self._world, actor.disk.node
        for other in (a.disk.node for a in world.actors if a is not actor):
            for path in ((one, other), (other, one)):
                world.network.cut(*path)
                world.at(seconds, world.network.mend, *path)

    def half_open(self, one: Actor, other: Actor) -> None:
        """`one` takes the link for closed; `other` talks into it until its own silent deadline."""
        self._drop(one, other)
        self._notice_late(other, one)

    def _notice_late(self, one: Actor, other: Actor) -> None:
        if believed := self._ends.get((one.number, other.number)):
            self._world.at(LINK_SILENCE_S, self._give_up, one, other, believed)

    def _give_up(self, one: Actor, other: Actor, link: int) -> None:
        if self._ends.get((one.number, other.number)) == link:
            self._drop(one, other)

    def _drop(self, one: Actor, other: Actor) -> None:
        if self._ends.pop((one.number, other.number), 0):
            self._world.deliver_in(0.001, one, LinkDown(other.disk.node))

    def linked(self, one: Actor, other: Actor) -> bool:
        """Do both ends believe in it?"""
        ends, a, b = self._ends, one.number, other.number
        return (a, b) in ends and (b, a) in ends

    def deny(self, actor: Actor, nodes: Iterable[NodeId]) -> None:
        """`actor` has read that these were removed: what links it has with them end, and there are no others."""
        self._denied.update({(actor.number, node): None for node in nodes})
        for other in self._world.actors:
            if (actor.number, other.disk.node) in self._denied:
                self.unlink(actor, other)

    def lose(self, actor: Actor, silently: bool) -> None:
        """Its process is gone: its own ends with it, and the others notice unless it went `silently`."""
        for other in self._world.actors:
            self._ends.pop((actor.number, other.number), None)
            if silently:
                self._notice_late(other, actor)
            else:
                self._drop(other, actor)
