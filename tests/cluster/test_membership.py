"""Who is here: machines with a pretend wire. SWIM (DSN 2002), Lifeguard (arXiv 1707.00788)."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.cluster.membership import GOSSIP_FANOUT, PUSH_ALL_MAX, Membership
from piclusterd.cluster.probing import INDIRECT
from piclusterd.cluster.suspicion import HEALTH_MAX, Guards
from piclusterd.events import (
    DeadlineReached,
    FactsChanged,
    LinkDown,
    LinkUp,
    LoopLagged,
    MemberDown,
    MemberUp,
    Output,
    Received,
    Send,
    Shutdown,
)
from piclusterd.ids import NodeId
from piclusterd.wire import Ack, Facts, Gossip, Member, Nack, PeerMessage, Ping, PingReq, PushPull

from .pair import PI, A, B, C, D, Wire, member, name


class House:
    """Members that are all linked and know each other."""

    def __init__(self, *nodes: NodeId, seed: int = 0) -> None:
        self.wire = Wire()
        self.nodes = {n: member(n, self.wire, seed) for n in nodes}
        self.wire.link_all()

    def state(self, of: NodeId, by: NodeId) -> str:
        return self.nodes[by].peers[of].member.state

    def dies(self, node: NodeId) -> None:
        """Its power goes: nobody is told, its links stay open."""
        self.wire.remove(node)
        self.nodes.pop(node)

    def downs(self, by: NodeId) -> list[tuple[NodeId, str]]:
        return [(note.node, note.state) for note in self.wire.heard_of(by, MemberDown)]


def lone(incarnation: int = 0) -> tuple[Membership, Wire]:
    """A, who knows B, C and D by their links; what it sends goes nowhere."""
    wire = Wire()
    node = member(A, wire, incarnation=incarnation)
    for peer in (B, C, D):
        node.handle(LinkUp(peer), wire.now)
    return node, wire


def hears(node: Membership, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
    return node.handle(Received(sender, message), now)


def of(node: NodeId, incarnation: int, state: str, version: int = 1) -> Member:
    return Member(node, incarnation, state, Facts(version=version, name=f"v{version}"))


def sends(out: list[Output], kind: type[PeerMessage]) -> list[Send]:
    return [o for o in out if isinstance(o, Send) and isinstance(o.message, kind)]


def probed(node: Membership) -> tuple[NodeId, int, float]:
    """The next probe of `node`: whom, its seq, and when."""
    now = node.deadline()
    while True:
        pings = sends(node.handle(DeadlineReached(), now), Ping)
        if pings:
            assert isinstance(pings[0].message, Ping)
            return pings[0].to, pings[0].message.seq, now
        now = node.deadline()


# joining and facts -----------------------------------------------------------------------------------------------
def test_a_link_makes_a_member_and_brings_its_facts() -> None:
    house = House(A, B)
    assert house.wire.heard_of(A, MemberUp)[0].node == B
    assert house.nodes[A].facts(B) == house.nodes[B].mine.facts
    assert [m.node for m in house.nodes[A].alive()] == [A, B]


def test_a_member_without_a_direct_link_is_learnt_from_others() -> None:
    wire = Wire()
    nodes = {n: member(n, wire) for n in (A, B, C)}
    for one, other in ((A, B), (B, C)):
        wire.tell(one, LinkUp(other))
        wire.tell(other, LinkUp(one))
    assert C in nodes[A].peers
    wire.run_for(PI.push_pull_s * 2)
    assert nodes[A].facts(C) == nodes[C].mine.facts
    assert nodes[C].facts(A) == nodes[A].mine.facts


def test_new_facts_reach_everybody_and_replace_the_old_as_a_whole() -> None:
    house = House(A, B, C)
    house.wire.tell(A, FactsChanged(Facts(name="renamed", temperature_c=61.5)))
    assert house.nodes[B].facts(A) == house.nodes[C].facts(A) == Facts(version=2, name="renamed", temperature_c=61.5)
    house.wire.tell(A, FactsChanged(Facts(name="again")))
    assert house.nodes[B].facts(A) == Facts(version=3, name="again")


def test_older_facts_are_not_believed() -> None:
    node, wire = lone()
    hears(node, B, Gossip((of(B, 1, "alive", version=5),)), wire.now)
    hears(node, C, Gossip((of(B, 1, "alive", version=4),)), wire.now)
    assert node.facts(B) == Facts(version=5, name="v5")


def test_an_accuser_with_old_facts_does_not_take_the_new_ones_away() -> None:
    node, wire = lone()
    hears(node, B, Gossip((of(B, 1, "alive", version=5),)), wire.now)
    hears(node, C, Gossip((of(B, 1, "suspect", version=2),)), wire.now)
    assert node.peers[B].member == of(B, 1, "suspect", version=5)


def test_a_state_of_a_newer_release_is_ignored() -> None:
    node, wire = lone()
    assert hears(node, B, Gossip((of(C, 9, "hibernating"),)), wire.now) == []
    assert node.peers[C].member.state == "alive"


# probing ---------------------------------------------------------------------------------------------------------
def test_healthy_members_stay_alive_for_hours() -> None:
    house = House(A, B, C)
    house.wire.run_for(600)
    assert all(house.downs(node) == [] for node in (A, B, C))
    assert all(machine.health == 0 for machine in house.nodes.values())


def test_every_member_is_probed_within_two_rounds() -> None:
    """SWIM §4.3"""
    node, _ = lone()
    targets = []
    for _ in range(5):
        target, seq, now = probed(node)
        hears(node, target, Ack(seq, b""), now)
        targets.append(target)
    assert set(targets) == {B, C, D}


def test_a_probe_without_an_answer_is_asked_of_others() -> None:
    """SWIM §3.1"""
    node, _ = lone()
    target, seq, now = probed(node)
    asked = sends(node.handle(DeadlineReached(), now + PI.probe_timeout_s), PingReq)
    assert {send.to for send in asked} == {B, C, D} - {target}
    assert len(asked) <= INDIRECT
    assert all(send.message == PingReq(seq, target) for send in asked)


def test_an_indirect_answer_clears_the_target() -> None:
    """The link from A to B passes nothing, C hears both."""
    house = House(A, B, C)
    house.wire.cut(A, B)
    house.wire.run_for(60)
    assert house.wire.sent(PingReq, by=A)
    assert house.state(B, by=A) == "alive"
    assert house.downs(A) == house.downs(C) == []


def test_a_helper_that_hears_nothing_says_so() -> None:
    """Lifeguard §IV.A: the nack tells the asker that it is heard itself."""
    wire = Wire()
    node = member(C, wire)
    node.handle(LinkUp(A), wire.now)
    node.handle(LinkUp(B), wire.now)
    out = hears(node, A, PingReq(77, B), wire.now)
    assert [send.to for send in sends(out, Ping)] == [B]
    late = node.handle(DeadlineReached(), wire.now + PI.probe_timeout_s)
    assert Send(A, Nack(77)) in late
    assert Send(A, Nack(78)) in hears(node, A, PingReq(78, D), wire.now), "no link to D at all"


def test_a_helper_passes_the_answer_on_with_the_askers_number() -> None:
    wire = Wire()
    node = member(C, wire)
    node.handle(LinkUp(B), wire.now)
    (ping,) = sends(hears(node, A, PingReq(77, B), wire.now), Ping)
    assert isinstance(ping.message, Ping)
    assert hears(node, B, Ack(ping.message.seq, b""), wire.now) == [Send(A, Ack(77, b"digest"))]


def test_nacks_keep_a_node_from_blaming_itself() -> None:
    """Lifeguard §IV.A"""
    for nacks, health in ((2, 0), (1, 1), (0, 2)):
        node, _ = lone()
        target, seq, now = probed(node)
        node.handle(DeadlineReached(), now + PI.probe_timeout_s)
        for helper in [n for n in (B, C, D) if n != target][:nacks]:
            hears(node, helper, Nack(seq), now + PI.probe_timeout_s)
        node.handle(DeadlineReached(), now + PI.probe_s)
        assert node.peers[target].member.state == "suspect"
        assert node.health == health


def sick(node: Membership, score: int, now: float) -> None:
    """Accused wrongly `score` times: signs that it is the slow one."""
    for incarnation in range(node.mine.incarnation, node.mine.incarnation + score):
        hears(node, B, Gossip((of(A, incarnation, "suspect"),)), now)
    assert node.health == score


def test_an_unhealthy_node_probes_more_slowly_and_recovers_by_answers() -> None:
    """Lifeguard §IV.A"""
    node, wire = lone()
    sick(node, 3, wire.now)
    target, seq, now = probed(node)
    assert node.deadline() == now + PI.probe_timeout_s * 4
    hears(node, target, Ack(seq, b""), now)
    assert node.health == 2
    assert node.deadline() == now + PI.probe_s * 4


def test_an_answer_to_an_earlier_probe_counts_for_nothing() -> None:
    node, _ = lone()
    target, seq, now = probed(node)
    sick(node, 1, now)
    hears(node, target, Ack(seq - 1, b""), now)
    assert node.health == 1


# suspicion -------------------------------------------------------------------------------------------------------
def test_a_closed_link_starts_suspicion_at_once_and_never_means_death() -> None:
    node, wire = lone()
    out = node.handle(LinkDown(B), wire.now)
    assert MemberDown(B, "", "suspect", "its link closed") in out
    assert {send.to for send in sends(out, Gossip)} == {C, D}
    assert B in [m.node for m in node.alive()]


def test_a_suspect_that_lives_refutes_with_a_higher_incarnation() -> None:
    """SWIM §4.2"""
    house = House(A, B, C)
    house.wire.unlink(A, B)
    assert house.nodes[A].mine.incarnation == 1
    assert house.nodes[B].mine.incarnation == 1
    assert house.state(B, by=A) == house.state(A, by=B) == "alive"
    house.wire.run_for(30)
    assert "failed" not in [state for _, state in house.downs(C)]


def test_a_dead_member_fails_within_the_longest_suspicion_and_stays_listed() -> None:
    house = House(A, B, C, D)
    house.dies(D)
    began = house.wire.now
    house.wire.run_until(lambda: house.state(D, by=A) == "failed", within=60)
    # found within two rounds of probes by one of three, then the suspicion
    assert house.wire.now - began <= 6 * PI.probe_s + PI.suspect_max_s
    assert D not in [m.node for m in house.nodes[A].alive()]
    assert D in [m.node for m in house.nodes[A].members()]
    house.wire.run_for(30)
    assert all(house.state(D, by=n) == "failed" for n in (A, B, C))


def failed_after(*accusers: NodeId) -> float:
    """Seconds from the closed link of B to its failure, where `accusers` agree."""
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    for accuser in accusers:
        hears(node, accuser, Gossip((of(B, 0, "suspect", version=0),)), wire.now)
    now = wire.now
    while node.peers[B].member.state != "failed":
        now = node.deadline()
        for send in sends(node.handle(DeadlineReached(), now), Ping):
            assert isinstance(send.message, Ping)
            if send.to != B:
                hears(node, send.to, Ack(send.message.seq, b""), now)
    return now - wire.now


def test_confirmations_by_others_shorten_the_suspicion() -> None:
    """Lifeguard §IV.B"""
    one, two, three = failed_after(), failed_after(C), failed_after(C, D)
    assert one == PI.suspect_max_s
    assert three == PI.suspect_min_s
    assert three < two < one
    assert failed_after(C, C, C) == two, "one voice, however often"


def test_where_nobody_could_confirm_the_suspicion_is_short() -> None:
    """memberlist `suspectNode`: with too few others there is nothing to wait for."""
    wire = Wire()
    node = member(A, wire)
    node.handle(LinkUp(B), wire.now)
    node.handle(LinkDown(B), wire.now)
    now = wire.now
    while node.peers[B].member.state != "failed":
        now = node.deadline()
        node.handle(DeadlineReached(), now)
    assert now == wire.now + PI.suspect_min_s


def test_a_suspect_is_told_so_by_the_next_probe() -> None:
    """Lifeguard's buddy system, §IV.C"""
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    pings = [send for _ in range(3) for send in sends(node.handle(DeadlineReached(), node.deadline()), Ping)]
    (told,) = [send.message for send in pings if send.to == B]
    assert isinstance(told, Ping)
    assert [m.state for m in told.members] == ["suspect"]
    accused = member(B, Wire())
    for _ in range(2):
        (ack,) = sends(hears(accused, A, told, wire.now), Ack)
        assert isinstance(ack.message, Ack)
        assert [(m.node, m.incarnation, m.state) for m in ack.message.members] == [(B, 1, "alive")], "said until heard"
    assert accused.mine.incarnation == 1


