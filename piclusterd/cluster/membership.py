"""Who is here: SWIM with Lifeguard, over links instead of datagrams.

Owns the member list. Guides scheduling and pages; decides nothing that must be right (leaders fall to election timers,
never to SWIM). A link coming up makes a member; a link going down starts suspicion at once and never means death.

    every period      A ──Ping──▶ B ──Ack──▶ A
    no Ack in time    A ──PingReq(B)──▶ C ──Ping──▶ B ──Ack──▶ C ──Ack──▶ A     C ──Nack──▶ A: C hears us, B is slow
    period over       A: B is suspect ──Gossip──▶ all     B: "alive, incarnation + 1" ──Gossip──▶ all
    suspicion over    A: B has failed (it stays listed, and refutes when it comes back) until it is removed (`removals`)

What is believed of what others say is `belief`'s. Only the subject raises its incarnation. Facts are replaced as a
whole by the higher version, whatever the state: a boot starts its versions above all of the boot before.

Who is slow, they or we (Lifeguard, arXiv 1707.00788; `suspicion`, `probing`): our health stretches our probes, others'
confirmations shorten a suspicion, a suspect is told so at once. And a node that did not run (it was told so, or was
called late) discards the probe it slept through: what it did not hear in that time proves nothing.

Evidence against gossip: a peer that we hear is not believed to have failed; it is told of the rumour and refutes it. A
peer that we list as failed and that speaks is sent its obituary, at most once in `suspect_min_s` (foca#25: such answers
flooded). A link that closes again and again is left to the probes.

Spreading. Up to PUSH_ALL_MAX members: every change to every link, at once, passed on by whoever it is new to. Above:
`broadcast`, on pings and in rounds of random gossip. Always: a comparison of lists with a random peer, digests first
(`exchange`), which alone carries facts in a large cluster; `own_facts` says when our own are worth a new version. In a
small one the digest also rides on pings, so that what was lost on the way is noticed within a probe or two.

Assumed of the hands: all members are linked as far as the network lets them, directly or through a neighbour
(`upkeep.keep_linked` dials whom gossip names, `links` says how many). In a large one, who was named just now and is not
linked yet is neither probed nor told news: it would not get them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from random import Random

import msgspec

from ..events import (
    DeadlineReached,
    Event,
    FactsChanged,
    LinkDown,
    LinkUp,
    LoopLagged,
    Output,
    Received,
    Send,
    Shutdown,
)
from ..ids import NodeId
from ..views import MemberView
from ..wire import Ack, Facts, Gossip, Member, Nack, PeerMessage, Ping, PingReq, PushPull
from .belief import Belief
from .broadcast import Broadcast
from .exchange import ListDigest, answers, digests
from .own_facts import OwnFacts
from .probing import Probe, Prober, Relay
from .roster import HERE, LINKING_S, Peer, Roster, bare
from .suspicion import Guards
from .timings import Timings

PUSH_ALL_MAX = 16
GOSSIP_FANOUT = 3
FAREWELLS = 6
"""Peers of a large cluster that are told at once when we leave: there is no second round."""
FAILED_PART = 0.25
"""Of list comparisons tried with a member that has failed: how the halves of a partition find each other again."""
ANSWER_PART = 0.5
"""Of `push_pull_s` between two comparisons of a large cluster that one node answers: whom chance makes many nodes'
partner would send all of them its list (17 KB/s at N = 1000). The asker tries another next time."""
FLAP_WINDOW_S = 60.0
FLAPS_MAX = 3
"""Closed links of one peer in that window that start a suspicion (Serf's flap window)."""
FACTS_SHIFT = 20
"""Incarnation << 20 leaves room for a million versions of facts before the next incarnation's."""


class Membership:
    def __init__(
        self,
        me: NodeId,
        facts: Facts,
        incarnation: int,
        timings: Timings,
        rng: Random,
        digest: Callable[[], bytes],
        now: float,
        guards: Guards = Guards(),  # noqa: B008 (frozen)
    ) -> None:
        """`incarnation` must be higher than any this node ever told (a persisted boot counter, shifted left)."""
        first = msgspec.structs.replace(facts, version=(incarnation << FACTS_SHIFT) + max(1, facts.version))
        self.me = me
        self.roster = Roster(Member(me, incarnation, "alive", first))
        self._prober = Prober(timings, rng, guards, now)
        self._own = OwnFacts(msgspec.structs.replace(facts, version=0), now)
        self._broadcast = Broadcast()
        self._list_digest = ListDigest(self.roster)
        self._guards = guards
        self._timings = timings
        self._rng = rng
        self._digest = digest
        self._started = now
        self._links: dict[NodeId, None] = {}
        self._belief = Belief(self.roster, timings, guards, self._prober.health, self._links, self._spread)
        self._next_push_pull = now + timings.push_pull_s
        self._next_gossip = float("inf")
        self._answered = float("-inf")
        self._stall_ended = float("-inf")

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def mine(self) -> Member:
        return self.roster.mine

    @property
    def peers(self) -> dict[NodeId, Peer]:
        return self.roster.peers

    @property
    def links(self) -> Collection[NodeId]:
        """Whom a message would reach just now."""
        return self._links.keys()

    @property
    def health(self) -> int:
        """0: well, up to HEALTH_MAX: it is probably us who are slow."""
        return self._prober.health.score

    @property
    def small(self) -> bool:
        """Few enough to tell everybody everything directly."""
        return len(self.peers) < PUSH_ALL_MAX

    def members(self) -> tuple[Member, ...]:
        return self.roster.members()

    def alive(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members() if m.state in HERE)

    @property
    def own_facts(self) -> Facts:
        """Our own, as last read."""
        return self._own.newest

    def facts(self, node: NodeId) -> Facts | None:
        member = self.mine if node == self.me else self.peers[node].member if node in self.peers else None
        return member.facts if member else None

    def views(self, voters: tuple[NodeId, ...], now: float) -> tuple[MemberView, ...]:
        me = MemberView(self.me, self.mine.state, now - self._started, None, self.mine.facts, self.me in voters, "")
        others = (
            MemberView(
                node,
                peer.member.state,
                now - peer.since,
                now - peer.heard,
                peer.member.facts,
                node in voters,
                peer.told(now),
            )
            for node, peer in sorted(self.peers.items())
        )
        return (me, *others)

    def deadline(self) -> float:
        due = min(self._prober.deadline(), self._next_push_pull, self._next_gossip, self._own.due)
        suspects = self.roster.suspects
        return min(due, *[suspicion.due for suspicion in suspects.values()]) if suspects else due

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case Received(sender, message):
                return [*self._receive(sender, message, now), *self._obituary(sender, now)]
            case DeadlineReached():
                return self._tick(now)
            case LinkUp(peer):
                return self._link_up(peer, now)
            case LinkDown(peer):
                return self._link_down(peer, now)
            case FactsChanged(facts):
                return self._read_facts(facts, now)
            case LoopLagged(seconds):
                return self._stalled(seconds, now)
            case Shutdown():
                self.roster.mine = msgspec.structs.replace(self.mine, state="left")
                told = list(self._links) if self.small else self._some(FAREWELLS, now)
                return [Send(peer, Gossip((bare(self.mine),))) for peer in told]
            case _:
                return []

    def learn(self, members: Iterable[Member], now: float) -> None:
        """Take a list of long known members (a rehearsal, an address book) as it is; nobody is told."""
        for member in members:
            if member.node != self.me:
                self.roster.add(member, now - LINKING_S)

    def remove(self, node: NodeId, now: float) -> list[Output]:
        """List `node` never again: its owner removed it. Others hear of it at once, and for good from the ledger."""
        self.roster.banned[node] = None
        self._links.pop(node, None)  # it is about to be cut, and would only protest
        peer = self.peers.get(node)
        tombstone = Member(node, peer.member.incarnation, "removed", Facts()) if peer else None
        return self._belief.bury(tombstone, self.me, now) if tombstone else []

    def _receive(self, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
        peer = self.peers.get(sender)
        if peer is not None:
            peer.heard = now
            if isinstance(message, Ping | Ack):
                peer.turn = now
        match message:
            case Ping(seq, _, members, listed):
                out = self._belief.merge_all(members, sender, now)
                doubted = any(member.node == self.me for member in members)  # a refutation sent before may be lost
                mine = (bare(self.mine),) if doubted else ()
                answer = Ack(seq, self._digest(), (*mine, *self._news()), self._listed())
                return [*out, Send(sender, answer), *self._same_list(sender, listed)]
            case Ack(seq, _, members, listed):
                out = self._belief.merge_all(members, sender, now)
                return [*out, *self._acked(seq, sender, now), *self._same_list(sender, listed)]
            case PingReq(seq, target):
                return self._relay(sender, seq, target, now)
            case Nack(seq):
                self._prober.nacked(seq)
                return []
            case Gossip(members):
                return self._belief.merge_all(members, sender, now)
            case PushPull():
                return [*self._belief.merge_all(message.members, sender, now), *self._compared(sender, message, now)]
            case _:
                return []

    # links ---------------------------------------------------------------------------------------------------
    def _link_up(self, node: NodeId, now: float) -> list[Output]:
        """It is here: it gets our own line, and what we thought of it where that was worse, so that it can refute."""
        self._links[node] = None
        out = self._belief.merge(Member(node, 0, "alive", Facts()), node, now)
        if node in self.peers:
            self.peers[node].heard = now
        known = self.roster.line_of(node)
        rumour = (bare(known),) if known and known.state != "alive" else ()
        return [*out, Send(node, PushPull((self.mine, *rumour), True, digests(self.roster)))]

    def _link_down(self, node: NodeId, now: float) -> list[Output]:
        self._links.pop(node, None)
        peer = self.peers.get(node)
        if peer is None:
            return []
        peer.closed = (*(at for at in peer.closed if now - at < FLAP_WINDOW_S), now)[-FLAPS_MAX - 1 :]
        if len(peer.closed) > FLAPS_MAX:
            peer.note("its link keeps closing", now)
            return []
        return self._belief.suspect(node, "its link closed", now)

    # time ----------------------------------------------------------------------------------------------------
    def _tick(self, now: float) -> list[Output]:
        out = self._stalled(now - self.deadline(), now)
        out += [Send(relay.asker, Nack(relay.seq)) for relay in self._prober.nacks_due(now)]
        if probe := self._prober.overdue(now):
            out += self._ask_others(probe)
        if self._prober.next_at <= now:
            out += self._next_probe(now)
        if self._own.due <= now:
            out += self._tell_facts(now)
        if self._next_push_pull <= now:
            out += self._push_pull(now)
        for node in [node for node, suspicion in self.roster.suspects.items() if suspicion.due <= now]:
            out += self._belief.fail(node, now)
        if self._next_gossip <= now:
            out += self._gossip(now)
        return out

    def _stalled(self, seconds: float, now: float) -> list[Output]:
        """We did not run for the last `seconds`; told twice, it counts once."""
        asleep = min(seconds, now - self._stall_ended)
        if self._guards.loop_lag and asleep > self._timings.probe_timeout_s:
            self._stall_ended = now
            self._prober.stalled()
            for suspicion in self.roster.suspects.values():
                suspicion.postpone(asleep)
        return []

    # probing -------------------------------------------------------------------------------------------------
    def _next_probe(self, now: float) -> list[Output]:
        out: list[Output] = []
        if failed := self._prober.end(now):
            helped = f"; {failed.nacks} of {failed.helpers} helpers heard nothing either" if failed.helpers else ""
            out = self._belief.suspect(failed.target, f"no answer to our probe{helped}", now)
        if self.small:  # a round in random order takes up to 2N - 3 periods from one turn to the next
            target = min(self.roster.here(), key=lambda node: self.peers[node].turn, default=None)
        else:
            target = self._prober.target(self.roster.within_reach(self._links, now))
        if target is None:
            return out
        self.peers[target].turn = now
        return [*out, self._ping(target, self._prober.start(target, now))]

    def _ping(self, target: NodeId, seq: int) -> Send:
        """A suspect is told so directly, so that it can refute at once (Lifeguard's buddy system)."""
        peer = self.peers.get(target)
        doubted = peer is not None and peer.member.state == "suspect" and self._guards.lifeguard
        warning = (bare(peer.member, self.me),) if peer is not None and doubted else ()
        return Send(target, Ping(seq, self._digest(), (*warning, *self._news()), self._listed()))

    def _ask_others(self, probe: Probe) -> list[Output]:
        near = self._links if self.small else self.roster.here()
        able = [n for n in near if n != probe.target and n in self.peers and self.peers[n].member.state == "alive"]
        return [Send(helper, PingReq(probe.seq, probe.target)) for helper in self._prober.ask(probe, able)]

    def _relay(self, asker: NodeId, seq: int, target: NodeId, now: float) -> list[Output]:
        if target not in self._links and (self.small or target not in self.peers):
            return [Send(asker, Nack(seq))]
        ours = self._prober.relay(asker, seq, now)
        return [] if ours is None else [self._ping(target, ours)]

    def _acked(self, seq: int, sender: NodeId, now: float) -> list[Output]:
        whose = self._prober.acked(seq)
        if isinstance(whose, Relay):
            return [Send(whose.asker, Ack(whose.seq, self._digest()))]
        if whose in self.peers:
            self.peers[whose].heard = now
            if whose != sender:
                self.peers[whose].note(f"no answer to our probe, but to {self.roster.called(sender)}'s", now)
        return []

    def _obituary(self, sender: NodeId, now: float) -> list[Output]:
        """Whoever is listed as gone and speaks is told so, now and then."""
        peer = self.peers.get(sender) or self.roster.removed.get(sender)
        if peer is None or peer.member.state in HERE or now - peer.obituary_sent < self._timings.suspect_min_s:
            return []
        peer.obituary_sent = now
        return [Send(sender, Gossip((bare(peer.member),)))]

    # our own facts -------------------------------------------------------------------------------------------
    def _read_facts(self, facts: Facts, now: float) -> list[Output]:
        self._own.read(msgspec.structs.replace(facts, version=0), self.small, self.roster.size, now)
        shown = msgspec.structs.replace(facts, version=self.mine.facts.version)
        self.roster.mine = msgspec.structs.replace(self.mine, facts=shown)
        return self._tell_facts(now) if self._own.due <= now else []

    def _tell_facts(self, now: float) -> list[Output]:
        """In a large cluster only what routing needs is broadcast; readings travel by comparison of lists."""
        reshaped = self._own.reshaped
        self._own.told(now)
        facts = msgspec.structs.replace(self.mine.facts, version=self.mine.facts.version + 1)
        self.roster.mine = msgspec.structs.replace(self.mine, facts=facts)
        return self._spread(self.mine, self.me, now) if self.small or reshaped else []

    # spreading -----------------------------------------------------------------------------------------------
    def _spread(self, news: Member, source: NodeId, now: float) -> list[Output]:
        if self.small:
            return [Send(peer, Gossip((news,))) for peer in self._links if peer != source]
        self._broadcast.add(news)
        self._next_gossip = min(self._next_gossip, now + self._rng.uniform(0.0, self._timings.gossip_s))
        return []

    def _gossip(self, now: float) -> list[Output]:
        """One round of random gossip; the next while there is news left."""
        peers = self._some(GOSSIP_FANOUT, now)
        news = self._broadcast.take(self.roster.size, max(1, len(peers)))
        self._next_gossip = now + self._timings.gossip_s if self._broadcast else float("inf")
        return [Send(peer, Gossip(news)) for peer in peers if news]

    def _news(self) -> tuple[Member, ...]:
        """What rides on a ping; the oldest news has the next seat when it is full."""
        return self._broadcast.take(self.roster.size) if self._broadcast else ()

    def _some(self, count: int, now: float) -> list[NodeId]:
        here = self.roster.within_reach(self._links, now)
        return self._rng.sample(here, min(count, len(here)))

    # comparing lists -----------------------------------------------------------------------------------------
    def _push_pull(self, now: float) -> list[Output]:
        self._next_push_pull = now + self._timings.push_pull_s * self._rng.uniform(0.5, 1.5)
        self.roster.forget(now)
        gone = self.roster.gone()
        if gone and self._rng.random() < FAILED_PART:
            partners: Sequence[NodeId] = gone
        else:
            partners = list(self._links) if self.small else self.roster.here()
        return [Send(self._rng.choice(partners), PushPull((), True, digests(self.roster)))] if partners else []

    def _compared(self, peer: NodeId, theirs: PushPull, now: float) -> list[Output]:
        routine = not self.small and theirs.digests and theirs.lines is None and not theirs.members
        if routine and now - self._answered < ANSWER_PART * self._timings.push_pull_s:
            return []
        if routine:
            self._answered = now
        return [Send(peer, answer) for answer in answers(self.roster, theirs)]

    def _listed(self) -> bytes:
        return self._list_digest() if self.small else b""

    def _same_list(self, peer: NodeId, theirs: bytes) -> list[Output]:
        """What rode on a ping of a small cluster; where it is not ours, as if `peer` had begun a comparison."""
        if not theirs or not self.small or theirs == self._list_digest():
            return []
        return [Send(peer, answer) for answer in answers(self.roster, PushPull((), True, (theirs,)))]
