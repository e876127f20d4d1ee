"""What pruning looks at: who is here and when they spoke (cluster), what is held and whether it is whole (ledger)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .cluster.election import Election
from .cluster.membership import Membership
from .events import Fact, Rules, Token
from .ledger.care import Care
from .ledger.pruning import Company, Ours, Pruning, Retention
from .ledger.reconcile import Reconcile


def make_pruning(
    membership: Membership,
    election: Election,
    reconcile: Reconcile,
    care: Care,
    keep: Retention,
    tokens: Iterator[Token],
    rules: Rules,
    now: float,
    ledger: Iterable[Fact],
) -> Pruning:
    """`ledger`: all that the disk tells at the start."""
    ours = Ours(
        reconcile.held,
        reconcile.heads,
        lambda: reconcile.digest,
        lambda: care.rewind.current,
        lambda: not care.lost and not care.rewind.suspended,
        lambda: bool(care.mending.damaged),
    )
    company = Company(
        membership.roster.here,
        lambda: {node: peer.heard for node, peer in membership.peers.items()},
        lambda: election.voters.voters,
    )
    return Pruning(membership.me, keep, ours, company, tokens, rules, now, ledger)
