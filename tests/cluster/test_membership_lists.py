"""The member list over time: who is removed, who comes back, how lists are compared, when facts are told."""

from __future__ import annotations

from random import Random

import pytest
from msgspec.structs import replace

from piclusterd.cluster.belief import SAYS
from piclusterd.cluster.broadcast import NEWS_PER_MESSAGE, RETRANSMIT, Broadcast
from piclusterd.cluster.exchange import BUCKETS_MAX, MEMBERS_A_MESSAGE, answers, digests
from piclusterd.cluster.membership import ANSWER_PART, FAREWELLS, FLAPS_MAX, Membership
from piclusterd.cluster.own_facts import REFRESH_S, OwnFacts, load_moved
from piclusterd.cluster.probing import RELAYS_MAX, Prober
from piclusterd.cluster.roster import LINKING_S, TOMBSTONE_S, Roster
from piclusterd.cluster.suspicion import Guards
from piclusterd.events import (
    DeadlineReached,
    FactsChanged,
    HardStateSaved,
    LinkDown,
    LinkUp,
    MemberDown,
    MemberUp,
    Output,
    Received,
    Send,
    Shutdown,
)
from piclusterd.ids import NodeId
from piclusterd.wire import (
    MEMBERS_MAX,
    Ack,
    Facts,
    Gossip,
    Head,
    Held,
    Line,
    Member,
    ModelFacts,
    Nack,
    Ping,
    PingReq,
    PushPull,
)

from .pair import PI, A, B, C, D, Wire, member, name
from .test_membership import House, crowded, hears, lone, of, probed, sends


def dead(node: Membership, peer: NodeId, now: float) -> None:
    """`peer` is gone, and `node` has been told."""
    node.handle(LinkDown(peer), now)
    hears(node, C, Gossip((of(peer, node.peers[peer].member.incarnation, "failed", 0),)), now)
    assert node.peers[peer].member.state == "failed"


# removal ---------------------------------------------------------------------------------------------------------
def test_the_failed_stay_listed_until_somebody_removes_them_everywhere() -> None:
    house = House(A, B, C, D)
    house.dies(D)
    house.wire.run_until(lambda: all(house.state(D, by=n) == "failed" for n in (A, B, C)), within=60)
    house.wire._perform(A, house.nodes[A].remove(D, house.wire.now))
    house.wire.settle()
    assert all(D not in [m.node for m in house.nodes[n].members()] for n in (A, B, C))
    assert (D, "removed") in house.downs(B)
    house.wire.run_for(60)
    assert all(D not in house.nodes[n].peers for n in (A, B, C)), "no old list brings it back"


def test_the_living_can_be_removed_and_their_protests_are_not_heard() -> None:
    node, wire = lone()
    out = node.remove(B, wire.now)
    assert MemberDown(B, B, "removed", "removed, says pi-a") in out
    assert B not in [send.to for send in sends(out, Gossip)], "it would only refute"
    for said in ("alive", "suspect", "removed"):
        assert hears(node, C, Gossip((of(B, 9, said),)), wire.now) == []
    assert B not in node.peers
    node.handle(LinkUp(B), wire.now)
    assert B not in node.peers
    assert node.remove(B, wire.now) == node.remove(NodeId("f" * 16), wire.now) == []


def test_a_node_whose_removal_is_only_rumoured_is_told_and_listed_again() -> None:
    """The ledger alone says who was removed; a rumour of it ends with the proof of the contrary."""
    node, wire = lone()
    dead(node, B, wire.now)
    hears(node, C, Gossip((of(B, 0, "removed"),)), wire.now)
    (opening,) = [s for s in sends(node.handle(LinkUp(B), wire.now), PushPull) if s.to == B]
    assert isinstance(opening.message, PushPull)
    assert (B, "removed") in [(m.node, m.state) for m in opening.message.members]
    assert B not in node.peers, "its old line is not believed"
    node.handle(DeadlineReached(), node.deadline())
    out = hears(node, B, Gossip((of(B, 1, "alive"),)), wire.now)
    assert MemberUp(B, "v1") in out
    assert B not in node.roster.removed


def test_a_removal_of_an_earlier_life_or_of_a_stranger_changes_nothing() -> None:
    node, wire = lone()
    hears(node, B, Gossip((of(B, 5, "alive"),)), wire.now)
    assert hears(node, C, Gossip((of(B, 4, "removed"),)), wire.now) == []
    assert hears(node, C, Gossip((of(name(99), 4, "removed"),)), wire.now) == []
    assert B in node.peers


