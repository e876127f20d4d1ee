"""When is it durable, and may this coordinator serve? The W-copies rule and the recovery barrier.

Owns what each voter is known to hold in the current term, the appends that wait for copies, and the phases of a
coordinator's life. It never chooses what to append.

    Elected ─▶ recovering ──E voters' heads ⊆ mine──▶ opening ──term entry on W──▶ active ─▶ (Deposed) idle
                                                         Append(term)       Activated

    coordinator                          voter
    Appended ──Push(term, entries)──────▶ term < mine? answer Held(mine): fenced
             ◀─Held(term, heads)───────── Stored, then answer           (W copies → Durable)

Invariants. (1) `Durable` only when W voters, this one included, said in this term that they hold it on disk.
(2) W + E > N: whoever acknowledged shares a member with every later reporting majority, and a voter that has
answered in term T acknowledges nothing older, so what a majority reports in T includes every acknowledged entry. A new
coordinator therefore serves only after E voters' reported heads are all covered by its own (the recovery barrier).
(3) A coordinator's append of an older term is never counted.
Sources: flexible quorums (Howard et al., 2016); TigerBeetle docs/internals/vsr.md; Viewstamped Replication §4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..events import (
    Activated,
    Append,
    Appended,
    AppendFailed,
    CloseHub,
    Deposed,
    Durable,
    Elected,
    Event,
    Fact,
    HardStateSaved,
    LinkDown,
    LinkUp,
    Note,
    OpenHub,
    Output,
    Received,
    Record,
    Rules,
    Send,
    Store,
    Stored,
    Token,
)
from ..ids import LogId, NodeId, Term
from ..wire import Entry, Head, Heartbeat, Held, PeerMessage, Push
from .reconcile import Reconcile, lacking

Phase = Literal["idle", "recovering", "opening", "active"]

OPENING = "log.open"
"""The kind of a new log's first entry: `care` asked for it, nobody waits for its copies."""
UNACKED_MAX = 4096
"""Appends waiting for copies; beyond it, callers are refused upstream (the mailbox's tickets are fewer)."""


