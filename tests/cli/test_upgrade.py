"""`picluster upgrade` against the real doors of a node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piclusterd.errors import Unavailable
from piclusterd.ids import RunId
from piclusterd.views import RunView
from piclusterd.web.admin import JobLine, JobShown
from piclusterd.workflows.deploy import OwnersWish
from tests.web.house import Node, run

from .command import picluster

RUN = "0" * 32


class Cluster(Node):
    """A run that takes three looks, the first of which finds the node restarting, and ends as `end`."""

    end: RunView = replace(run(1), run=RunId(RUN), state="done", detail="3 nodes now run 0.2.0")

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[OwnersWish] = []
        self.shown = 0

    async def begin_upgrade(self, wish: OwnersWish) -> str:
        self.begun.append(wish)
        return RUN

    async def show_job(self, run: str) -> JobShown:
        self.shown += 1
        if self.shown == 1:
            raise Unavailable("the node restarts")
        line = JobLine(0, "pi-1", 1, "run.result", "node-pi-2", '{"state": "done"}')
        over = self.shown > 2
        return JobShown(run, self.end if over else replace(self.end, state="open"), (line,))

    async def look_upgrade(self) -> dict[str, object]:
        nodes = [{"name": "pi-1", "release": "0.1.0"}, {"name": "pi-2", "release": "0.2.0"}]
        return {"version": "0.2.0", "sha256": "b" * 64, "nodes": nodes, "away": ["pi-3"]}


@pytest.fixture
def house() -> Cluster:
    return Cluster()


async def test_a_look_says_who_is_behind(path: str) -> None:
    result = await picluster("--socket", path, "upgrade", "--check")
    assert result.code == 0, result.err
    assert "pi-1" in result.out
    assert result.out.count("behind") == 1
    assert "pi-3 is away." in result.out
    assert "The source has 0.2.0" in result.out


async def test_a_rolling_upgrade_is_begun_and_followed_over_restarts(path: str, house: Cluster) -> None:
    result = await picluster("--socket", path, "upgrade", "--rolling", "0.2.0")
    assert result.code == 0, result.err
    assert house.begun == [OwnersWish("install", "0.2.0")]
    assert result.out.count("node-pi-2") == 1
    assert result.out.endswith("3 nodes now run 0.2.0\n")


async def test_a_run_that_failed_is_a_failure(path: str, house: Cluster) -> None:
    house.end = replace(house.end, state="failed", detail="pi-1 rolled-back: not ready")
    result = await picluster("--socket", path, "upgrade", "--rollback")
    assert result.code == 1
    assert house.begun == [OwnersWish("rollback", "")]
    assert "pi-1 rolled-back: not ready" in result.err
