"""Whose key is good: who was removed from the cluster, a set that only grows, folded from the ledger; and cloned keys.

    owner ──RemoveNode──▶ any node ──Append(node.removed)──▶ its ledger ──▶ every ledger, however late
                                                                │
    LedgerGrew: node.removed ─▶ the member list forgets it, Deny(all that were ever removed) ─▶ links end, and no more

The entry is the deny-list: signed, replicated, kept by every checkpoint (a kind without a subject), told to whoever was
away. A removed key stays removed; the same board joins again with a new one. What the removed node wrote stays in the
ledger, for chains must verify. Any member may remove any other, as any owner's console may: two that remove each other
are both gone. Nodes that vote are not removed: whoever counts on them would count on nobody (`desk` takes the vote away
first).
Two machines with one key (a cloned card) are told to their owners, on both and wherever they met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..errors import NotFound, PiclusterError, Unavailable, UserError
from ..events import (
    Answer,
    Append,
    Appended,
    AppendFailed,
    Deny,
    Event,
    Fact,
    KeyShared,
    LedgerAlarm,
    Output,
    Received,
    Record,
    RemoveNode,
    Ticket,
    Token,
)
from ..ids import NodeId, is_node_id
from ..wire import Twin
from .membership import Membership

REMOVED = "node.removed"
"""Kind of a ledger entry; its body is {node, name, by}."""
ANOTHER_KEY = "Was its disk cloned? Stop one of the two, empty its state directory and let it join anew."


class Removals:
    def __init__(
        self,
        membership: Membership,
        voters: Callable[[], tuple[NodeId, ...]],
        tokens: Iterator[Token],
        ledger: Iterable[Fact],
        now: float,
    ) -> None:
        """`ledger`: all that the disk tells at the start."""
        self._membership, self._voters, self._tokens = membership, voters, tokens
        self._removed: dict[NodeId, None] = {}
        self._asked: dict[Token, tuple[Ticket, NodeId]] = {}
        self.grew(ledger, now)

    @property
    def denied(self) -> tuple[NodeId, ...]:
        """Everybody who was ever removed, as far as this ledger tells."""
        return tuple(self._removed)

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case RemoveNode(ticket, node):
                fault = self._impossible(node)
                return [Answer(ticket, fault)] if fault else self._write(ticket, node)
            case Appended(token) if token in self._asked:
                return [Answer(*self._asked.pop(token))]
            case AppendFailed(token, why) if token in self._asked:
                ticket, node = self._asked.pop(token)
                return [Answer(ticket, Unavailable(f"{node} was not removed", why, "Ask another node."))]
            case KeyShared(why):
                return [LedgerAlarm(f"{why}. {ANOTHER_KEY}")]
            case Received(_, Twin(path)):
                return [LedgerAlarm(f"the key of this node is in use on another machine ({path}). {ANOTHER_KEY}")]
            case _:
                return []

    def grew(self, facts: Iterable[Fact], now: float) -> list[Output]:
        """`facts` are new in the ledger."""
        told = [fact.body for fact in facts if fact.kind == REMOVED]
        nodes = [NodeId(node) for body in told if is_node_id(node := str(body.get("node", "")))]
        new = [node for node in dict.fromkeys(nodes) if node not in self._removed]
        if not new:
            return []
        self._removed.update(dict.fromkeys(new))
        out = [output for node in new for output in self._leaves(node, now)]
        return [*out, Deny(tuple(self._removed))]

    def _leaves(self, node: NodeId, now: float) -> list[Output]:
        if node != self._membership.me:
            return self._membership.remove(node, now)
        return [
            LedgerAlarm(
                "this node was removed from its cluster: nobody links with it any more. To join again, give it another"
                " state directory, for its key is refused for good."
            )
        ]

    def _impossible(self, node: NodeId) -> PiclusterError | None:
        called = self._membership.roster.called(node)
        if node == self._membership.me:
            return UserError(f"{called} cannot remove itself", "nobody would tell the others.", "Ask on another node.")
        if node in self._removed:
            return UserError(f"{node} is removed already", fix="Its board joins again with a new state directory.")
        if node not in self._membership.peers:
            return NotFound(f"no member {node}", "It is not listed.", "See picluster status.")
        if node in self._voters():
            return UserError(f"{called} is a voter", "", f"Take its vote away first: picluster voter remove {called}")
        return None

    def _write(self, ticket: Ticket, node: NodeId) -> list[Output]:
        token = next(self._tokens)
        self._asked[token] = (ticket, node)
        body = {"node": node, "name": self._membership.roster.called(node), "by": self._membership.me}
        return [Append(token, (Record(REMOVED, body),))]
