"""What pruning looks at: who is here and when they spoke (cluster), what is held and whether it is whole (ledger).

And what an urgent run looks at before it ends: whether the relay outside holds its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from .cluster.election import Election
from .cluster.membership import Membership
from .events import Fact, Rules, Token
from .ids import LogId
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


def copy_look(membership: Membership, pruning: Pruning) -> Callable[[Sequence[tuple[LogId, int]]], bool]:
    """Did a relay say that it holds these entries, or is none a member? One that failed is waited for, not who left."""

    def look(places: Sequence[tuple[LogId, int]]) -> bool:
        members = [peer.member for peer in membership.peers.values() if peer.member.state != "left"]
        relays = [member.node for member in members if member.facts.role == "relay"]
        return not relays or any(pruning.said(relay, places) for relay in relays)

    return look
