"""Was our disk put back to an older image? And when may a node that lost part of its ledger vote again?

    peer ──Held(heads)──▶ a head of *our current log* beyond what we hold ──▶ NewEpoch, LedgerAlarm   (once a log)
    reconcile meanwhile asks for our own tail like for any other, and `apply` takes it: it verifies

A peer can only hold an entry of ours that was durable here first (append, fsync, then replicate), so such a head proves
that this disk forgot. The old log is never appended to again: its lost tail may lie on a peer that is away, and to
append would fork it. No high-water mark is fsynced beside each commit: it would double the flash wear and the latency
of every acknowledgement, and lies on the same card, so that a restored image would rewind it as well. The mark that
`rescue` keeps is written at start and at a clean stop only, and finds a ledger file that was put back by itself.

Convalescence. A node that forgot entries (rewound, file lost, rot) may have been one of the W copies of an
acknowledged one. An entry of its has W - 1 copies among the other N - 1 voters; whoever holds the union of N - W + 1
of them therefore holds it. Until then the node must neither vote nor report heads in a term nor stand: else it and a
voter that never had the entry could make a majority that has forgotten it.

Sources: SSB's fork bug; hypercore's `fork` counter; Protocol-Aware Recovery (FAST 2018); Michael et al., *Recovering
Shared Objects Without Stable Storage* (DISC 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..events import Fact
from ..ids import LogId, NodeId
from ..wire import Head


class Rewind:
    """Owns the question which of our logs are rewound; asked on every `Held` that carries heads."""

    def __init__(self, me: NodeId, current: LogId | None) -> None:
        """`current`: the log this node appends to."""
        self.me = me
        self.current = current
        self.suspended = False
        """A new epoch was asked for and has not been opened: nothing may be appended in between."""

    def on_heads(self, theirs: Iterable[Head], held: Mapping[LogId, int]) -> str:
        """Why a new epoch must be opened; "" where all is well, or where it is being opened already."""
        if self.suspended or self.current is None:
            return ""
        mine = held.get(self.current, 0)
        lost = next((h for h in theirs if h.seq > mine and h.log == self.current), None)
        if lost is None:
            return ""
        self.suspended = True
        return (
            f"this node's disk was put back to an older state: others hold {lost.seq} entries of its log"
            f" {lost.epoch}, it holds {mine}. It fetches them and goes on in a new log."
        )

    def on_fork(self, forked: Iterable[LogId]) -> str:
        """Why a new epoch must be opened after two branches of these logs were seen; "" where none is ours."""
        if self.suspended or self.current is None or self.current not in forked:
            return ""
        self.suspended = True
        return (
            f"two branches of this node's log {self.current.epoch} exist: its disk was put back to an older state, or"
            " its key is on two machines. Both branches are kept; it goes on in a new log."
        )

    def on_appended(self, facts: Sequence[Fact]) -> None:
        """Facts of this node's own that were just made durable: the log they are in is the current one."""
        if facts and facts[-1].log != self.current:
            self.current, self.suspended = facts[-1].log, False


def recovered(
    me: NodeId,
    voters: Sequence[NodeId],
    copies: int,
    told: Mapping[NodeId, Mapping[LogId, int]],
    held: Mapping[LogId, int],
) -> bool:
    """Does this node hold whatever it may have acknowledged before it forgot? `copies`: W; `told`: heads since then."""
    others = [voter for voter in voters if voter != me]
    covered = sum(all(held.get(log, 0) >= seq for log, seq in told[voter].items()) for voter in others if voter in told)
    return covered >= min(len(others), len(voters) - copies + 1)
