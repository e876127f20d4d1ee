"""The hall: every event goes to the deciders, every effect goes out, and no policy lives here.

    event ─▶ those of: membership, election, reconcile, care, replicate, intake, runs … ─▶ effects
                            ▲      notes (Elected, LedgerGrew, Durable …) go round until none is left

The order matters once: election sees a message first, so that the ledger's deciders answer in the newest term. And the
hall keeps one rule for all: what depends on hard state (a term, a vote) waits here until the disk has it.

Both the daemon and the simulator drive exactly this class, with `handle` and `deadline`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from random import Random

from .cluster.election import UNFIT, Election
from .cluster.fitness import Fitness
from .cluster.handover import Handover, HeirLooks
from .cluster.membership import Membership
from .cluster.reconfigure import Change, Decision, Looks, NewVoters, Reconfigure, Retire, Standing
from .cluster.removals import Removals
from .cluster.suspicion import Guards
from .cluster.voter_config import config_id
from .events import (
    Activated,
    Answer,
    Appended,
    AppendFailed,
    ChangeRun,
    ChangeVoters,
    ClockTold,
    Damaged,
    DeadlineReached,
    Deposed,
    DiskProbed,
    Diverged,
    Effect,
    Elected,
    EntriesRead,
    Event,
    FactsChanged,
    Forgot,
    HardStateSaved,
    HookArrived,
    KeyShared,
    LedgerGrew,
    LinkDown,
    LinkUp,
    LoopLagged,
    MoveLeadership,
    Note,
    Noted,
    Output,
    Received,
    RemoveNode,
    Sealed,
    Send,
    Shutdown,
    Snapshot,
    StepFinished,
    Stopped,
    Stored,
    WhoServes,
)
from .folding import fold
from .forgetting import copy_look, make_pruning
from .ids import NodeId, Term
from .inference.placement import Placement
from .ledger.care import Care
from .ledger.reconcile import Reconcile
from .ledger.replicate import Replicate, copies_needed
from .picture import picture
from .setup import Setup as Setup
from .views import View
from .wire import (
    Ack,
    Batch,
    ForwardHook,
    Gossip,
    Heartbeat,
    Held,
    HookStored,
    Nack,
    Ping,
    PingReq,
    Push,
    PushPull,
    RequestVote,
    TimeoutNow,
    Twin,
    Vote,
    Want,
)
from .workflows.intake import Intake
from .workflows.journal import Journal
from .workflows.run import Runs
from .workflows.schedule import Schedule

Handler = Callable[[Event, float], list[Output]]
Turn = tuple[int | None, Handler]
"""A decider's place in the list of deadlines (None: it has none), and how it is handed an event."""

NOTES_MAX = 10_000
"""Notes that one event may cause; more is a loop between deciders, which is a bug."""
HELD_BACK_MAX = 1024
"""Messages waiting for a stalled disk; the oldest are lost, as on a bad link, and are said again by the protocols."""
INCARNATION_SHIFT = 20
"""Boot counter << 20 leaves room for a million refutations before two lives of a node could meet."""
TICKET_SHIFT = 32
"""Boot counter << 32: no life forwards so many webhooks, and the boot counter has room for another 31 bits."""
MEMBERSHIP, ELECTION, HANDOVER = 0, 1, 6
"""Places in the list of deadlines."""
TIMERS_OF_NOTES = (3, 4, 5, 6, 9)
"""Places of intake, runs, reconfigure, handover, schedule: of those that hear notes, the ones with deadlines."""
ASKED = (WhoServes, Snapshot, Shutdown)
"""Events that the hall itself answers, the last by stopping."""
BOUND_TO_HARD_STATE = (RequestVote, Vote, Heartbeat, Held, Push, TimeoutNow)
"""Messages that promise a term or a vote: they never leave before it is durable (Raft §5.1)."""


