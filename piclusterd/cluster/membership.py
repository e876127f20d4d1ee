"""Who is here: SWIM with Lifeguard, over links instead of datagrams.

Owns the member list. Guides scheduling and pages; decides nothing that must be right (leaders fall to election timers,
never to SWIM). A link coming up makes a member; a link going down starts suspicion at once and never means death.

    every period      A ──Ping──▶ B ──Ack──▶ A
    no Ack in time    A ──PingReq(B)──▶ C ──Ping──▶ B ──Ack──▶ C ──Ack──▶ A     C ──Nack──▶ A: C hears us, B is slow
    period over       A: B is suspect ──Gossip──▶ all     B: "alive, incarnation + 1" ──Gossip──▶ all
    suspicion over    A: B has failed (it stays listed, and refutes when it comes back)

Precedence (SWIM §4.2): the higher incarnation wins; within one, left > failed > suspect > alive. Only the subject
raises its incarnation. Facts are replaced as a whole by the higher (incarnation, version).

Lifeguard (arXiv 1707.00788): `health` counts signs that *we* are the slow one (missing nacks, refuted suspicions, a
stalled loop) and stretches our probes; confirmations by others shorten a suspicion from max to min.

Up to PUSH_ALL_MAX members every change is sent to everybody (random gossip misses some at N = 4: measured); a full
push-pull with one random peer mends the rest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import msgspec

from ..events import (
    DeadlineReached,
    Event,
    FactsChanged,
    LinkDown,
    LinkUp,
    LoopLagged,
    MemberDown,
    MemberUp,
    MemberView,
    Output,
    Received,
    Send,
    Shutdown,
)
from ..ids import NodeId
from ..wire import Ack, Facts, Gossip, Member, Nack, PeerMessage, Ping, PingReq, PushPull
from .timings import Timings

PUSH_ALL_MAX = 16
GOSSIP_FANOUT = 3
INDIRECT = 3
"""Helpers asked when a direct probe fails (memberlist's default)."""
HEALTH_MAX = 7
HISTORY = 8
"""Lines of probe history kept a peer: the answer to "why was it marked dead?"."""
CONFIRMATIONS_WANTED = 2
RANK = {"alive": 0, "suspect": 1, "failed": 2, "left": 3}


@dataclass(slots=True)
class Peer:
    member: Member
    since: float
    heard: float
    suspected_at: float = 0.0
    accusers: dict[NodeId, None] = field(default_factory=dict)
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY))


