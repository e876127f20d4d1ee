"""Runs: a dead coordinator costs a delay and never an effect too many."""

from __future__ import annotations

import itertools
from collections import deque
from random import Random

import pytest

from piclusterd.events import (
    Activated,
    Append,
    AppendFailed,
    Ask,
    CallOut,
    DeadlineReached,
    Deposed,
    Durable,
    Fact,
    LedgerGrew,
    Output,
    RunMoved,
    StepFinished,
)
from piclusterd.ids import Term
from piclusterd.workflows.journal import Journal
from piclusterd.workflows.run import ACT_TIMEOUT_S, ACTIVE_MAX, BACKOFF_FIRST_S, BACKOFF_MAX_S, Runs

from .desk import LOG, Ledger, ThreeSteps, run_of

Act = Ask | CallOut


class Office:
    """A coordinator's runs over a ledger. Nothing happens by itself: the test lands appends and finishes acts."""

    def __init__(self, facts: list[Fact] | None = None, attempts_max: int = 3) -> None:
        self.ledger = Ledger(facts or [])
        self.journal = Journal()
        self.journal.grow(self.ledger.facts)
        self.machine = Runs(self.journal, {"three": ThreeSteps()}, attempts_max, Random(1), itertools.count(1))
        self.todo: deque[Append | Act] = deque()
        self.moved: list[RunMoved] = []
        self.now = 0.0

    def take(self, out: list[Output]) -> list[Output]:
        for output in out:
            if isinstance(output, Append | Ask | CallOut):
                self.todo.append(output)
            elif isinstance(output, RunMoved):
                self.moved.append(output)
        return out

    def activate(self, term: Term = 1) -> None:
        self.take(self.machine.note(Activated(term), self.now))

    def hook(self, key: str = "k") -> None:
        facts = self.ledger.add_hook(key)
        self.journal.grow(facts)
        self.take(self.machine.note(LedgerGrew(facts), self.now))

    def land(self, append: Append) -> None:
        """On disk here and on W ledgers, as the hall tells it."""
        facts = self.ledger.add(*append.records)
        self.journal.grow(facts)
        self.take(self.machine.note(LedgerGrew(facts), self.now))
        self.take(self.machine.note(Durable(append.token, facts, 2), self.now))

    def finish(self, act: Act, outcome: StepFinished | None = None) -> None:
        self.take(self.machine.handle(outcome or StepFinished(act.token, value=result_of(act)), self.now))

    def tick(self) -> None:
        self.now = self.machine.deadline()
        self.take(self.machine.handle(DeadlineReached(), self.now))

    def next_append(self, kind: str, step: str = "") -> Append:
        append = self.todo.popleft()
        assert isinstance(append, Append)
        (record,) = append.records
        assert (record.kind, record.body.get("step", "")) == (kind, step)
        return append

    def next_act(self) -> Act:
        act = self.todo.popleft()
        assert isinstance(act, Ask | CallOut)
        return act

    def to_first_act(self) -> Act:
        self.hook()
        self.land(self.next_append("run.intent", "classify"))
        return self.next_act()

    def fail(self, act: Act, **outcome: float | bool) -> None:
        retry_after = outcome.get("retry_after_s")
        failure = StepFinished(act.token, None, "boom", bool(outcome.get("retryable", True)), retry_after)
        self.finish(act, failure)

    def state(self, key: str = "k") -> str:
        return {view.run: view.state for view in self.journal.views(100)}[run_of(key)]


def result_of(act: Act) -> dict[str, str]:
    return {"text": "P1"} if isinstance(act, Ask) else {"did": act.operation}


@pytest.fixture
def office() -> Office:
    office = Office()
    office.activate()
    return office


# one run ---------------------------------------------------------------------------------------------------------
def test_every_act_comes_after_its_intent_and_every_step_after_the_last_result(office: Office) -> None:
    office.hook()
    for step in ("classify", "update", "comment"):
        assert len(office.todo) == 1
        office.land(office.next_append("run.intent", step))
        assert len(office.todo) == 1
        office.finish(office.next_act())
        office.land(office.next_append("run.result", step))
    office.land(office.next_append("run.done"))
    assert not office.todo
    assert office.state() == "done"
    assert office.machine.in_flight == 0
    assert [(m.step, m.outcome) for m in office.moved] == [
        ("classify", "ok"),
        ("update", "ok"),
        ("comment", "ok"),
        ("finish", "done"),
    ]


def test_an_intent_that_is_not_durable_yet_starts_nothing(office: Office) -> None:
    office.hook()
    append = office.next_append("run.intent", "classify")
    office.take(office.machine.note(LedgerGrew(()), 0.0))
    office.take(office.machine.note(Durable(append.token + 1000, (), 2), 0.0))
    office.take(office.machine.handle(DeadlineReached(), 1e6))
    assert not office.todo


