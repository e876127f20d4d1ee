"""What to believe of what is said: news against the list, accusations against evidence (SWIM §4.2, Lifeguard §IV.B).

    merge(news) ──newer──▶ the list changes ──▶ MemberUp | MemberDown, and the news is passed on
                ──same suspicion, another accuser──▶ the wait gets shorter, passed on while that matters
                ──about ourselves, and wrong──▶ incarnation + 1, passed on

Precedence: the higher incarnation wins; within one, removed > left > failed > suspect > alive. Facts go by their own
version. A peer that we hear is not believed to have failed: it becomes a suspect, which refutes. Sends nothing itself:
`spread` is given what to pass on, and whom it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable

import msgspec

from ..events import MemberDown, MemberUp, Output
from ..ids import NodeId, is_node_id
from ..wire import MEMBERS_MAX, Facts, Member
from .own_facts import shape
from .roster import ALIVE_AGAIN, HERE, RANK, Peer, Roster, bare
from .suspicion import Guards, LocalHealth, Suspicion
from .timings import Timings

Spread = Callable[[Member, NodeId, float], list[Output]]
"""(news, whom it came from, now)"""
SAYS = {"suspect": "finds it silent", "failed": "says it failed", "left": "says it left"}
FRESH_PROBES = 2.0
"""Probe periods within which a peer must have spoken to be called heard."""


class Belief:
    def __init__(
        self,
        roster: Roster,
        timings: Timings,
        guards: Guards,
        health: LocalHealth,
        links: Container[NodeId],
        spread: Spread,
    ) -> None:
        self._me = roster.mine.node
        self._roster = roster
        self._timings = timings
        self._guards = guards
        self._health = health
        self._links = links
        self._spread = spread

    def merge_all(self, members: Iterable[Member], source: NodeId, now: float) -> list[Output]:
        return [out for member in members for out in self.merge(member, source, now)]

    def merge(self, news: Member, source: NodeId, now: float) -> list[Output]:
        """What follows from `source` saying `news`. Nonsense and old news change nothing."""
        if news.state not in RANK or not is_node_id(news.node) or news.node in self._roster.banned:
            return []
        if news.node == self._me:
            return self._refute(news, now)
        if news.state == "removed":
            return self.bury(news, source, now)
        buried = self._roster.removed.get(news.node)
        if buried is not None and news.incarnation <= buried.member.incarnation:
            return []
        peer = self._roster.peers.get(news.node)
        if peer is None:
            return self._meet(news, source, now)
        if news.state == "failed" and source != self._me and self._hears(peer, now):
            news = msgspec.structs.replace(news, state="suspect")
        return self._weigh(peer, news, source, now)

    def suspect(self, node: NodeId, why: str, now: float) -> list[Output]:
        """By our own evidence: the first accusation, or a confirmation of others'."""
        peer = self._roster.peers.get(node)
        if peer is None or peer.member.state not in HERE:
            return []
        peer.note(why, now)
        return self.merge(Member(node, peer.member.incarnation, "suspect", Facts(), self._me), self._me, now)

    def fail(self, node: NodeId, now: float) -> list[Output]:
        """Its suspicion is over."""
        peer = self._roster.peers[node]
        waited = now - self._roster.suspects[node].since
        peer.note(f"not refuted in {waited:.0f} s", now)
        return self.merge(Member(node, peer.member.incarnation, "failed", Facts()), self._me, now)

    def bury(self, tombstone: Member, source: NodeId, now: float) -> list[Output]:
        """List it no longer, unless it was never met or has come back since."""
        peer = self._roster.peers.get(tombstone.node)
        if peer is None or tombstone.incarnation < peer.member.incarnation:
            return []
        name = self._roster.called(tombstone.node)
        self._roster.bury(peer, bare(tombstone), now)
        note = MemberDown(tombstone.node, name, "removed", f"removed, says {self._roster.called(source)}")
        return [note, *self._spread(bare(tombstone), source, now)]

    # weighing ------------------------------------------------------------------------------------------------
    def _weigh(self, peer: Peer, news: Member, source: NodeId, now: float) -> list[Output]:
        old = peer.member
        fresh = news.facts.version > old.facts.version
        facts = news.facts if fresh else old.facts
        accuser = news.accuser or source
        if (news.incarnation, RANK[news.state]) > (old.incarnation, RANK[old.state]):
            self._roster.put(peer, Member(news.node, news.incarnation, news.state, facts))
            out = self._changed(peer, old.state, accuser, source, now)
            told = peer.member if fresh else bare(peer.member, accuser)
            return [*out, *self._spread(told, source, now)]
        if fresh:
            self._roster.put(peer, msgspec.structs.replace(old, facts=facts))
            if shape(old.facts) != shape(facts):  # readings are told by their subject alone, or when lists are compared
                return self._spread(peer.member, source, now)
        if news.state == "suspect" and news.incarnation == old.incarnation and peer.suspicion is not None:
            return self._confirm(peer, peer.suspicion, accuser, source, now)
        return []

    def _hears(self, peer: Peer, now: float) -> bool:
        """Its link is up and it spoke just now."""
        return peer.member.node in self._links and now - peer.heard <= FRESH_PROBES * self._timings.probe_s

    def _meet(self, news: Member, source: NodeId, now: float) -> list[Output]:
        """The first we hear of it. That a stranger failed or left long ago is no event."""
        if len(self._roster.peers) >= MEMBERS_MAX:
            return []
        peer = self._roster.add(Member(news.node, news.incarnation, news.state, news.facts), now)
        if news.state not in HERE:
            return []
        out = self._changed(peer, "", news.accuser or source, source, now)
        return [*out, *self._spread(news, source, now)]

    def _changed(self, peer: Peer, before: str, accuser: NodeId, source: NodeId, now: float) -> list[Output]:
        member = peer.member
        self._roster.suspect(peer, self._suspicion(accuser, now) if member.state == "suspect" else None)
        if member.state == before:
            return []
        peer.since = now
        if member.state == "alive":
            if before:
                peer.note(ALIVE_AGAIN, now)
            return [MemberUp(member.node, member.facts.name)]
        if source != self._me:
            peer.note(f"{self._roster.called(accuser)} {SAYS[member.state]}", now)
        return [MemberDown(member.node, member.facts.name, member.state, peer.reasons())]

    def _suspicion(self, accuser: NodeId, now: float) -> Suspicion:
        scale = max(1.0, math.log10(self._roster.size))
        shortest = self._timings.suspect_min_s * scale
        longest = self._timings.suspect_max_s * scale if self._guards.lifeguard else shortest
        suspicion = Suspicion(now, shortest, longest, others=self._roster.size - 2)
        suspicion.accuse(accuser, now)
        return suspicion

    def _confirm(self, peer: Peer, doubt: Suspicion, accuser: NodeId, source: NodeId, now: float) -> list[Output]:
        if not doubt.accuse(accuser, now):
            return []
        if accuser != self._me:
            peer.note(f"{self._roster.called(accuser)} finds it silent too", now)
        return self._spread(bare(peer.member, accuser), source, now)

    def _refute(self, news: Member, now: float) -> list[Output]:
        """What is said of ourselves, and wrong: only we can raise our incarnation, above any earlier life's too."""
        mine = self._roster.mine
        older = news.facts.version > mine.facts.version
        if older:
            mine = msgspec.structs.replace(
                mine, facts=msgspec.structs.replace(mine.facts, version=news.facts.version + 1)
            )
        accused = (news.incarnation, RANK[news.state]) > (mine.incarnation, RANK["alive"]) and mine.state != "left"
        if accused:
            self._health.add(1)
            mine = msgspec.structs.replace(mine, incarnation=news.incarnation + 1)
        self._roster.mine = mine
        return self._spread(mine if older else bare(mine), self._me, now) if older or accused else []
