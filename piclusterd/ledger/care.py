"""The ledger's health as one decider: a disk put back, rot, forks; who is asked, who is told, and may this node vote?

    Held(heads) ─▶ rewound? ─▶ NewEpoch(why), LedgerAlarm          lost ─▶ enough others' heads held ─▶ Recovered
    Damaged(spans) ─▶ LedgerAlarm ─▶ Want(spans) to one peer after the other (`mending`)
    Diverged(forks, missing) ─▶ Read(forks) ─▶ Batch to every peer; Want(missing) of every peer
                              └ our own log among them ─▶ NewEpoch

Owns `lost` (why this node may have forgotten what it acknowledged) and what is damaged. While `lost` stands the node
neither votes, nor stands, nor reports heads in a term (`may_vote`); while anything is damaged it does not stand
(`may_stand`). It writes nothing and trusts no word of a peer: what comes back is verified by `store.apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..events import (
    Appended,
    Damaged,
    DeadlineReached,
    Diverged,
    EntriesRead,
    Event,
    LedgerAlarm,
    LinkDown,
    LinkUp,
    NewEpoch,
    Output,
    Read,
    Received,
    Recovered,
    Rules,
    Send,
    Stored,
    Token,
)
from ..ids import LogId, NodeId
from ..wire import Batch, Held, Span, Want
from .mending import ASK_AGAIN_S, Mending
from .rewind import Rewind, recovered

ALL_RULES = Rules()


class Care:
    def __init__(
        self,
        me: NodeId,
        current: LogId | None,
        held: Mapping[LogId, int],
        digest: Callable[[], bytes],
        tokens: Iterator[Token],
        lost: str = "",
        damaged: Sequence[Span] = (),
        rules: Rules = ALL_RULES,
    ) -> None:
        """`current`: the log we append to; `held`, `digest`: reconcile's, live; `lost`, `damaged`: the writer's."""
        self._rules = rules
        self.me = me
        self.lost = lost
        self.rewind = Rewind(me, current)
        self.mending = Mending(damaged)
        self._held, self._digest, self._tokens = held, digest, tokens
        self._told: dict[NodeId, Mapping[LogId, int]] = {}
        self._links: dict[NodeId, None] = {}
        self._reads: dict[Token, None] = {}
        self._look_again = 0.0
        """While `lost`: when to ask the others again what they hold."""
        self._missing: tuple[Span, ...] = ()
        self._missing_due = 0.0

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def may_vote(self) -> bool:
        return not self.lost

    def may_stand(self, voters: Sequence[NodeId], copies: int, now: float) -> bool:
        """May this node lead? `copies`: W."""
        return self.may_vote and not self.rewind.suspended and self.mending.may_stand(self.me, voters, copies, now)

    def deadline(self) -> float:
        return min(self.mending.deadline(), self._look_again if self.lost else float("inf"))

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float, voters: Sequence[NodeId], copies: int) -> list[Output]:
        """After reconcile has seen the same event."""
        match event:
            case Received(sender, Held() as held):
                return self._on_held(sender, held, voters, copies)
            case Stored():
                return self._convalesce(voters, copies)
            case Appended(_, _, facts):
                self.rewind.on_appended(facts)
                return []
            case Damaged(spans):
                return self._on_damaged(spans, now)
            case Diverged(forks, missing):
                return self._on_diverged(forks, missing, now)
            case EntriesRead(token, entries) if token in self._reads:
                del self._reads[token]
                return [Send(peer, Batch(entries)) for peer in self._links]
            case LinkUp(peer):
                self._links[peer] = None
                self.mending.link_up(peer)
                return self._ask(now)
            case LinkDown(peer):
                self._links.pop(peer, None)
                self.mending.link_down(peer)
                return []
            case DeadlineReached():
                return self._ask(now) + self._look(now, voters, copies)
            case _:
                return []

    def _on_held(self, sender: NodeId, held: Held, voters: Sequence[NodeId], copies: int) -> list[Output]:
        out = self._open_epoch(self.rewind.on_heads(held.heads, self._held)) if held.heads else []
        if not self.lost:
            return out
        if held.heads is not None:
            self._told[sender] = {head.log: head.seq for head in held.heads}
        elif held.digest == self._digest():
            self._told[sender] = dict(self._held)
        return out + self._convalesce(voters, copies)

    def _convalesce(self, voters: Sequence[NodeId], copies: int) -> list[Output]:
        if not self.lost or not voters or not recovered(self.me, voters, copies, self._told, self._held):
            return []
        self.lost = ""
        self._told.clear()
        return [Recovered(), LedgerAlarm("this node's ledger is whole again: it holds all that may be acknowledged")]

    def _look(self, now: float, voters: Sequence[NodeId], copies: int) -> list[Output]:
        """Who holds the same as we do tells us nothing by itself: ask. A lone voter has nobody to wait for."""
        if not self.lost or now < self._look_again:
            return []
        self._look_again = now + ASK_AGAIN_S
        asked: list[Output] = [Send(peer, Held(0, self._digest())) for peer in self._links if peer not in self._told]
        return asked + self._convalesce(voters, copies)

    def _open_epoch(self, why: str) -> list[Output]:
        if not why:
            return []
        self.lost = why
        self._told.clear()
        if not self._rules.epoch_bump:
            self.rewind.suspended = False
            return [LedgerAlarm(why)]
        return [NewEpoch(next(self._tokens), why), LedgerAlarm(why)]

    def _on_damaged(self, spans: tuple[Span, ...], now: float) -> list[Output]:
        before, after = len(self.mending.damaged), len(spans)
        self.mending.found(spans, now)
        told: list[Output] = []
        if after > before:
            told = [
                LedgerAlarm(f"rot on this node's disk: {_entries(spans)} entries are fetched from the others again")
            ]
        elif before and not after:
            told = [LedgerAlarm("what had rotted on this node's disk is mended")]
        return told + self._ask(now)

    def _ask(self, now: float) -> list[Output]:
        asked = self.mending.ask(now)
        return [] if asked is None else [Send(asked[0], Want(asked[1]))]

    def _on_diverged(self, forks: tuple[Span, ...], missing: tuple[Span, ...], now: float) -> list[Output]:
        out: list[Output] = []
        for span in forks:
            token = next(self._tokens)
            self._reads[token] = None
            out.append(Read(token, (span,)))
        if missing and (missing != self._missing or now >= self._missing_due):  # each answer tells of it anew
            self._missing, self._missing_due = missing, now + ASK_AGAIN_S
            out += [Send(peer, Want(missing)) for peer in self._links]
        return out + self._open_epoch(self.rewind.on_fork({span.log: None for span in forks}))


def _entries(spans: Sequence[Span]) -> int:
    return sum(span.last - span.first + 1 for span in spans)