def test_the_failed_come_back_by_refuting() -> None:
    house = House(A, B, C)
    house.wire.isolate(C)
    house.wire.run_until(lambda: house.state(C, by=A) == house.state(C, by=B) == "failed", within=60)
    house.wire.heal()
    house.wire.run_until(lambda: house.state(C, by=A) == house.state(C, by=B) == "alive", within=120)
    house.wire.run_until(lambda: house.state(A, by=C) == house.state(B, by=C) == "alive", within=120)
    assert house.nodes[C].mine.incarnation > 0


def test_a_restarted_node_outranks_its_obituary() -> None:
    """foca 0.17: the boot counter goes into the incarnation."""
    node, wire = lone()
    hears(node, C, Gossip((of(B, 5, "failed"),)), wire.now)
    out = hears(node, B, PushPull((of(B, 1 << 20, "alive"),), reply=False), wire.now)
    assert MemberUp(B, "v1") in out
    assert node.peers[B].member.state == "alive"


def test_a_node_does_not_answer_old_gossip_about_itself() -> None:
    node, wire = lone(incarnation=10)
    assert hears(node, B, Gossip((of(A, 9, "failed"),)), wire.now) == []
    assert hears(node, B, Gossip((of(A, 10, "alive"),)), wire.now) == []
    assert node.mine.incarnation == 10
    hears(node, B, Gossip((of(A, 10, "suspect"),)), wire.now)
    assert node.mine.incarnation == 11
    hears(node, B, Gossip((of(A, 40, "alive"),)), wire.now)
    assert node.mine.incarnation == 41, "an earlier life of ours was further"


