"""Runs: a dead coordinator costs a delay and never an effect too many."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal

import msgspec
import pytest

from piclusterd.errors import NotFound, PiclusterError, UserError
from piclusterd.events import (
    Activated,
    Answer,
    Append,
    AppendFailed,
    Ask,
    CallOut,
    ChangeRun,
    DeadlineReached,
    Deposed,
    Durable,
    Fact,
    LedgerGrew,
    Output,
    RunMoved,
    StepFinished,
)
from piclusterd.ids import LogId, RunId, Term
from piclusterd.views import RunView
from piclusterd.wire import Hook
from piclusterd.workflows.breaker import FAILURES_MAX, PAUSE_FIRST_S, PAUSE_MAX_S
from piclusterd.workflows.flight import Patience
from piclusterd.workflows.journal import Journal, digest_of
from piclusterd.workflows.run import (
    ACT_TIMEOUT_S,
    ACTIVE_MAX,
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    BATCHES_MAX,
    OPTIONAL_TRIES,
    TIMEOUT_SAYS,
    Runs,
)
from piclusterd.workflows.workflow import (
    Approve,
    AskModel,
    Call,
    Finish,
    Results,
    Step,
    Workflow,
    answered_by,
    wanted_by,
)

from .desk import LOG, Ledger, ThreeSteps, hook, run_of

Act = Ask | CallOut


class Office:
    """A coordinator's runs over a ledger. Nothing happens by itself: the test lands appends and finishes acts."""

    def __init__(
        self, facts: list[Fact] | None = None, attempts_max: int = 3, workflow: Workflow | None = None
    ) -> None:
        self.ledger = Ledger(facts or [])
        self.journal = Journal()
        self.journal.grow(self.ledger.facts)
        self.copied = True
        self.answers: list[object] = []
        self.places: list[tuple[LogId, int]] = []
        self.machine = Runs(
            self.journal, dict.fromkeys(("three", "batch"), workflow or ThreeSteps()),
            Patience(attempts_max, approval_s=100.0), Random(1),
            itertools.count(1), self.holds,
        )  # fmt: skip
        self.todo: deque[Append | Act] = deque()
        self.moved: list[RunMoved] = []
        self.now = 0.0

    def holds(self, places: Sequence[tuple[LogId, int]]) -> bool:
        self.places = list(places)
        return self.copied

    def change(self, what: Literal["retry", "cancel", "approve", "reject"], key: str = "k") -> None:
        self.take(self.machine.handle(ChangeRun(7, what, run_of(key), "ann"), self.now))

    def take(self, out: list[Output]) -> list[Output]:
        for output in out:
            if isinstance(output, Append | Ask | CallOut):
                self.todo.append(output)
            elif isinstance(output, RunMoved):
                self.moved.append(output)
            elif isinstance(output, Answer):
                self.answers.append(output.value)
        return out

    def activate(self, term: Term = 1) -> None:
        self.take(self.machine.note(Activated(term), self.now))

    def hook(self, key: str = "k", workflow: str = "three") -> None:
        facts = self.ledger.add_hook(key, workflow=workflow)
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


def test_batches_leave_places_to_webhooks_and_take_their_turns(office: Office) -> None:
    for n in range(BATCHES_MAX + 2):
        office.hook(f"b{n}", "batch")
    assert office.machine.in_flight == BATCHES_MAX
    office.hook("k")
    assert office.machine.in_flight == BATCHES_MAX + 1, "a webhook waits for no batch"
    play(office)
    assert office.machine.in_flight == 0
    assert {view.state for view in office.journal.views(100)} == {"done"}


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
    append = office.next_append("run.done", "classify")
    assert append.records[0].body["outcome"] == "failed"
    assert append.records[0].body["detail"] == "classify: boom after 3 tries"
    office.land(append)
    assert office.state() == "failed"
    assert office.machine.in_flight == 0


def test_what_cannot_be_mended_is_given_up_at_once(office: Office) -> None:
    act = office.to_first_act()
    office.fail(act, retryable=False)
    assert office.next_append("run.done", "classify").records[0].body["detail"] == "classify: boom"


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


