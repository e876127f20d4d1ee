"""The demo as a person runs it, and the kill loop: what they print, how they end, and that nothing outlives them."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import psutil
import pytest

from piclusterd.demo import workerd
from tests.cli.command import environment

from .rig import descendants, gone

pytestmark = pytest.mark.e2e

STORY_S = 120.0
LOOK_S = 0.05


async def play(module: str, *words: str, interrupt_at: str = "") -> tuple[int, str, set[psutil.Process]]:
    """Exit status, output and every process seen below it; SIGINT once a line holds `interrupt_at`."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *words, env=environment(),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert child.stdout is not None
    started: set[psutil.Process] = set()

    async def watch() -> None:
        while True:
            started.update(await asyncio.to_thread(descendants, child.pid))
            await asyncio.sleep(LOOK_S)

    watching = asyncio.create_task(watch())
    lines: list[str] = []
    try:
        async with asyncio.timeout(STORY_S):
            async for line in child.stdout:
                lines.append(line.decode())
                if interrupt_at and interrupt_at in lines[-1]:
                    child.send_signal(signal.SIGINT)
            return await child.wait(), "".join(lines), started
    finally:
        watching.cancel()
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
            await child.wait()


def assert_whole_story(said: str) -> None:
    assert "SIGKILL to pi-" in said
    assert "all ledgers equal" in said
    assert said.count(", one comment") == 2
    assert "written by the local model" in said
    assert "flagged (" in said


async def test_the_story_ends_well_and_leaves_no_process_behind() -> None:
    code, said, started = await play("piclusterd.demo", "--once", "--hub", "python")
    assert code == 0, said
    assert_whole_story(said)
    assert len(started) >= 6, "three daemons, their models, a hub"
    assert await gone(started) == []


async def test_the_story_is_the_same_with_the_hub_in_real_workerd() -> None:
    if workerd.available() is None:
        pytest.skip(f"no workerd here: {workerd.find().why}")
    code, said, started = await play("piclusterd.demo", "--once", "--hub", "workerd")
    assert code == 0, said
    assert_whole_story(said)
    assert "runs in workerd" in said
    assert await gone(started) == []


@pytest.mark.parametrize("moment", ["picluster join", "a webhook is durable"])
async def test_ctrl_c_in_the_middle_leaves_no_process_behind(moment: str) -> None:
    code, said, started = await play("piclusterd.demo", "--once", "--hub", "python", interrupt_at=moment)
    assert code == 0, said
    assert "stopping" in said
    assert "all ledgers equal" not in said
    assert await gone(started) == []


async def test_killed_coordinators_lose_no_webhook_and_triage_none_twice(tmp_path: Path) -> None:
    words = ("--kills", "3", "--rate", "4", "--hub", "python", "--hub-every", "2", "--dir", str(tmp_path))
    code, said, started = await play("piclusterd.demo.kill_loop", *words)
    assert code == 0, said
    assert "3 kills" in said
    assert "none lost, none triaged twice, ledgers equal" in said
    assert await gone(started) == []
