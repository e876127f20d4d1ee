"""Cards that were copied: an older image comes back without a word, or two cards with one key take turns in a board.

    image ─▶ …the card writes on… ─▶ swap: the image runs, the card lies in a drawer ─▶ swap back: the card runs again

Nothing on the disk says so, unlike after `picluster backup restore` (`Disk.put_back`): only its peers can tell the node
(`ledger.rewind`), and where they cannot, its log forks. The vote is not part of it: two cards that vote are two voters
with one name, against which nothing helps but the owner.

No design saves what is on such a card alone. So a swap is drawn only where all that the other card lacks is on W other
voters in every config in force, or was never seen outside this card: the tail of the log that a leader wrote while it
was cut off, and that is where forks come from.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from random import Random
from typing import TYPE_CHECKING

from ..ids import LogId, NodeId
from ..ledger import rows, store
from ..ledger.entry import Header, decode_header
from ..ledger.replicate import copies_needed
from .disk import Disk, Image
from .electorate import in_force, may_forget

if TYPE_CHECKING:
    from .world import Actor, World

IMAGE_AGE_S = (0.2, 15.0)
DRAWER_S = (1.0, 40.0)
"""So long a card lies in the drawer: the other one may be elected meanwhile, and write."""
APART_S = 1.0
LOOK_S = 2.0
LEAD_TRIES = 20
TRIES = 20
TRY_AGAIN_S = 1.0


class Images:
    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._pace = 0.0

    def begin(self, pace: float) -> None:
        self._pace = pace
        self._world.at(self._rng.uniform(1.0, pace), self._strike)

    def _strike(self) -> None:
        """Leaders most of all: theirs are the logs that grow."""
        world = self._world
        if world.now >= world.calm_from:
            return
        leaders = [a for a in world.actors if a.node and a.node.replicate.active]
        actor = self._rng.choice(leaders * 3 + world.actors)
        age = self._rng.uniform(*IMAGE_AGE_S)
        if self._rng.random() < 0.5:
            world.links.cut_off(actor, age * self._rng.uniform(0.5, 1.5))
        world.at(age, self._swap, actor, actor.disk, actor.disk.image(), False, TRIES)
        world.at(self._rng.uniform(0.2, 2 * self._pace), self._strike)

    # by hand -------------------------------------------------------------------------------------------------
    def begin_by_hand(self) -> None:
        """Theme `fork`: the same, so that two branches come of it each time."""
        self._world.at(self._rng.uniform(5.0, 10.0), self._write_apart)

    def _write_apart(self) -> None:
        """A leader is cut off and writes what nobody sees; then its older image runs."""
        world = self._world
        leaders = [a for a in world.actors if a.node and a.node.replicate.active]
        if world.now >= world.calm_from:
            return
        if not leaders:
            world.at(LOOK_S, self._write_apart)
            return
        leader, disk, image = leaders[0], leaders[0].disk, leaders[0].disk.image()
        world.links.cut_off(leader, APART_S)
        for _ in range(self._rng.randint(1, 5)):
            world.hands.webhook_at(leader)
        world.at(APART_S, self._swap, leader, disk, image, False, TRIES)
        world.at(APART_S + LOOK_S, self._lead_again, leader, LEAD_TRIES)

    def _lead_again(self, actor: Actor, tries: int) -> None:
        """Whoever else leads falls, until this one does, and writes where the other card did."""
        world = self._world
        others = [a for a in world.actors if a is not actor and a.node and a.node.replicate.active]
        if actor.node is not None and actor.node.replicate.active:
            world.at(self._rng.uniform(5.0, 15.0), self._write_apart)
        elif tries and world.now < world.calm_from:
            for other in others if actor.node is not None else ():
                world.crash(other)
                world.at(self._rng.uniform(0.5, 2.0), world.boot, other)
            world.at(LOOK_S, self._lead_again, actor, tries - 1)

    # swapping ------------------------------------------------------------------------------------------------
    def _swap(self, actor: Actor, disk: Disk, other: Image, back: bool, tries: int) -> None:
        """Run `other` in place of what is on the disk; perhaps the other way round later."""
        world = self._world
        if actor.disk is not disk or world.now >= world.calm_from or not tries:
            other.conn.close()
        elif not self._is_harmless(actor, other):
            world.at(TRY_AGAIN_S, self._swap, actor, disk, other, back, tries - 1)
        else:
            world.struck("clone" if back else "image")
            world.crash(actor, silently=self._rng.random() < 0.5)
            self._tell_the_checks(actor, other)
            card = disk.swap(other)
            world.checks.put_back(disk.node, store.heads(disk.conn))
            world.at(min(self._rng.uniform(0.1, 5.0), world.calm_from - world.now), world.boot, actor)
            if back or (self._pace and self._rng.random() < 0.3):
                card.conn.close()
            else:
                world.at(self._rng.uniform(*DRAWER_S), self._swap, actor, disk, card, True, TRIES)

    def _tell_the_checks(self, actor: Actor, other: Image) -> None:
        """From where may the log that `other` goes on with say two things? From what it lacks, and nobody shows it.

        After the crash, which may have landed the last of what was being written.
        """
        conns = [other.conn, *(a.disk.conn for a in self._world.actors if a is not actor)]
        shown = max(head.seq for conn in conns for head in store.heads(conn) if head.log == other.log)
        if self._world.checks.was_written(other.log, shown + 1):
            self._world.checks.cloned(other.log, shown + 1)

    def _is_harmless(self, actor: Actor, other: Image) -> bool:
        world, disk = self._world, actor.disk
        if disk.lost or disk.damaged() or disk.failing_until > world.now or not may_forget(world, actor):
            return False
        lacking = self._lacking(actor, other)
        return self._lengths_differ(other) and all(self._may_lack(disk, *one) for one in lacking)

    def _lacking(self, actor: Actor, other: Image) -> list[tuple[Header, list[NodeId]]]:
        """What `other` has not and the actor's disk has, and who else has it."""
        others = {a.disk.node: Holding(a.disk.conn) for a in self._world.actors if a is not actor}
        ours, image = Holding(actor.disk.conn), Holding(other.conn)
        lacking = [(raw, header) for raw, header in ours.entries(image.raw) if not image.has(raw, header)]
        return [(header, [node for node, held in others.items() if held.has(raw, header)]) for raw, header in lacking]

    def _may_lack(self, disk: Disk, header: Header, holders: list[NodeId]) -> bool:
        if header.log == disk.log and not holders:
            return header.seq > self._world.checks.durable.get(header.log, 0)
        return all(
            sum(voter in holders for voter in config.voters) >= copies_needed(len(config.voters))
            for config in in_force(self._world)
        )

    def _lengths_differ(self, other: Image) -> bool:
        """Two branches of one length are seen only once one of them grows (DECISIONS 12): they would differ at rest."""
        end = {head.log: head.seq for head in store.heads(other.conn)}.get(other.log, 0)
        ends = [head.seq for a in self._world.actors for head in store.heads(a.disk.conn) if head.log == other.log]
        return not self._world.checks.is_cloned(other.log) or end not in ends


