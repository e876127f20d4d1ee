"""Four stories of the cluster in a calm world, one row an event or an effect: golden traces (as etcd raft's testdata).

    webhook      a webhook reaches a node that does not coordinate: forwarded, durable on two, run, acted, done
    completion   a node without the model is asked who serves it
    join         a fourth node comes as a learner and gets the ledger
    sync         a node that was cut off gets what it missed

Every message takes a millisecond, every fsync half of one. Nodes are called by their part: A coordinates when the story
begins. Chatter that changes nothing (pings, heartbeats, equal digests, deadlines) is left out. A diff in such a file is
right only if you can say why each row moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from ..events import (
    Answer,
    Append,
    Appended,
    Ask,
    CallOut,
    Choice,
    DeadlineReached,
    Durable,
    Effect,
    EntriesRead,
    Event,
    Fact,
    HardStateSaved,
    HookArrived,
    HookTaken,
    LeaderChanged,
    LedgerGrew,
    LinkDown,
    LinkUp,
    MemberDown,
    MemberUp,
    Noted,
    Read,
    Received,
    RunMoved,
    SaveHardState,
    Send,
    StepFinished,
    Store,
    Stored,
    WhoServes,
)  # fmt: skip
from ..ids import LogId, NodeId
from ..ledger.entry import decode_header
from ..wire import (
    Ack,
    Batch,
    Dropped,
    Entry,
    Facts,
    ForwardHook,
    Gossip,
    Head,
    Heartbeat,
    Held,
    Hook,
    HookStored,
    ModelFacts,
    Nack,
    PeerMessage,
    Ping,
    PingReq,
    Push,
    PushPull,
    Want,
)  # fmt: skip
from .network import Weather
from .world import Actor, Plan, World

STEADY = Weather(0.001, 0.001, 0.0, 0.0, 0.0)
SETTLED_S = 20.0
"""By then there has been a coordinator for long."""
MODEL = "owl-3b"


class Story:
    """A world and the rows of what was told so far."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: list[str] = []
        self.names: dict[NodeId, str] = {}

    def begin(self, machines: int, facts: Facts | None = None) -> None:
        """A settled cluster; from here on rows are written. `facts`: of the last machine."""
        world = self.world
        world.open(machines - 1)
        world.boot(world.actors[machines - 1], facts)
        world.calm(STEADY)
        for actor in world.actors:
            actor.disk.steady()
        world.play(SETTLED_S)
        actors = sorted(
            world.actors, key=lambda a: (a.node is None, not (a.node and a.node.replicate.active), a.number)
        )
        self.names = {actor.disk.node: letter for actor, letter in zip(actors, "ABCD", strict=False)}
        world.watch = self._watch

    def actor(self, name: str) -> Actor:
        return next(self.world.by_id[node] for node, letter in self.names.items() if letter == name)

    def play(self, seconds: float) -> None:
        self.world.play(self.world.now + seconds)

    def say(self, text: str) -> None:
        self.rows.append(f"# {text}")

    def _watch(self, actor: Actor, event: Event, effects: list[Effect]) -> None:
        me = self.names[actor.disk.node]
        shown = [row for row in map(self._effect, effects) if row]
        heard = self._event(event)
        if heard or shown:
            self.rows.append(f"{me} <- {heard or self._plain(event)}")
            self.rows += [f"{me}      -> {row}" for row in shown]

    def _plain(self, event: Event) -> str:
        """What is worth a row only for what came of it."""
        if isinstance(event, Received):
            return f"{type(event.message).__name__} from {self.names[event.sender]}"
        return type(event).__name__

    # words ---------------------------------------------------------------------------------------------------
    def _event(self, event: Event) -> str:
        match event:
            case Received(sender, message):
                said = self._message(message)
                return f"{said} from {self.names[sender]}" if said else ""
            case Appended(_, _, facts):
                return f"Appended {self._facts(facts)}"
            case Stored(_, facts, _, dropped):
                return f"Stored {self._facts(facts)}" + "".join(f", dropped: {d.reason}" for d in dropped)
            case EntriesRead(_, entries):
                return f"EntriesRead {self._entries(entries)}"
            case HookArrived(_, hook):
                return f"HookArrived {hook.key}"
            case WhoServes(_, model):
                return f"WhoServes {model}"
            case StepFinished(_, value, error):
                return f"StepFinished {'ok' if value is not None else error}"
            case LinkUp(peer) | LinkDown(peer):
                return f"{type(event).__name__} {self.names[peer]}"
            case HardStateSaved():
                return "HardStateSaved"
            case DeadlineReached():
                return ""
            case _:
                return type(event).__name__

    def _effect(self, effect: Effect) -> str:
        match effect:
            case Send(to, message):
                said = self._message(message)
                return f"{said} to {self.names[to]}" if said else ""
            case Append(_, records):
                return f"Append {', '.join(record.kind for record in records)}"
            case Store(_, entries):
                return f"Store {self._entries(entries)}"
            case Read(_, spans):
                return "Read " + ", ".join(f"{self._log(s.log)} {s.first}-{s.last}" for s in spans)
            case SaveHardState(_, state):
                return f"SaveHardState term {state.term}"
            case Ask():
                return "Ask the model"
            case CallOut(_, _, service, operation):
                return f"CallOut {service}.{operation}"
            case Answer(_, value):
                return self._answer(value)
            case Noted(note):
                return self._note(note)
            case _:
                return type(effect).__name__

    def _answer(self, value: object) -> str:
        match value:
            case Choice(node, _, model):
                return f"Answer {self.names[node]} serves {model}"
            case HookTaken(run, duplicate):
                return f"Answer taken{', seen before' if duplicate else ''}{', it causes a run' if run else ''}"
            case _:
                return f"Answer {type(value).__name__}"

    def _note(self, note: object) -> str:
        match note:
            case Durable(_, facts, copies):
                return f"Durable {self._facts(facts)} on {copies}"
            case RunMoved(_, _, step, outcome):
                return f"RunMoved {step}: {outcome}"
            case LedgerGrew():
                return ""
            case LeaderChanged(term, leader):
                return f"LeaderChanged term {term}: {self.names[leader] if leader else 'nobody'}"
            case MemberUp(node):
                return f"MemberUp {self.names[node]}"
            case MemberDown(node, _, state, why):
                return f"MemberDown {self.names[node]} {state}: {self._named(why)}"
            case _:
                return type(note).__name__

    def _message(self, message: PeerMessage) -> str:
        match message:
            case Ping() | PingReq() | Ack() | Nack() | Heartbeat() | Held(_, _, None) | PushPull() | Gossip():
                return ""
            case Held(term, _, heads):
                return f"Held term {term} {self._heads(heads or ())}"
            case Push(term, entries):
                return f"Push term {term} {self._entries(entries)}"
            case Batch(entries):
                return f"Batch {self._entries(entries)}"
            case Want(spans):
                return "Want " + ", ".join(f"{self._log(s.log)} {s.first}-{s.last}" for s in spans)
            case ForwardHook(_, hook):
                return f"ForwardHook {hook.key}"
            case HookStored(_, stored):
                return f"HookStored {'taken' if stored else 'refused'}"
            case _:
                return type(message).__name__

    def _log(self, log: LogId) -> str:
        return self.names[log.origin]

    def _heads(self, heads: Sequence[Head]) -> str:
        return " ".join(sorted(f"{self._log(head.log)}:{head.seq}" for head in heads))

    def _facts(self, facts: Sequence[Fact]) -> str:
        return " ".join(f"{self._log(fact.log)}:{fact.seq} {fact.kind}" for fact in facts) or "nothing new"

    def _entries(self, entries: Sequence[Entry]) -> str:
        places = []
        for entry in entries:
            header = decode_header(entry.header)
            assert not isinstance(header, Dropped)
            places.append(f"{self._log(header.log)}:{header.seq} {header.kind}")
        return " ".join(places) or "nothing"

    def _named(self, text: str) -> str:
        for node, letter in self.names.items():
            text = text.replace(node, letter)
        return text


