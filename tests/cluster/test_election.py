"""Raft's election, machine against machine. Sections are of Ongaro's dissertation (2014); § 5 of the paper."""

from __future__ import annotations

from random import Random

import pytest

from piclusterd.cluster.election import LINK_LOST_FRACTION, Election, majority
from piclusterd.events import (
    DeadlineReached,
    Deposed,
    Elected,
    HardState,
    HardStateSaved,
    LeaderChanged,
    LinkDown,
    LinkUp,
    Received,
    Rules,
    SaveHardState,
    Sealed,
    Send,
    Shutdown,
)
from piclusterd.ids import NodeId
from piclusterd.wire import ConfigId, Heartbeat, Held, Push, RequestVote, TimeoutNow, Vote, Voters

from .pair import PI, A, B, C, D, Wire, elector

ABC = Voters(1, 0, (A, B, C))


class Room:
    """Three voters and, where asked, learners, linked to each other."""

    def __init__(self, seed: int = 0, voters: Voters = ABC, learners: tuple[NodeId, ...] = ()) -> None:
        self.wire = Wire()
        self.nodes = {n: elector(n, voters, self.wire, seed) for n in (*voters.voters, *learners)}
        self.wire.link_all()

    @property
    def leaders(self) -> list[NodeId]:
        return [n for n, machine in self.nodes.items() if machine.role == "leader"]

    def elect(self) -> NodeId:
        self.wire.run_until(lambda: bool(self.leaders), within=30)
        return self.leaders[0]

    def others(self, node: NodeId) -> list[NodeId]:
        return [n for n in self.nodes if n != node]


def unsaved_after(node: Election, token: int, now: float) -> bool:
    node.handle(HardStateSaved(token), now)
    return node.unsaved


def alone(hard: HardState | None = None, me: NodeId = A) -> tuple[Election, Wire]:
    wire = Wire()
    return elector(me, ABC, wire, hard=hard), wire


def ask(node: Election, sender: NodeId, request: RequestVote, now: float) -> Vote:
    out = node.handle(Received(sender, request), now)
    return next(o.message for o in out if isinstance(o, Send) and isinstance(o.message, Vote))


def win(node: Election, now: float) -> None:
    """`node` (A of A, B, C) is elected with B's vote."""
    node.handle(LinkUp(B), now)
    node.handle(LinkUp(C), now)
    node.handle(DeadlineReached(), now)
    out = node.handle(Received(B, Vote(node.term + 1, pre=True, granted=True)), now)
    node.handle(HardStateSaved(next(o.token for o in out if isinstance(o, SaveHardState))), now)
    node.handle(Received(B, Vote(node.term, pre=False, granted=True)), now)
    assert node.role == "leader"


