"""A disk that forgets what was not synced: one node's ledger (the real SQL, in memory) and its hard state.

    write ─▶ queue ──sync begins──▶ group ──its drawn time later: land──▶ events         (group commit, as the writer's)

Writes land in order; a crash loses the queue, and of the group under way only a drawn prefix landed, unanswered: a torn
write. A disk may also stall, or refuse for a while; then each write is answered as the daemon's hands answer it.

Lies (ablations) are the absence of one rule of this layer: `vote-fsync` and `ack-fsync` answer before the write has
landed, `contiguity` reports a log's highest seq seen as its end, gap or no gap, `epoch-bump` goes on in its old log
after it was put back.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from ..errors import Unavailable, UserError
from ..events import (
    AddCheckpoint,
    Append,
    Appended,
    AppendFailed,
    Damaged,
    DiskProbed,
    Diverged,
    Fact,
    Forget,
    Forgot,
    HardState,
    HardStateSaved,
    NewEpoch,
    ProbeDisk,
    Recovered,
    SaveHardState,
    Store,
    Stored,
)
from ..folding import MEANING
from ..ids import LogId, node_id
from ..ledger import prune, rows, scrub, store
from ..ledger.entry import CHECKPOINT, decode_header
from ..wire import Dropped, Entry, Head, Span
from .keys import SimKey, verify

Write = Append | Store | SaveHardState | NewEpoch | AddCheckpoint | Forget | Recovered | ProbeDisk
Outcome = Appended | AppendFailed | Stored | HardStateSaved | Forgot | Damaged | Diverged | DiskProbed

Refused = Append | AddCheckpoint | Store | Forget | ProbeDisk
REFUSED = (Append, AddCheckpoint, Store, Forget, ProbeDisk)
"""What a failing disk is told of; the rest is tried again until it is written."""
ALL = 1_000_000_000
"""More bytes and entries than a rehearsed ledger has."""
FASTEST_S = 0.0005
STALL_MAX_S = 10.0
"""The longest fsync seen on SD cards is 7.45 s (k3s#2853)."""
NO_SPACE = "no space left on device"
YEAR_2026_MS = 1_767_225_600_000


class Cached(NamedTuple):
    """A disk's state that exists in its cache only, and the facts that are new in it."""

    heads: tuple[Head, ...]
    hard: HardState
    facts: tuple[Fact, ...]


class Image(NamedTuple):
    """A copy of a card's ledger. The vote is elsewhere."""

    conn: sqlite3.Connection
    log: LogId


class Disk:
    def __init__(
        self,
        key: SimKey,
        name: str,
        rng: Random,
        slow: float,
        lies: tuple[str, ...] = (),
        hard: HardState | None = None,
    ) -> None:
        """`slow`: seconds the longest fsync takes."""
        self.key = key
        self.name = name
        self.hard = hard or HardState()
        self.conn = store.open_database(":memory:")
        self._epochs = itertools.count(1)
        """The daemon draws them at random: an image that was put back does not know which were used."""
        self.node = node_id(key.public_key)
        self.log: LogId = store.open_log(self.conn, key, name, next(self._epochs), YEAR_2026_MS)
        self.lost = ""
        """The note beside the ledger: why it may lack what it acknowledged."""
        self.votes_lost = ""
        """The note beside the votes: this node may have voted and does not know for whom."""
        self.queue: list[Write] = []
        self.group: list[Write] = []
        """What the sync under way will make durable."""
        self.landed: list[Fact] = []
        """Facts that are new on this disk; whoever watches takes them away."""
        self.wall_offset_ms = 0
        self.stalled_until = 0.0
        self.failing_until = 0.0
        self._lies = lies
        self._rng = rng
        self._slow = slow
        self._synced: tuple[Head, ...] = store.heads(self.conn)
        self._synced_hard = self.hard
        self._sound = True
        """Nothing is in quarantine, as far as was looked since something could have come there: nobody need look."""

    def steady(self) -> None:
        """From now on an fsync takes FASTEST_S."""
        self._slow = FASTEST_S

    # syncing -------------------------------------------------------------------------------------------------
    def begin_sync(self, now: float) -> float:
        """What waits becomes the group under way; seconds until it lands."""
        self.group, self.queue = self.queue, []
        return max(self.stalled_until - now, 0.0) + self._rng.uniform(FASTEST_S, self._slow)

    def land(self, now: float) -> list[Outcome]:
        """The group is on disk now, or refused; the answers in order. A vote that is refused is tried again."""
        group, self.group = self.group, []
        if now < self.failing_until:
            self.queue = [write for write in group if not isinstance(write, REFUSED)] + self.queue
            return [_refusal(write) for write in group if isinstance(write, REFUSED)]
        return self._perform(group, now)

    def _perform(self, group: list[Write], now: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for kind, writes in itertools.groupby(group, type):
            if kind is Append:
                outcomes += self._append([w for w in writes if isinstance(w, Append)], now)
            else:
                outcomes += [outcome for w in writes if not isinstance(w, Append) for outcome in self._one(w, now)]
        return outcomes

    def _append(self, writes: list[Append], now: float) -> list[Outcome]:
        """Appends that wait together are one transaction with one signature, as the ledger's writer makes them."""
        records = [record for write in writes for record in write.records]
        try:
            entries, facts = store.append(self.conn, self.log, records, self.key, self._wall_ms(now))
        except Unavailable as closed:  # by a fork: a new log is on its way
            return [AppendFailed(write.token, str(closed)) for write in writes]
        self.landed += facts
        outcomes: list[Outcome] = []
        at = 0
        for write in writes:
            share = slice(at, at + len(write.records))
            outcomes.append(Appended(write.token, entries[share], facts[share]))
            at = share.stop
        return outcomes

    def _wall_ms(self, now: float) -> int:
        return max(0, YEAR_2026_MS + int(now * 1000) + self.wall_offset_ms)

    def _one(
        self, write: Store | SaveHardState | NewEpoch | AddCheckpoint | Forget | Recovered | ProbeDisk, now: float
    ) -> list[Outcome]:
        match write:
            case SaveHardState(token, state):
                self.hard = state
                return [HardStateSaved(token)]
            case NewEpoch(token, why):
                self.lost = why
                return [Appended(token, *self.open_epoch())]
            case Recovered():
                self.lost = ""
                return []
            case ProbeDisk(token):
                return [DiskProbed(token, "")]
            case AddCheckpoint():
                return [self._add_checkpoint(write, now)]
            case Forget():
                return self._forget(write)
            case Store():
                return self._store(write)

    def _add_checkpoint(self, write: AddCheckpoint, now: float) -> Outcome:
        try:
            made = prune.make_plan(self.conn, write.log, write.upto, write.least, MEANING)
            made_at = self._wall_ms(now)
            entries, facts = prune.add_checkpoint(self.conn, write.log, made, self.key, self.name, made_at)
        except (UserError, Unavailable) as fault:
            return AppendFailed(write.token, str(fault), disk=False)
        self.landed += facts
        return Appended(write.token, entries, facts)

    def _forget(self, write: Forget) -> list[Outcome]:
        before = self.damaged()
        try:
            more = prune.prune(self.conn, write.log, write.checkpoint, write.level)
        except UserError as fault:
            return [Forgot(write.token, False, str(fault))]
        now = self.damaged() if before else ()
        outcomes: list[Outcome] = [Forgot(write.token, more)]
        return outcomes if now == before else [*outcomes, Damaged(now)]

    def _store(self, write: Store) -> list[Outcome]:
        before = () if self._sound else self.damaged()
        applied = store.apply(self.conn, write.entries, verify, write.resets)
        self._sound = self._sound and not applied.dropped  # whoever sends another branch makes it look at its own
        self.landed += [fact for fact in self._on_rows(applied.facts) if not _mends(fact, before)]
        heads = _highest(write, applied.heads) if "contiguity" in self._lies else applied.heads
        outcomes: list[Outcome] = [Stored(write.token, applied.facts, heads, applied.dropped)]
        if applied.forks or applied.missing:
            outcomes.append(Diverged(applied.forks, applied.missing))
        now = self.damaged() if before else ()
        return outcomes if now == before else [*outcomes, Damaged(now)]

    def _on_rows(self, facts: tuple[Fact, ...]) -> Iterable[Fact]:
        """Without those that a checkpoint carries on: they come from its payload. Two branches have one number each."""
        if not any(fact.kind == CHECKPOINT for fact in facts):
            return facts
        logs = rows.logs(self.conn)
        begins = {log: rows.begins(self.conn, row) for log, row in logs.items()}
        return {(fact.log, fact.seq, fact.hlc): fact for fact in facts if fact.seq >= begins[fact.log]}.values()

    def open_epoch(self) -> tuple[tuple[Entry, ...], tuple[Fact, ...]]:
        self.log = store.open_log(self.conn, self.key, self.name, next(self._epochs), YEAR_2026_MS)
        return store.opening(self.conn, self.log)

    def damaged(self) -> tuple[Span, ...]:
        found = scrub.damaged(self.conn)
        self._sound = not found
        return found

    # lying ---------------------------------------------------------------------------------------------------
    def lies_about(self, write: Write) -> bool:
        """Is `write` answered before it has landed? (An ablation.)"""
        return ("vote-fsync" if isinstance(write, SaveHardState) else "ack-fsync") in self._lies

    def answer_early(self, write: Write, now: float) -> tuple[list[Outcome], Cached]:
        """The answers, and what a power cut undoes until `settle` is given it."""
        known, self.landed = self.landed, []
        outcomes = self._perform([write], now)
        cached = Cached(store.heads(self.conn), self.hard, tuple(self.landed))
        self.landed = known
        return outcomes, cached

    def settle(self, cached: Cached) -> None:
        """What was answered early is on disk now."""
        self._synced, self._synced_hard = cached.heads, cached.hard
        self.landed += cached.facts

    # losing --------------------------------------------------------------------------------------------------
    def crash(self, now: float) -> None:
        """Power is gone: the queue is lost, and of the group only a prefix landed."""
        torn = self._rng.randrange(len(self.group) + 1) if now >= self.failing_until else 0
        self._perform(self.group[:torn], now)
        self.queue, self.group = [], []
        if "ack-fsync" in self._lies:
            self.rewind(self._synced)
        if "vote-fsync" in self._lies:
            self.hard = self._synced_hard

    def rewind(self, heads: tuple[Head, ...]) -> None:
        """The ledger as it was when it ended at `heads`; of what was pruned since, as the checkpoint has it."""
        spans = [Span(*head.log, 1, head.seq) for head in heads]
        entries = store.read(self.conn, spans, ALL, ALL)
        self.conn.close()
        self.conn = store.open_database(":memory:")
        store.apply(self.conn, entries, verify, resets=True)
        store.open_log(self.conn, self.key, self.name, self.log.epoch, YEAR_2026_MS)
        self._synced = store.heads(self.conn)

    def forget_votes(self) -> None:
        """Both copies are gone. `voted` beside the identity says that there were some (`cluster.hardstate`)."""
        self.hard = self._synced_hard = HardState()
        self.votes_lost = "both copies are gone"

    def put_back(self, heads: tuple[Head, ...]) -> None:
        """`picluster restore` of an image that ended at `heads`: noted as such, and a new log is opened."""
        held = {head.log for head in store.heads(self.conn)}
        self.log = max(head.log for head in heads if head.origin == self.node and head.log in held)
        self.rewind(heads)
        self.lost = "put back"
        if "epoch-bump" not in self._lies:
            self.open_epoch()

    def image(self) -> Image:
        """A copy of the ledger as it is now."""
        copy = store.open_database(":memory:")
        self.conn.backup(copy)
        return Image(copy, self.log)

    def swap(self, other: Image) -> Image:
        """Put the other card in, without a word; the one that was there."""
        mine = Image(self.conn, self.log)
        self.conn, self.log = other
        self._sound = False
        self._synced = store.heads(self.conn)
        return mine

    def rot(self, other: Disk) -> tuple[Span, ...]:
        """One bit of a payload that `other` holds too flips, and the scrub comes by; all that is damaged then."""
        head = self._rng.choice(store.heads(other.conn))
        row = rows.logs(self.conn).get(head.log)
        place = 0 if row is None else row.first + self._rng.randint(1, head.seq)
        sql = "SELECT payload FROM entries WHERE id = ? AND length(payload) > 0"
        for (payload,) in self.conn.execute(sql, (place,)).fetchall():
            spoilt = bytes([payload[0] ^ 1 << self._rng.randrange(8)]) + payload[1:]
            self.conn.execute("UPDATE entries SET payload = ? WHERE id = ?", (spoilt, place))
        scrub.scrub(self.conn, 0, verify, ALL)
        return self.damaged()

    def close(self) -> None:
        self.conn.close()


def _mends(fact: Fact, damaged: tuple[Span, ...]) -> bool:
    return any(span.log == fact.log and span.first <= fact.seq <= span.last for span in damaged)


def _refusal(write: Refused) -> Outcome:
    """No space, or an fsync that failed, in the words of the daemon's hands."""
    if isinstance(write, Append | AddCheckpoint):
        return AppendFailed(write.token, NO_SPACE)
    if isinstance(write, Forget):
        return Forgot(write.token, False, NO_SPACE)
    if isinstance(write, ProbeDisk):
        return DiskProbed(write.token, NO_SPACE)
    return Stored(write.token, (), (), (Dropped(NO_SPACE),), NO_SPACE)


def _highest(write: Store, heads: tuple[Head, ...]) -> tuple[Head, ...]:
    """The ends of the logs as a store would tell them that does not look for gaps."""
    ends = {head.log: head.seq for head in heads}
    for entry in write.entries:
        header = decode_header(entry.header)
        assert not isinstance(header, Dropped)
        ends[header.log] = max(header.seq, ends.get(header.log, 0))
    return tuple(Head(*log, seq) for log, seq in sorted(ends.items()))