@cache
def copies_needed(voters: int) -> int:
    """W for N voters: W + E > N, and never a single copy where there is a second disk."""
    return 1 if voters <= 1 else max(2, voters - (voters // 2 + 1) + 1)


@dataclass(frozen=True, slots=True)
class Unacked:
    token: Token
    log: LogId
    seq: int
    facts: tuple[Fact, ...]


class Replicate:
    def __init__(
        self,
        me: NodeId,
        ledger: Reconcile,
        rules: Rules,
        leader: Callable[[], NodeId | None],
        tokens: Iterator[Token],
        config_stored: Callable[[], bool] = lambda: True,
        may_vote: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_vote`: `care`'s word; who may not promises no copies either, and counts none."""
        self.me = me
        self.phase: Phase = "idle"
        self._ledger = ledger
        self._rules = rules
        self._leader = leader
        self._tokens = tokens
        self._config_stored = config_stored
        self._may_vote = may_vote
        self._base: dict[LogId, int] = {}
        """What may have been acknowledged: our heads when we became active, and what we called durable since."""
        self._term: Term = 0
        self._led: Term = 0
        self._voters: tuple[NodeId, ...] = ()
        self._held: dict[NodeId, dict[LogId, int]] = {}
        """Voter → what it said, in the term we lead, that it holds."""
        self._lives: dict[NodeId, int] = {}
        """Voter → in which of its lives it said so: one that was put back since may have forgotten it."""
        self._said: dict[NodeId, tuple[Head, ...]] = {}
        """Voter → the heads it told last."""
        self._unpushed: list[Entry] = []
        """Appended, but not covered by a signature yet: no voter would take it."""
        self._unacked: list[Unacked] = []
        self._links: dict[NodeId, None] = {}
        self._pushed: dict[Token, tuple[NodeId, Term]] = {}
        self._opening: Token | None = None

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        return self.phase == "active"

    def copies(self, log: LogId, seq: int) -> int:
        """Voters known to hold entry `seq` of `log` durably, ourselves included. Only meaningful while leading."""
        mine = self._ledger.held.get(log, 0) >= seq
        others = [v for v in self._voters if v in self._held and self._held[v].get(log, 0) >= seq]
        return len(others) + (mine and self.me in self._voters and self.me not in others)

    def is_durable(self, log: LogId, seq: int) -> bool:
        wanted = copies_needed(len(self._voters)) if self._rules.enough_copies else 1
        if self.copies(log, seq) < wanted or not self._config_stored():
            return False
        self._base[log] = max(seq, self._base.get(log, 0))  # whoever asks may acknowledge it now
        return True

    def knows(self, voter: NodeId, held: Held) -> bool:
        """Did `voter` say so before, and is there no append that waits for what anybody says?"""
        return (
            self._said.get(voter) is self._ledger.heads()
            and held.heads is None
            and held.term == self._led
            and held.life == self._lives.get(voter)
            and held.digest == self._ledger.digest
            and self.phase == "active"
            and not self._unacked
        )

    def carries(self, node: NodeId) -> bool:
        """Did `node` say, in the term we lead, that it holds all that may have been acknowledged?"""
        held = self._ledger.held if node == self.me else self._held.get(node)
        return held is not None and all(held.get(log, 0) >= seq for log, seq in self._base.items())

    def carried(self, voters: tuple[NodeId, ...]) -> bool:
        """Do enough of `voters` for them to be the next ones?"""
        return sum(self.carries(v) for v in voters) >= copies_needed(len(voters))

    def change(self, voters: tuple[NodeId, ...]) -> None:
        """From now on copies are counted among `voters` (this term's coordinator has changed them)."""
        self._voters = voters

    @property
    def waiting(self) -> int:
        """Appends that wait for copies."""
        return len(self._unacked)

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float, term: Term) -> list[Output]:
        """Comes after election and reconcile have seen the same event; `term` is the election's."""
        self._term = term
        match event:
            case Received(sender, message):
                return self._receive(sender, message)
            case Appended(_, _, facts) if self.phase != "idle" and facts[-1].kind != OPENING:
                return self._on_appended(event)
            case AppendFailed(token) if token == self._opening:
                self.phase = "recovering"  # tried again when a voter answers the next heartbeat
                return []
            case HardStateSaved():
                return self._progress()
            case Stored(token):
                return self._on_stored(token, bool(event.facts)) + self._progress()
            case LinkUp(peer):
                self._links[peer] = None
                return []
            case LinkDown(peer):
                self._links.pop(peer, None)
                return []
            case _:
                return []

    def _receive(self, sender: NodeId, message: PeerMessage) -> list[Output]:
        match message:
            case Heartbeat(beat_term, theirs):
                return self._on_heartbeat(sender, beat_term, theirs)
            case Held():
                return self._on_held(sender, message)
            case Push(push_term, entries):
                return self._on_push(sender, push_term, entries)
            case _:
                return []

    def note(self, note: Note) -> list[Output]:
        match note:
            case Elected(term, voters):
                self._reset("recovering", term, voters)
                return self._progress()
            case Deposed():
                self._reset("idle", 0, ())
                return [CloseHub()]
            case _:
                return []

    # voter ---------------------------------------------------------------------------------------------------
    def _on_heartbeat(self, sender: NodeId, beat_term: Term, theirs: bytes) -> list[Output]:
        if not self._may_vote():
            return []
        same = theirs == self._ledger.digest and beat_term == self._term
        heads = None if same else self._ledger.heads()
        return [self._say(sender, self._answer_in(beat_term), heads)]

    def _on_push(self, sender: NodeId, push_term: Term, entries: tuple[Entry, ...]) -> list[Output]:
        if push_term < self._term and self._rules.term_fencing:
            return [self._say_held(sender, self._term)] if self._may_vote() else []
        token = next(self._tokens)
        self._pushed[token] = (sender, push_term)
        return [Store(token, entries)]

    def _on_stored(self, token: Token, grew: bool) -> list[Output]:
        pushed = self._pushed.pop(token, None)
        if not self._may_vote():
            return []
        if pushed is not None:
            sender, push_term = pushed
            return [self._say_held(sender, self._answer_in(push_term))]
        leader = self._leader()
        if grew and leader is not None and leader != self.me:
            return [self._say_held(leader, self._term)]
        return []

    def _answer_in(self, asked: Term) -> Term:
        """The fence: whoever asks in an older term learns of the newer one, and counts nothing."""
        return self._term if self._rules.term_fencing else asked

    def _say_held(self, to: NodeId, term: Term) -> Send:
        return self._say(to, term, self._ledger.heads())

    def _say(self, to: NodeId, term: Term, heads: tuple[Head, ...] | None) -> Send:
        ledger = self._ledger
        return Send(to, Held(term, ledger.digest, heads, ledger.config(), ledger.life))

    # coordinator ---------------------------------------------------------------------------------------------
    def _on_held(self, sender: NodeId, held: Held) -> list[Output]:
        if self.phase == "idle" or held.term != self._led:
            return []
        known = self._lives.setdefault(sender, held.life)
        if held.life < known:
            return []  # late: it may have forgotten since
        if held.life > known:
            self._lives[sender] = held.life
            self._held.pop(sender, None)
            self._said.pop(sender, None)
        if held.heads is not None:
            self._learn(sender, held.heads)
        elif held.digest == self._ledger.digest:
            self._learn(sender, self._ledger.heads())
        return self._progress()

    def _learn(self, voter: NodeId, heads: tuple[Head, ...]) -> None:
        """Messages may overtake each other: what a voter once said in this life it holds, it holds."""
        said = self._said.get(voter)
        if heads == self._ledger.heads():
            heads = self._ledger.heads()  # the very same: `knows` need not compare them again
        self._said[voter] = heads
        if said == heads:
            return
        known = self._held.setdefault(voter, {})
        for origin, epoch, seq in heads:
            log = LogId(origin, epoch)
            known[log] = max(seq, known.get(log, 0))

    def _on_appended(self, appended: Appended) -> list[Output]:
        last = appended.facts[-1]
        self._unacked.append(Unacked(appended.token, last.log, last.seq, appended.facts))
        self._unpushed += appended.entries
        if not appended.entries[-1].signature:
            return self._progress()  # the rest of its commit group follows, signed at the end
        push = Push(self._led, tuple(self._unpushed))
        self._unpushed.clear()
        return [*(Send(peer, push) for peer in self._links), *self._progress()]

    def _progress(self) -> list[Output]:
        """Whatever the newest knowledge allows: open the term, become active, call appends durable."""
        if self.phase == "idle" or not self._may_vote():
            return []
        if self.phase == "recovering":
            return self._open() if self._recovered() or not self._rules.recovery_barrier else []
        if not self._unacked:
            return []
        out: list[Output] = []
        for unacked in self._ready():
            if unacked.token == self._opening:
                self.phase = "active"
                self._base = dict(self._ledger.held)
                out += [Activated(self._led), OpenHub(self._led)]
            self._base[unacked.log] = max(unacked.seq, self._base.get(unacked.log, 0))
            out.append(Durable(unacked.token, unacked.facts, self.copies(unacked.log, unacked.seq)))
        return out

    def _ready(self) -> list[Unacked]:
        """Takes what is durable now off `_unacked`. Behind an entry that is not, no later one of its log can be."""
        ready: list[Unacked] = []
        waiting: list[Unacked] = []
        for unacked in self._unacked:
            behind = bool(waiting) and waiting[-1].log == unacked.log
            (waiting if behind or not self.is_durable(unacked.log, unacked.seq) else ready).append(unacked)
        self._unacked = waiting
        return ready

    def _recovered(self) -> bool:
        """E voters, ourselves included, reported heads in this term, and we hold all of them."""
        mine = self._ledger.held
        covered = sum(
            v == self.me
            or (v in self._held and not lacking(mine, [Head(*log, seq) for log, seq in self._held[v].items()]))
            for v in self._voters
        )
        return covered >= len(self._voters) // 2 + 1

    def _open(self) -> list[Output]:
        self.phase = "opening"
        self._opening = next(self._tokens)
        body = {"term": self._led, "coordinator": self.me, "voters": list(self._voters)}
        return [Append(self._opening, (Record("term", body, self._led),))]

    def _reset(self, phase: Phase, term: Term, voters: tuple[NodeId, ...]) -> None:
        self.phase, self._led, self._voters = phase, term, voters
        self._held, self._said, self._lives, self._base = {}, {}, {}, {}
        self._unacked, self._unpushed, self._opening = [], [], None
