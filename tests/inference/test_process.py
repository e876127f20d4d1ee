"""Workers that somebody else starts for our connection, as `piclusterd-worker.socket` does."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from piclusterd.errors import Unavailable
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import GenerateRequest

from .rig import GREEDY, NAME, READY_S, Changes, collected, rest, spec

ENDLESS = GenerateRequest(prompt="x", max_tokens=0, json_schema='{"type": "string", "minLength": 900}')


class Activator:
    """Accept=yes: one worker process for every connection."""

    def __init__(self, listening: socket.socket) -> None:
        self.workers: list[asyncio.subprocess.Process] = []
        self.started = asyncio.Event()
        self._listening = listening

    async def accept(self) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listening)
            with connection:
                connection.setblocking(True)
                fd = connection.fileno()
                worker = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "piclusterd.inference.worker", "--fd", str(fd), pass_fds=(fd,)
                )
            self.workers.append(worker)
            self.started.set()


@pytest.fixture
async def activator(tmp_path: Path) -> AsyncIterator[Activator]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.setblocking(False)
        listening.bind(str(tmp_path / "worker.sock"))
        listening.listen()
        made = Activator(listening)
        accepting = asyncio.create_task(made.accept())
        yield made
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
    for worker in made.workers:
        if worker.returncode is None:
            worker.kill()
        await worker.wait()


@pytest.fixture
async def pool(activator: Activator, tmp_path: Path) -> AsyncIterator[Pool]:
    made = Pool(8, READY_S, Changes(), tmp_path / "worker.sock")
    await made.start([spec()])
    yield made
    await made.close()


async def test_a_worker_from_the_socket_answers_and_is_not_our_child(activator: Activator, pool: Pool) -> None:
    assert await pool.settled(NAME) == "ready"
    assert pool.pid(NAME) is None
    assert len(activator.workers) == 1
    assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_worker_from_the_socket_ends_when_the_pool_lets_go(activator: Activator, pool: Pool) -> None:
    assert await pool.settled(NAME) == "ready"
    await pool.close()
    async with asyncio.timeout(READY_S):
        assert await activator.workers[0].wait() == 0


async def test_a_worker_that_is_stuck_ends_too(activator: Activator, tmp_path: Path) -> None:
    """Nobody but itself may end it. It opens a pipe that nobody writes to, as a dead disk would keep it waiting."""
    os.mkfifo(tmp_path / "stuck.gguf")
    pool = Pool(8, READY_S, Changes(), tmp_path / "worker.sock")
    await pool.start([spec(tmp_path / "stuck.gguf")])
    async with asyncio.timeout(READY_S):
        await activator.started.wait()
        await pool.close()
        assert await activator.workers[0].wait() == 0


async def test_one_that_dies_is_replaced_through_the_socket(activator: Activator, tmp_path: Path) -> None:
    changes = Changes()
    pool = Pool(8, READY_S, changes, tmp_path / "worker.sock")
    await pool.start([spec()])
    try:
        assert await pool.settled(NAME) == "ready"
        async with aclosing(pool.generate(NAME, ENDLESS)) as answer:
            await anext(answer)
            activator.workers[0].kill()
            with pytest.raises(Unavailable, match="journalctl"):
                await rest(answer)
        await changes.until(lambda: pool.states()[NAME][0] == "loading")
        assert await pool.settled(NAME) == "ready"
        assert len(activator.workers) == 2
    finally:
        await pool.close()


async def test_where_there_is_no_socket_the_child_is_our_own(tmp_path: Path) -> None:
    pool = Pool(8, READY_S, Changes(), tmp_path / "missing.sock")
    await pool.start([spec()])
    try:
        assert await pool.settled(NAME) == "ready"
        assert pool.pid(NAME) is not None
    finally:
        await pool.close()
