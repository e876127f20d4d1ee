"""A daemon's life: ready, stopped, started again; alone and among others; seen through `picluster`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from piclusterd.demo.cluster import Cluster, Member
from tests.cli.command import Result, environment, picluster

from .rig import Rig, descendants, gone, running

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

READY_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """A cluster of one node."""
    async with running(Path(tmp_path_factory.mktemp("alone")), size=1) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    made = Cluster(Path(tmp_path_factory.mktemp("three")), with_model=(0,))
    try:
        await made.found()
        await made.until_served()
        yield made
    finally:
        await made.close()


async def client(member: Member, *words: str) -> Result:
    return await picluster("--host", member.url, *words)


# alone -----------------------------------------------------------------------------------------------------------
async def test_a_cluster_of_one_takes_a_webhook_and_triages_it(alone: Rig) -> None:
    issue, body = alone.world.new_issue("Checkout crashes for every customer", "500 on every payment")
    said = await alone.world.post(alone.cluster.http, body, alone.member.url)
    assert said["stored"]
    await alone.cluster.until_equal()

    async def commented() -> bool:
        return len(alone.world.linear.issue(issue).comments) == 1

    await alone.cluster.until(commented, "the issue is triaged", 30)
    assert alone.world.linear.issue(issue).priority > 0


async def test_status_is_0_where_all_is_well(alone: Rig) -> None:
    ended = await client(alone.member, "status")
    assert ended.code == 0, ended
    assert alone.member.name in ended.out
    picture = json.loads((await client(alone.member, "status", "--json")).out)
    assert picture["me"] == alone.member.node
    assert picture["status"] == "ok"


async def test_status_over_the_unix_socket_is_the_same(alone: Rig) -> None:
    ended = await picluster("--socket", str(alone.member.state / "api.sock"), "status", "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["me"] == alone.member.node


async def test_status_is_3_where_no_daemon_answers(tmp_path: Path) -> None:
    ended = await picluster("--socket", str(tmp_path / "none.sock"), "status")
    assert ended.code == 3
    assert "cannot reach the daemon" in ended.err


async def test_chat_prints_an_answer(alone: Rig) -> None:
    ended = await client(alone.member, "chat", "Title: printer on fire", "--max-tokens", "20")
    assert ended.code == 0, ended
    assert ended.out.strip()


async def test_events_prints_what_happened(alone: Rig) -> None:
    ended = await client(alone.member, "events")
    assert ended.code == 0, ended
    assert "serves as coordinator" in ended.out
    lines = (await client(alone.member, "events", "--json")).out.splitlines()
    assert {"id", "kind", "at", "data"} <= set(json.loads(lines[0]))


async def test_an_answer_under_way_is_finished_before_the_daemon_ends(alone: Rig) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 400}}}
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "response_format": schema}
    url = f"{alone.member.url}/v1/chat/completions"
    async with alone.cluster.http.post(url, json=body) as answer:
        assert answer.status == 200
        await answer.content.readline()
        stopping = asyncio.create_task(alone.cluster.stop(alone.member))
        rest = (await answer.content.read()).decode()
    assert rest.rstrip().endswith("data: [DONE]")
    assert await stopping == 0
    await alone.cluster.start(alone.member)


# among others ----------------------------------------------------------------------------------------------------
async def test_sigterm_hands_over_ends_the_children_and_a_restart_keeps_identity_and_ledger(three: Cluster) -> None:
    leader = await three.coordinator()
    assert leader is not None
    assert leader.process is not None
    before = await three.status(leader)
    assert before is not None
    children = descendants(leader.process.pid)
    assert await three.stop(leader) == 0
    assert await gone(children) == []
    heir = await three.until(three.coordinator, "another coordinator", 30)
    assert heir is not leader
    ended = await client(heir, "status")
    assert ended.code == 1, "degraded: a node is away"

    await three.start(leader)
    after = await three.status(leader)
    assert after is not None
    assert after["me"] == before["me"]
    assert after["entries"] >= before["entries"]
    await three.until_equal()


# as a service ----------------------------------------------------------------------------------------------------
@contextmanager
def systemd(path: Path) -> Iterator[socket.socket]:
    """A notification socket, as systemd makes one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        yield sock


@asynccontextmanager
async def service(tmp_path: Path) -> AsyncIterator[tuple[Cluster, asyncio.subprocess.Process, socket.socket]]:
    """A node of its own as systemd would start it, and the socket on which systemd is told; READY has come."""
    cluster = Cluster(tmp_path, size=1, with_model=())
    (member,) = cluster.prepare()
    await cluster.picluster(member, "init", "--cluster", "alone", "--name", member.name, "--expect", "1")
    with systemd(tmp_path / "notify.sock") as notified:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "piclusterd.daemon", "--config", str(member.config),
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify.sock")), stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(READY_S):
                word = await asyncio.get_running_loop().sock_recv(notified, 4096)
                assert word.startswith(b"READY=1"), word
                yield cluster, child, notified
        finally:
            if child.returncode is None:
                child.kill()
            await child.communicate()
            await cluster.close()


async def test_systemd_is_told_ready_and_stopping_and_the_log_is_json_lines(tmp_path: Path) -> None:
    async with service(tmp_path) as (cluster, child, notified):
        assert await cluster.until(lambda: cluster.status(cluster.members[0]), "it answers", READY_S)
        child.terminate()
        _, logged = await child.communicate()
        assert child.returncode == os.EX_OK
        loop = asyncio.get_running_loop()
        while not (word := await loop.sock_recv(notified, 4096)).startswith(b"STOPPING=1"):
            assert word.startswith((b"STATUS", b"WATCHDOG")), word
    lines = [json.loads(line) for line in logged.splitlines()]
    assert any(line["message"].startswith("ready: node") for line in lines)
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert not [line for line in lines if line["level"] in ("warning", "error", "critical")]


async def test_a_sigterm_right_after_ready_is_an_orderly_stop_too(tmp_path: Path) -> None:
    async with service(tmp_path) as (_, child, _notified):
        child.terminate()
        await child.communicate()
        assert child.returncode == os.EX_OK