def webhook(story: Story) -> None:
    story.begin(3)
    story.say("B, which follows, is given a webhook that causes a run")
    story.world.hands.give(story.actor("B"), Hook("sim", "hook-1", "create", b"{}"))
    story.play(5.0)
    story.say("the provider sends it again, this time to A")
    story.world.hands.give(story.actor("A"), Hook("sim", "hook-1", "create", b"{}"))
    story.play(1.0)


def completion(story: Story) -> None:
    facts = Facts(name="pi-2", models=(ModelFacts(MODEL, prefill_tps=40.0, decode_tps=8.0),))
    story.begin(3, facts)
    holder = story.names[story.world.actors[2].disk.node]
    for name in "ABC":
        story.say(f"{name} is asked; {holder} holds the model")
        story.world.hands.ask(story.actor(name), lambda ticket: WhoServes(ticket, MODEL))
        story.play(0.1)
    story.say("a model that nobody holds")
    story.world.hands.ask(story.actor("B"), lambda ticket: WhoServes(ticket, "unknown"))
    story.play(0.1)


def join(story: Story) -> None:
    story.begin(3)
    story.say("D starts, and finds the others")
    story.world.boot(story.actor("D"))
    story.play(5.0)
    story.say("a webhook is now copied to D as well, which does not count")
    story.world.hands.give(story.actor("A"), Hook("sim", "hook-1", "update", b"{}"))
    story.play(2.0)


def sync(story: Story) -> None:
    story.begin(3)
    c, network = story.actor("C"), story.world.network
    story.say("C is cut off; its link is found dead after the silent deadline")
    for name in "AB":
        network.cut(story.actor(name).disk.node, c.disk.node)
        network.cut(c.disk.node, story.actor(name).disk.node)
    story.play(10.0)
    story.say("A takes two webhooks without it")
    for key in ("hook-1", "hook-2"):
        story.world.hands.give(story.actor("A"), Hook("sim", key, "update", b"{}"))
        story.play(1.0)
    story.say("the cut is mended")
    network.heal()
    story.play(5.0)


STORIES: dict[str, Callable[[Story], None]] = {
    "webhook": webhook, "completion": completion, "join": join, "sync": sync,
}  # fmt: skip


def tell(name: str) -> str:
    """The rows of one story."""
    with closing(World(Plan(1, preset="pi"))) as world:
        story = Story(world)
        STORIES[name](story)
        return "\n".join(story.rows) + "\n"
