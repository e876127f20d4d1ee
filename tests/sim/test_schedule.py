"""A line of the schedule in a whole cluster: each due minute runs once, whoever coordinates and whoever dies."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest

from piclusterd.events import ClockTold
from piclusterd.ids import RunId
from piclusterd.sim.outside import Service
from piclusterd.sim.world import Actor, Plan, World
from piclusterd.workflows.errands import Errands
from piclusterd.workflows.schedule import Agenda, Line

NOON = 29_666_880
"""A full hour, in minutes since 1970."""
MINUTES = 20


class Reports(Service):
    """Counts how often each run asked for its report, and how often its text was posted: once for one key."""

    def __init__(self) -> None:
        super().__init__()
        self.workflows = {"errand": Errands("m")}
        self.agenda = Agenda((Line("report", "*/5 * * * *", "UTC", "triage-report", missed="run-once", post=True),))
        self.posted: dict[str, RunId] = {}

    def perform(self, run: RunId, operation: str, key: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if operation == "text":
            self.posted.setdefault(key, run)
        return {"text": "all well"}

    def effects(self) -> dict[str, int]:
        return {run: list(self.posted.values()).count(run) for run in self.posted.values()}


def leader(world: World) -> Actor | None:
    return next((actor for actor in world.actors if actor.node is not None and actor.node.replicate.active), None)


@pytest.mark.parametrize("seed", range(3))
def test_every_due_minute_runs_once_though_its_coordinators_die_in_it(seed: int) -> None:
    with closing(World(Plan(seed, voters=3, learners=0, preset="lan"))) as world:
        world.service = reports = Reports()
        world.calm()
        world.open()
        world.play(5.0)
        began = world.now

        def tell() -> None:
            """Every machine has its own clock; the second is some seconds ahead."""
            for actor in world.actors:
                ahead = 4.0 if actor.number == 1 else 0.0
                minute = NOON - 1 + int((world.now - began + ahead) // 60)
                world.deliver_in(0.0, actor, ClockTold(minute, synced=True))

        def kill() -> None:
            if (led := leader(world)) is not None:
                world.crash(led)
                world.at(10.0, world.boot, led)

        world.every(1.0, tell)
        for minute in range(1, MINUTES, 5):
            world.at(60.0 * minute + 0.3 * seed, kill)
        world.play(began + 60 * MINUTES)
        world.settle(10.0)
        node = world.actors[0].node
        assert node is not None
        runs = node.journal.views(100)
        assert {run.state for run in runs} == {"done"}
        due = [minute for minute in range(NOON, NOON + MINUTES - 1) if minute % 5 == 0]
        assert len(runs) == len(due)
        assert reports.effects() == {run.run: 1 for run in runs}
