"""Election, copies, barrier and change of voters are safe in every state; without any one of the rules they are not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from .reconfig import Bounds, Rules, explore, main

TWO_MINDS = (
    "1 reports {} to 0 in term 1",
    "2 reports {} to 0 in term 1",
    "0 changes config to v2@1[0, 1, 3]",
    "1 campaigns in term 2",
    "2 votes for 1 in term 2",
    "3 votes for 1 in term 2",
    "1 leads term 2 with config v1@1[0, 1, 2, 3]",
)
"""Coordinator 0 changes the config, nobody hears of it, and 1 is elected under the config before."""

ABLATIONS: dict[str, tuple[Bounds, tuple[str, ...]]] = {
    "order": (Bounds(nodes=3, voters=3, terms=2, changes=2), ()),
    "term_first": (Bounds(nodes=4, voters=4, terms=2), TWO_MINDS),
    "restamp": (Bounds(nodes=4, voters=4, terms=2), TWO_MINDS),
    "voter_compares": (Bounds(nodes=3, voters=3, terms=2, changes=2), ()),
    "config_stored": (Bounds(nodes=3, voters=3, terms=2, changes=2), ()),
    "config_in_term": (Bounds(nodes=4, voters=4, terms=2, changes=2), TWO_MINDS[2:]),
    "entries_carried": (Bounds(nodes=4, voters=4, terms=2), ()),
    "acks_wait": (Bounds(nodes=4, voters=3, terms=2), ()),
    "one_at_a_time": (Bounds(nodes=3, voters=3, terms=2), ()),
    "fencing": (Bounds(nodes=3, voters=3, terms=2, changes=0), ()),
    "barrier": (Bounds(nodes=3, voters=3, terms=2, changes=0), ()),
    "enough_copies": (Bounds(nodes=3, voters=3, terms=2, changes=0), ()),
    "one_vote": (Bounds(nodes=3, voters=3, terms=2, changes=0), ()),
    "leader_yields": (Bounds(nodes=3, voters=3, terms=2, changes=2), ()),
}
"""Rule → the smallest bounds in which its absence is found, and first steps where those alone leave too many states."""

NOT_MISSED = {"canvass_anew"}
"""Without it nothing is found within these bounds; it keeps the count of votes and the voters counted one thing."""


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(nodes=3, voters=3, terms=3, entries=1, changes=1),
        Bounds(nodes=3, voters=2, terms=3, entries=1, changes=1),
        Bounds(nodes=3, voters=3, terms=2, entries=2, changes=2),
        Bounds(nodes=4, voters=3, terms=2, entries=1, changes=1),
    ],
    ids=["3 terms", "2 voters and a learner", "2 entries, 2 changes", "3 voters and a learner"],
)
def test_nothing_acknowledged_is_ever_lost_and_no_term_has_two_leaders(bounds: Bounds) -> None:
    outcome = explore(bounds)
    assert outcome.violation is None, "\n".join((*outcome.trace, str(outcome.violation)))
    assert outcome.complete
    assert outcome.states > 1000


def test_nor_after_a_change_among_four_that_nobody_heard_of() -> None:
    outcome = explore(Bounds(nodes=4, voters=4, terms=2, changes=2), opening=TWO_MINDS)
    assert outcome.violation is None, "\n".join((*outcome.trace, str(outcome.violation)))
    assert outcome.complete


@pytest.mark.parametrize("rule", ABLATIONS)
def test_a_rule_switched_off_is_missed(rule: str) -> None:
    bounds, opening = ABLATIONS[rule]
    outcome = explore(bounds, replace(Rules(), **{rule: False}), states_max=200_000, opening=opening)
    print(*outcome.trace, outcome.violation, sep="\n")  # noqa: T201
    assert outcome.violation is not None


def test_every_rule_has_its_ablation() -> None:
    assert {rule.name for rule in fields(Rules)} == set(ABLATIONS) | NOT_MISSED


def test_the_program_shows_the_trace_and_fails_on_a_violation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nodes", "3", "--terms", "2", "--changes", "0", "--without", "fencing"]) == 1
    assert "is active in term 2, holding {}: it lacks e0" in capsys.readouterr().out
    assert main(["--nodes", "2", "--voters", "2", "--terms", "2"]) == 0