def test_a_member_that_leaves_is_not_suspected_but_gone() -> None:
    house = House(A, B, C)
    house.wire.tell(C, Shutdown())
    assert house.state(C, by=A) == house.state(C, by=B) == "left"
    house.dies(C)
    house.wire.unlink(A, C)
    house.wire.run_for(60)
    assert house.downs(A) == [(C, "left")]
    assert C in house.nodes[A].peers


def test_who_has_left_does_not_refute() -> None:
    node, wire = lone()
    node.handle(Shutdown(), wire.now)
    assert hears(node, B, Gossip((of(A, 0, "failed"),)), wire.now) == []


def test_why_a_member_was_called_dead_can_be_told() -> None:
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    hears(node, C, Gossip((of(B, 0, "failed", version=0),)), wire.now)
    (view,) = [v for v in node.views((A, B), wire.now + 3) if v.node == B]
    assert (view.state, view.since_s, view.voter) == ("failed", 3, True)
    assert view.why == f"3 s ago: its link closed; 3 s ago: {C} says it failed"


def test_the_story_of_a_death_is_told_with_names_and_ages() -> None:
    house = House(A, B, C, D)
    house.dies(D)
    house.wire.run_until(lambda: house.state(D, by=A) == "failed", within=60)
    (view,) = [v for v in house.nodes[A].views((), house.wire.now) if v.node == D]
    assert "no answer to our probe; 2 of 2 helpers heard nothing either" in view.why
    assert "pi-b finds it silent too" in view.why or "pi-c finds it silent too" in view.why
    assert "0 s ago: not refuted in" in view.why
    (fallen,) = [n for n in house.wire.heard_of(A, MemberDown) if n.state == "failed"]
    assert fallen.why.endswith("not refuted in " + fallen.why.rsplit("not refuted in ")[1])
    assert fallen.name == "pi-d"


