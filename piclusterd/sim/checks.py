"""What must hold, checked after every step (I1–I7) and when the world has come to rest (I6–I8, I12).

I1  at most one node is elected, and at most one becomes active, in a term
I5  a webhook is called taken only when W voters have it on disk at that instant
I6  every coordinator that becomes active holds every webhook ever called taken; at rest, so does every ledger
I7  a step of a run has one idempotency key, whoever acts; at rest every taken webhook's run is done, its effect there
I8  at rest all ledgers are equal and give equal journals
I12 at rest there is one active coordinator and the hub's outbox is empty
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..ids import NodeId, RunId, Term
from ..ledger.replicate import copies_needed

if TYPE_CHECKING:
    from .world import World


class Violation(AssertionError):
    """An invariant does not hold. The seed replays it."""


class Checks:
    def __init__(self, voters: tuple[NodeId, ...]) -> None:
        self._voters = voters
        self._elected: dict[Term, NodeId] = {}
        self._active: dict[Term, NodeId] = {}
        self._on_disk: dict[str, dict[NodeId, None]] = {}
        self._keys: dict[tuple[RunId, str], str] = {}
        self.taken: dict[str, None] = {}
        """Webhook keys that a node called taken."""

    def elected(self, node: NodeId, term: Term) -> None:
        self._single(self._elected, term, node, "I1 elected")

    def activated(self, node: NodeId, term: Term) -> None:
        self._single(self._active, term, node, "I1 active")
        missing = [key for key in self.taken if node not in self._on_disk.get(key, {})]
        _hold(not missing, f"I6 {node} is active in term {term} without {missing[:3]}")

    def landed(self, node: NodeId, hook_key: str) -> None:
        """`node` has the webhook on disk from now on."""
        self._on_disk.setdefault(hook_key, {})[node] = None

    def called_taken(self, hook_key: str, newest: NodeId | None) -> None:
        """`newest`: the active coordinator of the highest term at this instant."""
        copies = sum(node in self._on_disk.get(hook_key, {}) for node in self._voters)
        wanted = copies_needed(len(self._voters))
        _hold(copies >= wanted, f"I5 {hook_key} called taken with {copies} of {wanted} copies")
        held = newest is None or newest in self._on_disk.get(hook_key, {})
        _hold(held, f"I3 {hook_key} called taken by a superseded coordinator: {newest} does not hold it")
        self.taken[hook_key] = None

    def acted(self, run: RunId, operation: str, key: str) -> None:
        known = self._keys.setdefault((run, operation), key)
        _hold(known == key, f"I7 {operation} of run {run} was tried with keys {known} and {key}")

    def at_rest(self, world: World, effects: Mapping[str, int]) -> None:
        nodes = [actor.node for actor in world.actors if actor.node is not None]
        _hold(len(nodes) == len(world.actors), "I12 a node is not up")
        _hold(sum(node.replicate.active for node in nodes) == 1, "I12 no single active coordinator")
        _hold(not world.hub.outbox, f"I12 {len(world.hub.outbox)} webhooks are still at the hub")
        heads = [node.reconcile.heads() for node in nodes]
        _hold(all(h == heads[0] for h in heads), f"I8 ledgers differ: {[sum(x.seq for x in h) for h in heads]}")
        views = [node.journal.views(most=1_000_000) for node in nodes]
        _hold(all(v == views[0] for v in views), "I8 journals differ")
        for node in nodes:
            missing = [key for key in self.taken if key not in node.journal.hooks]
            _hold(not missing, f"I6 {node.me} lacks {missing[:3]}")
        still_open = [run.run for run in views[0] if run.state == "open"]
        _hold(not still_open, f"I12 runs still open: {still_open[:3]}")
        undone = [run.run for run in views[0] if run.state == "done" and effects.get(run.run, 0) != 1]
        _hold(not undone, f"I7 runs without exactly one effect: {undone[:3]}")

    def _single(self, book: dict[Term, NodeId], term: Term, node: NodeId, what: str) -> None:
        known = book.setdefault(term, node)
        _hold(known == node, f"{what}: both {known} and {node} in term {term}")


def _hold(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)