def test_a_run_that_ended_elsewhere_while_it_acted_records_nothing_more(office: Office) -> None:
    act = office.to_first_act()
    office.journal.grow([Fact(LOG, 99, 2, "run.done", {"run": run_of("k"), "outcome": "done"})])
    office.finish(act)
    assert (office.todo, office.machine.in_flight) == (deque(), 0)


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
    office.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), {}, [digest_of("k")])
    office.finish(act)
    assert not office.todo
    assert office.machine.in_flight == 0


def test_a_result_that_lands_after_its_run_was_ended_leads_nowhere(office: Office) -> None:
    office.finish(office.to_first_act())
    result = office.next_append("run.result", "classify")
    office.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), {}, [digest_of("k")])
    office.land(result)
    assert not office.todo
    assert office.machine.in_flight == 0


# dead letters ----------------------------------------------------------------------------------------------------
def give_up(office: Office, step: str = "update") -> Act:
    """The run dies at `step`; the act that was refused."""
    office.hook()
    for name in ("classify", "update", "comment"):
        office.land(office.next_append("run.intent", name))
        act = office.next_act()
        if name == step:
            office.fail(act, retryable=False)
            office.land(office.next_append("run.done", name))
            return act
        office.finish(act)
        office.land(office.next_append("run.result", name))
    raise AssertionError(step)


def test_a_retry_goes_on_at_the_step_that_failed_with_the_same_key(office: Office) -> None:
    refused = give_up(office)
    assert office.state() == "failed"
    office.change("retry")
    assert office.answers == [], "nothing is promised before it is durable"
    office.land(office.next_append("run.retry", "update"))
    (answer,) = office.answers
    assert isinstance(answer, RunView)
    assert answer.state == "open"
    office.land(office.next_append("run.intent", "update"))
    again = office.next_act()
    assert isinstance(again, CallOut)
    assert isinstance(refused, CallOut)
    assert again.key == refused.key
    office.finish(again)
    play(office)
    assert office.state() == "done"


def test_a_retry_survives_its_coordinator(office: Office) -> None:
    give_up(office)
    office.change("retry")
    office.land(office.next_append("run.retry", "update"))
    fresh = Office(office.ledger.facts)
    fresh.activate(term=2)
    assert [act.key for act in play(fresh) if isinstance(act, CallOut)] == [
        f"{run_of('k')}/update",
        f"{run_of('k')}/comment",
    ]
    assert fresh.state() == "done"


def test_a_dead_letter_opens_by_nobody_but_a_person(office: Office) -> None:
    give_up(office)
    fresh = Office(office.ledger.facts)
    fresh.activate(term=2)
    fresh.hook("l")
    assert run_of("k") not in {a.records[0].body["run"] for a in fresh.todo if isinstance(a, Append)}


class Unsure(ThreeSteps):
    """Gives up what the model answered, unless that is `good`."""

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if results.get("classify", {}).get("text") == "bad":
            return Finish("failed", "the model talks nonsense")
        return super().next(run, hook, results)


def test_a_retry_frees_a_workflow_of_the_result_that_it_gave_up() -> None:
    office = Office(workflow=Unsure())
    office.activate()
    act = office.to_first_act()
    office.finish(act, StepFinished(act.token, value={"text": "bad"}))
    office.land(office.next_append("run.result", "classify"))
    office.land(office.next_append("run.done", "classify"))
    assert office.state() == "failed"
    office.change("retry")
    office.land(office.next_append("run.retry", "classify"))
    office.land(office.next_append("run.intent", "classify"))
    office.finish(office.next_act())
    play(office)
    assert office.state() == "done"


def test_only_a_failed_run_is_tried_again_and_only_one_that_is_there(office: Office) -> None:
    office.change("retry")
    assert isinstance(office.answers.pop(), NotFound)
    office.hook()
    office.change("retry")
    assert isinstance(office.answers.pop(), UserError)
    play(office)
    office.change("retry")
    assert isinstance(office.answers.pop(), UserError)
    assert not office.todo


