"""Whom to ask for sound copies of damaged entries, and when to ask again.

    Damaged(spans) ─▶ Want(spans) ─▶ peer 1 …no… ─▶ Want ─▶ peer 2 ─▶ Batch ─▶ Store ─▶ `scrub.repair` ─▶ Damaged(())

Owns the list of what is damaged here, and takes turns among the linked peers, one request at a time: any of them may
lack it, or have rot of its own. It never decides that something is sound; the hands tell what is left. While anything
is damaged this node does not stand for election (`may_stand`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ids import NodeId
from ..wire import Span

ASK_AGAIN_S = 10.0
"""A peer that has not mended us in this time has nothing for us, or is gone: the next one is asked."""
SPANS_MAX = 64
"""Spans of one request."""


class Mending:
    def __init__(self, damaged: Sequence[Span] = ()) -> None:
        self.damaged = tuple(damaged)
        self._peers: list[NodeId] = []
        self._asked: dict[NodeId, float] = {}
        """Peer → when it was asked for what is damaged now."""
        self._due = 0.0

    def may_stand(self, me: NodeId, voters: Sequence[NodeId], copies: int, now: float) -> bool:
        """May this node lead? `copies`: W.

        Not while an acknowledged entry may be among the damaged. One that W voters hold is on W - 1 others, so once
        N - W + 1 others were asked and had none, it was never acknowledged, and what nobody holds cannot be mended.
        """
        if not self.damaged:
            return True
        others = [voter for voter in voters if voter != me]
        silent = sum(now - self._asked[voter] >= ASK_AGAIN_S for voter in others if voter in self._asked)
        return silent >= min(len(others), len(voters) - copies + 1)

    def deadline(self) -> float:
        return self._due if self.damaged and self._peers else float("inf")

    def link_up(self, peer: NodeId) -> None:
        if peer not in self._peers:
            self._peers.insert(0, peer)

    def link_down(self, peer: NodeId) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
        self._asked.pop(peer, None)  # it may have gone before it answered

    def found(self, damaged: Sequence[Span], now: float) -> None:
        """All that is damaged now, after a slice of the scrub or a repair."""
        if tuple(damaged) != self.damaged:
            self.damaged, self._due = tuple(damaged), now
            self._asked.clear()

    def ask(self, now: float) -> tuple[NodeId, tuple[Span, ...]] | None:
        """Whom to send a Want of what, if it is time."""
        if now < self.deadline():
            return None
        peer = self._peers.pop(0)
        self._peers.append(peer)
        self._asked.setdefault(peer, now)
        self._due = now + ASK_AGAIN_S
        return peer, self.damaged[:SPANS_MAX]
