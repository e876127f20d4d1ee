"""When this node ends what is closed of its own log, and when it forgets what a checkpoint has replaced.

    own entries since the last checkpoint >= entries, the oldest older than bodies_s ─▶ AddCheckpoint ─▶ Appended
    every member that has not lapsed holds a checkpoint ─┬ older than bodies_s ─▶ Forget(bodies) ─▶ Forgot … no more
    (Held, or a Ping with our own digest)                └ older than rows_s ───▶ Forget(rows)   ─▶ Forgot …

Owns what each node told last that it holds, and since when who is silent. It looks every CHECK_S, in memory: an idle
node writes nothing. Each node decides for its own disk; nobody ends another's log, so the rows of an origin that is
gone for good stay, and so do those of an own log that was given up (it is never appended to again; see `rewind`).

Invariants. Nothing is forgotten that a retained member lacks: members listed, voters and origins of logs are retained
until they were silent for lapse_s of this node's uptime. A majority of the voters is always among the retained, so that
whoever is elected has met one of them before it serves, and holds the checkpoint. A node that may have forgotten
something neither ends nor forgets anything; one with rot ends nothing, as what rotted may be open; nor does one before
it heard of a majority of the voters since it started, who would tell an older image that its log goes on. One request
of a kind is with the disk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .. import config
from ..events import (
    AddCheckpoint,
    Appended,
    AppendFailed,
    DeadlineReached,
    Event,
    Fact,
    Forget,
    Forgot,
    Output,
    Received,
    Rules,
    Token,
)
from ..ids import LogId, NodeId
from ..wire import Ack, Head, Held, Ping
from .entry import CHECKPOINT, HLC_COUNTER_BITS
from .frontier import DAY_S, GAP_S, LedgerTime, frontier

CHECK_S = 60.0
"""Between two looks: what is looked at moves by days."""
PUT_OFF_CHECKS = 10
"""Looks to let pass before a checkpoint, or what the disk refused, is tried again: what is open must close first."""

RECENT_PART = 16
"""Of the entries that make a checkpoint: the newest 256 by default are kept, so that pages still show the last runs.
Where they do not fit one entry, the next try goes without."""

Level = Literal["bodies", "rows"]


@dataclass(frozen=True, slots=True)
class Retention:
    """Seconds are of the ledger's own time (`frontier.LedgerTime`), but for `lapse_s`: of uptime."""

    entries: int = 4096
    bodies_s: float = 14 * DAY_S
    rows_s: float = 30 * DAY_S
    lapse_s: float = 30 * DAY_S
    check_s: float = CHECK_S
    gap_s: float = GAP_S

    @classmethod
    def of(cls, keep: config.Ledger) -> Retention:
        bodies_s, rows_s, lapse_s = (d * DAY_S for d in (keep.keep_bodies_days, keep.keep_rows_days, keep.lapse_days))
        return cls(keep.checkpoint_entries, bodies_s, rows_s, lapse_s)


class Company(NamedTuple):
    """Whom pruning has to do with, without us. `here`: who is alive or only suspected; `listed`: every member, and when
    it spoke to us last."""

    here: Callable[[], Iterable[NodeId]]
    listed: Callable[[], Mapping[NodeId, float]]
    voters: Callable[[], tuple[NodeId, ...]]


class Ours(NamedTuple):
    """This node's ledger: reconcile's looks, and the log it appends to. `whole`: it has forgotten nothing that it
    acknowledged; `damaged`: there is rot in it."""

    held: Mapping[LogId, int]
    heads: Callable[[], tuple[Head, ...]]
    digest: Callable[[], bytes]
    log: Callable[[], LogId | None]
    whole: Callable[[], bool]
    damaged: Callable[[], bool]


