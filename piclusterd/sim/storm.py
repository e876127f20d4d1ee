"""The faults of one seed, drawn when the world begins: which exist at all, how often, and on whom."""

from __future__ import annotations

from random import Random

from .network import CALM
from .world import Actor, World

KINDS = ("crash", "power", "pause", "split", "one_way", "isolate", "leader", "usurp")


class Storm:
    def __init__(self, world: World, rng: Random, ends: float) -> None:
        """Blows until `ends` seconds; then everything is mended and stays so."""
        self._world = world
        self._rng = rng
        self._ends = ends
        self._kinds = [kind for kind in KINDS if rng.random() < 0.5]
        self._pace = rng.choice((3.0, 8.0, 20.0))

    def begin(self) -> None:
        if self._kinds:
            self._world.at(self._rng.uniform(1.0, self._pace), self._strike)
        self._world.at(self._ends, self._calm)

    def _strike(self) -> None:
        if self._world.now >= self._ends:
            return
        kind = self._rng.choice(self._kinds)
        victim = self._rng.choice(self._world.actors)
        match kind:
            case "crash" | "power":
                self._down(victim, silently=kind == "power")
            case "pause":
                self._world.pause(victim, self._rng.uniform(0.5, 20.0))
            case "leader" | "usurp":
                self._strike_leader(kind)
            case _:
                self._partition(kind, victim)
        self._world.at(self._rng.uniform(0.2, 2 * self._pace), self._strike)

    def _strike_leader(self, kind: str) -> None:
        """Kill it; or put it to sleep, cut off from one voter, so that it wakes into another's term unawares."""
        for actor in self._world.actors:
            if actor.node is None or actor.node.election.role != "leader":
                continue
            if kind == "leader":
                self._down(actor, silently=False)
                continue
            rival = self._rng.choice([other for other in self._world.actors if other is not actor])
            self._cut_pair(actor, rival)
            self._world.pause(actor, self._rng.uniform(1.0, 15.0))

    def _cut_pair(self, one: Actor, other: Actor) -> None:
        self._world.network.cut(one.disk.node, other.disk.node)
        self._world.network.cut(other.disk.node, one.disk.node)
        self._world.at(self._rng.uniform(10.0, 40.0), self._world.network.heal)

    def _down(self, actor: Actor, silently: bool) -> None:
        if actor.node is None:
            return
        self._world.crash(actor, silently)
        self._world.at(self._rng.uniform(0.05, 15.0), lambda: self._restart(actor))

    def _restart(self, actor: Actor) -> None:
        if actor.node is None:
            self._world.boot(actor)

    def _partition(self, kind: str, victim: Actor) -> None:
        ids = [actor.disk.node for actor in self._world.actors]
        side = [victim.disk.node] if kind != "split" else [n for n in ids if self._rng.random() < 0.5]
        for one in side:
            for other in ids:
                if other not in side:
                    self._world.network.cut(one, other)
                    if kind != "one_way":
                        self._world.network.cut(other, one)
        self._world.at(self._rng.uniform(1.0, 30.0), self._world.network.heal)

    def _calm(self) -> None:
        self._world.network.heal()
        self._world.network.weather = CALM
        self._world.vote_crash = 0.0
        for actor in self._world.actors:
            actor.paused_until = min(actor.paused_until, self._world.now)
            self._restart(actor)
