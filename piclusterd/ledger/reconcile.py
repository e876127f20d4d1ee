"""Who lacks what: version vectors and pull.

Owns this node's heads (how far each log is durable here) and the digest of them. Refuses to push: whoever lacks entries
asks for them, one request in flight a peer, so a slow board is never flooded. Because a log is contiguous the
vector *is* the exact difference, in one round trip; no Merkle tree is needed.

    Ping/Ack(digest) ≠ mine ──▶ Held(my heads) ──▶ peer: Want(spans) ──▶ Read ──▶ Batch ──▶ Store ──▶ again
                                                    └ the coordinator's own entries: only if their Push stays away

The coordinator pushes what it appends over every link (`replicate`), so a peer that tells of the newest entries tells
of what is under way already, or waits for our disk: to ask for it too would send every entry twice while the cluster
is busy. So it is asked for when it has been missing for sync_s; at once on a link younger than that, since what was
appended before it was never pushed over it.

Invariants: heads only grow, and only on `Appended` and `Stored`. A digest is compared, never trusted.
Sources: Corrosion's sync state (heads and needs); Scuttlebutt (van Renesse 2008).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..events import (
    Appended,
    DeadlineReached,
    EntriesRead,
    Event,
    LedgerAlarm,
    LedgerGrew,
    LinkDown,
    LinkUp,
    Output,
    Read,
    Received,
    Send,
    Store,
    Stored,
    Token,
)
from ..ids import LogId, NodeId, Term
from ..wire import Ack, Batch, ConfigId, Head, Held, PeerMessage, Ping, Span, Want
from .entry import digest

WANT_TIMEOUT_S = 5.0
"""A Want unanswered for this long is asked again, of whoever has it then."""
SPANS_MAX = 64
"""Spans in one Want; the rest is asked for when this batch has been stored."""
NEVER = float("inf")
READS_MAX = 4
"""Reads under way for peers; further Wants are dropped and asked again after WANT_TIMEOUT_S."""


def lacking(mine: dict[LogId, int], theirs: Iterable[Head]) -> tuple[Span, ...]:
    """What `theirs` holds and `mine` does not."""
    spans: list[Span] = []
    for origin, epoch, seq in theirs:
        held = mine.get(LogId(origin, epoch), 0)
        if seq > held:
            spans.append(Span(origin, epoch, held + 1, seq))
    return tuple(sorted(spans))


class Reconcile:
    def __init__(
        self,
        heads: Iterable[Head],
        sync_s: float,
        tokens: Iterator[Token],
        config: Callable[[], ConfigId | None] = lambda: None,
        life: int = 0,
        leader: Callable[[], NodeId | None] = lambda: None,
    ) -> None:
        """`life`: this node's boot counter; `leader`: who pushes, as far as election knows."""
        self.held: dict[LogId, int] = {head.log: head.seq for head in heads}
        self._heads = self._sorted()
        self.digest = digest(self._heads)
        self._sync_s = sync_s
        self.config = config
        """Says which config of voters is on our disk: every `Held` carries it."""
        self.life = life
        self._term: Term = 0
        self._wants: dict[NodeId, float] = {}
        """Peer → when its answer is overdue."""
        self._offered: dict[NodeId, float] = {}
        """Peer → when heads were last offered to it."""
        self._theirs: dict[NodeId, tuple[Head, ...]] = {}
        """Peer → the heads it last told us, until we hold them too."""
        self._leader = leader
        self._awaited: dict[LogId, tuple[int, float]] = {}
        """Coordinator's log → the first seq that we lack of it, and until when we wait for its Push."""
        self._look_again = NEVER
        """When the first of them is to be asked for."""
        self._links: dict[NodeId, float] = {}
        """Peer → since when."""
        self._reads: dict[Token, NodeId] = {}
        self._stores: dict[Token, NodeId] = {}
        self._tokens = tokens

    # looks ---------------------------------------------------------------------------------------------------
    def heads(self) -> tuple[Head, ...]:
        return self._heads

    def is_closed(self, log: LogId) -> bool:
        """Does its origin write another log by now? Then its disk was put back, and this one may have branches."""
        return any(held.origin == log.origin and held.epoch > log.epoch for held in self.held)

    @property
    def waiting(self) -> int:
        """Peers whose answer to a Want is awaited."""
        return len(self._wants)

    def deadline(self) -> float:
        return min(self._look_again, *self._wants.values()) if self._wants else self._look_again

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float, term: Term) -> list[Output]:
        """`term` is the election's, by now durable or held back with what it goes into."""
        self._term = term
        match event:
            case Received(sender, message):
                return self._receive(sender, message, now)
            case EntriesRead(token, entries) if token in self._reads:
                return [Send(self._reads.pop(token), Batch(entries))]
            case Appended(_, _, facts):
                return self._grow([Head(*f.log, f.seq) for f in facts], [LedgerGrew(facts)])
            case Stored():
                return self._on_stored(event, now)
            case LinkUp(peer):
                self._links[peer] = now
                return self._offer(peer, now)
            case LinkDown(peer):
                for book in (self._links, self._wants, self._offered):
                    book.pop(peer, None)
                self._theirs.pop(peer, None)
                return []
            case DeadlineReached():
                return self._overdue(now)
            case _:
                return []

    def _receive(self, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
        match message:
            case Ping() | Ack():
                return self._compare(sender, message.digest, now)
            case Held(term, _, heads):
                if heads is not None:
                    return self._on_held(sender, heads, now)
                return [] if term else self._compare(sender, b"", now)  # it may not vote (`care`) and asks what we hold
            case Want(spans):
                return self._on_want(sender, spans)
            case Batch(entries):
                token = next(self._tokens)
                self._stores[token] = sender
                return [Store(token, entries, resets=True)]
            case _:
                return []

    def _compare(self, peer: NodeId, theirs: bytes, now: float) -> list[Output]:
        return self._offer(peer, now) if theirs != self.digest and self._may_offer(peer, now) else []

    def _may_offer(self, peer: NodeId, now: float) -> bool:
        return now - self._offered.get(peer, -NEVER) >= self._sync_s

    def _offer(self, peer: NodeId, now: float) -> list[Output]:
        self._offered[peer] = now
        return [Send(peer, Held(self._term, self.digest, self.heads(), self.config(), self.life))]

    def _on_held(self, peer: NodeId, theirs: tuple[Head, ...], now: float) -> list[Output]:
        if theirs == self._heads:
            self._theirs.pop(peer, None)
            return []
        out: list[Output] = []
        if self._may_offer(peer, now) and lacking({h.log: h.seq for h in theirs}, self._heads):
            out = self._offer(peer, now)  # they lack something: let them know, they will ask
        self._theirs[peer] = theirs
        return out + self._want(peer, now)

    def _want(self, peer: NodeId, now: float) -> list[Output]:
        if peer in self._wants:
            return []
        lacks = lacking(self.held, self._theirs.get(peer, ()))
        spans = [span for span in lacks if not self._is_pushed(span, now)]
        if not spans:
            return []
        self._wants[peer] = now + WANT_TIMEOUT_S
        return [Send(peer, Want(tuple(spans[:SPANS_MAX])))]

    def _is_pushed(self, span: Span, now: float) -> bool:
        """Is it, as far as one can tell, on its way to us already?"""
        linked = self._links.get(span.origin, now)
        if span.origin != self._leader() or now - linked < self._sync_s:
            return False
        first, until = self._awaited.get(span.log, (0, 0.0))
        if first != span.first:
            until = now + self._sync_s
            self._awaited[span.log] = (span.first, until)
        if now < until:
            self._look_again = min(self._look_again, until)
        return now < until

    def _on_want(self, peer: NodeId, spans: tuple[Span, ...]) -> list[Output]:
        if len(self._reads) >= READS_MAX:
            return []
        token = next(self._tokens)
        self._reads[token] = peer
        return [Read(token, spans[:SPANS_MAX])]

    def _on_stored(self, stored: Stored, now: float) -> list[Output]:
        notes: list[Output] = [LedgerAlarm(d.reason) for d in stored.dropped]
        if stored.facts:
            notes.append(LedgerGrew(stored.facts))
        out = self._grow(stored.heads, notes)
        peer = self._stores.pop(stored.token, None)
        if peer is not None:
            self._wants.pop(peer, None)
            out += self._want(peer, now) if stored.facts else []  # the rest of a long absence, batch after batch
        return out

    def _grow(self, heads: Iterable[Head], out: list[Output]) -> list[Output]:
        grew = False
        for origin, epoch, seq in heads:
            log = LogId(origin, epoch)
            if seq > self.held.get(log, 0):
                self.held[log] = seq
                grew = True
        if grew:
            self._heads = self._sorted()
            self.digest = digest(self._heads)
        return out

    def _sorted(self) -> tuple[Head, ...]:
        return tuple([Head(*log, seq) for log, seq in sorted(self.held.items())])

    def _overdue(self, now: float) -> list[Output]:
        late = [peer for peer, due in self._wants.items() if due <= now]
        for peer in late:
            del self._wants[peer]
        out = [out for peer in late if peer in self._links for out in self._offer(peer, now)]
        if now >= self._look_again:
            self._look_again = NEVER
            out += [out for peer in self._theirs for out in self._want(peer, now)]
        return out
