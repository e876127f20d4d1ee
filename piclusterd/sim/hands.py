"""The hands of the rehearsal room: every effect, performed with a drawn delay on the world's heap.

The daemon's hands have sockets, disks and services; these have dice. What is sent may be lost or late, what is written
is durable when the disk says so, the model and the service outside fail now and then, and a reply may be lost after its
effect has happened.
"""

from __future__ import annotations

import itertools
from random import Random
from typing import TYPE_CHECKING, assert_never

from ..events import (
    Activated,
    Answer,
    Append,
    Appended,
    Ask,
    CallOut,
    CloseHub,
    Effect,
    Elected,
    EntriesRead,
    Fact,
    HardState,
    HardStateSaved,
    HookArrived,
    HookTaken,
    Note,
    Noted,
    OpenHub,
    Read,
    Received,
    SaveHardState,
    Send,
    StepFinished,
    Stopped,
    Store,
    Stored,
)
from ..ids import NodeId, Term
from ..ledger import store
from ..wire import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, Hook, Vote
from .keys import verify
from .outside import Delivery, Line

if TYPE_CHECKING:
    from .world import Actor, World

REDELIVER_S = 10.0
"""The hub offers a webhook again that was not answered for this long."""


class SimHands:
    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._deliveries: dict[int, Delivery] = {}
        self._tickets = itertools.count(1)

    def perform(self, actor: Actor, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self._send(actor, self._world.by_id[to], Received(actor.disk.node, message))
            case SaveHardState(token, state):
                self._save(actor, token, state)
            case Append() | Store():
                life = actor.life
                self._world.at(
                    actor.disk.lands_at(self._world.now) - self._world.now, lambda: self._write(actor, life, effect)
                )
            case Read(token, spans):
                entries = store.read(actor.disk.conn, spans, BATCH_BYTES_MAX, BATCH_ENTRIES_MAX)
                self._world.deliver_in(self._rng.uniform(0.0001, 0.01), actor, EntriesRead(token, entries))
            case Ask():
                self._model(actor, effect)
            case CallOut():
                self._call(actor, effect)
            case OpenHub(term):
                self._connect_hub(actor, term)
            case CloseHub():
                self._world.hub.hang_up(actor.disk.node)
            case Answer(ticket, value):
                self._answered(ticket, value)
            case Noted(note):
                self._check_note(actor, note)
            case Stopped():
                self._world.crash(actor)
            case _:
                assert_never(effect)

    def _send(self, sender: Actor, to: Actor, event: Received) -> None:
        if not self._world.linked(sender, to):
            return
        for delay in self._world.network.delays(sender.disk.node, to.disk.node):
            self._world.deliver_in(delay, to, event)
        if isinstance(event.message, Vote) and event.message.granted and not event.message.pre:
            self._maybe_cut_power(sender)

    def _maybe_cut_power(self, actor: Actor) -> None:
        if self._rng.random() < self._world.vote_crash:
            life = actor.life
            self._world.at(0.0005, lambda: self._crash_and_restart(actor, life, self._rng.uniform(0.001, 0.1)))

    def _crash_and_restart(self, actor: Actor, life: int, after: float) -> None:
        if actor.life == life and actor.node is not None:
            self._world.crash(actor)
            self._world.at(after, lambda: self._world.boot(actor) if actor.node is None else None)

    def _save(self, actor: Actor, token: int, state: HardState) -> None:
        life = actor.life
        lands = actor.disk.lands_at(self._world.now) - self._world.now

        def land() -> None:
            if actor.life == life:
                actor.disk.hard = state
                if not self._world.plan.lying_disks:
                    self._world.deliver(actor, life, HardStateSaved(token))

        if self._world.plan.lying_disks:
            self._world.deliver_in(0.0001, actor, HardStateSaved(token))
            lands += self._rng.uniform(0.1, 1.0)
        self._world.at(lands, land)

    def _write(self, actor: Actor, life: int, effect: Append | Store) -> None:
        """The write is on disk now, unless the machine died before."""
        if actor.life != life:
            return
        disk = actor.disk
        event: Appended | Stored
        if isinstance(effect, Append):
            entries, facts = store.append(disk.conn, disk.log, effect.records, disk.key, int(self._world.now * 1000))
            event = Appended(effect.token, entries, facts)
        else:
            applied = store.apply(disk.conn, effect.entries, verify)
            facts = applied.facts
            event = Stored(effect.token, facts, applied.heads, applied.dropped)
        self._landed(actor, facts)
        self._world.deliver(actor, life, event)

    def _landed(self, actor: Actor, facts: tuple[Fact, ...]) -> None:
        for fact in facts:
            if fact.kind == "hook":
                self._world.checks.landed(actor.disk.node, str(fact.body["key"]))

    def _check_note(self, actor: Actor, note: Note) -> None:
        match note:
            case Elected(term, _):
                self._world.checks.elected(actor.disk.node, term)
            case Activated(term):
                self._world.checks.activated(actor.disk.node, term)
            case _:
                return
        self._world.note(actor, note)

    # outside -------------------------------------------------------------------------------------------------
    def _model(self, actor: Actor, ask: Ask) -> None:
        delay = self._rng.uniform(0.05, 0.8)
        failed = self._rng.random() < 0.1
        value = {"text": f"P{self._rng.randrange(4)}", "model": "sim", "node": f"pi-{actor.number}"}
        outcome = StepFinished(ask.token, error="the model died") if failed else StepFinished(ask.token, value=value)
        self._world.deliver_in(delay, actor, outcome)

    def _call(self, actor: Actor, call: CallOut) -> None:
        life = actor.life
        arrives, fate = self._rng.uniform(0.02, 0.3), self._rng.random()

        def arrive() -> None:
            if fate < 0.1:
                outcome = StepFinished(call.token, error="503", retry_after_s=1.0)
            else:
                self._world.checks.acted(call.run, call.operation, call.key)
                value = self._world.service.perform(call.run, call.operation, call.key)
                outcome = StepFinished(call.token, value=value)
            if fate > 0.1:  # between 0.1 and 0.2 the effect happens and the reply is lost
                outcome = StepFinished(call.token, error="timeout") if fate < 0.2 else outcome
            self._world.at(self._rng.uniform(0.02, 0.5), lambda: self._world.deliver(actor, life, outcome))

        self._world.at(arrives, arrive)

    def _connect_hub(self, actor: Actor, term: Term) -> None:
        line = Line(actor.disk.node, actor.life, term)
        self._world.at(self._rng.uniform(0.02, 0.3), lambda: self._world.hub.connect(line))

    def pump_hub(self) -> None:
        """The hub sends what its window allows; what was not answered is sent again."""
        line = self._world.hub.line
        if line is None:
            return
        actor = self._world.by_id[line.node]
        if actor.life != line.life:
            self._world.hub.hang_up(line.node)
            return
        for seq, hook in self._world.hub.to_send():
            self._arrive(actor, hook, seq)

    def _arrive(self, actor: Actor, hook: Hook, seq: int | None) -> None:
        ticket = next(self._tickets)
        self._deliveries[ticket] = Delivery(ticket, seq, hook)
        self._world.deliver_in(self._rng.uniform(0.01, 0.3), actor, HookArrived(ticket, hook))
        if seq is not None:
            self._world.at(REDELIVER_S, lambda: self._give_up(ticket))

    def _give_up(self, ticket: int) -> None:
        delivery = self._deliveries.pop(ticket, None)
        if delivery is not None and delivery.seq is not None:
            self._world.hub.answered(delivery.seq, taken=False)

    def _answered(self, ticket: int, value: object) -> None:
        delivery = self._deliveries.pop(ticket, None)
        if delivery is None:
            return
        taken = isinstance(value, HookTaken)
        if taken:
            self._world.checks.called_taken(delivery.hook.key, self._newest_coordinator())
        if delivery.seq is not None:
            self._world.hub.answered(delivery.seq, taken)

    def _newest_coordinator(self) -> NodeId | None:
        active = [(a.node.election.term, a.disk.node) for a in self._world.actors if a.node and a.node.replicate.active]
        return max(active)[1] if active else None

    def webhook(self) -> None:
        """Mostly through the hub; some straight to a node, some of them twice."""
        kind = "create" if self._rng.random() < 0.4 else "update"
        hook = Hook("sim", f"hook-{next(self._tickets)}", kind, b"{}")
        if self._rng.random() < 0.7:
            self._world.hub.accept(hook)
        for _ in range(self._rng.choice((0, 0, 1, 2))):
            self._arrive(self._rng.choice(self._world.actors), hook, None)
