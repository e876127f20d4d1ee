"""What holds at rest, once everything is mended: one config everywhere, and one ledger (I4, I8 and I12 of `checks`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cluster.voter_config import config_id
from ..ledger import store
from ..node import Node
from .images import unpruned
from .keys import verify

if TYPE_CHECKING:
    from .world import World


class Violation(AssertionError):
    """An invariant does not hold. The seed replays it."""


def hold(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)


def config_is_settled(nodes: list[Node]) -> None:
    """A wish may wait for a voter who will not come, and longer than the calm lasts; what was made is stored."""
    configs = {config_id(node.election.voters): None for node in nodes}
    hold(len(configs) == 1, f"I12 nodes have different configs of voters: {list(configs)}")
    (leader,) = (node for node in nodes if node.replicate.active)
    hold(leader.reconfigure.stored, f"I12 the config of {leader.me} is not settled")


def ledgers_agree(world: World, nodes: list[Node], forked: bool) -> None:
    """Where logs are `forked`, journals are compared on the disks that hold the same branches."""
    heads = [node.reconcile.heads() for node in nodes]
    hold(all(h == heads[0] for h in heads), f"I8 ledgers differ: {[sum(x.seq for x in h) for h in heads]}")
    for actor in world.actors:
        hold(store.heads(actor.disk.conn) == heads[0], f"I8 {actor.disk.node} has another ledger on disk")
    witness = world.actors[world.plan.seed % len(nodes)]  # one a seed: to hash all of them is slow
    verdict = store.verify_all(witness.disk.conn, verify)
    hold(not verdict.faults, f"I4 {witness.disk.node}: {verdict.faults[:1]}")
    held = unpruned(world)
    told = [store.headers(actor.disk.conn) for actor in world.actors] if forked else held
    views = [node.journal.views(most=1_000_000) for node in nodes]
    alike = [view == views[0] for view, has in zip(views, told, strict=True) if has == told[0]]
    hold(all(alike), "I8 journals differ")
    if not forked:
        hold(all(has == held[0] for has in held), "I8 ledgers of the same length differ")