def test_a_living_node_refutes_its_removal() -> None:
    node, wire = lone()
    hears(node, C, Gossip((of(A, 0, "removed"),)), wire.now)
    assert node.mine.incarnation == 1


def test_a_tombstone_is_forgotten_after_a_day() -> None:
    node, wire = lone()
    dead(node, B, wire.now)
    node.remove(B, wire.now)
    node.roster.forget(wire.now + TOMBSTONE_S - 1)
    assert B in node.roster.removed
    node.roster.forget(wire.now + TOMBSTONE_S)
    assert node.roster.removed == {}


# coming back -----------------------------------------------------------------------------------------------------
def test_a_failed_node_whose_link_comes_up_heals_at_once_and_nobody_calls_it_failed_again() -> None:
    house = House(A, B, C)
    house.wire.isolate(C)
    house.wire.run_until(lambda: house.state(C, by=A) == house.state(C, by=B) == "failed", within=60)
    house.wire.run_until(lambda: house.state(A, by=C) == house.state(B, by=C) == "failed", within=60)
    house.wire.heal()
    before = {n: len(house.downs(n)) for n in (A, B, C)}
    for one, other in ((A, C), (C, A)):
        house.wire.tell(one, LinkUp(other))
    assert {house.state(two, by=one) for one, two in ((A, C), (B, C), (C, A))} == {"alive"}
    house.wire.run_for(60)
    assert house.state(B, by=C) == "alive"
    assert [d for n in (A, B, C) for d in house.downs(n)[before[n] :] if d[1] == "failed"] == []


def test_a_peer_that_is_heard_is_not_believed_to_have_failed() -> None:
    """A rumour older than the link: it is passed on as doubt, to the peer too, which refutes."""
    node, wire = lone()
    out = hears(node, C, Gossip((of(B, 3, "failed", 0),)), wire.now)
    assert node.peers[B].member.state == "suspect"
    assert B in [send.to for send in sends(out, Gossip)]
    later = wire.now + 2 * PI.probe_s + 0.1
    hears(node, C, Gossip((of(D, 3, "failed", 0),)), later)
    assert node.peers[D].member.state == "failed", "D was not heard of late"


def test_the_obituary_is_sent_to_a_ghost_that_speaks_but_not_again_and_again() -> None:
    """foca#25: every message of a node called dead was answered, and the answers were, too."""
    node, wire = lone()
    dead(node, B, wire.now)
    told = [hears(node, B, Ping(n, b""), wire.now + n / 100) for n in range(50)]
    obituaries = [s for out in told for s in sends(out, Gossip)]
    assert [send.to for send in obituaries] == [B]
    assert sends(hears(node, B, Nack(1), wire.now + PI.suspect_min_s), Gossip) != []


def test_a_stranger_that_failed_long_ago_is_listed_without_a_note() -> None:
    node, wire = lone()
    out = hears(node, B, Gossip((of(name(99), 4, "failed"),)), wire.now)
    assert [o for o in out if isinstance(o, MemberDown)] == []
    assert node.peers[name(99)].member.state == "failed"


def test_a_link_that_keeps_closing_is_left_to_the_probes() -> None:
    node, wire = lone()
    out: list[Output] = []
    for count in range(1, FLAPS_MAX + 2):
        out = node.handle(LinkDown(B), wire.now + count)
        hears(node, B, Gossip((of(B, count, "alive"),)), wire.now + count)
        node.handle(LinkUp(B), wire.now + count)
    assert out == []
    assert "its link keeps closing" in node.peers[B].told(wire.now)
    assert node.handle(LinkDown(B), wire.now + 100.0) != [], "a minute later it counts again"


def test_a_link_of_a_stranger_that_closes_is_nothing() -> None:
    node, wire = lone()
    assert node.handle(LinkDown(name(99)), wire.now) == []


def test_a_list_without_end_is_refused() -> None:
    node, wire = lone()
    node.learn([of(name(n), 0, "alive") for n in range(100, 100 + MEMBERS_MAX)], wire.now)
    assert hears(node, B, Gossip((of(name(1), 0, "alive"),)), wire.now) == []
    assert name(1) not in node.peers


