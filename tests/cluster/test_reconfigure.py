"""Voters change one at a time, and only when nothing acknowledged and no majority can be lost (arXiv 2102.11960)."""

from __future__ import annotations

import pytest

from piclusterd.cluster.reconfigure import (
    CHANGE_PATIENCE_S,
    DEMOTE_AFTER_S,
    Change,
    Decision,
    Looks,
    NewVoters,
    Reconfigure,
    Retire,
    Standing,
)
from piclusterd.cluster.voter_config import config_id, is_newer, restamped
from piclusterd.errors import Unavailable, UserError
from piclusterd.events import Answer, Rules
from piclusterd.ids import NodeId
from piclusterd.wire import ConfigId, Voters

A, B, C, D, E, F = (NodeId(letter * 16) for letter in "abcdef")
ABC = Voters(1, 2, (A, B, C))
TICKET = 7
ADD_D, REMOVE_C = Change("add", D), Change("remove", C)


class Desk:
    """A, who leads term 2. What others report is in the sets a test fills."""

    def __init__(self, config: Voters = ABC, active: bool = True, stored: bool = True, **rules: bool) -> None:
        self.behind: list[NodeId] = []
        self.silent: list[NodeId] = []
        self.saved = True
        self.carried = True
        looks = Looks(
            carries=lambda node: node not in self.behind,
            carried=lambda voters: self.carried,
            heard=lambda node, now: node not in self.silent,
            saved=lambda: self.saved,
        )
        self.machine = Reconfigure(A, looks, Rules(**rules))
        self.machine.elected(2, config)
        if active:
            self.machine.activated()
        if stored:
            for voter in config.voters:
                self.held(voter)

    def held(self, node: NodeId, now: float = 0.0) -> list[Decision]:
        self.machine.on_held(node, 2, config_id(self.machine.config))
        return self.machine.progress(now)

    def stored(self) -> bool:
        return self.machine.stored

    def propose(self, change: Change, now: float = 0.0) -> list[Decision]:
        return self.machine.propose(TICKET, change, now)


def refusal(out: list[Decision]) -> Exception:
    (answer,) = out
    assert isinstance(answer, Answer)
    assert answer.ticket == TICKET
    assert isinstance(answer.value, Exception)
    return answer.value


def test_who_stores_the_config_is_of_no_more_interest_until_the_next_change() -> None:
    desk = Desk(stored=False)
    assert not desk.machine.knows(B)
    for voter in (A, B, C):
        desk.held(voter)
    assert desk.machine.knows(B)
    desk.behind.append(D)
    desk.propose(ADD_D)
    assert not desk.machine.knows(B), "the change waits for whoever speaks next"
    desk.behind.clear()
    desk.held(B)
    assert not desk.machine.knows(B), "it has not stored the next config"


# age -------------------------------------------------------------------------------------------------------------
def test_a_config_of_a_newer_term_is_newer_whatever_its_version() -> None:
    assert is_newer(Voters(1, 3, (A, B, C)), Voters(9, 2, (A,)))
    assert is_newer(Voters(2, 3, (A, B)), Voters(1, 3, (A, B, C)))
    assert not is_newer(ABC, ABC)


def test_a_new_leader_makes_its_config_one_of_its_term() -> None:
    assert restamped(ABC, 5) == Voters(1, 5, (A, B, C))


def test_a_leader_that_did_not_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Desk(stored=False).machine.elected(3, ABC)


# stored ----------------------------------------------------------------------------------------------------------
def test_a_config_is_stored_when_a_majority_of_its_voters_said_so_in_this_term() -> None:
    desk = Desk(stored=False)
    assert not desk.stored()
    desk.held(D)
    assert not desk.stored(), "a learner counts nothing"
    desk.held(B)
    assert desk.stored()


@pytest.mark.parametrize(
    ("term", "config"),
    [(1, ConfigId(2, 1)), (3, ConfigId(2, 1)), (2, ConfigId(1, 1)), (2, ConfigId(2, 2)), (2, None)],
)
def test_reports_of_other_terms_and_other_configs_count_nothing(term: int, config: ConfigId | None) -> None:
    desk = Desk(stored=False)
    desk.machine.on_held(B, term, config)
    assert not desk.stored()


def test_what_our_own_disk_has_not_saved_we_do_not_store() -> None:
    desk = Desk(stored=False)
    desk.saved = False
    desk.held(B)
    assert not desk.stored()
    desk.held(C)
    assert desk.stored()


