"""The hands of the rehearsal room: every effect, performed with a drawn delay on the world's heap.

The daemon's hands have sockets, disks and services; these have dice. What is sent may be lost or late, what is written
is durable when the disk says so, the model and the service outside fail now and then, and a reply may be lost after its
effect has happened.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, assert_never

import msgpack

from ..events import (
    Activated,
    AddCheckpoint,
    Answer,
    Append,
    Ask,
    CallOut,
    CloseHub,
    Deny,
    Deposed,
    Durable,
    Effect,
    Elected,
    EntriesRead,
    Event,
    Forget,
    HookArrived,
    HookTaken,
    LedgerAlarm,
    MemberDown,
    NewEpoch,
    Note,
    Noted,
    OpenHub,
    ProbeDisk,
    Read,
    Received,
    Recovered,
    SaveHardState,
    Send,
    StepFinished,
    Stopped,
    Store,
)
from ..ids import Term
from ..ledger import store
from ..wire import (
    BATCH_BYTES_MAX,
    BATCH_ENTRIES_MAX,
    Dropped,
    Hook,
    HookStored,
    PeerMessage,
    Vote,
    decode,
    encode,
)
from .disk import Cached, Write
from .outside import Delivery, Line

if TYPE_CHECKING:
    from .world import Actor, World

LIE_S = 0.5
"""How long a lying disk keeps in its cache what it called durable."""
REDELIVERED = 0.1
"""Of webhooks: old ones that come again, of whatever age."""
REDELIVER_S = 10.0
"""The hub offers a webhook again that was not answered for this long."""


class SimHands:
    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._deliveries: dict[int, Delivery] = {}
        self._tickets = itertools.count(1)
        self._sent: list[Hook] = []
        self._again = Random(world.plan.seed)
        self.answers: dict[int, object] = {}
        """Ticket → value, of questions asked with `ask`."""

    def perform(self, actor: Actor, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(actor, effect)
            case Noted(note):
                self._check_note(actor, note)
            case SaveHardState() | Append() | Store() | NewEpoch() | Recovered() | ProbeDisk():
                self._write(actor, effect)
            case AddCheckpoint() | Forget():
                self._write(actor, effect)
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
            case Deny(nodes):
                self._world.links.deny(actor, nodes)
            case Answer(ticket, value):
                self._answered(actor, ticket, value)
            case Stopped():
                self._world.crash(actor)
            case _:
                assert_never(effect)

    # network -------------------------------------------------------------------------------------------------
    def _send(self, sender: Actor, send: Send) -> None:
        world, me = self._world, sender.disk.node
        if isinstance(send.message, HookStored) and send.message.stored:
            self._promised(sender, send.message.key)  # whether or not it arrives
        to = world.by_id[send.to]
        if to.disk.node != send.to or not world.links.linked(sender, to):
            return
        message = of_newer_release(send.message) if sender.newer else send.message
        if message is not None:
            for delay in world.network.delays(me, send.to, world.now):
                world.deliver_in(delay, to, Received(me, message))
        if world.vote_crash and isinstance(message, Vote) and message.granted and not message.pre:
            self._maybe_cut_power(sender)

    def _promised(self, actor: Actor, hook_key: str) -> None:
        assert actor.node is not None
        self._world.checks.called_taken(hook_key, actor.node.election.voters)

    def _maybe_cut_power(self, actor: Actor) -> None:
        if self._rng.random() < self._world.vote_crash:
            self._world.at(0.0005, self._crash_and_restart, actor, actor.life, self._rng.uniform(0.001, 0.1))

    def _crash_and_restart(self, actor: Actor, life: int, after: float) -> None:
        if actor.life == life and actor.node is not None:
            self._world.crash(actor)
            self._world.at(after, self._world.boot, actor)

    # disk ----------------------------------------------------------------------------------------------------
    def _write(self, actor: Actor, write: Write) -> None:
        disk = actor.disk
        if isinstance(write, Forget):
            self._world.checks.forgets(actor, write)
        leads = actor.node is not None and actor.node.election.role == "leader"
        if isinstance(write, SaveHardState) and write.state.voters.term == write.state.term and leads:
            self._world.checks.config_made(write.state.voters)
        if disk.lies_about(write):
            outcomes, cached = disk.answer_early(write, self._world.now)
            for outcome in outcomes:
                self._world.deliver_in(0.0001, actor, outcome)
            self._world.at(LIE_S, self._settle, actor, actor.life, cached)
            return
        disk.queue.append(write)
        if not disk.group:
            self._sync(actor)

    def _sync(self, actor: Actor) -> None:
        self._world.at(actor.disk.begin_sync(self._world.now), self._land, actor, actor.life)

    def _land(self, actor: Actor, life: int) -> None:
        """The group is on disk now, unless the machine died before."""
        if actor.life != life:
            return
        outcomes = actor.disk.land(self._world.now)
        self.landed(actor)
        if actor.disk.queue:
            self._sync(actor)
        for outcome in outcomes:
            self._world.deliver(actor, life, outcome)

    def _settle(self, actor: Actor, life: int, cached: Cached) -> None:
        if actor.life == life:
            actor.disk.settle(cached)
            self.landed(actor)

    def landed(self, actor: Actor) -> None:
        """Tell the checks what is new on the actor's disk."""
        for fact in actor.disk.landed:
            self._world.checks.landed(actor.disk.node, fact)
        actor.disk.landed.clear()

    def _check_note(self, actor: Actor, note: Note) -> None:
        match note:
            case Elected(term, _):
                self._world.checks.elected(actor.disk.node, term)
                self._world.owner.heard(actor, note)
            case Activated(term):
                self._world.checks.activated(actor, term)
                self._world.owner.heard(actor, note)
            case Durable(_, facts):
                self._world.checks.called_durable(facts)
                return
            case LedgerAlarm(text):
                self._world.checks.alarmed(text)
                return
            case MemberDown():
                self._world.checks.member_down(actor, note)
            case Deposed(_, why):
                self._world.checks.deposed(actor, why)
            case _:
                return
        self._world.note(actor, note)

    # outside -------------------------------------------------------------------------------------------------
    def _model(self, actor: Actor, ask: Ask) -> None:
        delay = self._rng.uniform(0.05, 0.8)
        failed = self._rng.random() < 0.1
        text = self._world.service.says(f"P{self._rng.randrange(4)}")
        value = {"text": text, "model": "sim", "node": f"pi-{actor.number}"}
        outcome = StepFinished(ask.token, error="the model died") if failed else StepFinished(ask.token, value=value)
        self._world.deliver_in(delay, actor, outcome)

    def _call(self, actor: Actor, call: CallOut) -> None:
        life = actor.life
        arrives, fate = self._rng.uniform(0.02, 0.3), self._rng.random()

        def arrive() -> None:
            if fate < 0.1:
                outcome = StepFinished(call.token, error="503", retry_after_s=1.0)
            else:
                service = self._world.service
                if call.operation not in service.reads:
                    self._world.checks.acted(call.run, call.operation, call.key)
                value = service.perform(call.run, call.operation, call.key, call.arguments)
                outcome = StepFinished(call.token, value=value)
            if fate > 0.1:  # between 0.1 and 0.2 the effect happens and the reply is lost
                outcome = StepFinished(call.token, error="timeout") if fate < 0.2 else outcome
            self._world.at(self._rng.uniform(0.02, 0.5), self._world.deliver, actor, life, outcome)

        self._world.at(arrives, arrive)

    def _connect_hub(self, actor: Actor, term: Term) -> None:
        line = Line(actor.disk.node, actor.life, term)
        self._world.at(self._rng.uniform(0.02, 0.3), self._world.hub.connect, line)

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
            self._world.at(REDELIVER_S, self._give_up, ticket)

    def _give_up(self, ticket: int) -> None:
        delivery = self._deliveries.pop(ticket, None)
        if delivery is not None and delivery.seq is not None:
            self._world.hub.answered(delivery.seq, taken=False)

    def _answered(self, actor: Actor, ticket: int, value: object) -> None:
        delivery = self._deliveries.pop(ticket, None)
        if delivery is None:
            self.answers[ticket] = value
            return
        taken = isinstance(value, HookTaken)
        if taken:
            coordinates = actor.node is not None and actor.node.replicate.active
            if coordinates or delivery.hook.key not in self._world.checks.taken:
                self._promised(actor, delivery.hook.key)
        if delivery.seq is not None:
            self._world.hub.answered(delivery.seq, taken)

    def webhook(self) -> None:
        """Mostly through the hub; some straight to a node, some of them twice."""
        kind = "create" if self._rng.random() < 0.4 else "update"
        hook = Hook("sim", f"hook-{next(self._tickets)}", kind, b"{}")
        if self._sent and self._again.random() < REDELIVERED:
            hook = self._again.choice(self._sent)
        self._sent.append(hook)
        if self._rng.random() < 0.7:
            self._world.hub.accept(hook)
        for _ in range(self._rng.choice((0, 0, 1, 2))):
            self._arrive(self._rng.choice(self._world.actors), hook, None)

    def webhook_at(self, actor: Actor) -> None:
        """One more, straight to this node and to nobody else."""
        self.give(actor, Hook("sim", f"hook-{next(self._tickets)}", "update", b"{}"))

    def give(self, actor: Actor, hook: Hook) -> None:
        """Post a webhook straight to a node, as its provider would."""
        self._arrive(actor, hook, None)

    def ask(self, actor: Actor, question: Callable[[int], Event]) -> int:
        """Give `question(ticket)` to the actor; its answer will be in `answers` under the returned ticket."""
        ticket = next(self._tickets)
        self._world.deliver_in(0.0, actor, question(ticket))
        return ticket


def of_newer_release(message: PeerMessage) -> PeerMessage | None:
    """As a node of today reads what a later release says: with a field more, through the codec of both."""
    fields = msgpack.unpackb(encode(message))
    read = decode(msgpack.packb([*fields, {"of": "a later release"}]))
    return None if isinstance(read, Dropped) else read