# cancelling ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("moves", range(13))
def test_a_cancelled_run_never_acts_again(moves: int) -> None:
    office = Office()
    office.activate()
    office.hook()
    play(office, moves)
    before = list(office.todo)
    ended = office.state() == "done"
    office.todo.clear()
    office.change("cancel")
    if not office.todo:  # its end was being written
        assert isinstance(office.answers[-1], UserError)
        return
    assert not ended
    cancel = office.next_append("run.done")
    for late in before:  # what was under way when it came
        if isinstance(late, Append):
            office.land(late)
        else:
            office.finish(late)
    assert not office.todo
    office.land(cancel)
    (answer,) = office.answers
    assert isinstance(answer, RunView)
    assert (answer.state, answer.detail) == ("cancelled", "cancelled by ann")
    assert not office.todo
    fresh = Office(office.ledger.facts)
    fresh.activate(term=2)
    assert not fresh.todo
    fresh.change("retry")
    assert isinstance(fresh.answers[-1], UserError)


def test_a_cancel_that_the_disk_refuses_is_told_and_the_run_goes_on(office: Office) -> None:
    office.to_first_act()
    office.change("cancel")
    append = office.next_append("run.done")
    office.take(office.machine.handle(AppendFailed(append.token, "disk full"), 0.0))
    assert isinstance(office.answers.pop(), PiclusterError)
    office.tick()
    play(office)
    assert office.state() == "done"


def test_a_run_that_waits_for_its_turn_can_be_cancelled(office: Office) -> None:
    for n in range(ACTIVE_MAX + 1):
        office.hook(f"k{n}")
    last = f"k{ACTIVE_MAX}"
    office.change("cancel", last)
    cancel = office.todo.pop()
    assert isinstance(cancel, Append)
    office.land(cancel)
    play(office)
    assert office.state(last) == "cancelled"
    assert [v.state for v in office.journal.views(100)].count("done") == ACTIVE_MAX


def test_who_is_not_the_coordinator_changes_nothing() -> None:
    office = Office()
    office.hook()
    office.change("cancel")
    assert isinstance(office.answers.pop(), PiclusterError)
    assert not office.todo


def test_who_waits_for_a_change_when_the_coordinator_falls_is_told(office: Office) -> None:
    office.to_first_act()
    office.change("cancel")
    office.take(office.machine.note(Deposed(1, "why"), 0.0))
    assert isinstance(office.answers.pop(), PiclusterError)


def test_who_waits_for_a_change_of_a_run_that_a_checkpoint_ends_is_told(office: Office) -> None:
    give_up(office)
    office.change("retry")
    retry = office.next_append("run.retry", "update")
    office.journal.close(Fact(LOG, 99, 0, "log.checkpoint", {}), {}, [digest_of("k")])
    office.land(retry)
    assert isinstance(office.answers.pop(), NotFound)
    assert office.machine.in_flight == 0


# a person's word -------------------------------------------------------------------------------------------------
class Careful(ThreeSteps):
    """Asks before it closes anything."""

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "close?" not in results:
            return Approve("close?", f"Close {hook.key}?")
        if not results["close?"]["approved"]:
            return Finish("ignored", f"rejected by {results['close?']['by']}")
        if "close" not in results:
            return Call("close", "linear", "close", {}, f"{run}/close")
        return Finish("done")


@pytest.fixture
def careful() -> Office:
    office = Office(workflow=Careful())
    office.activate()
    office.hook()
    office.land(office.next_append("run.intent", "close?"))
    assert not office.todo
    return office


def test_a_run_asks_a_person_and_does_nothing_before_the_answer(careful: Office) -> None:
    (view,) = careful.journal.views(1)
    assert (view.state, view.asks) == ("open", "Close k?")
    careful.change("approve")
    careful.land(careful.next_append("run.result", "close?"))
    assert isinstance(careful.answers.pop(), RunView)
    assert careful.journal.views(1)[0].asks == ""
    assert [act.key for act in play(careful) if isinstance(act, CallOut)] == [f"{run_of('k')}/close"]
    assert careful.state() == "done"


