"""What the coordinator begins by itself: each due minute once, whoever coordinates, whatever the clock says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace

from piclusterd.events import (
    Activated,
    Append,
    AppendFailed,
    ClockTold,
    DeadlineReached,
    Deposed,
    Durable,
    Fact,
    LeaderChanged,
    LoopLagged,
    Output,
    Record,
)
from piclusterd.ids import run_id
from piclusterd.workflows.errands import Errands
from piclusterd.workflows.journal import Journal
from piclusterd.workflows.reconcile import Reconcile
from piclusterd.workflows.schedule import LATE_MAX, OVERLAP_MS, RETRY_S, Agenda, Line, Schedule
from piclusterd.workflows.workflow import Workflow

from .desk import Ledger

HOURLY = Line("report", "0 * * * *", "UTC", "triage-report")
ONCE = replace(HOURLY, missed="run-once")
NOON = 29_666_880
"""A full hour, in minutes since 1970."""
WORKFLOWS: Mapping[str, Workflow] = {"errand": Errands("m"), "reconcile": Reconcile()}


class Office:
    """A coordinator's schedule over a ledger that others may share."""

    def __init__(self, agenda: Agenda, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.journal = Journal()
        self.journal.grow(self.ledger.facts)
        self.schedule = Schedule(self.journal, WORKFLOWS, agenda, itertools.count(1))
        self.now = 0.0

    def lead(self, term: int = 1) -> list[str]:
        return self.land(self.schedule.note(Activated(term), self.now))

    def tell(self, minute: int, synced: bool = True) -> list[str]:
        return self.land(self.schedule.handle(ClockTold(minute, synced), self.now))

    def land(self, out: list[Output]) -> list[str]:
        """Keys of the events that were appended, now durable."""
        keys = []
        for append in out:
            assert isinstance(append, Append)
            facts = self.ledger.add(*append.records)
            self.journal.grow(facts)
            self.schedule.note(Durable(append.token, facts, 2), self.now)
            keys += [str(fact.body["key"]) for fact in facts]
        return keys


def of(*lines: Line) -> Agenda:
    return Agenda(lines)


# lines -----------------------------------------------------------------------------------------------------------
def test_a_line_runs_at_its_minute_and_once() -> None:
    office = Office(of(HOURLY))
    office.lead()
    assert office.tell(NOON - 1) == []
    assert office.tell(NOON) == [f"schedule:report:{NOON}"]
    assert [office.tell(NOON + n) for n in range(60)] == [[]] * 60
    assert office.tell(NOON + 60) == [f"schedule:report:{NOON + 60}"]
    first = office.journal.views(9)[-1]
    assert (first.run, first.title) == (run_id("errand", f"schedule:report:{NOON}"), "report: triage-report")


def test_two_coordinators_make_one_run_of_a_minute() -> None:
    """The old one's entry is not on the new one's ledger yet."""
    one, two = Office(of(HOURLY)), Office(of(HOURLY))
    for term, office in enumerate((one, two), start=1):
        office.lead(term)
        office.tell(NOON - 1)
        assert office.tell(NOON + term) == [f"schedule:report:{NOON}"]
    merged = Journal()
    merged.grow(one.ledger.facts)
    merged.grow(two.ledger.facts)
    assert len(merged.views(9)) == 1


def test_only_the_coordinator_begins_anything_and_a_late_one_takes_over_within_the_minute() -> None:
    office = Office(of(HOURLY))
    assert office.tell(NOON - 1) == office.tell(NOON) == []
    office.lead()
    assert office.tell(NOON + 1) == [f"schedule:report:{NOON}"]
    office.schedule.note(Deposed(1, "why"), 0.0)
    assert office.tell(NOON + 60) == []


def test_a_line_that_never_ran_has_missed_nothing() -> None:
    office = Office(of(ONCE))
    office.lead()
    assert office.tell(NOON + 30) == []
    assert office.tell(NOON + 60) == [f"schedule:report:{NOON + 60}"]


def test_what_was_missed_is_skipped_or_its_newest_is_run_once() -> None:
    skips, runs = Office(of(HOURLY)), Office(of(ONCE))
    for office in (skips, runs):
        office.lead()
        office.tell(NOON)
    fresh = [Office(of(line), office.ledger) for line, office in ((HOURLY, skips), (ONCE, runs))]
    for office in fresh:
        office.lead(2)
    after = NOON + 24 * 60 + LATE_MAX + 1
    assert [office.tell(after) for office in fresh] == [[], [f"schedule:report:{NOON + 24 * 60}"]]
    assert [office.tell(after + 1) for office in fresh] == [[], []]


def test_an_unset_clock_begins_nothing_and_says_so() -> None:
    office = Office(of(HOURLY))
    office.lead()
    assert office.tell(NOON, synced=False) == []
    assert office.schedule.clockless
    assert office.tell(NOON) == [f"schedule:report:{NOON}"]
    assert not office.schedule.clockless


def test_a_follower_or_an_empty_schedule_is_not_bothered_by_an_unset_clock() -> None:
    follower, empty = Office(of(HOURLY)), Office(of())
    empty.lead()
    for office in (follower, empty):
        office.tell(NOON, synced=False)
        assert not office.schedule.clockless


def test_a_clock_that_goes_back_runs_nothing_again() -> None:
    office = Office(of(ONCE))
    office.lead()
    office.tell(NOON)
    assert [office.tell(NOON - n) for n in range(0, 200, 7)] == [[]] * 29


def test_a_minute_that_is_being_recorded_is_not_recorded_twice_and_one_that_failed_is_tried_again() -> None:
    office = Office(of(HOURLY))
    office.lead()
    (append,) = office.schedule.handle(ClockTold(NOON, True), 0.0)
    assert isinstance(append, Append)
    assert office.schedule.handle(ClockTold(NOON, True), 0.0) == []
    assert office.schedule.handle(AppendFailed(append.token, "disk full"), 0.0) == []
    assert office.tell(NOON + 1) == [f"schedule:report:{NOON}"]


# looks -----------------------------------------------------------------------------------------------------------
LOOKS = Agenda(reconciled=("linear", "github"), reconcile_s=3600.0)
SENT_MS = 1_790_000_000_000


def came(ledger: Ledger, source: str = "linear", sent_ms: int = SENT_MS) -> Ledger:
    body = json.dumps({"webhookTimestamp": sent_ms}).encode()
    key = f"{source}:{len(ledger.facts)}"
    ledger.add(Record("hook", {"source": source, "key": key, "event": "Issue", "body": body}, 1))
    return ledger


def since(office: Office) -> int:
    (told,) = (f.body["body"] for f in office.ledger.facts[-1:])
    return int(json.loads(told)["since_ms"])


def test_a_new_coordinator_looks_for_what_never_came_and_again_after_hours() -> None:
    office = Office(LOOKS, came(Ledger()))
    assert office.lead(3) == ["reconcile:linear:3:1"]
    assert since(office) == SENT_MS - OVERLAP_MS
    assert office.schedule.deadline() == 3600.0
    assert office.schedule.handle(DeadlineReached(), 3599.0) == []
    assert office.land(office.schedule.handle(DeadlineReached(), 3600.0)) == ["reconcile:linear:3:2"]
    office.schedule.note(Deposed(3, "why"), 0.0)
    assert office.schedule.deadline() == float("inf")


def test_where_nothing_ever_came_there_is_no_gap() -> None:
    assert Office(LOOKS).lead() == []


def test_the_next_look_begins_where_the_last_one_ended_well() -> None:
    """Not at the newest event: one that came since says nothing of those before it."""
    ledger = came(Ledger())
    ledger.add(Record("run.done", {"run": "r", "outcome": "done", "marks": {"linear": SENT_MS - 50 * OVERLAP_MS}}, 1))
    office = Office(LOOKS, ledger)
    office.lead(2)
    assert since(office) == SENT_MS - 51 * OVERLAP_MS


def test_a_source_that_signs_no_time_is_asked_since_the_ledgers_own() -> None:
    ledger = Ledger([Fact(came(Ledger()).facts[0].log, 1, 1, "hook", dict(came(Ledger(), "github").facts[0].body),
                          hlc=SENT_MS << 16)])  # fmt: skip
    office = Office(LOOKS, ledger)
    assert office.lead() == ["reconcile:github:1:1"]
    assert since(office) == SENT_MS - OVERLAP_MS


def test_a_look_that_could_not_be_recorded_is_tried_again_soon() -> None:
    office = Office(LOOKS, came(Ledger()))
    (append,) = office.schedule.note(Activated(1), 0.0)
    assert isinstance(append, Append)
    office.schedule.handle(AppendFailed(append.token, "disk full"), 5.0)
    assert office.schedule.deadline() == 5.0 + RETRY_S
    assert office.land(office.schedule.handle(DeadlineReached(), 5.0 + RETRY_S)) == ["reconcile:linear:1:2"]


def test_other_events_and_notes_mean_nothing() -> None:
    office = Office(LOOKS)
    assert office.schedule.handle(LoopLagged(1.0), 0.0) == []
    assert office.schedule.handle(AppendFailed(99, "why"), 0.0) == []
    assert office.schedule.note(LeaderChanged(1, None), 0.0) == []
