"""Who leads: Raft's election and nothing else of Raft.

Owns the term, the vote, the record of voters, and this node's role. Refuses to know anything of logs: the winner pulls
what its voters hold before it serves (`ledger.replicate`), so any voter may win.

    follower ──silence──▶ pre ──majority would vote──▶ candidate ──majority voted──▶ leader
        ▲                  │                              │                            │
        └──────────────────┴──── newer term, a leader ────┴──── no majority heard ─────┘

Invariants: term, vote and voters never regress on one identity, and are durable (`HardStateSaved`) before any message
that depends on them leaves: `unsaved` tells the hall to hold such messages back. At most one leader a term.

* PreVote and leader stickiness (Ongaro 2014 §9.6, §4.2.3): a node that heard a leader within `election_min_s` neither
  votes nor adopts a candidate's term, so a node that comes back from a partition disturbs nobody.
* CheckQuorum (§6.2): a leader that heard no majority for `election_max_s` steps down.
* Transfer (§3.10): `TimeoutNow` lets one voter campaign at once, past stickiness (`handover` says when and to whom;
  a leader that stops sends one and steps down).
* A node whose disk is slow waits longer before it campaigns, and one whose disk is in trouble does not (`fitness`).
  Only its own silence is stretched: stickiness and CheckQuorum speak of others, and keep the times of the preset.
* A closed link to the leader voids stickiness and brings the campaign forward: a killed process is noticed in
  milliseconds, and a majority that still hears the leader keeps it all the same.
* A voter whose link comes up while this node canvasses or campaigns is asked at once: where two of three boards were
  down, the second to be back makes the majority, and nobody waits for another election timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal

from ..events import (
    DeadlineReached,
    Deposed,
    Elected,
    Event,
    HardState,
    HardStateSaved,
    LeaderChanged,
    LinkDown,
    LinkUp,
    Output,
    Received,
    Rules,
    SaveHardState,
    Sealed,
    Send,
    Shutdown,
    Token,
)
from ..ids import NodeId, Term
from ..wire import ConfigId, Heartbeat, Held, PeerMessage, Push, RequestVote, TimeoutNow, Vote, Voters
from .timings import Timings
from .voter_config import config_id, is_newer, restamped

Role = Literal["follower", "pre", "candidate", "leader"]

ALL_RULES = Rules()
UNSAID = Voters()
"""In place of a config that is known to be held."""

UNFIT = "this node's ledger is not whole"
"""Why a leader gives up that may not stand any more."""

LINK_LOST_FRACTION = 0.5
"""After the leader's link closed, campaign within this part of `election_min_s` (random, to avoid split votes)."""


def majority(voters: int) -> int:
    """E: the fewest of `voters` that any two elections must share a member of."""
    return voters // 2 + 1


