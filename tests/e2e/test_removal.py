"""`picluster node remove`: of a member that is up while a third node is away, and of the coordinator."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from piclusterd.demo.cluster import Cluster, Member
from tests.cli.command import Result
from tests.e2e.rig import run

pytestmark = pytest.mark.e2e
log = logging.getLogger(__name__)

REVOKED_S = 5.0
"""How long an open link of a removed node may live."""


async def picluster(member: Member, *words: str) -> Result:
    return await run("piclusterd.cli.main", "--socket", str(member.state / "api.sock"), *words)


def log_of(member: Member) -> str:
    return (member.home / "piclusterd.log").read_text()


async def lists(cluster: Cluster, node: str, by: list[Member]) -> list[str]:
    """Who of `by` lists `node`."""
    views = [(member.name, await cluster.status(member)) for member in by]
    return [name for name, view in views if view is None or node in [m["node"] for m in view["members"]]]


async def test_a_removed_node_is_cut_off_everywhere_for_good(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=4, voters=3, with_model=(0,))
    try:
        await cluster.found()
        leader = await cluster.until_served()
        gone, asked = cluster.members[3], next(m for m in cluster.members[:3] if m is not leader)
        away = next(m for m in cluster.members[:3] if m not in (leader, asked))
        others = [leader, asked, away]
        await cluster.until_equal()

        assert "cannot remove itself" in (await picluster(asked, "node", "remove", asked.name, "--yes")).err
        assert "no member has that name" in (await picluster(asked, "node", "remove", "pi-9", "--yes")).err

        await cluster.stop(away)
        started = time.monotonic()
        done = await picluster(asked, "node", "remove", gone.name, "--yes")
        assert done.code == 0, done.err
        answered = time.monotonic()

        async def cut() -> bool:
            ended = log_of(gone).count("it was removed from the cluster")
            return ended >= 2 and not await lists(cluster, gone.node, [leader, asked])

        await cluster.until(cut, "its links are closed and it is listed nowhere", REVOKED_S)
        now = time.monotonic()
        log.info("the command took %.2f s, and everywhere cut off %.2f s later", answered - started, now - answered)

        await cluster.start(away)
        await cluster.until(lambda: _heard_of_it(away), "who was away has learnt of it", 30)
        assert not await lists(cluster, gone.node, others)
        assert (away.state / "identity" / "denied.json").read_text() == f'["{gone.node}"]'

        await cluster.stop(gone)
        await cluster.start(gone)  # the same key again: 403 at every door

        async def refused() -> bool:
            return "no link to" in log_of(gone).rpartition("ready: node")[2]

        await cluster.until(refused, "it is refused at the handshake", 20)
        assert not await lists(cluster, gone.node, others)
        view = await cluster.status(leader)
        assert view is not None
        assert gone.node in [head["origin"] for head in view["heads"]], "what it wrote stays"
    finally:
        await cluster.close()


async def _heard_of_it(member: Member) -> bool:
    return (member.state / "identity" / "denied.json").exists()


async def test_a_coordinator_loses_its_office_and_its_vote_before_it_is_removed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=3, with_model=(0,))
    try:
        await cluster.found()
        leader = await cluster.until_served()
        others = [member for member in cluster.members if member is not leader]
        done = await picluster(others[0], "node", "remove", leader.name, "--yes")
        assert done.code == 0, done.err

        async def two() -> bool:
            views = [await cluster.status(member) for member in others]
            voters = {tuple(view["voters"]) for view in views if view}
            return voters == {tuple(sorted(m.node for m in others))} and not await lists(cluster, leader.node, others)

        await cluster.until(two, "the two that are left vote alone", 20)
        heir = await cluster.until(cluster.coordinator, "one of them coordinates", 20)
        assert heir in others
    finally:
        await cluster.close()