class Node:
    def __init__(self, setup: Setup, rng: Random, now: float) -> None:
        tokens, life, sync_s = itertools.count(1), setup.hard.incarnation, setup.timings.sync_s
        self.me, self.cluster = setup.me, setup.cluster
        self._rules, self._votes_lost = setup.rules, setup.votes_lost
        self._waiting: deque[Send] = deque(maxlen=HELD_BACK_MAX)
        self.reconcile = Reconcile(
            setup.heads, sync_s, tokens, lambda: config_id(self.election.voters), life, lambda: self.election.leader
        )
        held = self.reconcile.held
        self.care = Care(setup.me, setup.log, held, self._digest, tokens, setup.lost, setup.damaged, setup.rules)
        incarnation, guards = life << INCARNATION_SHIFT, Guards(loop_lag=setup.rules.lag_discard)
        self.membership = Membership(setup.me, setup.facts, incarnation, setup.timings, rng, self._digest, now, guards)
        fitness = Fitness(setup.timings, tokens, now)
        self.election = Election(
            setup.me, setup.hard, setup.timings, rng, self._digest, now, setup.rules, self._may_stand, self._may_vote,
            lambda: bool(fitness.trouble), fitness.stretch,
        )  # fmt: skip
        self.replicate = Replicate(
            setup.me, self.reconcile, setup.rules, lambda: self.election.leader, tokens,
            lambda: self.reconfigure.stored, self._may_vote,
        )  # fmt: skip
        looks = Looks(
            self.replicate.carries, self.replicate.carried, self.election.hears, lambda: not self.election.unsaved
        )
        self.reconfigure = Reconfigure(setup.me, looks, setup.rules)
        self.handover = Handover(setup.me, setup.timings, fitness, HeirLooks(
            lambda: self.election.role == "leader", lambda: self.election.term, lambda: self.election.voters.voters,
            self.election.reaches, self.replicate.carries, self.membership.facts,
        ))  # fmt: skip
        self.journal = Journal()
        ledger = list(setup.ledger)
        fold(self.journal, ledger)
        durable, last_ticket = self.replicate.is_durable, life << TICKET_SHIFT
        self.intake = Intake(setup.me, self.journal, setup.workflows, tokens, self._coordinator, durable,
            self.reconcile.is_closed, last_ticket)  # fmt: skip
        self.schedule = Schedule(self.journal, setup.workflows, setup.agenda, tokens)
        self.placement = Placement(setup.me)
        self.pruning = make_pruning(
            self.membership, self.election, self.reconcile, self.care, setup.retention, tokens, setup.rules, now, ledger
        )
        copied = copy_look(self.membership, self.pruning)
        self.runs = Runs(self.journal, setup.workflows, setup.patience, rng, tokens, copied)
        self.removals = Removals(self.membership, lambda: self.election.voters.voters, tokens, ledger, now)
        timed = (
            self.membership, self.election, self.reconcile, self.intake, self.runs, self.reconfigure, self.handover,
            self.care, self.pruning, self.schedule,
        )  # fmt: skip
        self._deadlines = [decider.deadline for decider in timed]
        self._due = [deadline() for deadline in self._deadlines]
        """Each decider's deadline; it moves only when the decider is handed an event or a note."""
        handlers: tuple[Handler, ...] = (
            self.membership.handle, self.election.handle, self._reconcile, self.intake.handle, self.runs.handle,
            self._reconfigure, self._handover, self._care, self.pruning.handle, self.schedule.handle,
        )  # fmt: skip
        self._timed: tuple[Turn, ...] = tuple(enumerate(handlers))
        self._routes = self._table()

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What `event` causes. Order is kept; nothing is done twice; never raises on what a peer sent."""
        outputs = self._deciders(event, now)
        effects: list[Effect] = self._settle(outputs, event, now) if outputs else []
        if type(event) in ASKED:
            effects += self._asked(event, now)
        return self._hold_back(effects) if self._waiting or self.election.unsaved else effects

    def _settle(self, outputs: list[Output], event: Event, now: float) -> list[Effect]:
        """Notes go round until none is left; what remains is effects."""
        effects: list[Effect] = [output for output in outputs if isinstance(output, Send)]
        if len(effects) == len(outputs):
            return effects  # as almost always
        queue, effects = deque(outputs), []
        for _ in range(NOTES_MAX):
            if not queue:
                self._due[HANDOVER] = self.handover.wrote(effects, now)
                return effects
            output = queue.popleft()
            if isinstance(output, Send) or not isinstance(output, Note):
                effects.append(output)
            else:
                effects.append(Noted(output))
                queue.extend(self._note(output, now))
        raise AssertionError(f"notes without end after {event}")

    def deadline(self) -> float:
        return min(self._due)

    @property
    def held_back(self) -> int:
        """Messages that wait for hard state."""
        return len(self._waiting)

    # routing -------------------------------------------------------------------------------------------------
    def _table(self) -> dict[type, tuple[Turn, ...]]:
        """Who hears of what, in order. What is not listed concerns nobody."""
        members, election, reconcile, intake, runs, voters, handover, care, pruning, schedule = self._timed
        replicate: Turn = (None, self._replicate)
        removals: Turn = (None, self.removals.handle)
        told, confirms, compare = ((None, handle) for _, handle in (pruning, intake, reconcile))  # no deadline moves
        linked = (members, election, reconcile, care, replicate)
        return {
            **dict.fromkeys((Ping, Ack), (members, compare, told)),
            **dict.fromkeys((PingReq, Nack, Gossip, PushPull), (members,)),
            **dict.fromkeys((RequestVote, Vote, TimeoutNow), (election,)),
            **dict.fromkeys((Heartbeat, Push), (election, replicate)),
            Held: (election, (None, self._config_held), reconcile, care, replicate, confirms, voters, told),
            **dict.fromkeys((Want, Batch), (compare,)),
            **dict.fromkeys((ForwardHook, HookStored, HookArrived), (intake,)),
            LinkUp: linked,
            LinkDown: (*linked, intake),
            HardStateSaved: (handover, election, replicate, voters),
            Sealed: (election,),
            ChangeVoters: (voters,),
            **dict.fromkeys((MoveLeadership, DiskProbed), (handover,)),
            Appended: (compare, care, replicate, confirms, voters, handover, told, removals),
            Stored: (reconcile, care, replicate, confirms, voters, handover),
            AppendFailed: (replicate, intake, runs, handover, pruning, schedule, removals),
            **dict.fromkeys((RemoveNode, KeyShared, Twin), (removals,)),
            Forgot: (pruning,),
            EntriesRead: (reconcile, care),
            **dict.fromkeys((Damaged, Diverged), (care,)),
            **dict.fromkeys((StepFinished, ChangeRun), (runs,)),
            ClockTold: (schedule,),
            FactsChanged: (handover, (None, self._advise)),
            LoopLagged: (members, handover),
            Shutdown: (members, election),
        }

    def _deciders(self, event: Event, now: float) -> list[Output]:
        if isinstance(event, DeadlineReached):
            turns = tuple([turn for turn, due in zip(self._timed, self._due, strict=True) if due <= now])
        else:
            said = event.message if isinstance(event, Received) else event
            turns = self._routes.get(type(said), ())
            if isinstance(said, Held) and isinstance(event, Received) and self._repeats(event.sender, said):
                turns = turns[:1]  # election's: its sender lives
        outputs: list[Output] = []
        for timer, handle in turns:
            outputs += handle(event, now)
            if timer is not None:
                self._due[timer] = self._deadlines[timer]()
        return outputs

    def _repeats(self, sender: NodeId, held: Held) -> bool:
        """As most answers to heartbeats are: what was known already, while nothing waits for anything to be said."""
        knows = self.replicate.knows(sender, held) and self.reconfigure.knows(sender)
        return knows and not (self.intake.waiting or self.care.lost)

    def _reconcile(self, event: Event, now: float) -> list[Output]:
        fenced = self._rules.term_fencing and self._may_vote()
        return self.reconcile.handle(event, now, self.election.term if fenced else 0)

    def _care(self, event: Event, now: float) -> list[Output]:
        """Before the ledger counts copies: who finds out that it forgot counts and promises nothing more."""
        voters = self.election.voters.voters
        out = self.care.handle(event, now, voters, copies_needed(len(voters)))
        if self.election.role == "leader" and not self._may_stand(now):
            out += self.election.retire(UNFIT, now)
            self._due[ELECTION] = self._deadlines[ELECTION]()
        return out

    def _handover(self, event: Event, now: float) -> list[Output]:
        """What it finds out about this node is told to everybody, with the node's other facts."""
        out = self.handover.handle(event, now)
        mine = self.membership.own_facts
        marked = self.handover.marked(event.facts if isinstance(event, FactsChanged) else mine, now)
        if marked is not mine:
            out += self.membership.handle(FactsChanged(marked), now)
            self._due[MEMBERSHIP] = self._deadlines[MEMBERSHIP]()
        return out

    def _replicate(self, event: Event, now: float) -> list[Output]:
        return self.replicate.handle(event, now, self.election.term)

    def _config_held(self, event: Event, now: float) -> list[Output]:
        """Before the ledger counts copies: it counts none until the config they are counted in is stored."""
        assert isinstance(event, Received)
        assert isinstance(event.message, Held), "nothing else is routed here"
        self.reconfigure.on_held(event.sender, event.message.term, event.message.config)
        return []

    def _reconfigure(self, event: Event, now: float) -> list[Output]:
        if isinstance(event, ChangeVoters):
            change = Change(event.what, event.node)
            return self._decided(self.reconfigure.propose(event.ticket, change, now), now)
        return self._decided(self.reconfigure.progress(now), now)

    def _advise(self, event: Event, now: float) -> list[Output]:
        """What the cluster changes by itself, looked at as often as this node looks at its board."""
        if not self.replicate.active:
            return []
        views = self.membership.views(self.election.voters.voters, now)
        standings = [Standing(v.node, v.state, v.since_s, v.facts.role == "worker") for v in views]
        change = self.reconfigure.advise(standings, now)
        return [] if change is None else self._decided(self.reconfigure.propose(None, change, now), now)

    def _decided(self, decisions: list[Decision], now: float) -> list[Output]:
        out: list[Output] = []
        for decision in decisions:
            match decision:
                case NewVoters(voters):
                    self.replicate.change(voters.voters)
                    out += self.election.change(voters)
                case Retire(why):
                    out += self.election.retire(why, now)
                case _:
                    out.append(decision)
        if decisions:
            self._due[ELECTION] = self._deadlines[ELECTION]()
        return out

    def _voters_note(self, note: Note, now: float) -> list[Output]:
        match note:
            case Elected(term):
                self.reconfigure.elected(term, self.election.voters)
            case Activated():
                self.reconfigure.activated()
            case Deposed():
                return self._decided(self.reconfigure.deposed(), now)
            case _:
                pass
        return []

    def _note(self, note: Note, now: float) -> list[Output]:
        left: list[Output] = []
        if isinstance(note, LedgerGrew):
            fold(self.journal, note.facts)
            self.pruning.grew(note.facts)
            left = self.removals.grew(note.facts, now)
        outputs = (
            left + self._voters_note(note, now) + self.replicate.note(note) + self.intake.note(note)
            + self.runs.note(note, now) + self.schedule.note(note, now) + self.handover.note(note, now)
        )  # fmt: skip
        for timer in TIMERS_OF_NOTES:
            self._due[timer] = self._deadlines[timer]()
        return outputs

    def _asked(self, event: Event, now: float) -> list[Effect]:
        match event:
            case WhoServes(ticket):
                self.placement.members_changed(self.membership.alive(), self.membership.links)
                return [Answer(ticket, self.placement.choose(event, now))]
            case Snapshot(ticket):
                return [Answer(ticket, self.view(now))]
            case _:
                return [Stopped()]

    def _hold_back(self, effects: list[Effect]) -> list[Effect]:
        if not self.election.unsaved:
            released = list(self._waiting)
            self._waiting.clear()
            return [*released, *effects]
        free: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, BOUND_TO_HARD_STATE):
                self._waiting.append(effect)
            else:
                free.append(effect)
        return free

    # looks ---------------------------------------------------------------------------------------------------
    def _digest(self) -> bytes:
        return self.reconcile.digest

    def _may_vote(self) -> bool:
        return not (self.care.lost or self._votes_lost)

    def _may_stand(self, now: float) -> bool:
        voters = self.election.voters.voters
        return not self._votes_lost and self.care.may_stand(voters, copies_needed(len(voters)), now)

    def _coordinator(self) -> tuple[NodeId | None, Term, bool]:
        return self.election.leader, self.election.term, self.replicate.active

    def view(self, now: float) -> View:
        return picture(self, now)
