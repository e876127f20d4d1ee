"""Leadership given to another voter: by hand, off a hot board, off a failing disk; never to one who could not lead."""

from __future__ import annotations

import itertools

import pytest

from piclusterd.cluster.fitness import BOARD_S, PROBE_S, Fitness
from piclusterd.cluster.handover import BY_HAND, MOVE_FACTOR, REST_S, RETRY_S, WISH_S, Handover, HeirLooks
from piclusterd.cluster.timings import PRESETS
from piclusterd.errors import PiclusterError, Unavailable, UserError
from piclusterd.events import (
    Answer,
    Append,
    AppendFailed,
    DeadlineReached,
    Deposed,
    DiskProbed,
    Elected,
    Event,
    FactsChanged,
    HandedOver,
    LeaderChanged,
    MoveLeadership,
    Output,
    ProbeDisk,
    Send,
)
from piclusterd.ids import NodeId
from piclusterd.wire import Facts, TimeoutNow

A, B, C, D = (NodeId(letter * 16) for letter in "abcd")
PI = PRESETS["pi"]
PATIENCE_S = MOVE_FACTOR * PI.election_max_s
FULL = AppendFailed(1, "disk full")
HOT = FactsChanged(Facts(name="pi-a", flags=("throttled",)))


class House:
    """A leads term 7 of voters A, B, C; D learns. What A sees of them may be changed."""

    def __init__(self) -> None:
        self.leads = True
        self.term = 7
        self.voters: tuple[NodeId, ...] = (A, B, C)
        self.reached = [B, C, D]
        self.current = [B, C]
        self.facts = {n: Facts(name=f"pi-{n[0]}") for n in (A, B, C, D)}
        looks = HeirLooks(
            lambda: self.leads, lambda: self.term, lambda: self.voters, lambda node, now: node in self.reached,
            lambda node: node in self.current, self.facts.get,
        )  # fmt: skip
        self.fitness = Fitness(PI, itertools.count(100), 0.0)
        self.machine = Handover(A, PI, self.fitness, looks)
        self.now = 100.0

    def handle(self, event: Event, after: float = 0.0) -> list[Output]:
        self.now += after
        return [out for out in self.machine.handle(event, self.now) if not isinstance(out, ProbeDisk)]

    def led_by(self, node: NodeId | None) -> list[Output]:
        """An election is over: A sees a newer term."""
        self.term += 1
        self.leads = node == A
        return self.machine.note(LeaderChanged(self.term, node), self.now)

    def wait(self, seconds: float) -> list[Output]:
        """What A does by itself in that time, told of nothing."""
        out: list[Output] = []
        end = self.now + seconds
        while (due := self.machine.deadline()) <= end:
            assert due > self.now - 1e-9
            out += self.handle(DeadlineReached(), max(due - self.now, 0.0))
        self.now = end
        return out

    def heat(self) -> list[Output]:
        """Flagged long enough."""
        return self.handle(HOT) + self.wait(BOARD_S)


def to(node: NodeId, term: int = 7) -> Send:
    return Send(node, TimeoutNow(term))


def refused(out: list[Output]) -> PiclusterError:
    (answer,) = out
    assert isinstance(answer, Answer)
    assert isinstance(answer.value, PiclusterError)
    return answer.value


# by hand ---------------------------------------------------------------------------------------------------------
def test_the_owner_moves_leadership_and_hears_who_leads() -> None:
    house = House()
    assert house.handle(MoveLeadership(1, C)) == [to(C)]
    assert house.machine.note(Deposed(7, "term 8 has begun"), house.now) == []
    assert house.led_by(None) == []
    house.term -= 1
    assert house.led_by(C) == [Answer(1, LeaderChanged(8, C)), HandedOver(7, C, BY_HAND)]
    assert house.machine.count == 1
    assert house.machine.deadline() == float("inf")
    assert house.machine.marked(house.facts[A], house.now) is house.facts[A], "the owner knows why"


def test_without_a_name_the_fittest_voter_is_chosen() -> None:
    house = House()
    house.facts[B] = Facts(name="pi-b", flags=("hot",))
    assert house.handle(MoveLeadership(1)) == [to(C)]
    house = House()
    house.current = [C]
    assert house.handle(MoveLeadership(1)) == [to(C)]


