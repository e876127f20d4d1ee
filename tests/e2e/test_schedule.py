"""Lines of the schedule on real daemons whose wall clock is stepped: on time, once, the droplet first."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from piclusterd.demo.cluster import Member
from piclusterd.folding import fold
from piclusterd.ids import RunId
from piclusterd.ledger import database, store
from piclusterd.workflows.journal import Journal, Run

from .rig import Rig, running
from .stepped import HOUR_S, SteppedClock

pytestmark = [pytest.mark.e2e]

BATCH = """
[[schedule]]
name = "nightly"
cron = "30 * * * *"
what = "batch"
prompts = ["My printer is on fire", "The door is shut", "Where is the key?"]
missed = "run-once"
"""
ENDS_S = 60.0


def runs_of(path: Path) -> dict[RunId, Run]:
    journal = Journal()
    with closing(database.open_reader(path)) as conn:
        for fact in store.facts(conn):
            fold(journal, (fact,))
    return {id: run for id, run in journal.runs.items() if run.workflow == "errand"}


async def until_done(rig: Rig, count: int) -> dict[RunId, Run]:
    """The errands in the ledger of the first node, once there are `count` and none is open."""

    async def done() -> dict[RunId, Run]:
        found = runs_of(rig.member.state / "ledger.db")
        return found if len(found) >= count and not any(run.open for run in found.values()) else {}

    found: dict[RunId, Run] = await rig.cluster.until(done, f"{count} errands are done", ENDS_S)
    return found


async def until_ready(rig: Rig, member: Member) -> None:
    """Everybody has heard that `member` serves a model."""

    async def heard() -> bool:
        facts = [m["facts"] for view in await rig.cluster.views() for m in view["members"] if m["node"] == member.node]
        return bool(facts) and all(told["models"] for told in facts)

    await rig.cluster.until(heard, f"{member.name} serves a model", ENDS_S)


def answered_by(run: Run) -> list[Any]:
    return [run.values()[f"find-{number}"]["node"] for number in (1, 2, 3)]


async def test_a_batch_begins_once_an_hour_on_the_droplet_and_what_was_missed_is_made_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock(tmp_path, monkeypatch)
    async with running(tmp_path, size=4, voters=3, with_model=(0, 3), relays=(3,), extra=BATCH) as rig:
        droplet = rig.cluster.members[3]
        await until_ready(rig, droplet)
        clock.step(HOUR_S)
        [(first, run)] = (await until_done(rig, 1)).items()
        assert run.done is not None
        assert run.done[1] == "done", run.done
        assert answered_by(run) == [droplet.node] * 3

        for member in rig.cluster.members:
            rig.cluster.kill(member)
            assert member.process is not None
            await member.process.wait()
        clock.step(5 * HOUR_S)
        for member in rig.cluster.members[:3]:  # the droplet stays away
            await rig.cluster.start(member)
        both = await until_done(rig, 2)
        assert len(both) == 2, "of five missed hours the newest is made up, once"
        [second] = [run for id, run in both.items() if id != first]
        assert answered_by(second) == [rig.member.node] * 3
