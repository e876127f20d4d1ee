"""`picluster jobs` against the real doors of a node."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from piclusterd.errors import UserError
from piclusterd.ids import RunId
from piclusterd.views import RunView
from piclusterd.web.admin import JobWish
from tests.web.house import HOSTILE, WALL, Node, view

from .command import Result, picluster

HLC = int(WALL * 1000) << 16
DONE = RunView(RunId("a" * 32), "triage", "LIN-1 crash", "done", "", 1, "bug P1: x", HLC)
DEAD = RunView(RunId("ab" + "c" * 30), "triage", f"LIN-2 {HOSTILE}\x1b[2J", "failed", "", 8, "update: no", HLC - 1)
ASKS = RunView(RunId("b" * 32), "deploy", "v1.2", "open", "roll", 1, "", HLC - 2, "Roll out v1.2?")


@pytest.fixture
def house() -> Node:
    return Node(replace(view(), runs=(DONE, DEAD, ASKS)))


async def jobs(path: str, *words: str) -> Result:
    return await picluster("--socket", path, "jobs", *words)


async def test_dead_letters_stand_first_with_their_reason_then_what_waits(path: str) -> None:
    result = await jobs(path, "ls")
    assert result.code == 0
    rows = result.out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == [run.run[:10] for run in (DEAD, ASKS, DONE)]
    assert "update: no" in rows[0]
    assert "Roll out v1.2?" in rows[1]
    assert "\x1b" not in result.out
    only = await jobs(path, "ls", "--state", "failed", "--json")
    assert [run["run"] for run in json.loads(only.out)] == [DEAD.run]
    assert (await jobs(path, "ls", "--state", "ignored")).out == "No runs.\n"


@pytest.mark.parametrize("what", ["retry", "cancel", "approve", "reject"])
async def test_a_persons_word_reaches_the_coordinator(path: str, house: Node, what: str) -> None:
    result = await jobs(path, what, DEAD.run[:3])
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(DEAD.run[:10])
    assert [(wish.what, wish.run) for wish in house.job_wishes] == [(what, DEAD.run)]


async def test_what_the_coordinator_objects_is_told(path: str, house: Node) -> None:
    house.objection = UserError("this run is done", "only a run that failed can be tried again")
    result = await jobs(path, "retry", DONE.run)
    assert (result.code, result.out) == (1, "")
    assert "error: this run is done" in result.err


@pytest.mark.parametrize(("run", "says"),
    [("a", "2 runs begin so"), ("f", "none of the newest"), ("../x", "not the id"), ("", "not the id"),
     ("f" * 33, "not the id"), ("f" * 32, "no run")],
)  # fmt: skip
async def test_a_run_that_is_not_one_is_told(path: str, run: str, says: str) -> None:
    result = await jobs(path, "show", run)
    assert result.code == 1
    assert says in result.err


async def test_a_run_is_shown_step_by_step_and_its_logs_whole(path: str) -> None:
    shown = await jobs(path, "show", "b")
    assert "asks: Roll out v1.2? (picluster jobs approve|reject bbbbbbbbbb)" in shown.out
    assert "run.result classify" in shown.out
    assert HOSTILE in (await jobs(path, "logs", "b")).out
    assert json.loads((await jobs(path, "show", "b", "--json")).out)["run"] == ASKS.run


async def test_the_doors_of_jobs_are_the_owners_alone(house: Node) -> None:
    from tests.web.house import serving

    async with serving(house.doors()) as client:
        for answer in (
            await client.get(f"/admin/jobs/{DONE.run}"),
            await client.post("/admin/jobs", json={"what": "cancel", "run": DONE.run}),
        ):
            assert answer.status == 403
    assert house.job_wishes == list[JobWish]()
