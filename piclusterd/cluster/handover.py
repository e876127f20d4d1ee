"""Leadership, handed to another voter while this one still works: by hand, off a throttled board, off a failing disk.

    MoveLeadership ─────────┐               leader                     heir                     others
    disk trouble (fitness) ─┼─▶ best heir? ── TimeoutNow(term) ──────▶ campaigns ─ RequestVote ─▶ vote, past stickiness
    board trouble (fitness)─┘               follows ◀──────────────── term+1, Heartbeat ───────▶ follow
                                               └─▶ HandedOver, Answer(LeaderChanged)

Owns the one move under way and what this node told of itself: `marked` puts the disk's trouble, and why leadership was
given up, into its facts, where every page finds them. The leader leads on until the newer term arrives: a TimeoutNow
that is lost, or an heir that cannot win, costs nothing (Ongaro 2014, §3.10, without its pause: fencing and the
recovery barrier keep what the old coordinator acknowledges meanwhile).

Nobody but a voter that is heard, has caught up and has a sound disk is an heir. A full or broken disk hands over as
soon as there is one; without, the leader stays, since nobody would do better. A slow board hands over only to a board
without flags that has not itself given up of late, and once in REST_S: two warm boards do not toss leadership about.
A node with disk trouble does not campaign (`election`): its first act as a leader, an append, would fail. It goes on
voting as long as its vote reaches the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ..errors import PiclusterError, Unavailable, UserError
from ..events import (
    Answer,
    Effect,
    Elected,
    Event,
    HandedOver,
    LeaderChanged,
    MoveLeadership,
    Note,
    Output,
    Send,
    Ticket,
)
from ..ids import NodeId, Term
from ..wire import Facts, TimeoutNow
from .fitness import BOARD_FLAGS, BOARD_S, Fitness
from .timings import Timings

REST_S = 1800.0
"""A board that was relieved is not relieved again, nor burdened by another's heat, for half an hour."""
RETRY_S = 0.5
"""Between two looks for an heir: a voter that is busy lacks the newest entry half of the time."""
WISH_S = 5.0
"""The owner waits this long for a voter that has not caught up."""
MOVE_FACTOR = 2.0
"""Of the longest election timeout: by then the heir has won, or somebody has."""
BY_HAND = "by hand"
DISK_FLAG = "disk"
"""Beside the board's flags, on every page that shows those."""


@dataclass(frozen=True, slots=True)
class HeirLooks:
    """What this decider asks others."""

    leads: Callable[[], bool]
    term: Callable[[], Term]
    voters: Callable[[], tuple[NodeId, ...]]
    reaches: Callable[[NodeId, float], bool]
    """Linked, and heard within the window of CheckQuorum?"""
    carries: Callable[[NodeId], bool]
    """Does this voter hold all that may have been acknowledged?"""
    facts: Callable[[NodeId], Facts | None]


@dataclass(frozen=True, slots=True)
class _Move:
    heir: NodeId
    why: str
    term: Term
    until: float
    ticket: Ticket | None
    """Of the owner who waits; None where this node saw reason itself."""


class _Behind(Unavailable):
    """Not yet, but perhaps in a moment."""


@dataclass(frozen=True, slots=True)
class _Wish:
    move: MoveLeadership
    until: float


