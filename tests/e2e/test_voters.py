"""A fourth node joins as a learner, is given a vote through a node that does not coordinate, and loses it again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from piclusterd.demo.cluster import Cluster, Member
from tests.e2e.rig import run

pytestmark = pytest.mark.e2e


async def voters(cluster: Cluster) -> set[str]:
    """What every node says, once they agree; empty before."""
    views = await cluster.views()
    said = {tuple(view["voters"]) for view in views}
    return set(said.pop()) if len(said) == 1 and len(views) == len(cluster.members) else set()


async def change(member: Member, what: str, node: str) -> str:
    done = await run("piclusterd.cli.main", "--socket", str(member.state / "api.sock"), "voter", what, node)
    assert done.code == 0, done.err
    return done.out


async def test_the_owner_adds_a_voter_and_removes_it(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=4, voters=3, with_model=(0,))
    try:
        await cluster.found()
        leader = await cluster.until_served()
        founding = await cluster.until(lambda: voters(cluster), "all know the voters", 20)
        learner = next(member for member in cluster.members if member.node not in founding)
        assert "Voters now" in await change(learner, "add", learner.name)

        async def four() -> bool:
            return await voters(cluster) == {*founding, learner.node}

        await cluster.until(four, "four nodes vote", 20)
        await change(leader, "remove", leader.name)

        async def without() -> bool:
            heir = await cluster.coordinator()
            return await voters(cluster) == {*founding, learner.node} - {leader.node} and heir not in (None, leader)

        await cluster.until(without, "the removed coordinator has handed over", 20)
    finally:
        await cluster.close()


async def test_a_stranger_is_no_voter(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=1, with_model=(0,))
    try:
        await cluster.found()
        first = await cluster.until_served()
        socket = str(first.state / "api.sock")
        refused, again = await asyncio.gather(
            run("piclusterd.cli.main", "--socket", socket, "voter", "add", "pi-9"),
            run("piclusterd.cli.main", "--socket", socket, "voter", "remove", first.name),
        )
        assert refused.code == 1
        assert "pi-9" in refused.err
        assert again.code == 1
        assert "the last voter" in again.err
    finally:
        await cluster.close()
