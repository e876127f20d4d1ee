"""`picluster ca rotate` on a running cluster: nobody restarts, nobody is lost, the old CA is worth nothing then."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from piclusterd.cluster.certificates import pin
from piclusterd.demo.cluster import Cluster, Member
from tests.e2e.rig import run

pytestmark = pytest.mark.e2e
log = logging.getLogger(__name__)

ROTATED_S = 90.0
"""Three stages of at most a look (`renewal.LOOK_EVERY_S`) each on every node, on a busy machine."""


def cas(member: Member) -> tuple[bytes, bool]:
    """Which CA a node trusts, and whether it trusts another beside."""
    identity = member.state / "identity"
    return pin((identity / "ca.pem").read_bytes()), (identity / "ca-next.pem").exists()


async def rotate(member: Member) -> str:
    done = await run("piclusterd.cli.main", "--socket", str(member.state / "api.sock"), "ca", "rotate")
    assert done.code == 0, done.err
    return done.out


def whole(cluster: Cluster, size: int) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        views = await cluster.views()
        said = [member["state"] for view in views for member in view["members"]]
        return said == ["alive"] * size * size

    return holds


async def test_the_ca_is_changed_under_a_running_cluster(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=3, with_model=(0,))
    try:
        await cluster.found()
        await cluster.until_served()
        holder, old = cluster.members[0], cas(cluster.members[0])[0]
        began = time.monotonic()
        assert "Waiting for" in await rotate(holder)

        async def over() -> bool:
            said = {cas(member) for member in cluster.members}
            return len(said) == 1 and not said.pop()[1] and cas(holder)[0] != old

        await cluster.until(over, "all trust the new CA alone", ROTATED_S)
        log.info("the change took %.1f s", time.monotonic() - began)
        assert "the cluster's CA is changed" in (holder.home / "piclusterd.log").read_text()

        await cluster.until(whole(cluster, 3), "all see all again", 30)
        await cluster.until(cluster.coordinator, "one coordinates", 30)
        late = cluster._member(3)
        cluster._write_config(late, model=False)
        where = f"127.0.0.1:{holder.peer_port}"
        await cluster.picluster(late, "join", await cluster.token(), "--name", late.name, "--server", where)
        cluster.members.append(late)
        await cluster.start(late)

        await cluster.until(whole(cluster, 4), "who joins afterwards is seen by all", 30)
        for member in cluster.members[:3]:
            await cluster.stop(member)
            await cluster.start(member)
        await cluster.until(whole(cluster, 4), "restarted, they trust the same CA", 60)
    finally:
        await cluster.close()