def test_a_death_after_a_recovery_does_not_quote_the_earlier_case() -> None:
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    hears(node, B, Gossip((of(B, 1, "alive"),)), wire.now)
    hears(node, C, Gossip((of(B, 1, "suspect"),)), wire.now)
    assert node.peers[B].reasons() == f"{C} finds it silent"
    assert "its link closed" in node.peers[B].told(wire.now), "it stays in the longer history"


# our own stalls --------------------------------------------------------------------------------------------------
def test_a_stalled_node_discards_its_own_probe() -> None:
    """What we did not hear while we did not run proves nothing (research: distributed#7523)."""
    node, _ = lone()
    target, _, now = probed(node)
    node.handle(LoopLagged(4.0), now + 4.0)
    node.handle(DeadlineReached(), now + 4.0)
    assert node.peers[target].member.state == "alive"
    assert node.health == 1


def test_a_stall_prolongs_the_suspicions_it_slept_through() -> None:
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    node.handle(LoopLagged(30.0), wire.now + 30.0)
    node.handle(DeadlineReached(), wire.now + 30.0)
    assert node.peers[B].member.state == "suspect"


def test_a_short_hiccup_excuses_nothing() -> None:
    node, _ = lone()
    target, _, now = probed(node)
    node.handle(LoopLagged(PI.probe_timeout_s / 2), now)
    node.handle(DeadlineReached(), now + PI.probe_s)
    assert node.peers[target].member.state == "suspect"