@pytest.mark.parametrize(("voters", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_two_majorities_always_share_a_voter(voters: int, needed: int) -> None:
    assert majority(voters) == needed
    assert 2 * majority(voters) > voters


# electing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_three_voters_elect_one_leader_and_all_know_it(seed: int) -> None:
    """§3.4"""
    room = Room(seed)
    leader = room.elect()
    room.wire.run_for(20)
    assert room.leaders == [leader]
    assert {machine.leader for machine in room.nodes.values()} == {leader}
    assert len({machine.term for machine in room.nodes.values()}) == 1
    elected = [note for n in room.nodes for note in room.wire.heard_of(n, Elected)]
    assert elected == [Elected(room.nodes[leader].term, (A, B, C))]


def test_a_leader_that_is_heard_keeps_its_term() -> None:
    room = Room()
    leader = room.elect()
    term = room.nodes[leader].term
    room.wire.run_for(300)
    assert room.leaders == [leader]
    assert room.nodes[leader].term == term


def test_nobody_campaigns_before_a_silence_of_the_least_election_timeout() -> None:
    room = Room()
    began = room.wire.now
    room.wire.run_until(lambda: bool(room.wire.said), within=10)
    assert PI.election_min_s <= room.wire.now - began <= PI.election_max_s


def test_a_learner_never_campaigns() -> None:
    room = Room(learners=(D,))
    leader = room.elect()
    room.wire.run_for(60)
    assert room.nodes[D].leader == leader
    room.wire.isolate(D)
    room.wire.run_for(60)
    assert not room.wire.sent(RequestVote, by=D)
    assert room.nodes[D].role == "follower"
    assert room.leaders == [leader]


def test_a_candidate_that_is_no_voter_gets_no_vote() -> None:
    node, wire = alone()
    assert not ask(node, D, RequestVote(5, False, ABC), wire.now).granted
    assert node.term == 0


def test_a_node_without_a_voters_record_stays_quiet() -> None:
    wire = Wire()
    node = elector(A, Voters(), wire)
    wire.run_for(60)
    assert wire.said == []
    assert (node.role, node.term) == ("follower", 0)


def test_a_single_voter_leads_as_soon_as_its_own_vote_is_saved() -> None:
    wire = Wire()
    wire.autosave = False
    node = elector(A, Voters(1, 0, (A,)), wire)
    wire.run_until(lambda: node.role == "candidate", within=10)
    assert node.unsaved
    assert wire.heard_of(A, Elected) == []
    wire.save(A)
    assert wire.heard_of(A, Elected) == [Elected(1, (A,))]
    wire.run_for(60)
    assert (node.role, node.term) == ("leader", 1)


def test_votes_count_only_once_the_candidates_own_is_durable() -> None:
    """§5.1 of the paper: term and vote are on disk before the node acts on them."""
    node, wire = alone()
    wire.now += 10
    node.handle(DeadlineReached(), wire.now)
    out = node.handle(Received(B, Vote(1, pre=True, granted=True)), wire.now)
    token = next(o.token for o in out if isinstance(o, SaveHardState))
    node.handle(Received(B, Vote(1, pre=False, granted=True)), wire.now)
    assert node.role == "candidate"
    assert Elected(1, (A, B, C)) in node.handle(HardStateSaved(token), wire.now)


def test_an_older_save_does_not_release_a_newer_state() -> None:
    node, wire = alone()
    out = node.handle(Received(B, RequestVote(1, False, ABC)), wire.now)
    term, vote = (o.token for o in out if isinstance(o, SaveHardState))
    assert [unsaved_after(node, token, wire.now) for token in (term, vote, term)] == [True, False, False]


# voting ----------------------------------------------------------------------------------------------------------
def test_a_voter_votes_once_a_term() -> None:
    """§3.4"""
    node, wire = alone()
    assert ask(node, B, RequestVote(1, False, ABC), wire.now) == Vote(1, False, True)
    assert ask(node, C, RequestVote(1, False, ABC), wire.now) == Vote(1, False, False)
    assert ask(node, B, RequestVote(1, False, ABC), wire.now) == Vote(1, False, True), "the reply may have been lost"


def test_a_vote_survives_a_restart() -> None:
    """§5.1 of the paper"""
    wire = Wire()
    node = elector(A, ABC, wire)
    wire.tell(A, Received(B, RequestVote(4, False, ABC)))
    restarted = elector(A, ABC, wire, hard=wire.saves[A][-1].state)
    assert node.voted_for == B
    assert not ask(restarted, C, RequestVote(4, False, ABC), wire.now).granted
    assert ask(restarted, B, RequestVote(4, False, ABC), wire.now).granted


def test_a_vote_for_a_newer_term_is_free_again() -> None:
    node, wire = alone()
    ask(node, B, RequestVote(1, False, ABC), wire.now)
    assert ask(node, C, RequestVote(2, False, ABC), wire.now) == Vote(2, False, True)


def test_the_disk_gets_term_vote_and_voters_together() -> None:
    node, wire = alone(HardState(term=1, voters=ABC, incarnation=7))
    out = node.handle(Received(B, RequestVote(2, False, ABC)), wire.now)
    last = [o.state for o in out if isinstance(o, SaveHardState)][-1]
    assert last == HardState(2, B, ABC, 7)


def test_a_candidate_with_older_voters_is_told_the_newer_and_leads_where_it_is_the_only_one_left() -> None:
    """Its leader removed itself, and fell before the last voter had heard of it."""
    wire, only_a = Wire(), Voters(3, 2, (A,))
    last = elector(A, Voters(2, 2, (A, B)), wire, hard=HardState(2, voters=Voters(2, 2, (A, B))))
    gone = elector(B, only_a, wire, hard=HardState(2, voters=only_a))
    wire.link_all()
    wire.run_until(lambda: last.role == "leader", within=30)
    assert last.voters.voters == gone.voters.voters == (A,)


def test_a_vote_is_returned_after_the_order_to_save_it() -> None:
    node, wire = alone()
    out = node.handle(Received(B, RequestVote(2, False, ABC)), wire.now)
    kinds = [type(o) for o in out]
    assert kinds.index(Send) > max(i for i, kind in enumerate(kinds) if kind is SaveHardState)
    assert node.unsaved


def test_an_older_candidate_learns_of_the_newer_term() -> None:
    """§3.3"""
    node, wire = alone(HardState(term=9, voters=ABC))
    assert ask(node, B, RequestVote(3, False, ABC), wire.now) == Vote(9, False, False)
    candidate, _ = alone(HardState(term=2, voters=ABC), me=B)
    candidate.handle(Received(A, Vote(9, False, False)), wire.now)
    assert (candidate.term, candidate.role) == (9, "follower")


def test_votes_of_another_term_of_another_round_or_of_strangers_do_not_count() -> None:
    node, wire = alone()
    node.handle(DeadlineReached(), wire.now + 10)
    for vote in (Vote(2, True, True), Vote(1, False, True), Vote(0, True, True)):
        node.handle(Received(B, vote), wire.now + 10)
    node.handle(Received(D, Vote(1, True, True)), wire.now + 10)
    assert (node.role, node.term) == ("pre", 0)


# PreVote and stickiness ------------------------------------------------------------------------------------------
def test_asking_for_a_prevote_raises_no_term_and_saves_nothing() -> None:
    """§9.6"""
    wire = Wire()
    node = elector(A, ABC, wire)
    wire.run_for(60)
    assert (node.role, node.term) == ("pre", 0)
    assert wire.saves[A] == []
    assert {request.term for request in wire.sent(RequestVote)} == {1}


def test_giving_a_prevote_changes_nothing() -> None:
    """§9.6"""
    node, wire = alone()
    out = node.handle(Received(B, RequestVote(5, True, ABC)), wire.now)
    assert out == [Send(B, Vote(5, True, True))]
    assert (node.term, node.voted_for, node.unsaved) == (0, None, False)
    assert ask(node, C, RequestVote(5, True, ABC), wire.now).granted


@pytest.mark.parametrize("pre", [True, False])
def test_voters_that_hear_a_leader_refuse_and_keep_their_term(pre: bool) -> None:
    """§4.2.3"""
    node, wire = alone()
    node.handle(Received(B, Heartbeat(3, b"", ABC)), wire.now)
    request = RequestVote(9, pre, ABC)
    assert ask(node, C, request, wire.now + PI.election_min_s - 0.01) == Vote(3, pre, False)
    assert (node.term, node.leader) == (3, B)
    assert ask(node, C, request, wire.now + PI.election_min_s).granted


def test_a_leader_refuses_even_after_a_long_silence() -> None:
    node, wire = alone()
    win(node, wire.now + 10)
    assert not ask(node, C, RequestVote(9, False, ABC), wire.now + 14).granted
    assert node.role == "leader"


@pytest.mark.parametrize("seed", range(5))
def test_a_node_that_returns_from_a_partition_disturbs_nobody(seed: int) -> None:
    """§9.6"""
    room = Room(seed)
    leader = room.elect()
    lost = room.others(leader)[0]
    term = room.nodes[leader].term
    room.wire.isolate(lost)
    room.wire.run_for(120)
    assert room.nodes[lost].term == term
    room.wire.heal()
    room.wire.run_for(30)
    assert room.leaders == [leader]
    assert {machine.term for machine in room.nodes.values()} == {term}


# keeping and losing the lead -------------------------------------------------------------------------------------
def test_a_leader_that_hears_no_majority_steps_down_within_the_longest_timeout() -> None:
    """CheckQuorum, §6.2"""
    room = Room()
    leader = room.elect()
    room.wire.run_for(5)
    room.wire.isolate(leader)
    began = room.wire.now
    room.wire.run_until(lambda: room.nodes[leader].role != "leader", within=20)
    assert room.wire.now - began <= PI.election_max_s + PI.heartbeat_s
    assert [note.why for note in room.wire.heard_of(leader, Deposed)] == ["no majority of the voters was heard"]


def test_one_of_two_others_is_majority_enough_for_a_leader() -> None:
    node, wire = alone()
    now = wire.now + 10
    win(node, now)
    for _ in range(100):
        now = node.deadline()
        node.handle(Received(B, Held(1, b"")), now)
        node.handle(DeadlineReached(), now)
    assert node.role == "leader"
    assert node.heard_voters(now) == 2


def test_what_learners_and_older_terms_say_keeps_no_leader() -> None:
    node, wire = alone()
    now = wire.now + 10
    win(node, now)
    while node.role == "leader":
        now = node.deadline()
        node.handle(Received(D, Held(1, b"")), now)
        node.handle(Received(B, Held(0, b"")), now)
        node.handle(DeadlineReached(), now)
        assert now < wire.now + 30
    assert node.heard_voters(now) == 1


@pytest.mark.parametrize(
    "message",
    [Heartbeat(7, b"", ABC), Push(7, ()), Held(7, b""), Vote(7, False, False)],
    ids=lambda message: type(message).__name__,
)
def test_a_higher_term_deposes_a_leader(message: Heartbeat | Push | Held | Vote) -> None:
    """§3.3"""
    node, wire = alone()
    win(node, wire.now + 10)
    out = node.handle(Received(C, message), wire.now + 11)
    assert Deposed(1, "term 7 has begun") in out
    assert (node.role, node.term, node.voted_for) == ("follower", 7, None)
    assert node.leader == (C if isinstance(message, Heartbeat | Push) else None)
    assert node.deadline() >= wire.now + 11 + PI.election_min_s


@pytest.mark.parametrize("message", [Heartbeat(3, b"", ABC), Push(3, ()), Held(3, b""), Vote(3, False, False)])
def test_an_older_term_moves_nobody(message: Heartbeat | Push | Held | Vote) -> None:
    node, wire = alone(HardState(term=4, voters=ABC))
    due = node.deadline()
    assert node.handle(Received(C, message), wire.now) == []
    assert (node.term, node.leader, node.deadline()) == (4, None, due)


def test_a_candidate_follows_the_leader_that_won_its_term() -> None:
    """§3.4"""
    room = Room()
    room.wire.autosave = False
    node = room.nodes[A]
    room.wire.run_until(lambda: node.role == "candidate" or bool(room.leaders), within=60)
    term = node.term
    out = node.handle(Received(B, Heartbeat(term, b"", ABC)), room.wire.now)
    assert LeaderChanged(term, B) in out
    assert node.role == "follower"


def test_a_candidate_without_an_answer_asks_for_prevotes_again() -> None:
    node, _ = alone()
    node.handle(DeadlineReached(), node.deadline())
    node.handle(Received(B, Vote(1, pre=True, granted=True)), node.deadline())
    assert (node.role, node.term) == ("candidate", 1)
    node.handle(DeadlineReached(), node.deadline())
    assert (node.role, node.term) == ("pre", 1)


def test_a_spurious_deadline_is_harmless() -> None:
    node, _ = alone()
    assert node.handle(DeadlineReached(), node.deadline() - 0.001) == []
    assert node.role == "follower"


def test_a_new_link_hears_of_the_leader_at_once() -> None:
    node, wire = alone()
    win(node, wire.now + 10)
    assert node.handle(LinkUp(D), wire.now + 10) == [Send(D, Heartbeat(1, b"digest", Voters(1, 1, (A, B, C))))]


@pytest.mark.parametrize("role", ["pre", "candidate"])
def test_a_voter_that_comes_back_while_votes_are_sought_is_asked_at_once(role: str) -> None:
    node, _ = alone()
    now = node.deadline()
    node.handle(DeadlineReached(), now)
    if role == "candidate":
        node.handle(Received(B, Vote(1, pre=True, granted=True)), now)
    assert node.role == role
    assert node.handle(LinkUp(C), now) == [Send(C, RequestVote(1, role == "pre", node.voters))]
    assert node.handle(LinkUp(D), now) == [], "no voter"


def test_the_second_of_three_to_be_back_makes_a_leader_without_another_timeout() -> None:
    room = Room()
    dead = room.elect()
    lonely, back = room.others(dead)
    for node in (dead, lonely):
        room.wire.isolate(node)
    for one, other in ((lonely, dead), (lonely, back), (back, dead)):
        room.wire.unlink(one, other)
    room.wire.remove(dead)
    del room.nodes[dead]
    room.wire.run_until(lambda: room.nodes[lonely].role == "pre", within=10)
    assert room.leaders == []
    room.wire.heal()
    room.wire.tell(lonely, LinkUp(back))
    assert room.leaders == [lonely]


def test_who_holds_the_voters_already_is_not_sent_them_with_every_heartbeat() -> None:
    node, wire = alone()
    win(node, wire.now + 10)
    now = wire.now + 10

    def told(peer: NodeId) -> Voters:
        (beat,) = [
            o.message for o in node.handle(DeadlineReached(), node.deadline()) if isinstance(o, Send) and o.to == peer
        ]
        assert isinstance(beat, Heartbeat)
        return beat.voters

    assert told(B) == node.voters
    node.handle(Received(B, Held(1, b"", None, ConfigId(1, 1))), now)
    assert (told(B), told(C)) == (Voters(), node.voters)
    node.handle(Received(B, Held(1, b"", None, ConfigId(0, 1))), now)
    assert told(B) == node.voters, "its disk has an older record"
    node.handle(Received(B, Held(1, b"", None, ConfigId(1, 1))), now)
    node.change(Voters(2, 1, (A, B)))
    assert told(B) == node.voters, "changed since"
    node.handle(Received(B, Held(1, b"", None, ConfigId(1, 2))), now)
    assert told(B) == Voters()
    node.handle(LinkDown(B), now)
    assert node.handle(LinkUp(B), now) == [Send(B, Heartbeat(1, b"digest", node.voters))], "it may be another life"


# a leader that dies or leaves ------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(10))
def test_a_closed_link_to_the_leader_brings_the_campaign_forward(seed: int) -> None:
    room = Room(seed)
    dead = room.elect()
    room.wire.run_for(1)
    room.wire.remove(dead)
    del room.nodes[dead]
    died = room.wire.now
    for other in list(room.nodes):
        room.wire.tell(other, LinkDown(dead))
    room.elect()
    assert room.wire.now - died <= LINK_LOST_FRACTION * PI.election_min_s * 2
    assert len(room.leaders) == 1


def test_a_closed_link_to_somebody_else_changes_nothing() -> None:
    node, wire = alone()
    node.handle(Received(B, Heartbeat(1, b"", ABC)), wire.now)
    due = node.deadline()
    node.handle(LinkDown(C), wire.now)
    assert node.deadline() == due
    assert not ask(node, C, RequestVote(2, True, ABC), wire.now).granted


def test_one_lost_link_does_not_unseat_a_leader_whom_the_majority_hears() -> None:
    room = Room()
    leader = room.elect()
    lonely, other = room.others(leader)
    room.wire.cut(leader, lonely)
    room.wire.unlink(leader, lonely)
    began = room.nodes[leader].term
    room.wire.run_for(60)
    assert room.leaders == [leader]
    assert room.nodes[other].term == began


def test_a_leader_that_stops_hands_over_at_once() -> None:
    """§3.10"""
    room = Room()
    leader = room.elect()
    room.wire.run_for(1)
    before = room.wire.now
    room.wire.tell(leader, Shutdown())
    assert room.wire.now == before
    (heir,) = room.leaders
    assert heir != leader
    assert [n.why for n in room.wire.heard_of(leader, Deposed)] == ["this node is stopping"]
    assert [r.transfer for r in room.wire.sent(RequestVote, by=heir)][-1]


def test_a_transfer_overrides_stickiness_and_only_that() -> None:
    """§3.10, §4.2.3"""
    node, wire = alone()
    node.handle(Received(B, Heartbeat(3, b"", ABC)), wire.now)
    assert not ask(node, C, RequestVote(3, False, ABC, transfer=True), wire.now).granted
    assert not ask(node, D, RequestVote(4, False, ABC, transfer=True), wire.now).granted
    assert ask(node, C, RequestVote(4, False, ABC, transfer=True), wire.now).granted


def test_only_the_leader_of_this_term_may_order_a_campaign() -> None:
    node, wire = alone()
    node.handle(Received(B, Heartbeat(3, b"", ABC)), wire.now)
    for sender, term in ((C, 3), (B, 2), (B, 4)):
        assert node.handle(Received(sender, TimeoutNow(term)), wire.now) == []
    node.handle(Received(B, TimeoutNow(3)), wire.now)
    assert (node.role, node.term) == ("candidate", 4)


def test_a_follower_that_stops_says_nothing() -> None:
    node, wire = alone()
    assert node.handle(Shutdown(), wire.now) == []


# who votes -------------------------------------------------------------------------------------------------------
def test_a_voters_record_is_adopted_only_if_newer_and_then_saved() -> None:
    """Logless reconfiguration (arXiv 2102.11960): configurations are ordered by (term, version)."""
    node, wire = alone(HardState(voters=Voters(2, 5, (A, B, C))))
    for older in (Voters(1, 5, (D,)), Voters(9, 4, (D,)), Voters(2, 5, (D,))):
        assert node.handle(Sealed(older), wire.now) == []
    for newer in (Voters(3, 5, (A, B)), Voters(1, 6, (A, B, D))):
        (save,) = node.handle(Sealed(newer), wire.now)
        assert isinstance(save, SaveHardState)
        assert save.state.voters == newer


def test_voters_spread_with_heartbeats_and_requests() -> None:
    room = Room(learners=(D,))
    leader = room.elect()
    room.nodes[leader].change(Voters(2, 1, (A, B, C, D)))
    room.wire.run_for(1)
    assert all(machine.votes_here and machine.voters.version == 2 for machine in room.nodes.values())
    assert ask(room.nodes[A], B, RequestVote(0, True, Voters(3, 1, (A, B))), room.wire.now).granted is False
    assert room.nodes[A].voters.version == 3


@pytest.mark.parametrize("seed", range(5))
def test_term_and_vote_never_regress_on_disk(seed: int) -> None:
    room = Room(seed)
    for _ in range(4):
        leader = room.elect()
        room.wire.isolate(leader)
        room.wire.run_until(lambda leader=leader: room.nodes[leader].role != "leader", within=60)  # type: ignore[misc]
        room.wire.heal()
    for saves in room.wire.saves.values():
        states = [save.state for save in saves]
        assert [s.term for s in states] == sorted(s.term for s in states)
        for term in {s.term for s in states}:
            assert len({s.voted_for for s in states if s.term == term} - {None}) <= 1


# rules switched off (what the simulator's ablations do) ----------------------------------------------------------
def ruled(rules: Rules) -> Election:
    return Election(A, HardState(voters=ABC), PI, Random(1), lambda: b"digest", 0.0, rules)


def test_without_prevote_a_silence_raises_the_term_at_once() -> None:
    node = ruled(Rules(pre_vote=False))
    node.handle(DeadlineReached(), 10.0)
    assert (node.role, node.term) == ("candidate", 1)


def test_without_checkquorum_a_leader_that_hears_nobody_goes_on() -> None:
    node = ruled(Rules(check_quorum=False, pre_vote=False))
    out = node.handle(DeadlineReached(), 10.0)
    node.handle(HardStateSaved(next(o.token for o in out if isinstance(o, SaveHardState))), 10.0)
    node.handle(Received(B, Vote(1, pre=False, granted=True)), 10.0)
    node.handle(DeadlineReached(), 1000.0)
    assert node.role == "leader"


# a config that changes under way ---------------------------------------------------------------------------------
def test_votes_given_for_the_config_before_elect_nobody() -> None:
    """A candidate that learns of a newer config of its own term canvasses anew; no leader changed, and none is told."""
    node, wire = alone()
    now = wire.now + 10
    node.handle(DeadlineReached(), now)
    out = node.handle(Received(B, Vote(1, pre=True, granted=True)), now)
    (own_vote,) = [o.token for o in out if isinstance(o, SaveHardState)]
    newer = Voters(2, 1, (A, B, C, D))
    assert [type(o) for o in node.handle(Sealed(newer), now)] == [SaveHardState]
    assert (node.role, node.term, node.voted_for, node.voters) == ("follower", 1, A, newer)
    assert node.handle(HardStateSaved(own_vote + 1), now) == []
    assert node.handle(Received(B, Vote(1, pre=False, granted=True)), now) == []
    assert node.handle(Received(C, Vote(1, pre=False, granted=True)), now) == []
    assert node.role == "follower"


def test_a_leader_that_retires_hands_over_to_the_voter_it_heard_last_and_says_why() -> None:
    node, wire = alone()
    now = wire.now + 10
    win(node, now)
    node.handle(Received(C, Held(1, b"")), now + 0.1)
    out = node.retire("this node is no voter any more", now + 0.2)
    assert out == [Send(C, TimeoutNow(1)), Deposed(1, "this node is no voter any more"), LeaderChanged(1, None)]
    assert node.role == "follower"
    assert node.retire("again", now + 0.3) == [], "who leads nothing has nothing to hand over"


def test_a_leader_hears_whoever_answered_in_its_term_and_only_for_the_window() -> None:
    """A learner too: `reconfigure` asks before it makes one a voter."""
    node, wire = alone()
    now = wire.now + 10
    win(node, now)
    node.handle(Received(D, Held(1, b"")), now)
    node.handle(Received(C, Held(0, b"")), now)
    assert [node.hears(peer, now) for peer in (B, C, D)] == [True, False, True]
    node.handle(Received(B, Held(1, b"")), now + 0.1)
    later = now + 0.1 + PI.election_max_s
    assert [node.hears(peer, later) for peer in (B, D)] == [True, False]


# a ledger that is not whole --------------------------------------------------------------------------------------
class Doubtful:
    """One of three voters, whose ledger says what it may do."""

    def __init__(self) -> None:
        self.may_stand = self.may_vote = True
        self.node = Election(
            A, HardState(voters=ABC), PI, Random(1), lambda: b"digest", 0.0, Rules(pre_vote=False),
            lambda now: self.may_stand, lambda: self.may_vote,
        )  # fmt: skip

    def campaign(self) -> None:
        out = self.node.handle(DeadlineReached(), 10.0)
        self.node.handle(HardStateSaved(next(o.token for o in out if isinstance(o, SaveHardState))), 10.0)

    def elect(self) -> None:
        self.node.handle(Received(B, Vote(1, pre=False, granted=True)), 10.0)


@pytest.mark.parametrize("pre", [True, False])
def test_who_may_have_forgotten_grants_no_vote(pre: bool) -> None:
    doubtful = Doubtful()
    doubtful.may_vote = False
    out = doubtful.node.handle(Received(B, RequestVote(1, pre, ABC)), 0.0)
    assert out == [Send(B, Vote(0, pre, granted=False))]


def test_who_may_not_stand_does_not_campaign_until_it_may() -> None:
    doubtful = Doubtful()
    doubtful.may_stand = False
    assert doubtful.node.handle(DeadlineReached(), 10.0) == []
    doubtful.node.handle(Received(B, Heartbeat(1, b"", ABC)), 10.0)
    assert doubtful.node.handle(Received(B, TimeoutNow(1)), 10.0) == []
    doubtful.may_stand = True
    doubtful.node.handle(DeadlineReached(), 20.0)
    assert doubtful.node.role == "candidate"


def test_a_candidate_that_may_not_stand_any_more_does_not_lead() -> None:
    doubtful = Doubtful()
    doubtful.campaign()
    doubtful.may_stand = False
    doubtful.elect()
    assert doubtful.node.role == "candidate"


def test_a_leader_that_may_not_stand_any_more_hands_over_at_its_next_tick() -> None:
    doubtful = Doubtful()
    doubtful.node.handle(LinkUp(B), 0.0)
    doubtful.campaign()
    doubtful.elect()
    assert doubtful.node.role == "leader"
    doubtful.may_stand = False
    out = doubtful.node.handle(DeadlineReached(), 11.0)
    assert Send(B, TimeoutNow(1)) in out
    assert Deposed(1, "this node's ledger is not whole") in out


# slow and failing disks ------------------------------------------------------------------------------------------
def test_a_node_with_disk_trouble_votes_and_does_not_campaign_not_even_when_it_is_asked_to() -> None:
    wire, ill = Wire(), [True]
    node = elector(A, ABC, wire, ails=lambda: ill[0])
    wire.run_for(60)
    assert wire.said == []
    assert ask(node, B, RequestVote(1, False, ABC), wire.now).granted
    node.handle(Received(B, Heartbeat(1, b"digest", ABC)), wire.now)
    assert node.handle(Received(B, TimeoutNow(1)), wire.now) == []
    ill[0] = False
    assert any(isinstance(out, SaveHardState) for out in node.handle(Received(B, TimeoutNow(1)), wire.now))


def test_a_leader_whose_disk_fails_leads_on_until_somebody_takes_over() -> None:
    wire, ill = Wire(), [False]
    node = elector(A, ABC, wire, ails=lambda: ill[0])
    now = node.deadline()
    win(node, now)
    ill[0] = True
    assert [type(out) for out in node.handle(DeadlineReached(), now + PI.heartbeat_s)] == [Send, Send]
    assert node.reaches(B, now)
    assert not node.reaches(C, now), "linked, but never heard"
    node.handle(LinkDown(B), now)
    assert not node.reaches(B, now)


def test_a_slow_disk_stretches_its_own_silence_and_nothing_else() -> None:
    wire = Wire()
    node = elector(A, ABC, wire, stretch=lambda now: 4.0)
    assert 4 * PI.election_min_s <= node.deadline() - wire.now <= 4 * PI.election_max_s
    node.handle(Received(B, Heartbeat(1, b"digest", ABC)), wire.now)
    assert not ask(node, C, RequestVote(2, True, ABC), wire.now + PI.election_min_s - 0.1).granted
    assert ask(node, C, RequestVote(2, True, ABC), wire.now + PI.election_min_s).granted, "stickiness is not stretched"
    leader = elector(A, ABC, Wire(), stretch=lambda now: 4.0)
    now = leader.deadline()
    win(leader, now)
    leader.handle(DeadlineReached(), now + PI.election_max_s + 0.1)
    assert leader.role == "follower", "nor is the window of CheckQuorum"