def test_a_name_that_is_no_node_id_is_ignored() -> None:
    node, wire = lone()
    assert hears(node, B, Gossip((of(NodeId("mallory"), 0, "alive"),)), wire.now) == []


def test_an_address_book_does_not_list_its_owner() -> None:
    node, wire = lone()
    node.learn([of(A, 9, "failed"), of(name(99), 0, "alive")], wire.now)
    assert A not in node.peers
    assert name(99) in node.peers


def test_facts_of_an_earlier_life_are_outbid() -> None:
    """A disk was restored from an old image: peers remember a later version than ours."""
    node, wire = lone()
    hears(node, B, Gossip((of(A, 0, "alive", version=70),)), wire.now)
    assert node.mine.facts.version == 71
    assert node.mine.facts.name == "pi-a"


def test_events_that_concern_others_are_ignored() -> None:
    node, wire = lone()
    assert node.handle(HardStateSaved(1), wire.now) == []
    assert hears(node, B, Held(0, b"", (Head(B, 1, 1),)), wire.now) == []


# confirmations ---------------------------------------------------------------------------------------------------
def test_who_passes_an_accusation_on_is_no_second_accuser() -> None:
    """Lifeguard §IV.B asks for independent confirmations."""
    node, wire = lone()
    node.handle(LinkDown(B), wire.now)
    doubt = node.peers[B].suspicion
    assert doubt is not None
    accused = Member(B, 0, "suspect", Facts(), C)
    for messenger in (C, D):
        hears(node, messenger, Gossip((accused,)), wire.now)
    assert list(doubt.accusers) == [A, C]


def test_our_own_failed_probe_confirms_others_suspicion() -> None:
    node, wire = lone()
    hears(node, D, Gossip((of(B, 0, "suspect", 0),)), wire.now)
    doubt = node.peers[B].suspicion
    assert doubt is not None
    out = node.handle(LinkDown(B), wire.now)
    assert list(doubt.accusers) == [D, A]
    news = [send.message for send in sends(out, Gossip)]
    assert all(isinstance(gossip, Gossip) and gossip.members[0].accuser == A for gossip in news)


def test_an_answer_that_comes_by_a_helper_is_remembered() -> None:
    node, _ = lone()
    target, seq, now = probed(node)
    helper = next(n for n in (B, C, D) if n != target)
    hears(node, helper, Ack(seq, b""), now)
    assert node.peers[target].told(now) == f"0 s ago: no answer to our probe, but to {helper}'s"


def test_the_probe_of_a_node_removed_meanwhile_ends_in_nothing() -> None:
    node, _ = lone()
    target, seq, now = probed(node)
    dead_by = next(n for n in (B, C, D) if n != target)
    node.handle(LinkDown(target), now)
    hears(node, dead_by, Gossip((of(target, 0, "failed", 0),)), now)
    node.remove(target, now)
    hears(node, dead_by, Ack(seq, b""), now)
    assert target not in node.peers
    hears(node, dead_by, Nack(seq), now)


def test_in_a_small_house_whoever_was_not_met_for_longest_is_probed_next() -> None:
    """And a silent one keeps nobody else waiting: its probe was its turn, answered or not."""
    node, _ = lone()

    def answered() -> NodeId:
        target, seq, now = probed(node)
        hears(node, target, Ack(seq, b""), now + 0.01)
        return target

    first, second, third = (answered() for _ in range(3))
    assert {first, second, third} == {B, C, D}
    silent, _, now = probed(node)
    assert silent == first
    hears(node, second, Ping(1, b""), now + 0.01)
    assert [answered(), answered(), answered()] == [third, first, second]


def test_a_round_of_a_large_cluster_visits_everybody_who_is_here_once() -> None:
    prober = Prober(PI, Random(1), Guards(), 0.0)
    assert prober.target([]) is None
    assert {prober.target([B, C, D]) for _ in range(3)} == {B, C, D}
    left = [prober.target([B, C, D]), prober.target([D])]
    assert left[1] == D, "who is gone is passed over"


def test_nacks_beyond_the_helpers_asked_do_not_count() -> None:
    node, _ = lone()
    _, seq, now = probed(node)
    hears(node, B, Nack(seq), now)
    hears(node, B, Nack(seq + 9), now)
    node.handle(DeadlineReached(), now + PI.probe_timeout_s)
    node.handle(DeadlineReached(), now + PI.probe_s)
    assert node.health == 2, "nobody nacked after being asked"


