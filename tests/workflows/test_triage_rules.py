"""Rules, words and whom triage passes by; from odds, votes and rules to a verdict."""

from __future__ import annotations

from typing import Any

import pytest

from piclusterd.workflows.triage_decide import (
    NEIGHBOURS,
    Answered,
    Evidence,
    Near,
    Recalled,
    Verdict,
    corrected,
    decide,
    is_unsure,
)
from piclusterd.workflows.triage_issue import Issue, Label, Party
from piclusterd.workflows.triage_policy import Policy, Rule
from piclusterd.workflows.triage_rules import Certain, certain, passed_by

ADA = Party("u-1", "Ada", "ada@example.com")


def issue(title: str = "Crash", **fields: Any) -> Issue:
    return Issue(id="i", identifier="LIN-1", title=title, creator=ADA, **fields)


def of(*rules: Rule, **policy: Any) -> Policy:
    return Policy(rules=rules, labels_more=("web", "backend"), **policy)


# rules -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        (Rule(title=("crash",)), True),
        (Rule(title=("cras",)), False),
        (Rule(title=("CRASH", "other")), True),
        (Rule(text=("all is gone",)), True),
        (Rule(title=("gone",)), False),
        (Rule(author=("ADA@example.com",)), True),
        (Rule(author=("u-1",)), True),
        (Rule(author=("Bob",)), False),
        (Rule(label=("VIP",)), True),
        (Rule(label=("other",)), False),
        (Rule(title=("crash",), author=("Bob",)), False),
        (Rule(title=("crash",), text=("gone",), author=("Ada",), label=("vip",)), True),
    ],
)
def test_a_rule_holds_where_all_it_names_holds(rule: Rule, holds: bool) -> None:
    policy = of(Rule(title=rule.title, text=rule.text, author=rule.author, label=rule.label, type="chore"))
    found = certain(policy, issue(description="It says: all is gone.", labels=(Label("l", "vip"),)))
    assert (found.type == "chore") is holds
    assert bool(found.why) is holds


def test_the_later_rule_wins_and_raises_add_up() -> None:
    rules = (
        Rule(title=("crash",), priority="P3", at_least="P2", labels=("web",)),
        Rule(title=("crash",), priority="P2", at_least="P1", labels=("backend",)),
    )
    found = certain(of(*rules), issue())
    assert (found.priority, found.at_least, found.labels) == ("P2", "P1", ("web", "backend"))


def test_a_synonym_speaks_for_its_label() -> None:
    policy = of(synonyms={"database": "backend"})
    assert certain(policy, issue("The database is slow")).labels == ("backend",)
    assert certain(policy, issue("The databases are slow")).labels == ()


@pytest.mark.parametrize(("title", "confirmed"), [("Outage of search", True), ("Crash", False), ("Cooldown", False)])
def test_some_words_confirm_a_p0(title: str, confirmed: bool) -> None:
    assert certain(of(), issue(title)).confirms_p0 is confirmed


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Policy(skip_labels=("VIP",)), "label VIP"),
        (Policy(skip_authors=("ada",)), "its author"),
        (Policy(skip_projects=("cupboard",)), "project Cupboard"),
        (Policy(skip_below_words=3), "fewer than 3 words"),
        (Policy(skip_projects=("",), skip_labels=("x",), skip_below_words=1), ""),
    ],
)
def test_whom_triage_passes_by(policy: Policy, why: str) -> None:
    said = passed_by(policy, issue(labels=(Label("l", "vip"),), project="Cupboard"))
    assert why in said if why else said == ""


# deciding --------------------------------------------------------------------------------------------------------
def verdict(
    policy: Policy | None = None,
    rules: Certain | None = None,
    recalled: Recalled | None = None,
    odds: dict[str, dict[str, float]] | None = None,
) -> Verdict:
    said = odds or {"type": {"bug": 0.9, "chore": 0.1}, "priority": {"P1": 0.7, "P2": 0.3}}
    evidence = Evidence(policy or Policy(), rules or Certain(), recalled or Recalled())
    return decide(evidence, Answered(said, "m", "n"))


def near(like: float, odds: dict[str, dict[str, float]] | None = None, **holds: str) -> Near:
    return Near("LIN-9", "t", like, holds, odds or {})


def test_without_others_the_model_decides() -> None:
    found = verdict()
    assert (found.type.value, found.type.confidence, found.type.source) == ("bug", 0.9, "model")
    assert (found.priority.value, found.priority.raw) == ("P1", 0.7)
    assert (found.label, found.duplicate) == (None, None)


def test_what_people_said_of_a_very_similar_issue_outweighs_the_model() -> None:
    found = verdict(recalled=Recalled(near=(near(0.95, type="chore", priority="P3"),)))
    assert (found.type.value, found.type.source) == ("chore", "similar issues")
    assert found.priority.value == "P3"
    assert 0.5 < found.type.raw < 0.95


