"""What triage remembers: a fold that any order of entries makes the same, bounded, and kept by checkpoints."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest

from piclusterd.events import Fact
from piclusterd.folding import MEANING, fold
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger.frontier import plan
from piclusterd.workflows import cases as module
from piclusterd.workflows.cases import CASES_BYTES_MAX, Cases, calibrated, weight
from piclusterd.workflows.journal import Journal
from piclusterd.workflows.vectors import DIMS_MAX, WORDS, likeness, of_words, quantised

LOG = LogId(NodeId("a" * 16), 1)


class Book:
    """A ledger of cases alone."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.cases = Cases()

    def tell(self, issue: str, **parts: Any) -> None:
        named = {name.replace("__", "."): value for name, value in parts.items()}
        for record in self.cases.records({"issue": issue, "set": named}, 1):
            seq = len(self.facts) + 1
            self.facts.append(Fact(LOG, seq, 1, record.kind, record.body, hlc=seq << 16))
            self.cases.grow(self.facts[-1])


def pictures(cases: Cases) -> list[dict[str, Any]]:
    return [case.as_dict() for case in cases]


def test_the_newest_of_each_part_counts_in_whatever_order_it_comes() -> None:
    book = Book()
    book.tell("i-1", identifier="LIN-1", title="a", said__type=["bug", 0.5, 0.5])
    book.tell("i-1", title="b")
    book.tell("i-2", identifier="LIN-2", human__type="chore")
    for seed in range(10):
        shuffled = book.facts * 2
        Random(seed).shuffle(shuffled)
        other = Cases()
        for fact in shuffled:
            other.grow(fact)
        assert pictures(other) == pictures(book.cases)
    case = book.cases.of("lin-1")
    assert case is not None
    assert (case.get("title", ""), case.said("type"), case.judged) == ("b", ("bug", 0.5, 0.5), False)
    assert book.cases.of("LIN-3") is None


@pytest.mark.parametrize("body", [{}, {"issue": 3}, {"issue": "x", "set": 7}, {"issue": None, "set": {}}])
def test_junk_means_nothing(body: dict[str, Any]) -> None:
    cases = Cases()
    cases.grow(Fact(LOG, 1, 1, "case", body, hlc=1))
    assert len(cases) == 0


def test_a_part_of_another_type_than_expected_is_not_there() -> None:
    book = Book()
    book.tell("i", title=7, said__type="bug", human__priority=3, vector="x")
    case = book.cases.of("i")
    assert case is not None
    assert (case.get("title", ""), case.said("type"), case.holds("priority")) == ("", None, "")


def test_room_is_made_by_the_oldest_that_nobody_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES_BYTES_MAX", 2200)
    book = Book()
    book.tell("i-0", human__type="bug")
    for number in itertools.count(1):
        book.tell(f"i-{number}", title="x" * 100)
        if book.facts[-1].kind == "case.end":
            break
    assert book.facts[-1].body == {"issue": "i-1"}
    assert [case.issue for case in book.cases][:2] == ["i-0", "i-2"]
    other = Cases()
    for fact in reversed(book.facts):
        other.grow(fact)
    assert pictures(other) == pictures(book.cases), "an end that comes first ends what comes late"


def test_what_is_remembered_fits_a_checkpoint() -> None:
    book = Book()
    for number in range(500):
        book.tell(f"i-{number}", vector=bytes(384), title="x" * 80, text="y" * 300)
    told = list(book.cases)
    assert sum(case.bytes for case in told) <= CASES_BYTES_MAX
    assert len(told) > 250


def test_a_checkpoint_keeps_cases_and_lets_go_of_those_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES_BYTES_MAX", 1500)
    book = Book()
    for number in range(12):
        book.tell(f"i-{number}", title="x" * 100)
    book.tell("i-0", title="again")
    made = plan(book.facts, LOG, len(book.facts), MEANING)
    kept = [fact for fact in book.facts if fact.seq in made.keep]
    assert len(kept) < len(book.facts)
    journal = Journal()
    fold(journal, kept)
    assert pictures(journal.cases) == pictures(book.cases)


def test_an_issue_that_is_told_again_makes_no_room_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CASES_BYTES_MAX", 100)
    book = Book()
    book.tell("i-0", title="x" * 200)
    book.tell("i-0", title="y" * 200)
    assert [fact.kind for fact in book.facts] == ["case", "case"]
    book.cases.grow(Fact(LOG, 9, 1, "case.end", {"issue": "never"}, hlc=9))
    assert [case.issue for case in book.cases] == ["i-0"]