class Election:
    def __init__(
        self,
        me: NodeId,
        hard: HardState,
        timings: Timings,
        rng: Random,
        digest: Callable[[], bytes],
        now: float,
        rules: Rules = ALL_RULES,
        may_stand: Callable[[float], bool] = lambda now: True,
        may_vote: Callable[[], bool] = lambda: True,
        ails: Callable[[], bool] = lambda: False,
        stretch: Callable[[float], float] = lambda now: 1.0,
    ) -> None:
        """`may_stand`, `may_vote`: the ledger's word (`ledger.care`): who forgot must neither lead nor elect.

        `ails`, `stretch`: the disk's (`fitness`): is it in trouble, and by what are silences multiplied?
        """
        self.me = me
        self.term: Term = hard.term
        self.voted_for = hard.voted_for
        self.voters = hard.voters
        self.role: Role = "follower"
        self.leader: NodeId | None = None
        self._incarnation = hard.incarnation
        self._timings = timings
        self._rng = rng
        self._digest = digest
        self._rules = rules
        self._may_stand = may_stand
        self._may_vote = may_vote
        self._ails = ails
        self._stretch = stretch
        self._links: dict[NodeId, None] = {}
        self._votes: dict[NodeId, None] = {}
        self._contact: dict[NodeId, float] = {}
        self._holds: dict[NodeId, ConfigId | None] = {}
        """Peer → the config it last said is on its disk: it need not be sent twice a second."""
        self._heard = float("-inf")
        self._transfer = False
        self._last_token: Token = 0
        self._saved_token: Token = 0
        self._due = now + self._silence(now)

    # looks ---------------------------------------------------------------------------------------------------
    @property
    def unsaved(self) -> bool:
        """Hard state is on its way to the disk: nothing that depends on it may leave."""
        return self._saved_token != self._last_token

    @property
    def votes_here(self) -> bool:
        return self.me in self.voters.voters

    @property
    def majority(self) -> int:
        return majority(len(self.voters.voters))

    def heard_voters(self, now: float) -> int:
        """Voters this leader heard within the CheckQuorum window, itself included."""
        since = now - self._timings.election_max_s
        return sum(v == self.me or self._contact.get(v, float("-inf")) >= since for v in self.voters.voters)

    def hears(self, node: NodeId, now: float) -> bool:
        """Did this leader hear `node`, a voter or not, within the CheckQuorum window?"""
        return self._contact.get(node, float("-inf")) >= now - self._timings.election_max_s

    def reaches(self, node: NodeId, now: float) -> bool:
        """Is there a link to `node`, and does this leader hear it?"""
        return node in self._links and self.hears(node, now)

    def deadline(self) -> float:
        return self._due

    # events --------------------------------------------------------------------------------------------------
    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case Received(sender, message):
                return self._receive(sender, message, now)
            case DeadlineReached() if now >= self._due:
                return self._tick(now)
            case HardStateSaved(token):
                self._saved_token = max(self._saved_token, token)
                return self._count_votes(now)
            case Sealed(voters):
                return self._adopt_voters(voters, now)
            case LinkUp(peer):
                return self._link_made(peer)
            case LinkDown(peer):
                return self._link_lost(peer, now)
            case Shutdown():
                return self._hand_over("this node is stopping", now)
            case _:
                return []

    def _receive(self, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
        match message:
            case Heartbeat():
                return self._adopt_voters(message.voters, now) + self._on_heartbeat(sender, message, now)
            case Held(term):
                self._holds[sender] = message.config
                return self._on_held(sender, term, now)
            case RequestVote():
                return self._adopt_voters(message.voters, now) + self._on_request(sender, message, now)
            case Vote(voters=voters):
                adopted = self._adopt_voters(voters, now) if voters else []
                return adopted + self._on_vote(sender, message, now)
            case Push(term) if term > self.term:
                return self._follow(term, sender, now)
            case TimeoutNow(term) if term == self.term and sender == self.leader and self._may_campaign(now):
                return self._campaign(now, transfer=True)
            case _:
                return []

    def _tick(self, now: float) -> list[Output]:
        if self.role == "leader":
            if self._rules.check_quorum and self.heard_voters(now) < self.majority:
                return self._step_down("no majority of the voters was heard", now)
            if not self._may_stand(now):
                return self._hand_over(UNFIT, now)
            self._due = now + self._timings.heartbeat_s
            return [out for peer in self._links for out in self._heartbeat_to(peer)]
        self._due = now + self._silence(now)
        if not self._may_campaign(now):
            return []
        return self._canvass(now) if self._rules.pre_vote else self._campaign(now)

    # campaigning ---------------------------------------------------------------------------------------------
    def _may_campaign(self, now: float) -> bool:
        return self.votes_here and not self._ails() and self._may_stand(now)

    def _canvass(self, now: float) -> list[Output]:
        """PreVote: would a majority elect me? Changes nothing durable."""
        self.role = "pre"
        self._votes = {self.me: None}
        out: list[Output] = []
        if self.leader is not None:
            self.leader = None
            out.append(LeaderChanged(self.term, None))
        if len(self._votes) >= self.majority:
            return out + self._campaign(now)
        return out + self._ask_votes()

    def _campaign(self, now: float, transfer: bool = False) -> list[Output]:
        self.role = "candidate"
        self.term += 1
        self.voted_for = self.me
        self.leader = None
        self._votes = {self.me: None}
        self._transfer = transfer
        self._due = now + self._silence(now)
        return [self._save(), *self._ask_votes()]

    def _ask_votes(self) -> list[Output]:
        return [out for v in self.voters.voters if v != self.me for out in self._ask_vote(v)]

    def _ask_vote(self, voter: NodeId) -> list[Output]:
        pre = self.role == "pre"
        return [Send(voter, RequestVote(self.term + pre, pre, self.voters, self._transfer and not pre))]

    def _count_votes(self, now: float) -> list[Output]:
        if self.role == "pre" and len(self._votes) >= self.majority:
            return self._campaign(now)
        if self.role == "candidate" and not self.unsaved and len(self._votes) >= self.majority:
            return self._lead(now) if self._may_stand(now) else []
        return []

    def _lead(self, now: float) -> list[Output]:
        self.role = "leader"
        self.leader = self.me
        self._contact = dict.fromkeys(self._votes, now)
        self._due = now + self._timings.heartbeat_s
        changed = self.change(restamped(self.voters, self.term))
        return [LeaderChanged(self.term, self.me), Elected(self.term, self.voters.voters), *changed]

    def change(self, voters: Voters) -> list[Output]:
        """This leader's next config (`reconfigure` decides it): saved before anybody is told."""
        self.voters = voters
        return [self._save(), *(out for peer in self._links for out in self._heartbeat_to(peer))]

    def retire(self, why: str, now: float) -> list[Output]:
        """Hand leadership over and stop leading, for example when this node is no voter any more."""
        return self._hand_over(why, now)

    # answering -----------------------------------------------------------------------------------------------
    def _on_request(self, sender: NodeId, request: RequestVote, now: float) -> list[Output]:
        sticky = now - self._heard < self._timings.election_min_s or self.role == "leader"
        outdated = is_newer(self.voters, request.voters) or sender not in self.voters.voters
        taken = request.pre or self.voted_for is not None or self.leader is not None
        spent = request.term < self.term or (request.term == self.term and taken)
        if spent or outdated or (sticky and not request.transfer) or not self._may_vote():
            same_vote = self._may_vote() and not request.pre and request.term == self.term and self.voted_for == sender
            newer = self.voters if is_newer(self.voters, request.voters) else None
            return [Send(sender, Vote(self.term, request.pre, same_vote, newer))]
        if request.pre:
            return [Send(sender, Vote(request.term, pre=True, granted=True))]
        out = self._follow(request.term, None, now)
        self.voted_for = sender
        self._due = now + self._silence(now)
        return [*out, self._save(), Send(sender, Vote(self.term, pre=False, granted=True))]

    def _on_vote(self, sender: NodeId, vote: Vote, now: float) -> list[Output]:
        if not vote.granted:
            return self._follow(vote.term, None, now) if vote.term > self.term else []
        wanted = self.term + 1 if self.role == "pre" else self.term
        if vote.term != wanted or vote.pre != (self.role == "pre") or self.role not in ("pre", "candidate"):
            return []
        if sender in self.voters.voters:
            self._votes[sender] = None
        return self._count_votes(now)

    def _on_heartbeat(self, sender: NodeId, beat: Heartbeat, now: float) -> list[Output]:
        if beat.term < self.term:
            return []
        out: list[Output] = []
        if beat.term > self.term or self.role != "follower" or self.leader != sender:
            out = self._follow(beat.term, sender, now)
        self._heard = now
        self._due = now + self._silence(now)
        return out

    def _on_held(self, sender: NodeId, term: Term, now: float) -> list[Output]:
        if term > self.term:
            return self._follow(term, None, now)
        if term == self.term and self.role == "leader":
            self._contact[sender] = now
        return []

    # changing ------------------------------------------------------------------------------------------------
    def _follow(self, term: Term, leader: NodeId | None, now: float) -> list[Output]:
        """Adopt `term` (never an older one) as a follower of `leader`, who may be unknown yet."""
        out: list[Output] = []
        if self.role == "leader":
            out.append(Deposed(self.term, f"term {term} has begun"))
            self._due = now + self._silence(now)
        if term > self.term:
            self.term, self.voted_for = term, None
            out.append(self._save())
        self.role, self._votes, self._transfer = "follower", {}, False
        if leader != self.leader or out:
            self.leader = leader
            out.append(LeaderChanged(self.term, leader))
        return out

    def _step_down(self, why: str, now: float) -> list[Output]:
        self.role, self.leader, self._votes = "follower", None, {}
        self._due = now + self._silence(now)
        return [Deposed(self.term, why), LeaderChanged(self.term, None)]

    def _hand_over(self, why: str, now: float) -> list[Output]:
        if self.role != "leader":
            return []
        voters = [v for v in self.voters.voters if v != self.me and v in self._links and v in self._contact]
        heirs = sorted((-self._contact[v], v) for v in voters)
        out: list[Output] = [Send(heirs[0][1], TimeoutNow(self.term))] if heirs else []
        return out + self._step_down(why, now)

    def _link_made(self, peer: NodeId) -> list[Output]:
        self._links[peer] = None
        if self.role == "leader":
            return self._heartbeat_to(peer)
        asks = self.role in ("pre", "candidate") and peer in self.voters.voters
        return self._ask_vote(peer) if asks else []

    def _link_lost(self, peer: NodeId, now: float) -> list[Output]:
        self._links.pop(peer, None)
        self._holds.pop(peer, None)
        if peer == self.leader and self.role == "follower":
            self._heard = float("-inf")
            soon = self._rng.uniform(0.1, 1.0) * LINK_LOST_FRACTION * self._timings.election_min_s
            self._due = min(self._due, now + soon)
        return []

    def _adopt_voters(self, voters: Voters, now: float) -> list[Output]:
        if not is_newer(voters, self.voters):
            return []
        # A leader made the newest config of its term, so a newer one is of a newer term. A candidate canvasses anew:
        # its votes were given for the config it had.
        out = [] if self.role == "follower" else self._follow(max(self.term, voters.term), None, now)
        self.voters = voters
        self._due = min(self._due, now + self._silence(now))
        return [*out, self._save()]

    # small things --------------------------------------------------------------------------------------------
    def _save(self) -> SaveHardState:
        self._last_token += 1
        return SaveHardState(self._last_token, HardState(self.term, self.voted_for, self.voters, self._incarnation))

    def _heartbeat_to(self, peer: NodeId) -> list[Output]:
        known = self._holds.get(peer) == config_id(self.voters)
        return [Send(peer, Heartbeat(self.term, self._digest(), UNSAID if known else self.voters))]

    def _silence(self, now: float) -> float:
        drawn = self._rng.uniform(self._timings.election_min_s, self._timings.election_max_s)
        return self._stretch(now) * drawn
