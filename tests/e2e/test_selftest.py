"""`picluster selftest` on a real cluster: green through hub, coordinator, ledgers and run; red where one is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piclusterd.demo.cluster import Cluster

from .rig import run, running

pytestmark = pytest.mark.e2e


async def test_a_selftest_passes_every_hop_and_turns_red_where_one_is_broken(tmp_path: Path) -> None:
    async with running(tmp_path, hub="auto", with_model=()) as rig:
        leader = await rig.cluster.coordinator()
        assert leader is not None
        other = next(member for member in rig.cluster.members if member is not leader)
        words = ("--host", other.url, "selftest", "--config", str(other.config))
        green = await run("piclusterd.cli.main", *words)
        assert (green.code, green.out.splitlines()[-1]) == (0, "green"), green
        assert [line.split()[:2] for line in green.out.splitlines()[:-1]] == [
            ["ok", hop] for hop in ("hub", "durable", "run", "closed", "acked", "copy")
        ]
        told = json.loads((await run("piclusterd.cli.main", *words, "--json")).out)
        assert told["green"] is True
        assert all(hop["ms"] > 0 for hop in told["hops"])
        assert await _same(rig.cluster)
        assert rig.world.hub is not None
        await rig.world.hub.kill()
        red = await run("piclusterd.cli.main", *words, "--timeout", "1")
        assert red.code == 1
        assert red.out.startswith("RED hub ")
        assert "look at: picluster hub health" in red.out


async def _same(cluster: Cluster) -> bool:
    views = await cluster.until_equal()
    return all(sum(run["workflow"] == "selftest" for run in view["runs"]) == 2 for view in views)