class Holding:
    """What a ledger holds: its entries by their headers, and whatever a checkpoint of the same log replaced."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.raw = store.headers(conn)
        self.begins = {log: rows.begins(conn, row) for log, row in rows.logs(conn).items()}

    def has(self, raw: bytes, header: Header) -> bool:
        return raw in self.raw or header.seq < self.begins.get(header.log, 0)

    def entries(self, without: Iterable[bytes] = ()) -> Iterator[tuple[bytes, Header]]:
        """Those that no checkpoint has replaced."""
        for raw in sorted(self.raw.keys() - without):
            header = _header(raw)
            if header.seq >= self.begins[header.log]:
                yield raw, header


def unpruned(world: World) -> list[dict[bytes, None]]:
    """Of every disk, the entries of which no other has forgotten the place: equal disks give equal ones."""
    holdings = [Holding(actor.disk.conn) for actor in world.actors]
    if all(held.raw == holdings[0].raw for held in holdings):
        return [held.raw for held in holdings]
    begins: dict[LogId, int] = {}
    for log, first in (item for held in holdings for item in held.begins.items()):
        begins[log] = max(first, begins.get(log, 0))
    return [{raw: None for raw, header in held.entries() if header.seq >= begins[header.log]} for held in holdings]


def forks(world: World) -> dict[LogId, int]:
    """The logs of which two branches are on the disks that run, and the first number that exists twice."""
    found: dict[LogId, int] = {}
    seen: dict[tuple[LogId, int], bytes] = {}
    for actor in world.actors:
        for raw, header in Holding(actor.disk.conn).entries():
            if seen.setdefault((header.log, header.seq), raw) != raw:
                found[header.log] = min(header.seq, found.get(header.log, header.seq))
    return found


def _header(raw: bytes) -> Header:
    header = decode_header(raw)
    assert isinstance(header, Header)
    return header