def test_moving_to_who_leads_already_changes_nothing() -> None:
    assert House().handle(MoveLeadership(1, A)) == [Answer(1, LeaderChanged(7, A))]


def test_another_winner_than_the_heir_is_told_as_it_is() -> None:
    house = House()
    house.handle(MoveLeadership(1, C))
    assert house.led_by(B) == [Answer(1, LeaderChanged(8, B)), HandedOver(7, B, BY_HAND)]
    house = House()
    house.handle(MoveLeadership(1, C))
    assert house.led_by(A) == [Answer(1, LeaderChanged(8, A))]
    assert house.machine.count == 0


def test_word_of_the_present_term_ends_no_move() -> None:
    house = House()
    house.handle(MoveLeadership(1, C))
    assert house.machine.note(LeaderChanged(7, A), house.now) == []
    assert house.machine.deadline() == house.now + PATIENCE_S


@pytest.mark.parametrize(
    ("change", "wanted", "text", "kind"),
    [
        ({"leads": False}, C, "does not coordinate", Unavailable),
        ({"voters": (A,)}, None, "no other voter", UserError),
        ({}, D, "pi-d is no voter", UserError),
        ({"reached": [B]}, C, "pi-c cannot be reached", Unavailable),
        ({"current": [B]}, C, "pi-c has not caught up", Unavailable),
        ({"current": [], "reached": [C]}, None, "pi-b cannot be reached", Unavailable),
        ({"facts": {C: Facts(name="pi-c", trouble="full")}}, C, "pi-c has disk trouble", Unavailable),
        ({"reached": [], "facts": {}}, C, f"node {C} cannot be reached", Unavailable),
    ],
)  # fmt: skip
def test_a_move_that_cannot_be_is_refused_with_its_reason(
    change: dict[str, object], wanted: NodeId | None, text: str, kind: type[PiclusterError]
) -> None:
    house = House()
    told = change.pop("facts", None)
    if isinstance(told, dict):
        house.facts.update(told)
        if not told:
            house.facts.clear()
    for name, value in change.items():
        setattr(house, name, value)
    fault = refused(house.handle(MoveLeadership(1, wanted)) + house.wait(WISH_S + RETRY_S))
    assert isinstance(fault, kind)
    with pytest.raises(PiclusterError, match=text):
        raise PiclusterError(str(fault))


def test_a_voter_that_is_a_little_behind_is_waited_for() -> None:
    house = House()
    house.current = []
    assert house.handle(MoveLeadership(1, C)) == []
    assert house.wait(WISH_S / 2) == []
    house.current = [C]
    assert house.wait(RETRY_S) == [to(C)]


def test_one_move_at_a_time() -> None:
    house = House()
    house.current = [C]
    house.handle(MoveLeadership(1, B))
    assert "already" in str(refused(house.handle(MoveLeadership(2, C))))
    house.current = [B, C]
    assert house.wait(RETRY_S) == [to(B)]
    assert "already" in str(refused(house.handle(MoveLeadership(2, C))))


def test_a_disk_that_fails_meanwhile_comes_before_the_owners_wish() -> None:
    house = House()
    house.current = [C]
    house.handle(MoveLeadership(1, B))
    assert house.handle(FULL) == [to(C)]
    assert house.handle(FULL, 0.1) == []
    house.led_by(C)
    assert "does not coordinate" in str(refused(house.wait(RETRY_S)))


def test_an_heir_that_does_not_take_over_is_told_in_time_and_nothing_has_changed() -> None:
    house = House()
    house.handle(MoveLeadership(1, C))
    assert "pi-c did not take over" in str(refused(house.wait(PATIENCE_S)))
    assert house.handle(MoveLeadership(2)) == [to(B)], "and is not the first choice any more"