def test_a_call_carries_its_key_and_the_term(office: Office) -> None:
    office.finish(office.to_first_act())
    office.land(office.next_append("run.result", "classify"))
    office.land(office.next_append("run.intent", "update"))
    call = office.next_act()
    assert isinstance(call, CallOut)
    assert (call.run, call.service, call.operation) == (run_of("k"), "linear", "update")
    assert (call.key, call.term) == (f"{run_of('k')}/update", 1)


def test_only_the_active_coordinator_works() -> None:
    office = Office()
    office.hook()
    assert not office.todo
    office.activate()
    assert len(office.todo) == 1


def test_a_few_runs_at_a_time_and_the_oldest_first(office: Office) -> None:
    keys = [f"k{n:02}" for n in range(ACTIVE_MAX + 3)]
    for key in keys:
        office.hook(key)
    assert office.machine.in_flight == ACTIVE_MAX
    started = [append.records[0].body["run"] for append in office.todo if isinstance(append, Append)]
    assert started == [run_of(key) for key in keys[:ACTIVE_MAX]]


def test_a_run_that_ends_makes_room_for_the_next(office: Office) -> None:
    for n in range(ACTIVE_MAX + 3):
        office.hook(f"k{n:02}")
    play(office)
    assert office.machine.in_flight == 0
    assert {view.state for view in office.journal.views(100)} == {"done"}


def test_a_run_of_a_workflow_this_release_does_not_know_is_closed_as_failed(office: Office) -> None:
    facts = office.ledger.add_hook("k", workflow="of-the-future")
    office.journal.grow(facts)
    office.take(office.machine.note(LedgerGrew(facts), 0.0))
    (record,) = office.next_append("run.done").records
    assert record.body["outcome"] == "failed"
    assert "of-the-future" in record.body["detail"]


# trouble ---------------------------------------------------------------------------------------------------------
def test_a_failed_act_is_tried_again_with_the_same_key_after_a_wait(office: Office) -> None:
    act = office.to_first_act()
    office.fail(act)
    assert not office.todo
    assert 0.0 <= office.machine.deadline() <= BACKOFF_FIRST_S
    office.tick()
    again = office.next_act()
    assert isinstance(act, Ask)
    assert isinstance(again, Ask)
    assert (again.run, again.request) == (act.run, act.request)
    assert again.token != act.token
    office.finish(act)
    assert not office.todo, "the first try's late outcome is dropped"
    office.finish(again)
    office.next_append("run.result", "classify")


def test_the_wait_grows_with_every_try_up_to_a_ceiling() -> None:
    office = Office(attempts_max=1000)
    office.activate()
    act = office.to_first_act()
    for attempt in range(30):
        office.fail(act)
        wait = office.machine.deadline() - office.now
        assert 0.0 <= wait <= min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt)
        office.tick()
        act = office.next_act()


def test_no_try_comes_before_the_server_said(office: Office) -> None:
    act = office.to_first_act()
    office.fail(act, retry_after_s=120.0)
    assert office.machine.deadline() == office.now + 120.0


def test_a_run_is_given_up_after_its_last_try(office: Office) -> None:
    act = office.to_first_act()
    for _ in range(2):
        office.fail(act)
        office.tick()
        act = office.next_act()
    office.fail(act)
    append = office.next_append("run.done")
    assert append.records[0].body["outcome"] == "failed"
    assert append.records[0].body["detail"] == "classify: boom after 3 tries"
    office.land(append)
    assert office.state() == "failed"
    assert office.machine.in_flight == 0


def test_what_cannot_be_mended_is_given_up_at_once(office: Office) -> None:
    act = office.to_first_act()
    office.fail(act, retryable=False)
    assert office.next_append("run.done").records[0].body["detail"] == "classify: boom"


def test_an_act_that_never_answers_counts_as_failed(office: Office) -> None:
    act = office.to_first_act()
    assert office.machine.deadline() == ACT_TIMEOUT_S
    office.tick()
    assert office.moved[-1].outcome == "no outcome in time"
    office.tick()
    assert office.next_act().token != act.token


@pytest.mark.parametrize("landed", ["intent", "result"])
def test_a_failed_append_is_made_good_from_what_the_journal_knows(office: Office, landed: str) -> None:
    if landed == "intent":
        office.hook()
        append = office.next_append("run.intent", "classify")
    else:
        office.finish(office.to_first_act())
        append = office.next_append("run.result", "classify")
    office.take(office.machine.handle(AppendFailed(append.token, "disk full"), 0.0))
    assert not office.todo
    office.tick()
    office.land(office.next_append("run.intent", "classify"))
    play(office)
    assert office.state() == "done"


def test_the_deposed_drop_everything_and_every_late_outcome(office: Office) -> None:
    act = office.to_first_act()
    office.hook("l")
    append = office.next_append("run.intent", "classify")
    office.take(office.machine.note(Deposed(1, "why"), 0.0))
    office.finish(act)
    office.take(office.machine.note(Durable(append.token, (), 2), 0.0))
    office.take(office.machine.handle(AppendFailed(append.token, "why"), 0.0))
    office.take(office.machine.handle(DeadlineReached(), 1e6))
    office.hook("m")
    assert not office.todo
    assert office.machine.in_flight == 0
    assert office.machine.deadline() == float("inf")