def test_probes_for_others_are_limited() -> None:
    node, wire = lone()
    asked = [sends(hears(node, C, PingReq(n, B), wire.now), Ping) for n in range(RELAYS_MAX + 1)]
    assert [len(pings) for pings in asked] == [1] * RELAYS_MAX + [0]


def test_a_node_alone_probes_nobody_and_compares_with_nobody() -> None:
    node = Membership(A, Facts(), 0, PI, Random(1), bytes, 0.0)
    for _ in range(50):
        assert node.handle(DeadlineReached(), node.deadline()) == []


# large clusters --------------------------------------------------------------------------------------------------
def test_news_in_a_large_cluster_ride_on_pings_and_rounds_and_then_stop() -> None:
    node = crowded(40)
    hears(node, name(20), Gossip((of(name(30), 0, "suspect", 0),)), 1.0)
    (ack,) = sends(hears(node, name(21), Ping(1, b""), 1.0), Ack)
    assert isinstance(ack.message, Ack)
    assert [m.node for m in ack.message.members] == [name(30)]
    said: list[Output] = []
    while node._broadcast:
        said += node.handle(DeadlineReached(), node.deadline())
    told = len(sends(said, Gossip)) + len(
        [p for p in sends(said, Ping) if isinstance(p.message, Ping) and p.message.members]
    )
    assert RETRANSMIT <= told <= RETRANSMIT * 2 + 6


def test_readings_of_a_large_cluster_wait_and_travel_by_comparison() -> None:
    node = crowded(40)
    version = node.mine.facts.version
    assert node.handle(FactsChanged(Facts(name="pi-a", cpu_percent=90.0)), 0.5) == []
    assert node.mine.facts.cpu_percent == 90.0, "our own pages show it at once"
    assert node.mine.facts.version == version
    now = 0.0
    while now < 10.0:
        now = node.deadline()
        news = [send.message for send in sends(node.handle(DeadlineReached(), now), Gossip)]
        assert all(isinstance(gossip, Gossip) and A not in [m.node for m in gossip.members] for gossip in news)
    assert node.mine.facts.version == version + 1


def test_a_large_cluster_helps_without_links_and_says_farewell_to_a_few() -> None:
    node = crowded(40)
    node.handle(LinkDown(name(20)), 1.0)
    hears(node, name(20), Gossip((of(name(20), 1, "alive"),)), 1.0)
    assert [send.to for send in sends(hears(node, name(21), PingReq(3, name(20)), 1.0), Ping)] == [name(20)]
    assert hears(node, name(21), PingReq(3, name(999)), 1.0) == [Send(name(21), Nack(3))]
    asked: list[Send] = []
    while not asked:
        asked = sends(node.handle(DeadlineReached(), node.deadline()), PingReq)
    assert len(asked) == 3
    assert len(sends(node.handle(Shutdown(), 9.0), Gossip)) == FAREWELLS


def test_news_the_least_told_go_first() -> None:
    queue = Broadcast()
    for number in range(NEWS_PER_MESSAGE + 4):
        queue.add(of(name(number), 0, "suspect"))
    first, second = queue.take(9), queue.take(9)
    assert [m.node for m in second[:4]] == [name(n) for n in range(NEWS_PER_MESSAGE, NEWS_PER_MESSAGE + 4)]
    assert len(first) == NEWS_PER_MESSAGE
    while queue:
        queue.take(9)
    queue.add(of(B, 0, "suspect"))
    queue.add(of(B, 1, "alive"))
    assert queue.take(9) == (of(B, 1, "alive"),), "newer news of one member replace the older"


# comparing lists -------------------------------------------------------------------------------------------------
def roster(*members: Member) -> Roster:
    mine, *others = members
    built = Roster(mine)
    for other in others:
        built.add(other, 0.0)
    return built


def compared(one: Membership, other: Membership) -> int:
    """Let `one` open and both answer until silent; the messages it took."""
    said = [(one.me, other, PushPull((), True, digests(one.roster)))]
    count = 0
    while said:
        sender, receiver, message = said.pop(0)
        count += 1
        assert count < 50, "they compare without end"
        back = one if receiver is other else other
        answered = [
            send.message for send in sends(hears(receiver, sender, message, 0.0), PushPull) if send.to == sender
        ]
        said += [(receiver.me, back, answer) for answer in answered if isinstance(answer, PushPull)]
    return count