def test_nothing_is_stored_on_a_node_that_does_not_lead() -> None:
    desk = Desk()
    desk.machine.deposed()
    assert not desk.stored()


def test_a_new_term_starts_with_nobody_known_to_store_it() -> None:
    desk = Desk()
    desk.machine.elected(3, restamped(ABC, 3))
    assert not desk.stored()


# a change --------------------------------------------------------------------------------------------------------
def test_a_voter_is_added_in_the_next_version_and_answered_when_a_majority_stores_it() -> None:
    desk = Desk()
    added = Voters(2, 2, (A, B, C, D))
    assert desk.propose(ADD_D) == [NewVoters(added)]
    assert not desk.stored(), "acknowledgements wait"
    assert desk.held(B) == []
    assert desk.held(D) == [Answer(TICKET, added)]
    assert desk.stored()
    assert desk.machine.under_way is None


def test_a_voter_is_removed() -> None:
    desk = Desk()
    assert desk.propose(REMOVE_C) == [NewVoters(Voters(2, 2, (A, B)))]
    assert desk.held(C) == [], "it has no say any more"
    assert desk.held(B) == [Answer(TICKET, Voters(2, 2, (A, B)))]


def test_a_coordinator_that_removed_itself_retires_once_the_others_store_it() -> None:
    desk = Desk()
    desk.propose(Change("remove", A))
    assert desk.held(B) == []
    answer, retire = desk.held(C)
    assert isinstance(answer, Answer)
    assert isinstance(retire, Retire)


def test_reports_about_the_config_before_do_not_confirm_the_next() -> None:
    desk = Desk()
    desk.propose(ADD_D)
    for voter in (B, C, D):
        desk.machine.on_held(voter, 2, config_id(ABC))
    assert desk.machine.progress(1.0) == []
    assert not desk.stored()


def test_without_a_ticket_nobody_is_answered() -> None:
    desk = Desk()
    assert desk.machine.propose(None, REMOVE_C, 0.0) == [NewVoters(Voters(2, 2, (A, B)))]
    assert desk.held(B) == []
    assert desk.machine.propose(None, Change("add", A), 0.0) == []


# not yet ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trouble", "why"),
    [("behind", "has not caught up"), ("silent", "is not heard"), ("lacking", "hold what was acknowledged")],
)
def test_a_change_waits_until_it_loses_nothing(trouble: str, why: str) -> None:
    desk = Desk()
    desk.behind = [D] if trouble == "behind" else []
    desk.silent = [D] if trouble == "silent" else []
    desk.carried = trouble != "lacking"
    assert desk.propose(ADD_D) == []
    assert why in (desk.machine.may_change(ADD_D, 1.0) or "")
    desk.behind, desk.silent, desk.carried = [], [], True
    assert desk.held(D, 1.0) == [NewVoters(Voters(2, 2, (A, B, C, D)))]


def test_a_change_waits_for_the_config_before_to_be_stored() -> None:
    desk = Desk(stored=False)
    assert desk.propose(ADD_D) == []
    assert desk.held(B) == [NewVoters(Voters(2, 2, (A, B, C, D)))]


def test_without_the_rule_of_terms_what_an_older_term_stored_is_taken_for_stored() -> None:
    desk = Desk(stored=False, config_in_term=False)
    assert desk.propose(ADD_D) == [NewVoters(Voters(2, 2, (A, B, C, D)))]
    desk.machine.on_held(B, 2, ConfigId(1, 2))
    desk.machine.on_held(C, 2, None)
    assert not desk.stored()
    desk.machine.on_held(C, 2, ConfigId(1, 1))
    desk.machine.on_held(D, 3, ConfigId(1, 2))
    assert not desk.stored()
    desk.machine.on_held(C, 2, ConfigId(2, 2))
    assert desk.stored()


def test_without_the_rule_of_catching_up_a_voter_is_added_that_holds_nothing() -> None:
    desk = Desk(catch_up=False)
    desk.behind, desk.carried = [D], False
    assert desk.propose(ADD_D) == [NewVoters(Voters(2, 2, (A, B, C, D)))]


def test_a_change_that_would_stop_the_cluster_waits() -> None:
    desk = Desk()
    desk.silent = [B]
    assert desk.propose(REMOVE_C) == []
    assert "the cluster would stop" in (desk.machine.may_change(REMOVE_C, 0.0) or "")