def test_an_outcome_of_an_earlier_term_is_not_taken_for_one_of_this(office: Office) -> None:
    act = office.to_first_act()
    office.take(office.machine.note(Deposed(1, "why"), 0.0))
    office.activate(term=3)
    office.finish(act)
    assert [type(o) for o in office.todo] == [Append]
    assert office.next_append("run.intent", "classify").records[0].term == 3


def test_a_run_that_another_coordinator_finished_is_left_alone(office: Office) -> None:
    done = office.to_first_act()
    office.fail(done)
    record = [Fact(office.ledger.facts[0].log, 99, 2, "run.done", {"run": run_of("k"), "outcome": "done"})]
    office.journal.grow(record)
    fresh = Office(office.ledger.facts + record)
    fresh.activate(term=3)
    assert not fresh.todo


@pytest.mark.parametrize("landed", ["intent", "result"])
def test_a_run_whose_end_another_coordinator_recorded_meanwhile_goes_no_further(office: Office, landed: str) -> None:
    """That ledger was cut off, and came back while this coordinator had a step of the run under way."""
    act = office.to_first_act()
    if landed == "result":
        office.finish(act)
    else:
        office.take(office.machine.note(Deposed(1, "why"), 0.0))
        office.activate(term=3)
    append = office.next_append(f"run.{landed}", "classify")
    end = Fact(office.ledger.facts[0].log, 99, 2, "run.done", {"run": run_of("k"), "outcome": "done"})
    office.journal.grow([end])
    if landed == "result":
        office.land(append)
    else:
        office.take(office.machine.handle(AppendFailed(append.token, "disk full"), 0.0))
        office.tick()
    assert not office.todo
    assert office.machine.in_flight == 0
    assert office.state() == "done"


# a second coordinator --------------------------------------------------------------------------------------------
def play(office: Office, moves: int = 10_000) -> list[Act]:
    """Up to `moves` moves (an append lands, an act is done, an outcome arrives); the acts that were done."""
    done: list[Act] = []
    outcomes: deque[Act] = deque()
    for _ in range(moves):
        if outcomes:
            office.finish(outcomes.popleft())
        elif office.todo:
            todo = office.todo.popleft()
            if isinstance(todo, Append):
                office.land(todo)
            else:
                done.append(todo)
                outcomes.append(todo)
        else:
            break
    return done


MOVES = 3 * 4 + 1
"""Of one run: intent, act, outcome, result for each of three steps, and the end."""


def key_of(act: Act) -> str:
    return "classify" if isinstance(act, Ask) else act.key.split("/")[1]


@pytest.mark.parametrize("killed_after", range(MOVES + 1))
def test_a_run_killed_anywhere_is_finished_by_the_next_coordinator(killed_after: int) -> None:
    first = Office()
    first.activate(term=1)
    first.hook()
    before = play(first, killed_after)
    had_results = set(first.journal.runs[run_of("k")].results)
    finished = first.state() == "done"

    second = Office(first.ledger.facts)
    second.activate(term=2)
    after = play(second)

    assert second.state() == "done"
    assert [key_of(act) for act in after] == [s for s in ("classify", "update", "comment") if s not in had_results]
    effects = {act.key for act in before + after if isinstance(act, CallOut)}
    assert effects == {f"{run_of('k')}/update", f"{run_of('k')}/comment"}, "the same key whoever acts"
    assert len(before) + len(after) <= 4, "at most the one step that was under way is done twice"
    assert len([f for f in second.ledger.facts if f.kind == "run.done"]) == 1
    assert (killed_after == MOVES) == finished
    assert all(act.term == 2 for act in after if isinstance(act, CallOut))


@pytest.mark.parametrize("kills", [(3, 5), (1, 1), (2, 2, 2), (4, 4, 4, 4), (6, 1, 6)])
def test_a_run_survives_one_coordinator_after_another(kills: tuple[int, ...]) -> None:
    facts = list(Ledger().add_hook("k"))
    acts: list[Act] = []
    for term, moves in enumerate((*kills, 1000), start=1):
        office = Office(facts)
        office.activate(term)
        acts += play(office, moves)
        facts = office.ledger.facts
    assert office.state() == "done"
    assert {act.key for act in acts if isinstance(act, CallOut)} == {
        f"{run_of('k')}/update",
        f"{run_of('k')}/comment",
    }


def test_a_run_that_a_checkpoint_ended_meanwhile_is_let_go(office: Office) -> None:
    """It was finished by another coordinator, whose ledger arrives while this one is at work on it."""
    act = office.to_first_act()
    office.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), (), ())
    office.finish(act)
    assert not office.todo
    assert office.machine.in_flight == 0


def test_a_result_that_lands_after_its_run_was_ended_leads_nowhere(office: Office) -> None:
    office.finish(office.to_first_act())
    result = office.next_append("run.result", "classify")
    office.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), (), ())
    office.land(result)
    assert not office.todo
    assert office.machine.in_flight == 0