def test_a_rejected_run_acts_never(careful: Office) -> None:
    careful.change("reject")
    assert play(careful) == []
    assert careful.journal.views(1)[0].detail == "rejected by ann"


def test_no_answer_in_time_is_a_no(careful: Office) -> None:
    assert careful.machine.deadline() == 100.0
    careful.tick()
    assert play(careful) == []
    assert careful.journal.views(1)[0].detail == f"rejected by {TIMEOUT_SAYS}"


def test_the_second_answer_is_refused(careful: Office) -> None:
    careful.change("reject")
    careful.change("approve")
    assert isinstance(careful.answers.pop(), UserError)
    play(careful)
    assert careful.journal.views(1)[0].detail == "rejected by ann"


def test_a_new_coordinator_goes_on_asking_without_another_entry(careful: Office) -> None:
    fresh = Office(careful.ledger.facts, workflow=Careful())
    fresh.activate(term=2)
    assert not fresh.todo
    fresh.change("approve")
    assert len(play(fresh)) == 1


def test_runs_that_wait_for_a_person_keep_nobody_from_work(careful: Office) -> None:
    for n in range(3 * ACTIVE_MAX):
        careful.hook(f"k{n}")
    play(careful)
    assert careful.machine.in_flight == 3 * ACTIVE_MAX + 1
    assert all(view.asks for view in careful.journal.views(100))


# urgent runs -----------------------------------------------------------------------------------------------------
class Urgent(ThreeSteps):
    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        step = super().next(run, hook, results)
        return Finish(step.outcome, step.detail, urgent=True) if isinstance(step, Finish) else step


def test_an_urgent_run_ends_once_the_relay_holds_all_that_it_is_made_of() -> None:
    office = Office(workflow=Urgent())
    office.activate()
    office.copied = False
    office.hook()
    play(office)
    assert (office.state(), office.machine.in_flight) == ("open", 1)
    assert sorted(seq for _, seq in office.places) == [1, 3, 5, 7], "the event, and each result"
    first = office.machine.deadline()
    office.tick()
    office.tick()
    assert office.machine.deadline() > first
    assert office.machine.copying_s(office.now) == [office.now]
    assert [m.step for m in office.moved].count("copy") == 1
    office.copied = True
    office.tick()
    play(office)
    assert office.state() == "done"


def test_urgent_runs_that_wait_for_their_copy_keep_nobody_from_work() -> None:
    office = Office(workflow=Urgent())
    office.activate()
    office.copied = False
    for n in range(100):
        office.hook(f"k{n:03}")
    play(office)
    assert len(office.machine.copying_s(0.0)) == 100
    fresh = Office(office.ledger.facts, workflow=Urgent())
    fresh.copied = False
    fresh.activate(term=2)
    assert len(fresh.machine.copying_s(0.0)) == 100
    fresh.change("cancel", "k050")
    play(fresh)
    assert fresh.state("k050") == "cancelled"


def test_a_run_that_ended_elsewhere_while_it_waited_for_its_copy_is_let_go() -> None:
    office = Office(workflow=Urgent())
    office.activate()
    office.copied = False
    office.hook()
    play(office)
    office.journal.grow([Fact(LOG, 99, 2, "run.done", {"run": run_of("k"), "outcome": "done"})])
    office.tick()
    assert (office.todo, office.machine.in_flight) == (deque(), 0)


# breakers --------------------------------------------------------------------------------------------------------
def failing_update(office: Office, key: str = "k") -> Act:
    office.hook(key)
    office.land(office.next_append("run.intent", "classify"))
    office.finish(office.next_act())
    office.land(office.next_append("run.result", "classify"))
    office.land(office.next_append("run.intent", "update"))
    return office.next_act()