def test_the_health_score_is_bounded() -> None:
    node, wire = lone()
    for number in range(1, 100):
        node.handle(LoopLagged(10.0), wire.now + 10.0 * number)
    assert node.health == HEALTH_MAX


def test_a_stall_told_twice_counts_once() -> None:
    """The hands say so, and the node sees itself that it was called late, in whatever order."""
    node, wire = lone()
    node.handle(DeadlineReached(), wire.now + 10.0)
    assert node.health == 1
    node.handle(LoopLagged(9.0), wire.now + 10.0)
    assert node.health == 1


def test_without_the_rule_a_stalled_node_accuses_others() -> None:
    """The ablation: what the rule is there for."""
    for guards, state in ((Guards(), "alive"), (Guards(loop_lag=False), "suspect")):
        node = Membership(A, Facts(), 0, PI, Random(1), bytes, 0.0, guards)
        for peer in (B, C, D):
            node.handle(LinkUp(peer), 0.0)
        target, _, now = probed(node)
        node.handle(DeadlineReached(), now + 8.0)
        assert node.peers[target].member.state == state


def test_without_lifeguard_nobody_nacks_and_no_suspect_is_told() -> None:
    node = Membership(A, Facts(), 0, PI, Random(1), bytes, 0.0, Guards(lifeguard=False))
    for peer in (B, C, D):
        node.handle(LinkUp(peer), 0.0)
    hears(node, C, PingReq(5, B), 0.0)
    node.handle(LinkDown(B), 0.0)
    said: list[Output] = []
    while node.peers[B].member.state == "suspect":
        now = node.deadline()
        said += node.handle(DeadlineReached(), now)
    assert sends(said, Nack) == []
    pings = [send.message for send in sends(said, Ping)]
    assert all(isinstance(ping, Ping) and ping.members == () for ping in pings)
    assert now == PI.suspect_min_s


