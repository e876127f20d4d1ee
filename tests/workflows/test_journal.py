"""The fold: the same entries give the same picture, in whatever order and however often they come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.events import Fact
from piclusterd.ids import LogId, NodeId, RunId
from piclusterd.workflows.journal import DETAIL_CHARS_MAX, SEEN_MAX, Journal, digest_of, hook_of, hook_record, subject

from .desk import LOG, Ledger, hook, run_of

LOGS = [LOG, LogId(NodeId("b" * 16), 1)]


def folded(*facts: Fact) -> Journal:
    journal = Journal()
    journal.grow(facts)
    return journal


def picture(journal: Journal) -> object:
    """All that others may look at. The order in which steps were first heard of is for people only."""
    runs = [
        (
            r.run,
            r.workflow,
            r.title,
            r.hook,
            r.hlc,
            r.done,
            r.state,
            sorted(r.values().items()),
            sorted(r.results.items()),
            sorted(r.intents.items()),
        )
        for r in sorted(journal.runs.values(), key=lambda r: r.run)
    ]
    hooks = [(key, entry.rank, entry.run) for key, entry in sorted(journal.hooks.items())]
    return runs, hooks, journal.open_runs()


def step(kind: str, seq: int, key: str = "k", term: int = 1, log: LogId = LOG, **body: object) -> Fact:
    return Fact(log, seq, term, kind, {"run": run_of(key), **body}, hlc=seq)


def hook_fact(seq: int, key: str = "k", term: int = 1, log: LogId = LOG, workflow: str = "three") -> Fact:
    return Fact(log, seq, term, "hook", hook_record(hook(key), workflow, f"about {key} at {seq}", term).body, hlc=seq)


@st.composite
def histories(draw: st.DrawFn) -> list[Fact]:
    """Facts of two logs and a few terms about two runs: hooks twice, results twice, intents and ends."""
    facts = []
    for seq in range(1, draw(st.integers(1, 9)) + 1):
        key, term, log = draw(st.sampled_from("kl")), draw(st.integers(1, 3)), draw(st.sampled_from(LOGS))
        kind = draw(st.sampled_from(["hook", "run.intent", "run.result", "run.done", "run.retry", "run.later", "term"]))
        if kind == "hook":
            facts.append(hook_fact(seq, key, term, log, workflow=draw(st.sampled_from(["three", ""]))))
        else:
            name, attempt = draw(st.sampled_from("xy")), draw(st.integers(1, 3))
            body: dict[str, Any] = {"step": name, "attempt": attempt, "value": {"seq": seq}, "detail": str(seq)}
            body["outcome"] = draw(st.sampled_from(["done", "failed", "cancelled"]))
            facts.append(Fact(log, seq, term, kind, {"run": run_of(key), **body}, hlc=seq))
    return facts


@settings(deadline=None, max_examples=300)
@given(histories(), st.data())
def test_any_order_and_any_repetition_give_the_same_picture(facts: list[Fact], data: st.DataObject) -> None:
    repeated = facts + data.draw(st.lists(st.sampled_from(facts), max_size=4))
    shuffled = data.draw(st.permutations(repeated))
    assert picture(folded(*shuffled)) == picture(folded(*facts))


@settings(deadline=None)
@given(histories(), st.data())
def test_it_does_not_matter_in_which_portions_entries_come(facts: list[Fact], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(facts)))
    journal = folded(*facts[:cut])
    journal.grow(facts[cut:])
    assert picture(journal) == picture(folded(*facts))


def test_a_hook_opens_the_run_it_names() -> None:
    journal = folded(hook_fact(1))
    assert journal.hooks["k"].run == run_of("k")
    assert journal.open_runs() == [run_of("k")]
    (view,) = journal.views(10)
    assert (view.state, view.workflow, view.title, view.step, view.attempts) == ("open", "three", "about k at 1", "", 0)


def test_a_hook_that_no_workflow_wants_is_kept_without_a_run() -> None:
    journal = folded(hook_fact(1, workflow=""))
    assert journal.hooks["k"].run is None
    assert journal.runs == {}


def test_of_two_entries_of_one_hook_the_first_by_rank_stands() -> None:
    journal = folded(hook_fact(9, term=2), hook_fact(4, term=1), hook_fact(5, term=1))
    assert journal.hooks["k"].rank == (1, LOG, 4)
    assert journal.runs[run_of("k")].title == "about k at 4"


def test_an_event_stands_where_whoever_reads_the_ledger_anew_finds_it() -> None:
    """The first of two places went with the branch of a log that a checkpoint ended, and the webhook did not."""
    first, second = hook_fact(4, log=LOG), hook_fact(9, term=2, log=LOGS[1])
    journal = folded(first, second)
    journal.close(checkpoint_fact(7), {}, ())
    anew = folded(second)
    anew.close(checkpoint_fact(7), {}, ())
    assert journal.views(9) == anew.views(9)
    assert journal.hooks["k"].rank == anew.hooks["k"].rank == (2, LOGS[1], 9)


def test_what_a_checkpoint_kept_at_its_place_may_be_another_cards() -> None:
    mine, other = hook_fact(4), hook_fact(9, term=2, log=LOGS[1])
    journal = folded(mine, other)
    journal.close(checkpoint_fact(7), {4: 4}, ())
    assert journal.hooks["k"].rank == (1, LOG, 4)
    forked = folded(mine, other)
    forked.close(checkpoint_fact(7), {4: 1_000}, ())
    assert forked.hooks["k"].rank == (2, LOGS[1], 9)


def test_of_two_results_the_one_of_the_newer_term_wins() -> None:
    facts = [
        step("run.result", 3, term=2, step="x", value={"v": "new"}),
        step("run.result", 8, step="x", value={"v": "old"}),
    ]
    assert folded(*facts).runs[run_of("k")].values() == {"x": {"v": "new"}}


def test_a_run_whose_end_comes_before_its_hook_never_opens() -> None:
    journal = folded(step("run.done", 5, outcome="done", detail="d"), hook_fact(1))
    assert journal.open_runs() == []
    assert journal.runs[run_of("k")].hook is None
    assert journal.views(1)[0].state == "done"


def test_results_before_their_hook_wait_for_it() -> None:
    journal = folded(step("run.result", 5, step="x", value={"v": 1}))
    assert journal.open_runs() == []
    journal.grow([hook_fact(1)])
    assert journal.open_runs() == [run_of("k")]
    assert journal.runs[run_of("k")].values() == {"x": {"v": 1}}


def test_open_runs_come_oldest_first_and_views_newest_first() -> None:
    journal = folded(hook_fact(3, "c"), hook_fact(1, "a"), hook_fact(2, "b"))
    assert journal.open_runs() == [run_of(key) for key in "abc"]
    assert [view.run for view in journal.views(2)] == [run_of("c"), run_of("b")]


def test_a_view_shows_the_step_and_the_attempt_under_way_and_then_the_end() -> None:
    journal = folded(
        hook_fact(1), step("run.intent", 2, step="x", attempt=1), step("run.intent", 3, step="x", attempt=3)
    )
    (view,) = journal.views(1)
    assert (view.step, view.attempts) == ("x", 3)
    journal.grow([step("run.done", 4, outcome="failed", detail="w" * 2 * DETAIL_CHARS_MAX)])
    (view,) = journal.views(1)
    assert (view.state, view.step, len(view.detail)) == ("failed", "", DETAIL_CHARS_MAX)


def test_the_event_of_a_finished_run_is_not_kept_in_memory() -> None:
    journal = folded(hook_fact(1), step("run.done", 2, outcome="done"))
    assert journal.runs[run_of("k")].hook is None
    assert "k" in journal.hooks, "so that a late duplicate is known"


def test_a_hook_survives_the_way_through_a_record() -> None:
    record = hook_record(hook("k"), "three", "t", 4)
    assert hook_of(record.body) == hook("k")
    (fact,) = Ledger().add(record)
    assert folded(fact).hooks["k"].rank == (4, LOG, 1)


def test_kinds_of_other_rooms_and_of_newer_releases_mean_nothing_here() -> None:
    journal = folded(Fact(LOG, 1, 1, "term", {}), Fact(LOG, 2, 1, "log.open", {}), step("run.paused", 3))
    assert journal.open_runs() == []
    assert RunId(run_of("k")) in journal.runs


def checkpoint_fact(seq: int) -> Fact:
    return Fact(LOG, seq, 0, "log.checkpoint", {}, hlc=seq)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_one_branch_of_a_log_has_ended_the_other_branchs_checkpoint_does_not_bring_back(
    order: tuple[int, int],
) -> None:
    """Two cards with one key: one ended the webhook at 3, the other, which wrote more, still kept it."""
    ends: list[tuple[Fact, dict[int, int], list[bytes]]] = [
        (checkpoint_fact(8), {}, [digest_of("k")]),
        (checkpoint_fact(10), {3: 3}, [digest_of("other")]),
    ]
    journal = folded(hook_fact(3))
    for at in order:
        journal.close(*ends[at])
    assert (journal.hooks, journal.runs) == ({}, {})
    assert journal.known("k")
    assert journal.known("other")
    journal.grow([hook_fact(3)])
    assert not journal.hooks


def test_a_log_that_went_on_for_years_is_known_by_its_latest_checkpoint_alone() -> None:
    journal = Journal()
    journal.close(checkpoint_fact(8), {}, [digest_of(f"{n}") for n in range(SEEN_MAX)])
    journal.close(checkpoint_fact(10), {}, [digest_of("newest")])
    assert journal.known("newest")
    assert not journal.known("1")


# dead letters and what a person says -------------------------------------------------------------------------------
def orders(*facts: Fact) -> list[Journal]:
    """The fold of `facts` in every order."""
    return [folded(*order) for order in itertools.permutations(facts)]


def test_a_dead_letter_keeps_its_event_and_a_retry_opens_it_whatever_came_first() -> None:
    failed = step("run.done", 3, outcome="failed", detail="update: no", step="update")
    retry = step("run.retry", 4, term=2, step="update")
    for journal in orders(hook_fact(1), failed):
        assert (journal.open_runs(), journal.views(1)[0].state) == ([], "failed")
        assert journal.runs[run_of("k")].hook == hook("k")
        assert journal.runs[run_of("k")].failed_at == "update"
    for journal in orders(hook_fact(1), failed, retry):
        assert journal.open_runs() == [run_of("k")]
    for journal in orders(hook_fact(1), failed, retry, step("run.done", 5, term=2, outcome="failed")):
        assert journal.open_runs() == []


def test_a_retry_takes_back_the_result_that_was_given_up_and_not_the_one_that_follows() -> None:
    old = step("run.result", 2, step="x", value={"v": 1})
    new = step("run.result", 5, step="x", value={"v": 2})
    end, retry = step("run.done", 3, outcome="failed", step="x"), step("run.retry", 4, step="x")
    for journal in orders(hook_fact(1), old, end, retry):
        assert journal.runs[run_of("k")].values() == {}
    for journal in orders(hook_fact(1), old, end, retry, new):
        assert journal.runs[run_of("k")].values() == {"x": {"v": 2}}


@pytest.mark.parametrize("outcome", ["done", "cancelled"])
def test_an_end_that_is_no_failure_stands_against_any_failure_and_any_retry(outcome: str) -> None:
    facts = (
        hook_fact(1),
        step("run.done", 2, outcome=outcome),
        step("run.done", 3, term=2, outcome="failed"),
        step("run.retry", 4, term=2),
    )
    for journal in orders(*facts):
        assert journal.views(1)[0].state == outcome
        assert journal.runs[run_of("k")].hook is None
        assert journal.open_runs() == []


def test_a_question_stands_until_it_is_answered() -> None:
    asked = step("run.intent", 2, step="close?", attempt=1, asks="Close it?")
    journal = folded(hook_fact(1), asked)
    assert journal.views(1)[0].asks == "Close it?"
    journal.grow([step("run.result", 3, step="close?", value={"approved": True})])
    assert journal.views(1)[0].asks == ""
    assert folded(hook_fact(1), asked, step("run.done", 3, outcome="cancelled")).views(1)[0].asks == ""


def test_the_newest_time_a_source_signed_is_remembered_and_junk_is_not() -> None:
    def sent(seq: int, body: bytes) -> Fact:
        fact = hook_fact(seq, f"k{seq}")
        return Fact(fact.log, fact.seq, fact.term, fact.kind, {**fact.body, "body": body}, fact.hlc)

    journal = folded(sent(1, b'{"webhookTimestamp":700}'), sent(2, b'{"webhookTimestamp":300}'), sent(3, b"{"))
    assert journal.newest == {"linear": 700}


def test_the_minutes_that_a_line_ran_for_are_remembered() -> None:
    def ran(seq: int, minute: int) -> Fact:
        fact = hook_fact(seq, f"schedule:daily:{minute}")
        return Fact(fact.log, fact.seq, fact.term, fact.kind, {**fact.body, "source": "schedule"}, fact.hlc)

    assert folded(ran(1, 60), ran(2, 120), ran(3, 90)).scheduled == {"daily": 120}


def test_where_a_runs_entries_stand() -> None:
    journal = folded(hook_fact(1), step("run.intent", 2, step="x"), step("run.result", 3, step="x", value={}))
    assert sorted(journal.runs[run_of("k")].places()) == [(LOG, 1), (LOG, 3)]
    assert folded(step("run.result", 3, step="x", value={})).runs[run_of("k")].places() == [(LOG, 3)]


def test_a_checkpoint_of_another_branch_ends_nothing_by_its_numbers() -> None:
    """Under 3 it let go something else; what it let go itself it has seen."""
    journal = folded(hook_fact(3))
    journal.close(checkpoint_fact(8), {}, [digest_of("other")])
    assert journal.known("k")
    assert journal.open_runs()


def test_a_webhook_too_old_for_a_digest_is_ended_by_its_number() -> None:
    journal = folded(hook_fact(3), hook_fact(5, "younger"), hook_fact(2, "kept"))
    journal.close(checkpoint_fact(8), {2: 2}, (), aged=4)
    assert [journal.known(key) is not None for key in ("k", "younger", "kept")] == [False, True, True]
    journal.grow([hook_fact(3)])
    assert journal.known("k") is None


def test_a_run_stands_where_its_webhook_is_told() -> None:
    journal = folded(step("run.result", 2, step="x", value={}))
    assert journal.standing(run_of("k")) is None, "only a step of it is told yet"
    assert journal.standing(run_of("other")) is None
    journal.grow([hook_fact(1)])
    assert journal.standing(run_of("k")) is journal.runs[run_of("k")]


def test_the_newest_step_is_that_whose_result_came_last() -> None:
    (run,) = folded(step("run.result", 3, step="b", value={}), step("run.result", 2, step="a", value={})).runs.values()
    assert run.newest == "b"
    assert Journal().runs.setdefault(run.run, type(run)(run.run)).newest == ""


def test_the_end_of_a_run_may_say_how_far_a_service_was_compared() -> None:
    ends = [step("run.done", 2, "k", outcome="done", marks={"linear": 7}), hook_fact(1)]
    assert folded(*ends, step("run.done", 3, "l", outcome="done", marks={"linear": 5})).marks == {"linear": 7}


@pytest.mark.parametrize(
    ("fact", "about"),
    [
        (hook_fact(1), run_of("k")),
        (hook_fact(1, workflow=""), ""),
        (step("run.retry", 2), run_of("k")),
        (Fact(LOG, 3, 1, "term", {}), ""),
        (Fact(LOG, 3, 1, "of.a.later.release", {}), None),
    ],
)
def test_a_fact_is_about_a_run_or_about_nothing_or_nobody_knows(fact: Fact, about: str | None) -> None:
    assert subject(fact) == about


def test_titles_of_open_runs_are_told_by_workflow() -> None:
    journal = folded(hook_fact(1, "a"), hook_fact(2, "b"), step("run.done", 3, "b", outcome="done"))
    assert journal.open_titles(("three",)) == ["about a at 1"]
    assert journal.open_titles(("other",)) == []


@pytest.mark.parametrize("kind", ["case", "case.end"])
def test_what_triage_learnt_is_about_its_issue(kind: str) -> None:
    fact = Fact(LOG, 1, 1, kind, {"issue": "i-1", "set": {"title": "crash"}}, hlc=1)
    assert subject(fact) == "case:i-1"
    assert [case.issue for case in folded(fact).cases] == (["i-1"] if kind == "case" else [])
