"""What is told unasked: dead letters by the coordinator, once each, and alarms by whoever has them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from piclusterd.config import Notify
from piclusterd.errors import Unavailable
from piclusterd.events import Activated, HookTaken, LedgerAlarm, LedgerGrew, Record
from piclusterd.notices import TRIES, Crier
from piclusterd.wire import Hook
from piclusterd.workflows.journal import Journal

from .workflows.desk import Ledger, run_of

ON = Notify(ntfy_url_file="somewhere")


class Desk:
    """Takes events, after refusing the first `refusals`."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.tries = 0
        self.taken: list[Hook] = []

    async def take(self, hook: Hook) -> HookTaken:
        self.tries += 1
        if self.tries <= self.refusals:
            raise Unavailable("nobody leads now", "", "", 0.0)
        self.taken.append(hook)
        return HookTaken(None, duplicate=False)


def given_up(outcome: str = "failed", workflow: str = "three") -> tuple[Journal, LedgerGrew]:
    ledger, journal = Ledger(), Journal()
    journal.grow(ledger.add_hook("k", workflow=workflow))
    run = next(iter(journal.runs))
    facts = ledger.add(Record("run.done", {"run": run, "outcome": outcome, "detail": "page: <b>full</b>\n"}, 1))
    journal.grow(facts)
    return journal, LedgerGrew(facts)


async def heard(note: Any, journal: Journal, desk: Desk, policy: Notify = ON, leads: bool = True) -> list[Hook]:
    crier = Crier(policy, "pi-1", desk.take, lambda: journal, lambda: leads, retry_s=0.0)
    crier.hear(note)
    async with asyncio.timeout(10):
        await asyncio.gather(*crier._tasks)
    await crier.close()
    return desk.taken


async def test_a_run_that_is_given_up_is_told_by_the_coordinator_alone() -> None:
    journal, grew = given_up()
    (hook,) = await heard(grew, journal, Desk())
    words = json.loads(hook.body)
    assert (hook.source, hook.event) == ("cluster", "notice")
    assert words["title"] == "given up: three, about k"
    assert f"picluster jobs retry {run_of('k')[:8]}" in words["text"]
    assert await heard(grew, journal, Desk(), leads=False) == []


async def test_the_next_coordinator_tells_of_it_under_the_same_key() -> None:
    journal, grew = given_up()
    (first,) = await heard(grew, journal, Desk())
    (again,) = await heard(Activated(2), journal, Desk())
    assert first == again


async def test_ends_that_are_well_and_notices_themselves_are_not_told() -> None:
    for journal, grew in (given_up("done"), given_up("cancelled"), given_up(workflow="notice")):
        assert await heard(grew, journal, Desk()) == []
        assert await heard(Activated(2), journal, Desk()) == []


async def test_an_alarm_is_told_by_the_node_that_has_it_once_for_each_text() -> None:
    (one,) = await heard(LedgerAlarm("a fork"), Journal(), Desk(), leads=False)
    (same,) = await heard(LedgerAlarm("a fork"), Journal(), Desk())
    (other,) = await heard(LedgerAlarm("another"), Journal(), Desk())
    assert one.key == same.key != other.key


async def test_what_is_not_asked_for_is_not_told() -> None:
    journal, grew = given_up()
    assert await heard(grew, journal, Desk(), Notify()) == []
    quiet = Notify(ntfy_url_file="x", dead_letters=False, alarms=False)
    for note in (grew, Activated(1), LedgerAlarm("a")):
        assert await heard(note, journal, Desk(), quiet) == []


async def test_an_election_is_outlasted_and_then_it_is_let_go() -> None:
    journal, grew = given_up()
    assert len(await heard(grew, journal, Desk(TRIES - 1))) == 1
    assert await heard(grew, journal, Desk(TRIES)) == []
