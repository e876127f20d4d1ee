"""A disk that lies, on one node of three real ones: nothing acknowledged is lost, the node heals, the owner is told.

Each test takes webhooks (acknowledged: durable on two of three ledgers), spoils one node's disk while it is off, takes
another webhook without it, starts it again, and then looks into all three files. Told means: on another node, in the
list of `picluster status` and /health, with the node's name, a cause and a fix.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from piclusterd.demo import kill_audit
from piclusterd.demo.cluster import Member
from tests.cli.command import picluster

from .rig import Rig, alarm, running

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PAGE = 4096
HEALED_S = 60.0
MENDED = "mended its ledger"


class House(Rig):
    """Three nodes, and what was promised to those who sent webhooks."""

    promised: list[str]

    async def promise(self, count: int = 2) -> None:
        """Webhooks that the coordinator answered with 200."""
        for _ in range(count):
            issue, body = self.world.new_issue(f"Printer {len(self.promised)} is on fire", "It burns.")
            leader = await self.coordinator()
            await self.world.post(self.cluster.http, body, leader.url)
            self.promised.append(issue)

    async def coordinator(self) -> Member:
        leader: Member = await self.cluster.until(self.cluster.coordinator, "a coordinator", HEALED_S)
        return leader

    async def follower(self) -> Member:
        leader = await self.coordinator()
        return next(member for member in self.cluster.members if member is not leader)

    async def off(self, member: Member, kill: bool = False) -> None:
        if kill:
            self.cluster.kill(member)
        assert member.process is not None
        assert kill or await self.cluster.stop(member) == 0
        await member.process.wait()

    async def assert_healed(self, member: Member, what: str = MENDED) -> dict[str, Any]:
        """All ledgers hold all that was promised, and another node tells of `member`; the finding."""
        await self.cluster.until_equal(HEALED_S)
        other = next(one for one in self.cluster.members if one is not member)

        async def told() -> dict[str, Any] | None:
            async with self.cluster.http.get(f"{other.url}/health") as answer:
                found = (await answer.json())["findings"]
            return next((f for f in found if f["node"] == member.name and what in f["what"]), None)

        finding: dict[str, Any] = await self.cluster.until(told, f"{other.name} tells of {member.name}", HEALED_S)
        assert finding["why"]
        assert finding["fix"]
        said = await picluster("--host", other.url, "status")
        assert f"{member.name} {what}" in said.out
        for one in self.cluster.members:
            assert kill_audit.finished(ledger_of(one), self.promised), one.name
        return finding


def image(member: Member, into: Path) -> None:
    """Its state directory as of one moment."""
    assert member.process is not None
    member.process.send_signal(signal.SIGSTOP)
    shutil.copytree(member.state, into, ignore=shutil.ignore_patterns("*.sock", "*.ballast"))
    member.process.send_signal(signal.SIGCONT)


def ledger_of(member: Member) -> Path:
    return member.state / "ledger.db"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with running(Path(tmp_path_factory.mktemp("disks")), size=3) as rig:
        made = House(rig.world, rig.cluster)
        made.promised = []
        await made.promise()
        yield made


async def test_a_flipped_bit_is_found_and_mended(house: House) -> None:
    await house.cluster.until_equal()
    node = await house.follower()
    await house.off(node)
    data = bytearray(ledger_of(node).read_bytes())
    data[data.index(b"is on fire")] ^= 1
    ledger_of(node).write_bytes(data)
    await house.promise()
    await house.cluster.start(node)
    assert "1 entries" in await alarm(house.cluster, node, "rot on this node's disk")
    await house.assert_healed(node)


async def test_a_torn_page_is_found_and_the_ledger_made_anew(house: House) -> None:
    await house.cluster.until_equal()
    node = await house.follower()
    await house.off(node)
    with closing(sqlite3.connect(ledger_of(node))) as conn:
        pages = conn.execute("PRAGMA page_count").fetchone()[0]
    with ledger_of(node).open("r+b") as file:
        file.seek((pages - 2) * PAGE)
        file.write(b"\xff" * PAGE)
    await house.promise()
    await house.cluster.start(node)
    assert "damaged" in await alarm(house.cluster, node, "damaged")
    await house.assert_healed(node)


async def test_a_log_cut_off_in_the_middle_of_a_frame_is_noticed_by_the_others_and_fetched_back(house: House) -> None:
    node = await house.coordinator()
    await house.promise()
    await house.cluster.until_equal()
    await house.off(node, kill=True)
    wal = node.state / "ledger.db-wal"
    with wal.open("r+b") as file:
        file.truncate(wal.stat().st_size * 2 // 3 + 100)
    await house.promise()
    await house.cluster.start(node)
    assert "older state" in await alarm(house.cluster, node, "older state")
    await house.assert_healed(node)


async def test_a_state_directory_put_back_to_an_older_image_goes_on_in_a_new_log(house: House, tmp_path: Path) -> None:
    node = await house.coordinator()
    image(node, tmp_path / "image")
    await house.promise()
    await house.off(node, kill=True)
    shutil.rmtree(node.state)
    shutil.copytree(tmp_path / "image", node.state)
    await house.promise()
    await house.cluster.start(node)
    assert "older state" in await alarm(house.cluster, node, "older state")
    await house.assert_healed(node)


async def test_a_voter_whose_whole_disk_is_lost_joins_anew_and_gets_everything(house: House) -> None:
    leader = await house.coordinator()
    node = next(one for one in house.cluster.members[1:] if one is not leader)
    lost = node.node
    await house.off(node, kill=True)
    shutil.rmtree(node.state)
    await house.promise()
    other = next(one for one in house.cluster.members if one.up)
    named = (await picluster("--host", other.url, "status")).out
    assert f"{node.name} is not answering" in named or f"{node.name} may be down" in named
    await house.cluster.picluster(node, "join", await house.cluster.token(), "--name", "pi-new")
    await house.cluster.start(node)
    assert node.node != lost
    node.name = "pi-new"
    socket = str(house.cluster.members[0].state / "api.sock")
    for change in (("add", node.node), ("remove", lost)):
        ended = await picluster("--socket", socket, "voter", *change)
        assert ended.code == 0, ended.err

    async def seated() -> bool:
        views = await house.cluster.views()
        return all(node.node in view["voters"] and lost not in view["voters"] for view in views)

    await house.cluster.until(seated, "the new node has the vote", HEALED_S)
    await house.cluster.until_equal()


async def test_nothing_acknowledged_was_lost_and_nothing_done_twice(house: House) -> None:
    await house.promise()
    await house.cluster.until_equal(HEALED_S)
    ledgers = {member.name: ledger_of(member) for member in house.cluster.members}
    assert kill_audit.audit(ledgers, house.promised, house.world.linear).faults == ()