class Pruning:
    def __init__(
        self,
        me: NodeId,
        keep: Retention,
        ours: Ours,
        company: Company,
        tokens: Iterator[Token],
        rules: Rules,
        now: float,
        ledger: Iterable[Fact] = (),
    ) -> None:
        self.me = me
        self._keep, self._ours, self._company = keep, ours, company
        self._tokens = tokens
        self._rules = rules
        self._due = now + keep.check_s
        self._told: dict[NodeId, tuple[Head, ...]] = {}
        self._heard: dict[NodeId, float] = {}
        """Node → when it was here last, as far as this life of ours knows."""
        self._elapsed = 0.0
        """The ledger's time: as `LedgerTime`, but grown entry by entry."""
        self._newest = 0
        self._since: dict[LogId, float] = {}
        """Log → its time at the last checkpoint, or at the first entry told."""
        self._last: dict[LogId, int] = {}
        """Log → seq of the last checkpoint."""
        self._waiting: dict[LogId, dict[int, float]] = {}
        """Log → seq and time of each checkpoint whose rows are not forgotten yet."""
        self._bodiless: dict[LogId, int] = {}
        """Log → the checkpoint up to which bodies are forgotten, in this life of ours."""
        self._adding: Token | None = None
        self._add_after = now
        self._recent = keep.entries // RECENT_PART
        """The newest entries, which the next checkpoint keeps as they are."""
        self._forgetting: Forget | None = None
        self._put_off: dict[LogId, float] = {}
        self._replay(ledger)

    def deadline(self) -> float:
        return self._due

    def said(self, node: NodeId, places: Iterable[tuple[LogId, int]]) -> bool:
        """Did `node` tell that it holds the entries at these (log, seq)?"""
        told = {head.log: head.seq for head in self._told.get(node, ())}
        return all(told.get(log, 0) >= seq for log, seq in places)

    # what is told --------------------------------------------------------------------------------------------
    def _replay(self, ledger: Iterable[Fact]) -> None:
        """What the disk tells at the start comes log by log, not in order of time."""
        facts = list(ledger)
        time = LedgerTime([fact.hlc for fact in facts], self._keep.gap_s)
        for fact in facts:
            self._note(fact, time.elapsed - time.age(fact.hlc))
        self._elapsed, self._newest = time.elapsed, max((fact.hlc for fact in facts), default=0)

    def grew(self, facts: Iterable[Fact]) -> None:
        """New entries are durable here. What arrives late is taken to be as young as it may be."""
        for fact in facts:
            if fact.hlc > self._newest:
                gap = (fact.hlc - self._newest >> HLC_COUNTER_BITS) / 1000
                self._elapsed += min(gap, self._keep.gap_s)
                self._newest = fact.hlc
            self._note(fact, self._elapsed)

    def _note(self, fact: Fact, at: float) -> None:
        self._since.setdefault(fact.log, at)
        if fact.kind == CHECKPOINT and fact.seq > self._last.get(fact.log, 0):
            self._last[fact.log], self._since[fact.log] = fact.seq, at
            self._waiting.setdefault(fact.log, {})[fact.seq] = at

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case Received(sender, Ping() | Ack() as message):
                self._told_digest(sender, message.digest)
                return []
            case Received(sender, Held(_, digest, None)):
                self._told_digest(sender, digest)
                return []
            case Received(sender, Held(_, _, heads)) if heads is not None:
                self._told[sender] = heads
                return []
            case Appended(token) if token == self._adding:
                self._adding, self._recent = None, self._keep.entries // RECENT_PART
                return []
            case AppendFailed(token) if token == self._adding:
                self._adding = None
                return []
            case Forgot():
                return self._forgot(event, now)
            case DeadlineReached():
                return self._look(now)
            case _:
                return []

    def _told_digest(self, sender: NodeId, digest: bytes) -> None:
        if digest == self._ours.digest():
            self._told[sender] = self._ours.heads()

    # looking -------------------------------------------------------------------------------------------------
    def _look(self, now: float) -> list[Output]:
        if now < self._due:
            return []
        self._heard |= dict.fromkeys(self._company.here(), now)
        self._due = now + self._keep.check_s
        if not self._ours.whole():
            return []
        return [*self._end(now), *self._forget(now)]

    def _end(self, now: float) -> list[Output]:
        """A checkpoint of our own log, where enough of it is old enough."""
        log = self._ours.log()
        if log is None or self._ours.damaged() or self._adding is not None or now < self._add_after:
            return []
        if not self._has_heard():
            return []
        upto = self._ours.held.get(log, 0)
        young = self._elapsed - self._since.get(log, self._elapsed) < self._keep.bodies_s
        if young or upto - self._last.get(log, 0) < self._keep.entries:
            return []
        self._add_after = now + PUT_OFF_CHECKS * self._keep.check_s
        self._adding = next(self._tokens)
        recent, self._recent = self._recent, 0 if self._recent else self._keep.entries // RECENT_PART
        return [AddCheckpoint(self._adding, log, upto - recent, self._keep.entries // 2)]

    def _has_heard(self) -> bool:
        """Did a majority of the voters say in this life what they hold? Else our log may go on elsewhere (`rewind`)."""
        voters = self._company.voters()
        return sum(voter == self.me or voter in self._told for voter in voters) > len(voters) // 2

    def _forget(self, now: float) -> list[Output]:
        """The next slice of what may go, if there is any."""
        if self._forgetting is None:
            heads, retained = self._retained(now)
            stable = frontier(heads, retained) if any(self._waiting.values()) else {}
            self._forgetting = next((f for log in sorted(self._waiting) for f in self._ripe(log, stable, now)), None)
            return [] if self._forgetting is None else [self._forgetting]
        return []

    def _ripe(self, log: LogId, stable: Mapping[LogId, int], now: float) -> Iterator[Forget]:
        if now < self._put_off.get(log, now):
            return
        ages = {seq: self._elapsed - at for seq, at in self._waiting[log].items() if seq <= stable.get(log, 0)}
        bodies_s = self._keep.bodies_s
        rows = max((seq for seq, age in ages.items() if age >= max(self._keep.rows_s, bodies_s)), default=0)
        bodies = max((seq for seq, age in ages.items() if age >= bodies_s), default=0)
        if rows:
            yield Forget(next(self._tokens), log, rows, "rows")
        elif bodies > self._bodiless.get(log, 0):
            yield Forget(next(self._tokens), log, bodies, "bodies")

    def _retained(self, now: float) -> tuple[dict[NodeId, Mapping[LogId, int]], list[NodeId]]:
        """What each retained node holds, as far as it said, and who they are; nobody while too few voters are."""
        here, voters = dict.fromkeys(self._company.here()), self._company.voters()
        origins = (log.origin for log in sorted(self._ours.held))
        spoke = self._company.listed()
        known = dict.fromkeys((*voters, *sorted(spoke), *origins))
        known.pop(self.me, None)
        retained = [self.me, *(n for n in known if n in here or not self._lapsed(n, spoke.get(n, 0.0), now))]
        heads: dict[NodeId, Mapping[LogId, int]] = {self.me: self._ours.held}
        heads |= {node: {head.log: head.seq for head in self._told[node]} for node in retained if node in self._told}
        enough = sum(voter in retained for voter in voters) > len(voters) // 2
        return heads, retained if enough else []

    def _lapsed(self, node: NodeId, spoke: float, now: float) -> bool:
        silent = now - max(self._heard.setdefault(node, now), spoke)
        return silent >= self._keep.lapse_s or not self._rules.prune_lapse

    def _forgot(self, forgot: Forgot, now: float) -> list[Output]:
        done = self._forgetting
        if done is None or forgot.token != done.token:
            return []
        if forgot.more:
            self._forgetting = Forget(next(self._tokens), done.log, done.checkpoint, done.level)
            return [self._forgetting]
        self._forgetting = None
        if forgot.why:
            self._put_off[done.log] = now + PUT_OFF_CHECKS * self._keep.check_s
            return []
        self._bodiless[done.log] = max(done.checkpoint, self._bodiless.get(done.log, 0))
        if done.level == "rows":
            left = {seq: at for seq, at in self._waiting[done.log].items() if seq > done.checkpoint}
            self._waiting[done.log] = left
        return self._forget(now)
