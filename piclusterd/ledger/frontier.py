"""What may be forgotten: how far everybody holds each log, and which entries a checkpoint must carry on.

    heads of every node in the retention set ─min─▶ frontier      checkpoint at c prunable ⟺ frontier[log] >= c
    facts ─▶ plan ─▶ keep: those before the checkpoint that still mean something; seen: digests of what it lets go

Safety. A checkpoint drops what is *closed*, and a closed subject (a run) only when none of its opening entries (the
webhook) outlives it: else a node that replays the ledger would meet the webhook without its `run.done` and do the work
once more. So a `done` in one log stays for as long as the webhook stands in another *on this disk*, that is until every
retained node holds the checkpoint that ended the webhook. Kinds that this release does not know are always kept. The
frontier holds back for every member that has not lapsed, however long it is away; whoever comes back after that gets
checkpoint and tail, and the fold learns from the checkpoint itself what ended meanwhile (`workflows.journal`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..events import Fact
from ..ids import LogId, NodeId
from .checkpoint import SEEN_TOTAL_MAX, Seen, seen_groups
from .entry import CHECKPOINT, HLC_COUNTER_BITS

DAY_S = 24 * 3600.0
GAP_S = DAY_S
"""The longest pause between two entries that counts as time: a clock that jumps by 60 days ages the ledger by one."""
SEEN_S = 30 * DAY_S
"""A redelivered webhook is known again for this long: the hub keeps one for 14 days and revives a dead letter for 14
more; GitHub redelivers by hand for 3 days, Notion and Linear for one. In the ledger's own time, so never shorter."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a checkpoint must know of facts; the ledger itself knows nothing of runs (see `folding`)."""

    subject: Callable[[Fact], str | None]
    """What a fact is about: the id of a run; "" where it means nothing once it is old; None where its kind is new."""
    opens: Callable[[Fact], bool]
    """Does it begin its subject?"""
    ends: Callable[[Fact], bool]
    """Does it end its subject?"""
    reopens: Callable[[Fact], bool]
    """Does it open its subject again, where it is newer than what ended it?"""
    key: Callable[[Fact], bytes | None]
    """Digest by which a redelivery of what the fact says is known again; None where there is no such thing."""


class Plan(NamedTuple):
    """A checkpoint to be made: what of the log up to `upto` it keeps, and what is remembered of the rest."""

    upto: int
    keep: tuple[int, ...]
    seen: tuple[Seen, ...]
    replaced: int
    """Entries it lets go."""


class _Trace(NamedTuple):
    """What a plan needs of a fact of the log it is made for."""

    about: str | None
    opens: bool
    key: bytes | None


class LedgerTime:
    """Seconds as the ledger's entries tell them, in order of their hybrid clocks; no gap counts for more than `gap_s`.

    A restart loses nothing of it, and a board without a clock battery cannot make entries old: it only lags real time.
    """

    def __init__(self, hlcs: Iterable[int], gap_s: float = GAP_S) -> None:
        self._at = sorted({hlc >> HLC_COUNTER_BITS for hlc in hlcs})
        self._elapsed = [0.0, *accumulate(min((b - a) / 1000, gap_s) for a, b in pairwise(self._at))]

    @property
    def elapsed(self) -> float:
        """Between the oldest entry and the newest."""
        return self._elapsed[-1]

    def age(self, hlc: int) -> float:
        """How long before the newest entry `hlc` was."""
        at = bisect_right(self._at, hlc >> HLC_COUNTER_BITS)
        return self.elapsed - self._elapsed[max(at - 1, 0)]


def frontier(heads: Mapping[NodeId, Mapping[LogId, int]], retention: Sequence[NodeId]) -> dict[LogId, int]:
    """Per log, how many entries every node of `retention` holds durably. Nothing where one has not said."""
    if not retention or any(node not in heads for node in retention):
        return {}
    first, *others = retention
    return {
        log: stable
        for log in sorted(heads[first])
        if (stable := min(heads[node].get(log, 0) for node in (first, *others))) > 0
    }


def plan(facts: Iterable[Fact], log: LogId, upto: int, meaning: Meaning) -> Plan:
    """What a checkpoint of `log` after seq `upto` keeps, given all that the ledger tells (`store.facts`)."""
    before: dict[int, _Trace] = {}
    outlived: dict[str | None, None] = {}
    turned: dict[str | None, tuple[tuple[int, LogId, int], bool]] = {}
    """Subject → the newest entry that ended it or opened it again, and which of the two it was."""
    hlcs: list[int] = []
    carried: list[Seen] = []
    newest = 0
    for fact in facts:
        hlcs.append(fact.hlc)
        trace = _Trace(meaning.subject(fact), meaning.opens(fact), meaning.key(fact))
        if (ends := meaning.ends(fact)) or meaning.reopens(fact):
            turn = (fact.order, ends)
            turned[trace.about] = max(turn, turned.get(trace.about, turn))
        if fact.log == log and fact.seq <= upto:
            before[fact.seq] = trace
            newest = max(newest, fact.hlc)
            carried = list(seen_groups(fact)) if fact.kind == CHECKPOINT else carried
        elif trace.opens:
            outlived[trace.about] = None
    standing = outlived | {trace.about: None for trace in before.values() if trace.opens}

    def kept(trace: _Trace) -> bool:
        is_open = trace.about in standing and not (trace.about in turned and turned[trace.about][1])
        return trace.about is None or (trace.about != "" and (is_open or (trace.about in outlived and not trace.opens)))

    keep = tuple(seq for seq, trace in before.items() if kept(trace))
    gone = [trace.key for trace in before.values() if trace.key is not None and not kept(trace)]
    seen = _remembered(Seen(newest, b"".join(gone)[-SEEN_TOTAL_MAX:]), carried, LedgerTime(hlcs))
    return Plan(upto, keep, seen, len(before) - len(keep))


def _remembered(new: Seen, carried: Sequence[Seen], time: LedgerTime) -> tuple[Seen, ...]:
    """The newest groups that are young enough and fit, and one without digests up to where others were forgotten."""
    groups: list[Seen] = []
    room, aged = SEEN_TOTAL_MAX, 0
    for group in (*([new] if new.digests else ()), *sorted(carried, reverse=True)):
        if group.digests and time.age(group.hlc) < SEEN_S and len(group.digests) <= room:
            groups.append(group)
            room -= len(group.digests)
        else:
            aged = max(aged, group.hlc)
    return (*([Seen(aged, b"")] if aged else ()), *sorted(groups))