# a failing disk --------------------------------------------------------------------------------------------------
def test_a_leader_whose_disk_is_full_hands_over_at_once_and_says_why() -> None:
    house = House()
    assert house.handle(FULL) == [to(B)]
    assert house.led_by(B) == [HandedOver(7, B, "disk full")]
    told = house.machine.marked(Facts(name="pi-a", flags=("hot",)), house.now)
    assert (told.flags, told.trouble, told.handed_over) == (("hot", "disk"), "disk full", "disk full")
    assert house.machine.marked(told, house.now) is told
    assert house.machine.marked(told, house.now + REST_S).handed_over == ""


def test_trouble_that_ended_is_told_too() -> None:
    house = House()
    house.leads = False
    house.handle(FULL)
    told = house.machine.marked(Facts(), house.now)
    (probe,) = house.machine.handle(DeadlineReached(), house.now + PROBE_S)
    assert isinstance(probe, ProbeDisk)
    house.machine.handle(DiskProbed(probe.token, ""), house.now + PROBE_S)
    assert house.machine.marked(told, house.now + PROBE_S) == Facts()


def test_without_an_heir_the_leader_stays_and_looks_again() -> None:
    house = House()
    house.reached = []
    assert house.handle(FULL) == []
    assert house.handle(FULL, 1.0) == []
    house.reached = [C]
    assert house.wait(RETRY_S) == [to(C)]


def test_an_heir_that_does_not_win_is_followed_by_the_next() -> None:
    house = House()
    assert house.handle(FULL) == [to(B)]
    assert house.wait(PATIENCE_S) == [to(C)]
    assert house.wait(PATIENCE_S) == [to(B)]


def test_a_failing_disk_goes_to_a_hot_board_rather_than_to_nobody_but_never_to_a_failing_disk() -> None:
    house = House()
    house.facts[B] = Facts(name="pi-b", trouble="read-only")
    house.facts[C] = Facts(name="pi-c", flags=("hot",), handed_over="the board is hot")
    assert house.handle(FULL) == [to(C)]


def test_a_write_that_hangs_is_looked_after_from_the_moment_it_goes_out() -> None:
    house = House()
    assert house.machine.wrote([Append(1, ())], house.now) == house.now + house.fitness.stall_s
    assert house.wait(house.fitness.stall_s) == [to(B)]


def test_a_follower_with_a_full_disk_has_nothing_to_hand_over() -> None:
    house = House()
    house.leads = False
    assert house.handle(FULL) == []
    assert house.wait(60.0) == []


def test_who_is_elected_with_a_failing_disk_hands_over() -> None:
    house = House()
    house.leads = False
    house.handle(FULL)
    house.leads = True
    assert house.machine.note(Elected(7, house.voters), house.now) == []
    assert house.wait(0.0) == [to(B)]


# a hot board -----------------------------------------------------------------------------------------------------
def test_a_board_that_stays_throttled_hands_over_to_a_cool_one() -> None:
    house = House()
    house.facts[B] = Facts(name="pi-b", flags=("undervolt",))
    assert house.heat() == [to(C)]
    assert house.led_by(C) == [HandedOver(7, C, "the board is throttled")]
    assert house.machine.marked(Facts(), house.now).handed_over == "the board is throttled"


@pytest.mark.parametrize(
    "facts", [Facts(flags=("hot",)), Facts(handed_over="the board is hot"), Facts(trouble="full"), None]
)
def test_a_hot_board_keeps_leading_where_no_other_is_better(facts: Facts | None) -> None:
    house = House()
    house.voters = (A, B)
    house.facts.pop(B) if facts is None else house.facts.__setitem__(B, facts)
    assert house.heat() == []
    house.facts[B] = Facts(name="pi-b")
    assert house.wait(PATIENCE_S) == [to(B)]


def test_a_board_is_relieved_once_in_a_while_so_that_leadership_does_not_wander() -> None:
    house = House()
    house.heat()
    house.led_by(B)
    house.led_by(A)
    house.machine.note(Elected(house.term, house.voters), house.now)
    assert house.wait(REST_S - 1.0) == []
    assert house.wait(2.0) == [to(B, house.term)]


def test_flags_that_went_in_time_move_nothing() -> None:
    house = House()
    house.handle(HOT)
    house.handle(FactsChanged(Facts()), BOARD_S / 2)
    assert house.wait(300.0) == []
