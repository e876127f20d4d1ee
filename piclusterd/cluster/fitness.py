"""Is this board fit to lead, and how slow is its disk? What speaks against it, measured on itself.

    Append, SaveHardState ─▶ wrote ─┐ bracket ─▶ how long it took ─▶ stretch of the election timeout
    Appended, HardStateSaved … ◀────┘        └─▶ over `stall_s` and no answer ─▶ disk trouble
    AppendFailed, Stored(refused) ──────────────────────────────────────────────▶ disk trouble
    disk trouble ── every PROBE_S ─▶ ProbeDisk ─▶ DiskProbed: room again, and a write that lands ─▶ none
    FactsChanged(flags) ── for BOARD_S without a gap ─▶ board trouble

Owns these measurements and nothing else: `handover` decides what they mean for leadership, `election` asks `stretch`
and whether there is trouble. Nothing here is durable: a node that restarts measures anew.

Stretch. A candidate needs its own vote on disk, and so do its voters; where that takes longer than the election
timeout, it begins another term before the first was decided, for ever. So the timeout of a node is multiplied by

    stretch = min(STRETCH_MAX, max(1, FSYNCS_PER_ELECTION x slowest write / election_min_s))

with the slowest write of late, which counts half as much every HALF_LIFE_S. SD cards stall for up to 7.45 s (k3s#2853)
and take some 95 ms on average; openraft asks for ten times the latter, which both presets give. Safety rests on none of
it: there are no leases, and the windows of stickiness and of CheckQuorum, which speak of others, are never stretched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..events import (
    Append,
    Appended,
    AppendFailed,
    DeadlineReached,
    DiskProbed,
    Effect,
    Event,
    FactsChanged,
    HardStateSaved,
    LoopLagged,
    Output,
    ProbeDisk,
    SaveHardState,
    Stored,
    Token,
)
from .timings import Timings

FSYNCS_PER_ELECTION = 2.0
"""The candidate's, and then its voters', side by side."""
STRETCH_MAX = 4.0
"""`pi`: silences of 12 to 24 s. A disk that is slower still is trouble, not weather."""
HALF_LIFE_S = 300.0
"""A stall seen an hour ago has no weight left; one of five minutes ago may come back with the next erase block."""
STALL_S = 5.0
"""A write that is not done by then is trouble: a hand-over costs a second or two. Never less than an election."""
PROBE_S = 2.0
"""Between two looks whether a troubled disk is well again: slow enough for a full card, quick enough for an owner."""
BOARD_S = 20.0
"""Flags that stay this long (four looks at the board) are no passing load."""
BOARD_FLAGS = ("undervolt", "throttled", "hot")
"""Of `board.sensors`: a board that is slow, or about to be."""
WHY_MAX = 160
"""Characters of a reason that travel with every node's facts."""

TIMED = (Append, SaveHardState)
"""Not `Store`: how long a batch of others' entries takes says as much of them as of the disk."""


class Fitness:
    def __init__(self, timings: Timings, tokens: Iterator[Token], now: float) -> None:
        self.trouble = ""
        """What ails the disk, in words; "" where nothing does."""
        self.flags: tuple[str, ...] = ()
        """Of the board, as last read."""
        self.flagged_since = float("inf")
        self.stall_s = max(STALL_S, timings.election_max_s)
        self._shortest_s = timings.election_min_s
        self._tokens = tokens
        self._slowest, self._slowest_at = 0.0, now
        self._writes: dict[tuple[type, Token], float] = {}
        """Under way, oldest first, and since when. Appends and votes are numbered apart."""
        self._probe: Token | None = None
        self._probe_at = float("inf")

    # looks ---------------------------------------------------------------------------------------------------
    def slowest_s(self, now: float) -> float:
        """The slowest write of late, seconds; what it counts for decays."""
        return float(self._slowest * 0.5 ** ((now - self._slowest_at) / HALF_LIFE_S))

    def stretch(self, now: float) -> float:
        """What the election timeout of this node is to be multiplied by, 1 to STRETCH_MAX."""
        return min(STRETCH_MAX, max(1.0, FSYNCS_PER_ELECTION * self.slowest_s(now) / self._shortest_s))

    def board_trouble(self, now: float) -> str:
        """The board's flags, where they have stayed; else ""."""
        return f"the board is {', '.join(self.flags)}" if now >= self.flagged_since + BOARD_S else ""

    def deadline(self) -> float:
        if self.trouble:
            return self._probe_at
        return next(iter(self._writes.values()), float("inf")) + self.stall_s

    # events --------------------------------------------------------------------------------------------------
    def wrote(self, effects: Iterable[Effect], now: float) -> None:
        """These go out now; those that write are timed from here."""
        for effect in effects:
            if isinstance(effect, TIMED):
                self._writes[type(effect), effect.token] = now

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case AppendFailed(token, why, disk):
                self._done(Append, token, now)
                if disk:
                    self._ail(why, now)
            case Appended(token):
                self._done(Append, token, now)
            case HardStateSaved(token):
                self._done(SaveHardState, token, now)
            case Stored(refused=why) if why:
                self._ail(why, now)
            case DiskProbed(token, why) if token == self._probe:
                self._probed(why, now)
            case FactsChanged(facts):
                self._read_flags(facts.flags, now)
            case LoopLagged(seconds):  # it was we who were away, not the disk
                self._writes = {write: min(since + seconds, now) for write, since in self._writes.items()}
            case DeadlineReached():
                return self._look(now)
            case _:
                pass
        return []

    def _done(self, kind: type, token: Token, now: float) -> None:
        since = self._writes.pop((kind, token), now)
        if now - since >= self.slowest_s(now):
            self._slowest, self._slowest_at = now - since, now

    def _read_flags(self, flags: tuple[str, ...], now: float) -> None:
        self.flags = tuple(flag for flag in flags if flag in BOARD_FLAGS)
        self.flagged_since = min(self.flagged_since, now) if self.flags else float("inf")

    # the disk ------------------------------------------------------------------------------------------------
    def _ail(self, why: str, now: float) -> None:
        if not self.trouble:
            self._probe_at = now + PROBE_S
        self.trouble = why[:WHY_MAX]

    def _hangs(self, now: float) -> bool:
        return any(now >= since + self.stall_s for since in self._writes.values())

    def _look(self, now: float) -> list[Output]:
        if not self.trouble and self._hangs(now):
            self._ail(f"a write to the disk has hung for {self.stall_s:g} s", now)
        if now < self._probe_at:
            return []
        self._probe, self._probe_at = next(self._tokens), float("inf")
        return [ProbeDisk(self._probe)]

    def _probed(self, why: str, now: float) -> None:
        """Well is a disk with room that takes a write, and that owes us none."""
        self._probe = None
        if why or self._hangs(now):
            self.trouble, self._probe_at = (why or self.trouble)[:WHY_MAX], now + PROBE_S
        else:
            self.trouble = ""