def test_a_service_that_fails_in_a_row_is_left_alone_and_no_run_is_given_up_for_it() -> None:
    office = Office(attempts_max=FAILURES_MAX + 1)
    office.activate()
    act = failing_update(office)
    for _ in range(FAILURES_MAX - 1):
        office.fail(act)
        office.tick()
        act = office.next_act()
    assert office.machine.services(office.now) == ()
    office.fail(act)
    (service,) = office.machine.services(office.now)
    assert (service.name, service.failures, service.why) == ("linear", FAILURES_MAX, "boom")
    assert PAUSE_FIRST_S / 2 <= service.waits_s <= PAUSE_FIRST_S
    for _ in range(200):  # a day without the service
        while not office.todo:
            office.tick()
        office.fail(office.next_act())
        assert office.machine.services(office.now)[0].waits_s <= PAUSE_MAX_S
    assert office.state() == "open"
    while not office.todo:
        office.tick()
    office.finish(office.next_act())
    assert office.machine.services(office.now) == ()
    play(office)
    assert office.state() == "done"


def test_one_call_finds_out_and_the_others_wait_for_it() -> None:
    office = Office(attempts_max=100)
    office.activate()
    acts = [failing_update(office, f"k{n}") for n in range(FAILURES_MAX)]
    for act in acts:
        office.fail(act)
    while not office.todo:
        office.tick()
    probe = office.next_act()
    for _ in range(20):
        office.tick()
        assert not office.todo, "a second call while the first finds out"
    office.finish(probe)
    play(office)
    for _ in range(200):
        if office.machine.in_flight == 0:
            break
        office.tick()
        play(office)
    assert [view.state for view in office.journal.views(10)] == ["done"] * FAILURES_MAX


def test_a_refusal_that_stays_says_that_the_service_is_well() -> None:
    office = Office(attempts_max=100)
    office.activate()
    for n in range(3 * FAILURES_MAX):
        office.fail(failing_update(office, f"k{n:02}"), retryable=False)
        office.land(office.next_append("run.done", "update"))
    assert office.machine.services(office.now) == ()


# events that a step brings ---------------------------------------------------------------------------------------
class Finder(ThreeSteps):
    """Whatever is called `look` finds k1 twice and k2."""

    def next(self, run: RunId, given: Hook, results: Results) -> Step:
        if given.key != "look":
            return super().next(run, given, results)
        if "page" not in results:
            return Call("page", "linear", "look", {}, "k", found=self.found)
        return Finish("done", str(results["page"]), marks={"linear": 5})

    def found(self, answer: Mapping[str, Any]) -> tuple[list[Hook], Mapping[str, Any]]:
        if "junk" in answer:
            raise msgspec.ValidationError("no page")
        return [hook("k1"), hook("k2"), hook("k1")], {"more": answer["more"]}


def test_events_that_a_step_found_are_taken_once_together_with_its_result() -> None:
    office = Office(workflow=Finder())
    office.activate()
    office.hook("k1")
    play(office)
    office.hook("look")
    office.land(office.next_append("run.intent", "page"))
    act = office.next_act()
    office.finish(act, StepFinished(act.token, {"more": "c", "issues": ["a long one"] * 50}))
    append = office.todo.popleft()
    assert isinstance(append, Append)
    assert [record.kind for record in append.records] == ["hook", "run.result"], "k1 came by itself before"
    assert append.records[-1].body["value"] == {"more": "c", "taken": 1}
    office.land(append)
    play(office)
    assert {view.title: view.state for view in office.journal.views(10)} == {
        "about k1": "done", "about k2": "done", "about look": "done",
    }  # fmt: skip
    assert office.journal.marks == {"linear": 5}


def test_an_answer_that_is_no_page_ends_the_run_as_a_dead_letter() -> None:
    office = Office(workflow=Finder())
    office.activate()
    office.hook("look")
    office.land(office.next_append("run.intent", "page"))
    act = office.next_act()
    office.finish(act, StepFinished(act.token, {"junk": 1}))
    office.land(office.next_append("run.done", "page"))
    assert office.state("look") == "failed"


def test_the_first_workflow_that_wants_a_webhook_has_it() -> None:
    class Never(ThreeSteps):
        def wants(self, hook: Hook) -> str | None:
            return None

    workflows: dict[str, Workflow] = {"never": Never(), "three": ThreeSteps(), "again": ThreeSteps()}
    assert wanted_by(workflows, hook("k")) == ("three", "about k")
    assert wanted_by(workflows, hook("k", "skip")) == ("", "")


