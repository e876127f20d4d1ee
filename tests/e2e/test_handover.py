"""Leadership moved by hand through any node, and off a leader whose disk is full; a vote record that vanished."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from piclusterd.demo.cluster import Cluster, DemoFailed, Member
from tests.cli.command import Result
from tests.e2e.rig import alarm, run, running

pytestmark = pytest.mark.e2e

SMALL_MB = 24
"""Room for a node and its ledger, too little for a ballast."""


async def move(member: Member, *node: str) -> Result:
    return await run("piclusterd.cli.main", "--socket", str(member.state / "api.sock"), "coordinator", "move", *node)


async def vote(member: Member, what: str, node: Member) -> Result:
    return await run("piclusterd.cli.main", "--socket", str(member.state / "api.sock"), "voter", what, node.name)


async def until_led_by(cluster: Cluster, member: Member) -> None:
    async def led() -> bool:
        return await cluster.coordinator() is member

    await cluster.until(led, f"{member.name} coordinates", 20)


async def test_the_owner_moves_leadership_from_any_node(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=4, voters=3, with_model=(0,))
    try:
        await cluster.found()
        leader = await cluster.until_served()
        founding = set((await cluster.views())[0]["voters"])
        heir, other = (m for m in cluster.members if m.node in founding and m is not leader)
        learner = next(m for m in cluster.members if m.node not in founding)
        moved = await move(other, heir.name)
        assert moved.code == 0, moved.err
        assert moved.out.startswith(f"{heir.name} coordinates now (term ")
        await until_led_by(cluster, heir)
        back = await move(learner)
        assert back.code == 0, back.err
        assert heir.name not in back.out
        for wanted, told in ((learner.name, "is no voter"), ("pi-9", "no member has that name or id")):
            refused = await move(other, wanted)
            assert refused.code == 1
            assert told in refused.err
    finally:
        await cluster.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder in which each of three nodes has a small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted: list[Path] = []
    try:
        for name in ("pi-1", "pi-2", "pi-3"):
            state = tmp_path / name / "state"
            state.mkdir(parents=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MB}m,mode=700", "tmpfs", str(state)]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
            mounted.append(state)
        yield tmp_path
    finally:
        for state in mounted:
            subprocess.run(["umount", str(state)], check=True)


def fill(folder: Path) -> Path:
    """Somebody else's file, as large as the disk lets it be."""
    other = folder / "someone else's"
    with other.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return other


async def test_a_leader_whose_disk_is_full_hands_over_says_why_and_leads_again_when_there_is_room(small: Path) -> None:
    async with running(small, size=3) as rig:
        cluster = rig.cluster
        leader = await cluster.until_served()
        filler = fill(leader.state)
        with pytest.raises(DemoFailed, match="Free space"):
            await rig.world.post(cluster.http, rig.world.new_issue("Too much", "x" * 200_000)[1], leader.url)

        async def handed_over() -> Member | None:
            heir = await cluster.coordinator()
            return heir if heir is not leader else None

        heir: Member = await cluster.until(handed_over, "another coordinates", 30)
        assert await rig.world.post(cluster.http, rig.world.new_issue("Now", "it is taken")[1], heir.url)

        async def told() -> list[str]:
            async with cluster.http.get(f"{heir.url}/health") as answer:
                found = (await answer.json())["findings"]
            whats = {finding["what"]: finding["why"] for finding in found}
            there = f"{leader.name} has disk trouble" in whats and f"{leader.name} handed over" in whats
            return [whats[f"{leader.name} handed over"]] if there else []

        (why,) = await cluster.until(told, "the heir's page tells why", 20)
        assert "SQLite says" in why
        refused = await move(heir, leader.name)
        assert (refused.code, "has disk trouble" in refused.err) == (1, True), refused.err

        filler.unlink()

        async def well() -> bool:
            members = [m for view in await cluster.views() for m in view["members"]]
            return len(members) == 9 and not any(m["facts"]["trouble"] for m in members)

        await cluster.until(well, "the disk is well again", 30)
        moved = await move(heir, leader.name)
        assert moved.code == 0, moved.err
        await until_led_by(cluster, leader)


async def test_a_node_whose_votes_vanished_says_so_and_votes_again_as_it_was_told(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=3, with_model=(0,))
    try:
        await cluster.found()
        leader = await cluster.until_served()
        forgetful = next(m for m in cluster.members if m is not leader)
        await cluster.stop(forgetful)
        shutil.rmtree(forgetful.state / "votes")
        await cluster.start(forgetful)
        fix = await alarm(cluster, forgetful, "the vote record is lost")
        assert f"picluster voter remove {forgetful.name}" in fix
        assert (await vote(leader, "remove", forgetful)).code == 0
        await cluster.stop(forgetful)
        (forgetful.state / "votes.lost").unlink()
        await cluster.start(forgetful)
        given = await vote(leader, "add", forgetful)
        assert given.code == 0, given.err
        assert forgetful.name in given.out
        moved = await move(leader, forgetful.name)
        assert moved.code == 0, moved.err
    finally:
        await cluster.close()