def test_what_is_far_off_or_was_judged_by_nobody_outweighs_nothing() -> None:
    for other in (near(0.95), near(0.2, type="chore"), near(0.9, type="of-old")):
        assert verdict(recalled=Recalled(near=(other,))).type.value == "bug"


def test_what_moves_a_verdict_is_the_models_error_where_it_said_the_like() -> None:
    said = {"bug": 0.9, "chore": 0.1}
    options = ("bug", "chore")
    right = near(0.9, {"type": {"bug": 1.0}}, type="bug")
    assert corrected("type", options, said, (right,)) == pytest.approx(said), "it was right there, and nothing moves"
    wrong = near(0.9, {"type": {"bug": 0.9, "chore": 0.1}}, type="chore")
    assert corrected("type", options, said, (wrong,))["chore"] > 0.8
    unlike = near(0.9, {"type": {"chore": 1.0}}, type="bug")
    assert corrected("type", options, said, (unlike,))["bug"] == pytest.approx(1.0, abs=0.1)
    assert corrected("type", options, {"chore": 1.0}, (wrong,))["chore"] > 0.9
    assert corrected("type", options, said, ()) == said


def test_only_the_nearest_move_it() -> None:
    far = [near(0.3, type="bug")] * 50
    close = [near(0.9, type="chore")] * NEIGHBOURS
    assert corrected("type", ("bug", "chore"), {"bug": 1.0}, (*far, *close))["chore"] > 0.9


def test_confidence_is_calibrated_by_what_stood() -> None:
    bins = [[0, 0]] * 9 + [[100, 50]]
    found = verdict(recalled=Recalled(bins={"type": bins}))
    assert found.type.raw == 0.9
    assert 0.5 < found.type.confidence < 0.6


def test_rules_are_certain_and_win_over_everything() -> None:
    rules = Certain(type="question", priority="P3", labels=("web",), why=("rule 1",))
    found = verdict(rules=rules, recalled=Recalled(near=(near(1.0, type="chore"),)))
    assert (found.type.value, found.type.confidence, found.type.source) == ("question", 1.0, "rule")
    assert found.label is not None
    assert (found.label.value, found.why) == ("web", ("rule 1",))


def test_a_raise_comes_after_the_model_and_lowers_nothing() -> None:
    assert verdict(rules=Certain(at_least="P0")).priority.value == "P0"
    assert verdict(rules=Certain(at_least="P2")).priority.value == "P1"


@pytest.mark.parametrize(
    ("sure", "confirms", "value"), [(0.8, False, "P1"), (0.8, True, "P0"), (0.95, False, "P0")]
)  # fmt: skip
def test_p0_needs_confirmation(sure: float, confirms: bool, value: str) -> None:
    odds = {"type": {"bug": 1.0}, "priority": {"P0": sure, "P1": 1 - sure}}
    found = verdict(Policy(p0_confidence=0.9), odds=odds, rules=Certain(confirms_p0=confirms))
    assert found.priority.value == value
    assert is_unsure(found, Policy()), "a larger model looks, where there is one"
    by_rule = verdict(rules=Certain(priority="P0", confirms_p0=True))
    assert not is_unsure(by_rule, Policy())


def test_a_label_is_one_of_the_policys_or_none() -> None:
    policy = Policy(labels_more=("web", "backend"))
    odds = {"type": {"bug": 1.0}, "priority": {"P1": 1.0}, "label": {"web": 0.7, "none": 0.3}}
    found = verdict(policy, odds=odds)
    assert found.label is not None
    assert found.label.value == "web"
    assert verdict(policy, odds={**odds, "label": {"none": 1.0}}).label is None
    assert verdict(Policy(labels_more=("web",), fields=("type",)), odds=odds).label is None


def test_an_answer_that_lacks_a_field_says_nothing_of_it() -> None:
    found = verdict(Policy(labels_more=("web",)))
    assert found.label is not None
    assert found.label.confidence == 0.5


def test_a_duplicate_is_the_nearest_where_it_is_near_enough() -> None:
    twin = near(0.9, type="bug")
    assert verdict(recalled=Recalled(near=(twin,))).duplicate == twin
    assert verdict(recalled=Recalled(near=(near(0.7),))).duplicate is None
    assert verdict(Policy(fields=("type", "priority")), recalled=Recalled(near=(twin,))).duplicate is None


def test_who_is_unsure_of_a_field_that_is_decided_asks_further() -> None:
    odds = {"type": {"bug": 0.9}, "priority": {"P1": 0.4, "P2": 0.3, "P3": 0.3}}
    found = verdict(odds=odds)
    assert is_unsure(found, Policy())
    assert not is_unsure(found, Policy(fields=("type",)))