def listing(me: NodeId, members: list[Member]) -> Membership:
    node = Membership(me, Facts(name=f"pi-{me[-1]}"), 0, PI, Random(1), bytes, 0.0)
    node.learn(members, 0.0)
    return node


@pytest.mark.parametrize("size", [5, 300, 700])
def test_two_lists_become_one_and_equal_lists_are_silent(size: int) -> None:
    """Above 256 members in buckets: only those that differ are sent."""
    rng = Random(size)
    both = [of(name(1000 + n), 0, "alive", version=1 + n % 3) for n in range(size)]
    one = listing(A, [m for m in both if rng.random() < 0.9])
    other = listing(B, [m for m in both if rng.random() < 0.9] + [of(name(77), 2, "left")])
    compared(one, other)
    assert {m.node: m for m in one.members()} == {m.node: m for m in other.members()}
    assert digests(one.roster) == digests(other.roster)
    assert compared(one, other) == 1


def test_each_side_gets_what_is_newer_at_the_other() -> None:
    mine = of(A, 0, "alive")
    one = roster(mine, of(C, 4, "failed"), of(D, 0, "alive", version=9))
    lines = (Line(A, 0, 0, 1), Line(C, 5, 0, 2), Line(D, 0, 1, 3), Line(B, 0, 0, 1), Line(name(99), 1, 4, 0))
    (answer,) = answers(one, PushPull((), True, (b"other",), lines))
    assert [m.node for m in answer.members] == [D], "its facts are newer here"
    assert answer.want == (C, D, B), "and its state there; a stranger's tombstone is not wanted"


def test_a_tombstone_wins_against_an_old_list_whoever_opens() -> None:
    for opener in (0, 1):
        one, other = (listing(n, [of(C, 1, "failed"), of(D, 1, "alive")]) for n in (A, B))
        one.remove(C, 0.0)
        compared(*((one, other) if opener == 0 else (other, one)))
        assert C not in one.peers
        assert C not in other.peers


def test_news_lost_on_the_way_to_one_is_noticed_by_the_next_pings_of_a_small_house() -> None:
    """Without the digest on pings it waits for a comparison: up to 22 s, and longer where that is lost too."""
    house = House(A, B, C, D)
    house.wire.isolate(B)
    house.wire.tell(A, FactsChanged(Facts(name="renamed")))
    house.wire.heal()
    assert house.nodes[B].peers[A].member.facts.name == "pi-a"
    house.wire.run_for(2 * PI.probe_s)
    assert [house.nodes[n].peers[A].member.facts.name for n in (B, C, D)] == ["renamed"] * 3


def test_equal_lists_of_a_small_house_ride_on_pings_in_silence() -> None:
    house = House(A, B, C)
    house.wire.run_for(5.0)
    house.wire.said.clear()
    house.wire.run_for(5.0)
    (digest,) = {ping.listed for ping in house.wire.sent(Ping)}
    assert digest != b""
    assert {ack.listed for ack in house.wire.sent(Ack)} == {digest}
    assert house.wire.sent(PushPull) == []


def test_an_earlier_release_says_nothing_of_its_list_and_a_large_cluster_has_nothing_to_say() -> None:
    node, wire = lone()
    (answer,) = hears(node, B, Ping(1, b""), wire.now)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, Ack)
    assert sends(hears(node, B, Ping(2, b"", (), b"another"), wire.now), PushPull) != []
    crowd = crowded(40)
    (ack,) = hears(crowd, name(21), Ping(1, b"", (), b"another"), 1.0)
    assert isinstance(ack, Send)
    assert ack.message == Ack(1, crowd._digest(), (), b"")


def test_whom_chance_makes_everybodys_partner_answers_one_and_then_waits() -> None:
    """17 KB/s of one node at N = 1000, where the mean was 4."""
    node = crowded(40)
    opening = PushPull((), True, (b"other",))
    pause = ANSWER_PART * PI.push_pull_s
    assert sends(hears(node, name(20), opening, 1.0), PushPull) != []
    assert sends(hears(node, name(21), opening, 1.0), PushPull) == []
    assert sends(hears(node, name(22), replace(opening, members=(of(name(22), 0, "alive"),)), 1.0), PushPull) != [], (
        "a new link is always answered: it may be a newcomer's only one"
    )
    assert sends(hears(node, name(23), opening, 1.0 + pause - 0.1), PushPull) == []
    assert sends(hears(node, name(23), opening, 1.0 + pause), PushPull) != []
    small, wire = lone()
    assert all(sends(hears(small, peer, opening, wire.now), PushPull) for peer in (B, C, D))


