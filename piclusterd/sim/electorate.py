"""Which configs of voters may still matter, and whose disk may therefore forget: what the design promises, in numbers.

    known ──newest one that a majority of its voters stores, and all that are newer──▶ in force

A config older than that can elect nobody any more (`cluster.reconfigure`). Acknowledged entries stand on W voters, so a
minority of the voters of *every* config in force may lose or forget what they hold, and not one disk more.

A coordinator that changes voters counts on what it heard within the last window of CheckQuorum. A disk that dies within
it, of all times, may leave a config whose voters are gone (`recover --force` is for that). So nobody forgets while a
change is under way, and the owner changes nothing within `window_s` after somebody forgot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cluster.election import majority
from ..cluster.voter_config import config_id
from ..ids import NodeId
from ..ledger import store
from ..wire import ConfigId, Voters
from .network import CLOG_MAX_S

if TYPE_CHECKING:
    from .world import Actor, World

NOWHERE = ConfigId(-1, -1)
"""Older than any config: of a disk that is gone."""


def in_force(world: World) -> tuple[Voters, ...]:
    """Every config that an election or an acknowledgement may be counted in, oldest first; never none."""
    stored = {actor.disk.node: config_id(actor.disk.hard.voters) for actor in world.actors}
    known = sorted(world.checks.configs.items())
    decided = [
        name
        for name, config in known
        if sum(stored.get(voter, NOWHERE) >= name for voter in config.voters) >= majority(len(config.voters))
    ]
    newest = max(decided, default=NOWHERE)
    return tuple(config for name, config in known if name >= newest)


def window_s(world: World) -> float:
    """How long a coordinator may take somebody for heard who is gone."""
    return world.timings.election_max_s + world.network.weather.longest_s + CLOG_MAX_S


def is_well(world: World, node: NodeId) -> bool:
    """Has it the disk it had, whole as far as it knows, and as far as others can show it?"""
    disk = world.by_id[node].disk
    ends = [{h.log: h.seq for h in store.heads(a.disk.conn)}.get(disk.log, 0) for a in world.actors]
    if max(ends) > {h.log: h.seq for h in store.heads(disk.conn)}.get(disk.log, 0):
        return False  # an older image that has not been told yet
    return disk.node == node and not disk.lost and not disk.votes_lost and not disk.damaged()


def may_forget(world: World, actor: Actor) -> bool:
    """May this disk lose what it holds?"""
    if world.owner.busy:
        return False
    node = actor.disk.node
    voted_in = [config.voters for config in in_force(world) if node in config.voters]
    return all(sum(is_well(world, v) for v in voters if v != node) > len(voters) // 2 for voters in voted_in)