class Handover:
    def __init__(self, me: NodeId, timings: Timings, fitness: Fitness, looks: HeirLooks) -> None:
        self.me = me
        self.fitness = fitness
        self.count = 0
        """Times that this node handed over since it started."""
        self._patience = MOVE_FACTOR * timings.election_max_s
        self._looks = looks
        self._wish: _Wish | None = None
        self._move: _Move | None = None
        self._tried: dict[NodeId, int] = {}
        """Heirs that did not take it, and how often."""
        self._next_try = float("-inf")
        self._gave_up = ""
        self._gave_up_at = float("-inf")
        self._due = float("inf")

    # looks ---------------------------------------------------------------------------------------------------
    def deadline(self) -> float:
        return min(self._due, self.fitness.deadline())

    def marked(self, facts: Facts, now: float) -> Facts:
        """`facts` with what this node has to say of its disk and of its leadership."""
        trouble, told = self.fitness.trouble, self._told(now)
        flags = tuple(flag for flag in facts.flags if flag != DISK_FLAG) + ((DISK_FLAG,) if trouble else ())
        if (flags, trouble, told) == (facts.flags, facts.trouble, facts.handed_over):
            return facts
        return msgspec.structs.replace(facts, flags=flags, trouble=trouble, handed_over=told)

    def _told(self, now: float) -> str:
        return self._gave_up if now < self._gave_up_at + REST_S else ""

    def wrote(self, effects: list[Effect], now: float) -> float:
        """These go out now, some of them to the disk; the deadline from here on."""
        self.fitness.wrote(effects, now)
        return self.deadline()

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float) -> list[Output]:
        out = self.fitness.handle(event, now)
        if isinstance(event, MoveLeadership):
            out += self._by_hand(event, now)
        elif self._wish is not None and self._move is None:
            out += self._grant(self._wish, now)
        if self._move is not None and now >= self._move.until:
            out += self._not_taken(self._move)
        if self._move is None and self._looks.leads():
            out += self._by_itself(now)
        self._due = self._next(now)
        return out

    def note(self, note: Note, now: float) -> list[Output]:
        out: list[Output] = []
        match note:
            case LeaderChanged(term, leader) if leader is not None and self._move is not None:
                if term > self._move.term:
                    out = self._taken(self._move, note, leader, now)
            case Elected():
                self._tried, self._next_try = {}, now
            case _:
                return []
        self._due = self._next(now)
        return out

    # reasons of its own --------------------------------------------------------------------------------------
    def _by_itself(self, now: float) -> list[Output]:
        disk, board = self.fitness.trouble, self.fitness.board_trouble(now)
        if now < self._next_try or not (disk or (board and now >= self._gave_up_at + REST_S)):
            return []
        self._next_try = now + RETRY_S
        heirs = [v for v in self._others() if not self._unfit(v, now) and (disk or self._is_cool(v))]
        return [self._send(self._best(heirs), disk or board, None, now)] if heirs else []

    def _next(self, now: float) -> float:
        """When to look again without being told of anything."""
        if self._move is not None:
            return self._move.until
        if self._wish is not None:
            return now + RETRY_S
        if not self._looks.leads():
            return float("inf")
        board = max(self.fitness.flagged_since + BOARD_S, self._gave_up_at + REST_S)
        return max(self._next_try, now if self.fitness.trouble else board)

    # heirs ---------------------------------------------------------------------------------------------------
    def _others(self) -> list[NodeId]:
        return [v for v in self._looks.voters() if v != self.me]

    def _unfit(self, node: NodeId, now: float) -> PiclusterError | None:
        """Why `node`, another voter, cannot take over now."""
        facts, called = self._looks.facts(node), self._called(node)
        if facts is not None and facts.trouble:
            return Unavailable(f"{called} has disk trouble", f"({facts.trouble})", "Choose another voter.")
        if not self._looks.reaches(node, now):
            return Unavailable(f"{called} cannot be reached", "", "Bring it back, or choose another voter.")
        if not self._looks.carries(node):
            return _Behind(f"{called} has not caught up with the ledger", "", "Ask again in a moment.")
        return None

    def _called(self, node: NodeId) -> str:
        facts = self._looks.facts(node)
        return (facts.name if facts else "") or f"node {node}"

    def _is_cool(self, node: NodeId) -> bool:
        facts = self._looks.facts(node)
        return facts is not None and not facts.handed_over and not any(flag in BOARD_FLAGS for flag in facts.flags)

    def _best(self, heirs: list[NodeId]) -> NodeId:
        return min(heirs, key=lambda heir: (self._tried.get(heir, 0), not self._is_cool(heir), heir))

    # moving --------------------------------------------------------------------------------------------------
    def _by_hand(self, move: MoveLeadership, now: float) -> list[Output]:
        if self._move is None and self._wish is None:
            return self._grant(_Wish(move, now + WISH_S), now)
        why = "it is being moved already."
        return [Answer(move.ticket, Unavailable("leadership was not moved", why, "Ask again in a moment."))]

    def _grant(self, wish: _Wish, now: float) -> list[Output]:
        """Now, or with the reason not; a voter that is merely behind is waited for."""
        self._wish = None
        ticket, to = wish.move.ticket, wish.move.to
        if to == self.me and self._looks.leads():
            return [Answer(ticket, LeaderChanged(self._looks.term(), self.me))]
        heir = self._chosen(to, now)
        if isinstance(heir, _Behind) and now < wish.until:
            self._wish = wish
            return []
        return [Answer(ticket, heir) if isinstance(heir, PiclusterError) else self._send(heir, BY_HAND, ticket, now)]

    def _chosen(self, to: NodeId | None, now: float) -> NodeId | PiclusterError:
        if not self._looks.leads():
            return Unavailable("leadership was not moved", "this node does not coordinate.", "Ask again in a moment.")
        others = self._others()
        if not others:
            return UserError("there is no other voter to lead", "", "Make one: picluster voter add NODE.")
        if to is not None and to not in others:
            return UserError(
                f"{self._called(to)} is no voter", "Only a voter can coordinate.", "picluster voter add NODE"
            )
        wanted = others if to is None else [to]
        faults = [fault for v in wanted if (fault := self._unfit(v, now))]
        fit = [v for v in wanted if self._unfit(v, now) is None]
        return self._best(fit) if fit else faults[0]

    def _send(self, heir: NodeId, why: str, ticket: Ticket | None, now: float) -> Send:
        self._move = _Move(heir, why, self._looks.term(), now + self._patience, ticket)
        return Send(heir, TimeoutNow(self._looks.term()))

    def _taken(self, move: _Move, changed: LeaderChanged, leader: NodeId, now: float) -> list[Output]:
        """The move is over: somebody leads a newer term, mostly the heir, sometimes this node again."""
        self._move = None
        out: list[Output] = [] if move.ticket is None else [Answer(move.ticket, changed)]
        if leader == self.me:
            return out
        self.count += 1
        if move.ticket is None:
            self._gave_up, self._gave_up_at = move.why, now
        return [*out, HandedOver(move.term, leader, move.why)]

    def _not_taken(self, move: _Move) -> list[Output]:
        self._move = None
        self._tried[move.heir] = self._tried.get(move.heir, 0) + 1
        if move.ticket is None:
            return []
        why = f"{self._called(move.heir)} did not take over within {self._patience:g} s."
        return [Answer(move.ticket, Unavailable("leadership was not moved", why, "See who leads: picluster status."))]