def test_a_long_list_is_sent_in_parts() -> None:
    one = listing(A, [of(name(1000 + n), 0, "alive") for n in range(MEMBERS_A_MESSAGE)])
    parts = answers(one.roster, PushPull((), True))
    assert [len(part.members) for part in parts] == [MEMBERS_A_MESSAGE, 1]


def test_nonsense_is_not_compared() -> None:
    one = roster(of(A, 0, "alive"))
    assert answers(one, PushPull((), True, (b"",) * (BUCKETS_MAX + 1))) == []
    assert answers(one, PushPull((), False, (), ())) == []
    assert answers(one, PushPull((), False, want=(name(99),))) == []


# when facts are told ---------------------------------------------------------------------------------------------
MODEL = ModelFacts("m", decode_tps=10.0)
CALM = Facts(cpu_percent=3.0, memory_used=50, memory_total=100, temperature_c=50.0, models=(MODEL,))


@pytest.mark.parametrize(
    ("new", "moved"),
    [
        (replace(CALM, cpu_percent=9.0, memory_used=55, temperature_c=51.0), False),
        (replace(CALM, cpu_percent=13.0), True),
        (replace(CALM, memory_used=65), True),
        (replace(CALM, temperature_c=53.0), True),
        (replace(CALM, temperature_c=None), True),
        (replace(CALM, ledger_entries=1), True),
        (replace(CALM, models=(replace(MODEL, busy=1),)), True),
        (replace(CALM, models=(replace(MODEL, decode_tps=10.5),)), False),
        (replace(CALM, models=(replace(MODEL, decode_tps=12.0),)), True),
    ],
)
def test_a_reading_is_news_when_a_router_or_a_page_would_notice(new: Facts, moved: bool) -> None:
    assert load_moved(CALM, new) is moved


def test_a_flutter_is_told_after_a_minute_and_sameness_never() -> None:
    own = OwnFacts(CALM, 0.0)
    own.read(CALM, True, 4, 5.0)
    assert own.due == float("inf")
    own.read(replace(CALM, cpu_percent=4.0), True, 4, 10.0)
    assert own.due == REFRESH_S
    assert not own.reshaped
    own.told(REFRESH_S)
    assert own.due == float("inf")


def test_readings_are_passed_on_by_nobody_and_a_new_shape_by_everybody() -> None:
    node, wire = lone()
    hears(node, B, Gossip((of(B, 0, "alive", version=5),)), wire.now)
    hotter = Member(B, 0, "alive", Facts(version=6, name="v5", temperature_c=70.0))
    assert sends(hears(node, B, Gossip((hotter,)), wire.now), Gossip) == []
    assert node.facts(B) == hotter.facts
    renamed = Member(B, 0, "alive", Facts(version=7, name="v7"))
    assert {send.to for send in sends(hears(node, B, Gossip((renamed,)), wire.now), Gossip)} == {C, D}


def test_every_state_that_others_can_tell_has_its_words() -> None:
    assert set(SAYS) == {"suspect", "failed", "left"}


def test_what_a_node_says_of_a_member_it_never_met_is_nothing() -> None:
    node, _ = lone()
    assert node.facts(name(99)) is None
    assert node.handle(Received(B, Nack(5)), 100.0) == []


def test_in_a_large_cluster_whom_gossip_named_just_now_is_probed_once_it_should_be_linked() -> None:
    node, near, far, named = member(A, Wire()), [name(n) for n in range(100, 120)], name(200), 100.0
    for peer in near:
        node.handle(LinkUp(peer), named)
    node.handle(Received(near[0], Gossip((of(far, 1, "alive"),))), named)
    asked: list[float] = []
    while node.deadline() < named + 3 * LINKING_S:
        now = node.deadline()
        for out in node.handle(DeadlineReached(), now):
            match out:
                case Send(to, Ping()) if to == far:
                    asked.append(now)
                case Send(to, Ping(seq)):
                    node.handle(Received(to, Ack(seq, b"")), now)
                case _:
                    pass
    assert asked
    assert min(asked) >= named + LINKING_S