def crowded(others: int, seed: int = 0) -> Membership:
    """A with so many others, all of whom it knows and is linked to."""
    node = Membership(A, Facts(name="pi-a"), 0, PI, Random(seed), bytes, 0.0)
    for number in range(20, 20 + others):
        node.handle(LinkUp(name(number)), 0.0)
    while node._broadcast:
        node.handle(DeadlineReached(), node.deadline())
    return node


# spreading -------------------------------------------------------------------------------------------------------
def test_in_a_small_house_a_change_is_told_to_everybody_and_in_a_large_one_to_a_few() -> None:
    """Random gossip misses some at N = 4 (measured in research §1a)."""
    for others in (PUSH_ALL_MAX - 1, PUSH_ALL_MAX):
        node = crowded(others)
        said = node.handle(FactsChanged(Facts()), 0.0)
        if others == PUSH_ALL_MAX:
            assert said == []
            said = node.handle(DeadlineReached(), node.deadline())
        told = {send.to for send in sends(said, Gossip)}
        assert len(told) == (others if others < PUSH_ALL_MAX else GOSSIP_FANOUT)


def test_news_are_not_sent_back_to_where_they_came_from() -> None:
    node, wire = lone()
    told = {send.to for send in sends(hears(node, B, Gossip((of(C, 0, "suspect"),)), wire.now), Gossip)}
    assert told == {C, D}


def test_old_news_are_not_passed_on() -> None:
    node, wire = lone()
    news = Gossip((of(C, 0, "suspect"),))
    hears(node, B, news, wire.now)
    assert hears(node, B, news, wire.now) == []


def test_push_pull_mends_what_gossip_missed() -> None:
    house = House(A, B)
    house.wire.cut(A, B)
    house.wire.tell(A, FactsChanged(Facts(name="missed")))
    house.wire.heal()
    assert house.nodes[B].facts(A) != house.nodes[A].mine.facts
    house.wire.run_for(PI.push_pull_s * 2)
    assert house.nodes[B].facts(A) == house.nodes[A].mine.facts


MEMBERS = st.builds(
    of, st.sampled_from([C, D]), st.integers(0, 2), st.sampled_from(["alive", "suspect", "failed", "left"]), st.just(1)
)


@settings(deadline=None)
@given(st.lists(MEMBERS, max_size=4))
def test_the_order_of_news_does_not_matter(news: list[Member]) -> None:
    """SWIM §4.2: precedence by incarnation, then by state."""
    ends = set()
    for order in permutations(news):
        node, wire = lone()
        for item in order:
            hears(node, B, Gossip((item,)), wire.now)
        ends.add(tuple((m.node, m.incarnation, m.state) for m in node.members()))
    assert len(ends) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_house_heals_after_any_partition(seed: int) -> None:
    house = House(A, B, C, D, seed=seed)
    for one, other in ((A, C), (A, D), (B, C), (B, D)):
        house.wire.cut(one, other)
    house.wire.run_until(lambda: house.state(C, by=A) == house.state(A, by=C) == "failed", within=90)
    house.wire.heal()
    house.wire.run_for(180)
    assert {house.state(two, by=one) for one in house.nodes for two in house.nodes if one != two} == {"alive"}


def test_links_and_own_facts_are_what_was_told_last() -> None:
    node, wire = lone()
    assert list(node.links) == [B, C, D]
    node.handle(LinkDown(C), wire.now)
    assert list(node.links) == [B, D]
    node.handle(FactsChanged(Facts(name="pi-a", board="pi5")), wire.now)
    assert node.own_facts.board == "pi5"