# steps that may be missed, waits, what is learnt ---------------------------------------------------------------------
class Lenient:
    """An optional model and an optional call, a wait, then an end with a case."""

    name = "three"

    def wants(self, hook: Hook) -> str | None:
        return "t"

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "look" not in results:
            return AskModel("look", {}, optional=True)
        if "call" not in results:
            return Call("call", "memory", "similar", {}, "", optional=True)
        if "wait" not in results:
            return Approve("wait", "now?", within_s=7.0)
        return Finish("done", str(results["look"]), case={"issue": "i", "set": {"title": "t"}})


def test_an_optional_step_that_cannot_be_had_is_passed_over_after_few_tries() -> None:
    office = Office(workflow=Lenient())
    office.activate()
    office.hook()
    office.land(office.next_append("run.intent", "look"))
    for _ in range(OPTIONAL_TRIES):
        office.fail(office.next_act())
        if not office.todo:
            office.tick()
    append = office.next_append("run.result", "look")
    assert append.records[0].body["value"] == {"failed": "boom"}
    office.land(append)
    office.land(office.next_append("run.intent", "call"))
    office.fail(office.next_act(), retryable=False)
    assert office.next_append("run.result", "call").records[0].body["value"] == {"failed": "boom"}


def test_an_optional_call_does_not_wait_for_an_ailing_service() -> None:
    office = Office(workflow=Lenient())
    office.activate()
    for number in range(FAILURES_MAX):
        office.hook(f"k{number}")
        office.land(office.next_append("run.intent", "look"))
        office.finish(office.next_act())
        office.land(office.next_append("run.result", "look"))
        office.land(office.next_append("run.intent", "call"))
        if isinstance(office.todo[0], CallOut):
            office.fail(office.next_act())
            while office.todo == deque():
                office.tick()
        if isinstance(office.todo[0], CallOut):
            office.fail(office.next_act())
        told = office.next_append("run.result", "call").records[0].body["value"]
        if "left alone" in told["failed"]:
            return
    raise AssertionError("the breaker never opened")


def test_a_wait_ends_by_itself_in_its_own_time_and_what_was_learnt_is_told_with_the_end() -> None:
    office = Office(workflow=Lenient())
    office.activate()
    office.hook()
    for step in ("look", "call"):
        office.land(office.next_append("run.intent", step))
        office.finish(office.next_act())
        office.land(office.next_append("run.result", step))
    office.land(office.next_append("run.intent", "wait"))
    assert office.machine.deadline() == office.now + 7.0
    office.tick()
    append = office.next_append("run.result", "wait")
    assert append.records[0].body["value"] == {"approved": False, "by": TIMEOUT_SAYS}
    office.land(append)
    end = office.todo.popleft()
    assert isinstance(end, Append)
    assert [record.kind for record in end.records] == ["case", "run.done"]
    office.land(end)
    assert office.journal.cases.of("i") is not None
    assert office.state() == "done"


class Patient:
    """One call whose service says itself when it is too late."""

    name = "three"

    def wants(self, hook: Hook) -> str | None:
        return "t"

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        if "call" not in results:
            return Call("call", "batch", "lines", {}, "", patient=True)
        return Finish("done")


def test_a_patient_call_is_tried_until_its_service_says_no() -> None:
    office = Office(workflow=Patient(), attempts_max=1)
    office.activate()
    office.hook()
    office.land(office.next_append("run.intent", "call"))
    for _ in range(2 * FAILURES_MAX):
        office.fail(office.next_act())
        while not office.todo:
            office.tick()
    office.fail(office.next_act(), retryable=False)
    assert office.next_append("run.done", "call").records[0].body["outcome"] == "failed"


def test_who_answered_has_a_name_of_model_and_node_whatever_was_told() -> None:
    assert answered_by({"model": "small", "node": "n-1", "name": "attic"}) == ("small", "attic")
    assert answered_by({"model": "small", "node": "n-1"}) == ("small", "n-1")
    assert answered_by({"model": None}) == ("unknown", "unknown")
