"""The member list itself: its lines, and what is known of each member.

Owns who is listed, who is suspected, and who was removed: a tombstone is kept for TOMBSTONE_S, so that a node with an
old list cannot bring a removed member back here before it has read of the removal in the ledger itself. Decides
nothing: `belief` says what goes in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..ids import NodeId
from ..wire import Facts, Member
from .suspicion import Suspicion

RANK = {"alive": 0, "suspect": 1, "failed": 2, "left": 3, "removed": 4}
"""Precedence within one incarnation (SWIM §4.2)."""
HERE = ("alive", "suspect")
HISTORY = 8
"""Lines of probe history kept a peer: the answer to "why was it marked dead?"."""
TOMBSTONE_S = 24 * 3600.0
"""Serf's: longer than any node that may come back with an old list is expected to sleep."""
LINKING_S = 30.0
"""Whom gossip names is linked by then, directly or not: 32 nodes on two busy cores were a mesh after 19 s."""
ALIVE_AGAIN = "alive again"


@dataclass(slots=True)
class Peer:
    """One member as this node knows it. Times in seconds of this node's monotonic clock."""

    member: Member
    since: float
    """In this state."""
    heard: float
    turn: float = float("-inf")
    """When it was last probed by us, or said Ping or Ack: in a small cluster whose turn is longest ago is next."""
    suspicion: Suspicion | None = None
    obituary_sent: float = float("-inf")
    closed: tuple[float, ...] = ()
    """When its link closed, of late."""
    history: tuple[tuple[float, str], ...] = ()

    def note(self, text: str, now: float) -> None:
        before = [item for item in self.history if item[1] != text]
        self.history = (*before, (now, text))[-HISTORY:]

    def reasons(self) -> str:
        """What led to the present state."""
        texts = [text for _, text in self.history]
        start = texts.index(ALIVE_AGAIN) + 1 if ALIVE_AGAIN in texts else 0
        return "; ".join(texts[start:])

    def told(self, now: float) -> str:
        """The probe history in words, with ages."""
        return "; ".join(f"{now - at:.0f} s ago: {text}" for at, text in self.history)


NOBODY = NodeId("")


def bare(member: Member, accuser: NodeId = NOBODY) -> Member:
    """`member` as news of its state alone."""
    return Member(member.node, member.incarnation, member.state, Facts(), accuser)


class Roster:
    def __init__(self, mine: Member) -> None:
        self.mine = mine
        self.peers: dict[NodeId, Peer] = {}
        """Everybody else who is listed; only `put` and `bury` change whom and in which state."""
        self.removed: dict[NodeId, Peer] = {}
        self.banned: dict[NodeId, None] = {}
        """Whose removal the ledger tells: never listed again, whatever is said."""
        self.suspects: dict[NodeId, Suspicion] = {}
        self._here: list[NodeId] | None = None
        self.changes = 0
        """How often what is listed of the others has changed."""

    # looks ---------------------------------------------------------------------------------------------------
    def here(self) -> list[NodeId]:
        """The others that are alive or only suspected, in order of their ids."""
        if self._here is None:
            self._here = sorted(node for node, peer in self.peers.items() if peer.member.state in HERE)
        return self._here

    def within_reach(self, links: Collection[NodeId], now: float) -> list[NodeId]:
        """Of those here, who is linked or should be by now: from others, silence says nothing about them."""
        return [node for node in self.here() if node in links or now - self.peers[node].since >= LINKING_S]

    @property
    def size(self) -> int:
        """Members that are here, this node included."""
        return len(self.here()) + 1

    def gone(self) -> list[NodeId]:
        """Who has failed and may come back."""
        return [node for node, peer in self.peers.items() if peer.member.state == "failed"]

    def members(self) -> tuple[Member, ...]:
        return (self.mine, *(self.peers[node].member for node in sorted(self.peers)))

    def called(self, node: NodeId) -> str:
        """Its name, or its id while it has told none."""
        member = self.mine if node == self.mine.node else self.peers[node].member if node in self.peers else None
        return (member.facts.name if member else "") or node

    def listed(self) -> list[Member]:
        """As `members`, in no order that matters."""
        return [self.mine, *(peer.member for peer in self.peers.values())]

    def tombstones(self) -> list[Member]:
        return [peer.member for peer in self.removed.values()]

    # changes -------------------------------------------------------------------------------------------------
    def add(self, member: Member, now: float) -> Peer:
        self.removed.pop(member.node, None)
        peer = self.peers[member.node] = Peer(member, now, now)
        self._here = None
        self.changes += 1
        return peer

    def put(self, peer: Peer, member: Member) -> None:
        if (peer.member.state in HERE) != (member.state in HERE):
            self._here = None
        peer.member = member
        self.changes += 1

    def suspect(self, peer: Peer, suspicion: Suspicion | None) -> None:
        """Start or end the suspicion of `peer`."""
        peer.suspicion = suspicion
        if suspicion is None:
            self.suspects.pop(peer.member.node, None)
        else:
            self.suspects[peer.member.node] = suspicion

    def bury(self, peer: Peer, tombstone: Member, now: float) -> None:
        self.suspect(peer, None)
        del self.peers[tombstone.node]
        self._here = None
        self.changes += 1
        peer.member, peer.since = tombstone, now
        self.removed[tombstone.node] = peer

    def forget(self, now: float) -> None:
        """Tombstones that nobody can need any more."""
        old = [node for node, peer in self.removed.items() if now - peer.since >= TOMBSTONE_S]
        for node in old:
            del self.removed[node]

    def line_of(self, node: NodeId) -> Member | None:
        """What is known of `node`, a tombstone too."""
        if node == self.mine.node:
            return self.mine
        peer = self.peers.get(node) or self.removed.get(node)
        return peer.member if peer else None