@dataclass(slots=True)
class Probe:
    """The probe of this period."""

    target: NodeId
    seq: int
    indirect_at: float
    ends: float
    nacks_expected: int = 0
    nacks: int = 0


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
    ) -> None:
        """`incarnation` must be higher than any this node ever told (a persisted boot counter, shifted left)."""
        self.me = me
        self.mine = Member(me, incarnation, "alive", facts)
        self.health = 0
        self.peers: dict[NodeId, Peer] = {}
        self._timings = timings
        self._rng = rng
        self._digest = digest
        self._started = now
        self._links: dict[NodeId, None] = {}
        self._round: list[NodeId] = []
        self._probe: Probe | None = None
        self._relayed: dict[int, tuple[NodeId, int, float]] = {}
        """Our ping's seq → (asker, its seq, when to nack)."""
        self._last_seq = 0
        self._next_probe = now + timings.probe_s
        self._next_push_pull = now + timings.push_pull_s

    # looks ---------------------------------------------------------------------------------------------------
    def members(self) -> tuple[Member, ...]:
        return (self.mine, *(self.peers[node].member for node in sorted(self.peers)))

    def alive(self) -> tuple[Member, ...]:
        return tuple(m for m in self.members() if m.state in ("alive", "suspect"))

    def facts(self, node: NodeId) -> Facts | None:
        if node == self.me:
            return self.mine.facts
        peer = self.peers.get(node)
        return peer.member.facts if peer else None

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
                "; ".join(peer.history),
            )
            for node, peer in sorted(self.peers.items())
        )
        return (me, *others)

    def deadline(self) -> float:
        times = [self._next_probe, self._next_push_pull]
        if self._probe:
            times.append(self._probe.indirect_at)
        times += [due for _, _, due in self._relayed.values()]
        times += [self._fails_at(p) for p in self.peers.values() if p.member.state == "suspect"]
        return min(times)

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case Received(sender, message):
                return self._receive(sender, message, now)
            case DeadlineReached():
                return self._tick(now)
            case LinkUp(peer):
                self._links[peer] = None
                out = self._merge(Member(peer, 0, "alive", Facts()), peer, now)
                return [*out, Send(peer, PushPull(self.members(), reply=True))]
            case LinkDown(peer):
                self._links.pop(peer, None)
                return self._suspect(peer, "its link closed", now)
            case FactsChanged(facts):
                return self._say_of_self(facts)
            case LoopLagged(seconds):
                return self._stalled(seconds, now)
            case Shutdown():
                self.mine = msgspec.structs.replace(self.mine, state="left")
                return self._spread((self.mine,))
            case _:
                return []

    def _receive(self, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
        peer = self.peers.get(sender)
        if peer is not None:
            peer.heard = now
        match message:
            case Ping(seq, _, members):
                return [*self._merge_all(members, sender, now), Send(sender, Ack(seq, self._digest()))]
            case Ack(seq, _, members):
                return [*self._merge_all(members, sender, now), *self._on_ack(sender, seq, now)]
            case PingReq(seq, target):
                return self._relay(sender, seq, target, now)
            case Nack(seq) if self._probe and seq == self._probe.seq:
                self._probe.nacks += 1
                return []
            case Gossip(members):
                return self._merge_all(members, sender, now)
            case PushPull(members, reply):
                out = self._merge_all(members, sender, now)
                return [*out, Send(sender, PushPull(self.members(), reply=False))] if reply else out
            case _:
                return []

    # probing -------------------------------------------------------------------------------------------------
    def _tick(self, now: float) -> list[Output]:
        out = self._nack_overdue(now)
        if self._probe and self._probe.indirect_at <= now:
            out += self._ask_others(self._probe)
        if self._next_probe <= now:
            out += self._end_probe(now) + self._start_probe(now)
        if self._next_push_pull <= now:
            self._next_push_pull = now + self._timings.push_pull_s * self._rng.uniform(0.5, 1.5)
            if self._links:
                peer = self._rng.choice(list(self._links))
                out.append(Send(peer, PushPull(self.members(), reply=True)))
        overdue = [n for n, p in self.peers.items() if p.member.state == "suspect" and self._fails_at(p) <= now]
        for node in overdue:
            out += self._fail(node, now)
        return out

    def _start_probe(self, now: float) -> list[Output]:
        stretch = 1 + self.health
        self._next_probe = now + self._timings.probe_s * stretch
        target = self._next_target()
        if target is None:
            return []
        self._last_seq += 1
        direct = now + self._timings.probe_timeout_s * stretch
        self._probe = Probe(target, self._last_seq, direct, self._next_probe)
        return [Send(target, self._ping(self._last_seq, target))]

    def _next_target(self) -> NodeId | None:
        """Round-robin over a shuffled list: every member is probed within 2N - 1 periods (SWIM §4.3)."""
        while self._round:
            node = self._round.pop()
            if node in self.peers and self.peers[node].member.state in ("alive", "suspect"):
                return node
        self._round = [n for n, p in sorted(self.peers.items()) if p.member.state in ("alive", "suspect")]
        self._rng.shuffle(self._round)
        return self._round.pop() if self._round else None

    def _ping(self, seq: int, target: NodeId) -> Ping:
        """A suspect is told so directly, so that it can refute at once (Lifeguard's buddy system)."""
        suspect = self.peers[target].member if target in self.peers else None
        news = (suspect,) if suspect and suspect.state == "suspect" else ()
        return Ping(seq, self._digest(), news)

    def _on_ack(self, sender: NodeId, seq: int, now: float) -> list[Output]:
        if seq in self._relayed:
            asker, their_seq, _ = self._relayed.pop(seq)
            return [Send(asker, Ack(their_seq, self._digest()))]
        if self._probe is None or seq != self._probe.seq:
            return []
        target = self.peers.get(self._probe.target)
        self._probe = None
        self.health = max(0, self.health - 1)
        if target is not None:
            target.heard = now
        return []

    def _ask_others(self, probe: Probe) -> list[Output]:
        probe.indirect_at = float("inf")
        helpers = [n for n in self._links if n != probe.target and self.peers[n].member.state == "alive"]
        self._rng.shuffle(helpers)
        probe.nacks_expected = len(helpers[:INDIRECT])
        return [Send(helper, PingReq(probe.seq, probe.target)) for helper in helpers[:INDIRECT]]

    def _relay(self, asker: NodeId, seq: int, target: NodeId, now: float) -> list[Output]:
        if target not in self._links:
            return [Send(asker, Nack(seq))]
        self._last_seq += 1
        self._relayed[self._last_seq] = (asker, seq, now + self._timings.probe_timeout_s * 0.8)
        return [Send(target, self._ping(self._last_seq, target))]

    def _nack_overdue(self, now: float) -> list[Output]:
        late = [(ours, asker, theirs) for ours, (asker, theirs, due) in self._relayed.items() if due <= now]
        for ours, _, _ in late:
            del self._relayed[ours]
        return [Send(asker, Nack(theirs)) for _, asker, theirs in late]

    def _end_probe(self, now: float) -> list[Output]:
        probe, self._probe = self._probe, None
        if probe is None or probe.target not in self.peers:
            return []
        missing = probe.nacks_expected - probe.nacks
        self.health = min(HEALTH_MAX, self.health + (missing if probe.nacks_expected else 1))
        why = f"no answer to probe {probe.seq}, {probe.nacks} of {probe.nacks_expected} helpers heard us"
        return self._suspect(probe.target, why, now)

    def _stalled(self, seconds: float, now: float) -> list[Output]:
        """We did not run: whatever we did not hear proves nothing."""
        if seconds >= self._timings.probe_timeout_s:
            self.health = min(HEALTH_MAX, self.health + 1)
            self._probe = None
            for peer in self.peers.values():
                peer.suspected_at += seconds
        return []

    # suspicion -----------------------------------------------------------------------------------------------
    def _suspect(self, node: NodeId, why: str, now: float) -> list[Output]:
        peer = self.peers.get(node)
        if peer is None or peer.member.state != "alive":
            return []
        peer.history.append(why)
        accused = Member(node, peer.member.incarnation, "suspect", peer.member.facts)
        return self._merge(accused, self.me, now)

    def _fails_at(self, peer: Peer) -> float:
        """Lifeguard §IV.B: from max towards min as the logarithm of independent confirmations."""
        spread = self._timings.suspect_max_s - self._timings.suspect_min_s
        confirmed = min(1.0, math.log(len(peer.accusers) or 1) / math.log(CONFIRMATIONS_WANTED + 1))
        helpers = len(self.peers) > CONFIRMATIONS_WANTED
        wait = self._timings.suspect_max_s - spread * confirmed if helpers else self._timings.suspect_min_s
        return peer.suspected_at + wait

    def _fail(self, node: NodeId, now: float) -> list[Output]:
        member = self.peers[node].member
        self.peers[node].history.append("not refuted in time")
        return self._merge(Member(node, member.incarnation, "failed", member.facts), self.me, now)

    # merging -------------------------------------------------------------------------------------------------
    def _merge_all(self, members: Iterable[Member], source: NodeId, now: float) -> list[Output]:
        return [out for member in members for out in self._merge(member, source, now)]

    def _merge(self, news: Member, source: NodeId, now: float) -> list[Output]:
        if news.state not in RANK:
            return []
        if news.node == self.me:
            return self._refute(news)
        peer = self.peers.get(news.node)
        if peer is None:
            self.peers[news.node] = peer = Peer(news, now, now, suspected_at=now)
            return [*self._changed(peer, "", now, source), *self._spread((news,), source)]
        old = peer.member
        if news.state == "suspect" and old.state == "suspect" and news.incarnation == old.incarnation:
            peer.accusers[source] = None
        if (news.incarnation, RANK[news.state]) <= (old.incarnation, RANK[old.state]):
            if news.incarnation == old.incarnation and news.facts.version > old.facts.version:
                peer.member = msgspec.structs.replace(old, facts=news.facts)
            return []
        newer = (news.incarnation, news.facts.version) >= (old.incarnation, old.facts.version)
        peer.member = news if newer else msgspec.structs.replace(news, facts=old.facts)
        out = self._changed(peer, old.state, now, source)
        return [*out, *self._spread((peer.member,), source)]

    def _changed(self, peer: Peer, before: str, now: float, source: NodeId) -> list[Output]:
        member = peer.member
        if member.state == before:
            return []
        peer.since = now
        if member.state == "alive":
            peer.accusers.clear()
            return [MemberUp(member.node, member.facts.name)]
        if member.state == "suspect":
            peer.suspected_at, peer.accusers = now, {source: None}
        if source != self.me:
            peer.history.append(f"{source} says {member.state}")
        why = peer.history[-1] if peer.history else ""
        return [MemberDown(member.node, member.facts.name, member.state, why)]

    def _refute(self, news: Member) -> list[Output]:
        if self.mine.state == "left" or news.incarnation < self.mine.incarnation:
            return []
        if news.incarnation == self.mine.incarnation and news.state == "alive":
            return []
        self.health = min(HEALTH_MAX, self.health + 1)
        self.mine = msgspec.structs.replace(self.mine, incarnation=news.incarnation + 1)
        return self._spread((self.mine,))

    def _say_of_self(self, facts: Facts) -> list[Output]:
        facts = msgspec.structs.replace(facts, version=self.mine.facts.version + 1)
        self.mine = msgspec.structs.replace(self.mine, facts=facts)
        return self._spread((self.mine,))

    def _spread(self, members: tuple[Member, ...], source: NodeId | None = None) -> list[Output]:
        peers = [node for node in self._links if node != source]
        if len(self.peers) > PUSH_ALL_MAX:
            self._rng.shuffle(peers)
            peers = peers[:GOSSIP_FANOUT]
        return [Send(peer, Gossip(members)) for peer in peers]