def test_what_is_told_of_an_issue_after_its_end_outlives_the_end() -> None:
    book = Book()
    book.tell("i", title="old", text="old")
    book.facts.append(Fact(LOG, 2, 1, "case.end", {"issue": "i"}, hlc=2))
    book.tell("i", title="new")
    for order in itertools.permutations(book.facts):
        cases = Cases()
        for fact in order:
            cases.grow(fact)
        assert pictures(cases) == [{"issue": "i", "title": "new"}]


def test_similar_issues_are_those_of_the_team_by_the_same_encoder_rescaled() -> None:
    book = Book()
    texts = {"i-1": "the printer prints blank pages", "i-2": "login is slow", "i-3": "dark mode please"}
    for issue, text in texts.items():
        book.tell(issue, team="LIN", encoder=WORDS, vector=of_words(text))
    book.tell("i-4", team="OPS", encoder=WORDS, vector=of_words(texts["i-1"]))
    book.tell("i-5", team="LIN", encoder="other", vector=of_words(texts["i-1"]))
    near = book.cases.near(of_words("the printer prints blank pages again"), WORDS, "LIN", but="")
    assert near[0][1].issue == "i-1"
    assert near[0][0] > 0.5
    assert all(like < 0.5 for like, _ in near[1:])
    assert {case.issue for _, case in near} <= {"i-1", "i-2", "i-3"}
    assert all(case.issue != "i-1" for _, case in book.cases.near(of_words(texts["i-1"]), WORDS, "LIN", but="i-1"))


def test_only_what_a_person_made_of_it_is_a_lesson() -> None:
    book = Book()
    book.tell("i", said__type=["bug", 0.9, 0.9])
    case = book.cases.of("i")
    assert case is not None
    assert (case.holds("type"), case.judged) == ("", False)
    book.tell("i", human__type="chore")
    assert (case.holds("type"), case.judged) == ("chore", True)


def test_confidence_follows_how_often_such_verdicts_stood() -> None:
    book = Book()
    for number in range(40):
        book.tell(f"i-{number}", said__type=["bug", 0.95, 0.95], human__type="bug" if number % 2 else "chore")
    book.tell("unjudged", said__type=["bug", 0.95, 0.95])
    bins = book.cases.bins("type")
    assert bins[9] == [40, 20]
    assert calibrated(0.95, bins) == pytest.approx(0.59, abs=0.01)
    assert calibrated(0.95, []) == 0.95
    assert 0.45 < calibrated(0.5, bins) < 0.55, "far tenths say nothing"
    assert calibrated(1.0, bins) < 1.0


# vectors ---------------------------------------------------------------------------------------------------------
def test_a_vector_keeps_its_direction_in_bytes() -> None:
    rng = Random(1)
    a = [rng.gauss(0, 1) for _ in range(384)]
    b = [x + rng.gauss(0, 0.5) for x in a]
    true = sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    assert likeness(quantised(a), quantised(b)) == pytest.approx(true, abs=0.01)
    assert likeness(quantised(a), quantised([-x for x in a])) == pytest.approx(-1, abs=0.01)


def test_a_long_vector_is_folded_and_angles_stay_about_the_same() -> None:
    rng = Random(2)
    a = [rng.gauss(0, 1) for _ in range(2048)]
    b = [x + rng.gauss(0, 0.5) for x in a]
    c = [rng.gauss(0, 1) for _ in range(2048)]
    assert len(quantised(a)) == DIMS_MAX
    assert likeness(quantised(a), quantised(b)) > 0.8
    assert abs(likeness(quantised(a), quantised(c))) < 0.2


def test_vectors_of_different_length_or_none_are_not_alike() -> None:
    assert likeness(quantised([1.0, 2.0]), quantised([1.0])) == 0.0
    assert likeness(quantised([0.0, 0.0]), quantised([1.0, 1.0])) == 0.0
    assert quantised([]) == of_words("")[:0] == b""


def test_texts_with_common_words_are_alike() -> None:
    one = of_words("The backup fails every night")
    assert likeness(one, of_words("Backup failing at night")) > likeness(one, of_words("Dark mode for the app")) + 0.2
    assert weight({"vector": one}) > len(one)