def test_a_change_that_stays_impossible_is_answered_with_what_it_waited_for() -> None:
    desk = Desk()
    desk.behind = [D]
    desk.propose(ADD_D)
    assert desk.machine.deadline() == CHANGE_PATIENCE_S
    assert desk.machine.progress(CHANGE_PATIENCE_S - 1) == []
    fault = refusal(desk.machine.progress(CHANGE_PATIENCE_S))
    assert isinstance(fault, Unavailable)
    assert "has not caught up" in str(fault)
    assert desk.machine.deadline() == float("inf")
    assert desk.machine.progress(CHANGE_PATIENCE_S) == []


# never -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "voters", "why"),
    [
        (Change("add", B), (A, B, C), "is a voter already"),
        (Change("remove", D), (A, B, C), "is no voter"),
        (Change("add", F), (A, B, C, D, E), "the most"),
        (Change("remove", A), (A,), "the last voter"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(change: Change, voters: tuple[NodeId, ...], why: str) -> None:
    fault = refusal(Desk(Voters(1, 2, voters)).propose(change))
    assert isinstance(fault, UserError)
    assert why in str(fault)


def test_two_changes_at_once_are_refused() -> None:
    desk = Desk()
    desk.propose(ADD_D)
    assert "under way" in str(refusal(desk.propose(REMOVE_C)))


def test_only_the_active_coordinator_changes_voters() -> None:
    desk = Desk(active=False)
    assert isinstance(refusal(desk.propose(ADD_D)), Unavailable)
    assert "not the active coordinator" in (desk.machine.may_change(ADD_D, 0.0) or "")


@pytest.mark.parametrize("made", [True, False])
def test_a_deposed_coordinator_says_that_the_outcome_is_open(made: bool) -> None:
    desk = Desk()
    desk.behind = [] if made else [D]
    desk.propose(ADD_D)
    assert "no longer coordinates" in str(refusal(desk.machine.deposed()))
    assert desk.machine.under_way is None


# by itself -------------------------------------------------------------------------------------------------------
def standing(
    node: NodeId, state: str = "alive", since_s: float = 2 * DEMOTE_AFTER_S, eligible: bool = True
) -> Standing:
    return Standing(node, state, since_s, eligible)


def test_a_voter_in_a_drawer_is_succeeded_by_a_learner_then_loses_its_seat() -> None:
    desk = Desk()
    desk.silent = [C]
    members = [standing(A), standing(B), standing(C, "failed"), standing(D)]
    assert desk.machine.advise(members, 0.0) == ADD_D
    desk.machine.propose(None, ADD_D, 0.0)
    assert desk.machine.advise(members, 0.0) is None, "one at a time"
    desk.held(B)
    desk.held(D)
    assert desk.machine.advise(members, 0.0) == REMOVE_C


def test_with_voters_to_spare_it_only_loses_its_seat() -> None:
    desk = Desk(Voters(1, 2, (A, B, C, D, E)))
    members = [standing(n) for n in (A, B, C, D, F)] + [standing(E, "left")]
    assert desk.machine.advise(members, 0.0) == Change("remove", E)


@pytest.mark.parametrize("heir", [standing(D, eligible=False), standing(D, "failed"), standing(D, "suspect")])
def test_the_cluster_never_shrinks_itself_below_three(heir: Standing) -> None:
    assert Desk().machine.advise([standing(A), standing(B), standing(C, "failed"), heir], 0.0) is None


@pytest.mark.parametrize("voter", [standing(C), standing(C, "failed", DEMOTE_AFTER_S - 1), standing(C, "suspect")])
def test_a_voter_that_is_only_away_keeps_its_seat(voter: Standing) -> None:
    assert Desk().machine.advise([standing(A), standing(B), voter, standing(D)], 0.0) is None


def test_a_learner_that_is_behind_succeeds_nobody() -> None:
    desk = Desk()
    desk.behind = [D]
    assert desk.machine.advise([standing(A), standing(B), standing(C, "failed"), standing(D)], 0.0) is None


def test_only_the_active_coordinator_advises() -> None:
    members = [standing(A), standing(B), standing(C, "failed"), standing(D)]
    assert Desk(active=False).machine.advise(members, 0.0) is None
