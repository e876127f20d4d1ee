"""What happens to boards and cables, on three Pis behind a NAT: each lane says what the owner sees, and that nothing
that was acknowledged is lost (`village.audited`). Minutes long: `make e2e`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from piclusterd.demo.cluster import Member
from piclusterd.demo.sites import Place
from tests.cli.command import picluster

from .rig import descendants
from .village import SLOW, Village, states, village

pytestmark = [
    pytest.mark.e2e, pytest.mark.slow_lane, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600),
    pytest.mark.skipif(bool(SLOW), reason=SLOW or "-"),
]  # fmt: skip

THREE = tuple(Place(f"pi-{number}", cable={}) for number in (1, 2, 3))
FULL, CARD = "pi-3", "pi-2"
"""Whose state is on a small tmpfs, and on an ext4 file system that goes read-only at its first error."""
TMPFS_MB, IMAGE_MB = 64, 96
STOPPED_S = 60.0
LONG, CROWD = "it rains in, and " * 100, 8
"""Prompts and how many at once: enough for every copy of a model to need another page."""
STARVED_S = 20.0
JUMPED_S = 8.0
"""After each jump of the clock: longer than a suspicion lasts at these timings."""
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
WALL_CLOCK_ONLY = ("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_FORCE_MONOTONIC_FIX=0")
"""As NTP and an RTC change it. Where libfaketime applies its "fix" to pthread_cond_timedwait (it does unasked on glibc
2.36), CPython's wait for the GIL ends at once, threads fight for it, and the node stalls for seconds."""


def card_image(folder: Path) -> Path:
    image = folder / "card.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_MB * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    return image


def replaced(card: Path) -> None:
    """What an owner does with a card that went read-only: its files on a new one, in the same place."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["cp", "-a", f"{card}/.", scratch], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", str(card)], check=True)
        subprocess.run(["cp", "-a", f"{scratch}/.", str(card)], check=True)


def spoilt(device: Path) -> bool:
    """Plant an error in the file system on `device`, which makes it read-only. False: this kernel cannot."""
    trigger = Path(f"/sys/fs/ext4/{device.name}/trigger_fs_error")
    if trigger.exists():
        trigger.write_text("planted")
    return trigger.exists()


@contextmanager
def mounted(path: Path, *how: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *how, str(path)], check=True)
    try:
        yield
    finally:
        while subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True).returncode == 0:
            pass  # one may be mounted over another


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Village]:
    root = Path(tmp_path_factory.mktemp("faults"))
    image = card_image(root)
    with (
        mounted(root / FULL / "state", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m,mode=700", "tmpfs"),
        mounted(root / CARD / "state", "-o", "loop,errors=remount-ro", str(image)),
    ):
        async with village(root, THREE, with_model=(0, 1)) as made:
            yield made


async def leader(home: Village) -> Member:
    found: Member = await home.cluster.until(home.cluster.coordinator, "a coordinator", 60)
    return found


async def heir_of(home: Village, old: Member) -> Member:
    """Another node that serves as coordinator, as the others see it."""

    async def found() -> Member | None:
        for view in await home.cluster.views():
            if view["role"] == "leader" and view["me"] != old.node:
                return next(member for member in home.cluster.members if member.node == view["me"])
        return None

    heir: Member = await home.cluster.until(found, f"another coordinator than {old.name}", 60)
    return heir


async def findings(home: Village, name: str) -> str:
    """The health list as node `name` tells it."""
    async with home.cluster.http.get(f"{home.member(name).url}/health") as answer:
        found: list[dict[str, Any]] = (await answer.json())["findings"]
    return "\n".join(" ".join(str(part) for part in finding.values()) for finding in found)


async def until_told(home: Village, name: str, words: str) -> None:
    async def told() -> bool:
        return words in await findings(home, name)

    await home.cluster.until(told, f"{name} tells: {words}", 60)


async def test_a_coordinator_whose_cable_is_pulled_is_replaced_and_comes_back(home: Village) -> None:
    old = await leader(home)
    async with home.webhooks():
        home.net.unplug(old.name)
        heir = await heir_of(home, old)
        await home.until_sees(heir.name, "failed", old.name)
        await until_told(home, heir.name, old.name)

        async def stepped_down() -> bool:
            return bool((await home.picture(old.name))["role"] != "leader")

        await home.cluster.until(stepped_down, "the one that is cut off stepped down", 10)
        home.net.replug(old.name)
        home.net.route(old.name)
        await home.until_sees(heir.name, "alive", old.name)
    assert await home.audited() == ()


async def test_a_one_way_partition_is_bridged_by_the_third_and_nobody_notices(home: Village) -> None:
    boss = await leader(home)
    term = (await home.picture(boss.name))["term"]
    deaf, third = (member for member in home.cluster.members if member is not boss)
    home.net.block(boss.name, deaf.name)

    async def bridged() -> bool:
        async with home.cluster.http.get(f"{third.url}/metrics") as answer:
            return "piclusterd_relayed_links 1.0" in await answer.text()

    try:
        async with home.webhooks():
            await home.cluster.until(bridged, f"{third.name} relays between the two", 30)
            await home.until_sees(deaf.name, "alive", boss.name)
        await home.settle()
    finally:
        home.net.unblock(boss.name)
    assert await home.audited() == ()
    seen = await home.picture(boss.name)
    assert (seen["role"], seen["term"]) == ("leader", term), "stickiness: who hears nothing unseats nobody"


async def test_webhooks_pass_on_a_bad_network(home: Village) -> None:
    """40 ms each way, a tenth of the frames lost and a tenth reordered, on every cable."""
    for place in THREE:
        home.net.spoil(place.name, delay=0.04, jitter=0.005, loss=0.1, reorder=0.1)
    try:
        before = len(home.promised)
        async with home.webhooks():
            await asyncio.sleep(15)
        assert len(home.promised) > before + 10
    finally:
        for place in THREE:
            home.net.spoil(place.name, delay=0.0, jitter=0.0, loss=0.0, reorder=0.0)
    assert await home.audited() == ()


async def test_a_killed_coordinator_loses_nothing(home: Village) -> None:
    old = await leader(home)
    async with home.webhooks():
        home.cluster.kill(old)
        await heir_of(home, old)
        await home.cluster.start(old)
    assert await home.audited() == ()


async def test_a_coordinator_that_was_stopped_for_a_minute_wakes_as_a_follower(home: Village) -> None:
    old = await leader(home)
    assert old.process is not None
    async with home.webhooks(every_s=2.0):
        os.kill(old.process.pid, signal.SIGSTOP)
        try:
            heir = await heir_of(home, old)
            await home.until_sees(heir.name, "failed", old.name)
            await asyncio.sleep(STOPPED_S)
        finally:
            os.kill(old.process.pid, signal.SIGCONT)
        await home.until_sees(heir.name, "alive", old.name)

        async def follows() -> bool:
            view = await home.cluster.status(old)
            return view is not None and view["role"] != "leader" and view["leader"] is not None

        await home.cluster.until(follows, f"{old.name} follows", 30)
    assert await home.audited() == ()


@pytest.mark.skipif(not FAKETIME.exists(), reason="no libfaketime on this machine")
async def test_a_clock_that_jumps_by_sixty_days_and_back_changes_nothing(home: Village, tmp_path: Path) -> None:
    boss, clock = await leader(home), tmp_path / "clock"
    node = next(member for member in home.cluster.members if member is not boss)
    clock.write_text("+0")
    plain = node.within
    await home.cluster.stop(node)
    node.within = (*plain, "env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={clock}", *WALL_CLOCK_ONLY)
    try:
        await home.cluster.start(node)
        await home.until_sees(boss.name, "alive", node.name)
        terms = {view["term"] for view in await home.cluster.views()}
        for jump in (60 * 86400, -3600, 0):
            clock.write_text(f"{jump:+d}")
            async with home.webhooks():
                await nobody_is_buried(home, JUMPED_S)
        assert {view["term"] for view in await home.cluster.views()} == terms, "no election came of it"
    finally:
        await home.cluster.stop(node)
        node.within = plain
        await home.cluster.start(node)
    assert await home.audited() == ()


async def test_a_full_disk_hands_over_is_told_and_loses_nothing(home: Village) -> None:
    node = home.member(FULL)
    filler = node.state / "filler"
    if await leader(home) is not node:
        moved = await picluster("--host", node.url, "coordinator", "move", FULL)
        assert moved.code == 0, moved
    async with home.webhooks():
        await asyncio.to_thread(fill, filler)
        try:
            heir = await heir_of(home, node)
            await until_told(home, heir.name, f"{FULL} has disk trouble")
        finally:
            filler.unlink()
    assert await home.audited() == ()


def fill(path: Path) -> None:
    """Every block there is, the large ones first."""
    for size in (1024 * 1024, 512):
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(size)) == size:
                pass


async def test_a_card_that_goes_read_only_is_told_and_loses_nothing(home: Village) -> None:
    node = home.member(CARD)
    device = Path(next(part.device for part in psutil.disk_partitions(all=True) if part.mountpoint == str(node.state)))
    async with home.webhooks():
        if not await asyncio.to_thread(spoilt, device):
            pytest.skip("this kernel cannot be asked for a file system error")
        await until_told(home, "pi-1", f"{CARD} has disk trouble")
        await home.promise()
        home.cluster.kill(node)
        assert node.process is not None
        await node.process.wait()
        await asyncio.to_thread(replaced, node.state)
        await home.cluster.start(node)
    assert await home.audited() == ()


async def test_boards_busy_with_inference_and_worse_bury_nobody(home: Village) -> None:
    boss = await leader(home)
    term = (await home.picture(boss.name))["term"]
    async with busy(2 * (os.cpu_count() or 1)), home.webhooks(), asyncio.timeout(STARVED_S * 3):
        await nobody_is_buried(home, STARVED_S)
    seen = await home.picture(boss.name)
    assert (seen["role"], seen["term"]) == ("leader", term), "the coordinator is the same"
    assert await home.audited() == ()


async def nobody_is_buried(home: Village, seconds: float) -> None:
    """All the while there is inference, and no node lists another as failed."""
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        await home.chat("pi-1")
        for name in ("pi-1", "pi-2", "pi-3"):
            assert "failed" not in (await states(home, name)).values()


@asynccontextmanager
async def busy(count: int) -> AsyncIterator[None]:
    """`count` processes that take what they get, a little nicer than a daemon, as inference is."""
    loops = [
        await asyncio.create_subprocess_exec("nice", "-n", "5", sys.executable, "-c", "while True: pass")
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            await process.wait()


async def test_a_model_killed_for_memory_is_started_again_and_others_answer_meanwhile(home: Village) -> None:
    node = home.member("pi-1")
    assert node.process is not None
    daemon = node.process.pid
    (child,) = [p for p in descendants(daemon) if "piclusterd.inference.worker" in " ".join(p.cmdline())]
    with no_memory_for(child.pid):
        killed = asyncio.create_task(asyncio.to_thread(child.wait, 60))
        while not killed.done():
            assert all(await asyncio.gather(*(home.chat("pi-1", about=LONG) for _ in range(CROWD))))
        await killed
    log = (node.home / "piclusterd.log").read_text()
    assert "model triage-demo" in log, "the owner finds why in the log"

    async def again() -> bool:
        view = await home.picture(node.name)
        return any(m["me"] == view["me"] and m["models"] for m in models_of(view))

    await home.cluster.until(again, "the model is served again", 60)
    assert node.process.pid == daemon
    assert node.up
    assert await home.audited() == ()


def models_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"me": member["node"], "models": member["facts"]["models"]} for member in view["members"]]


@contextmanager
def no_memory_for(pid: int) -> Iterator[None]:
    """A memory cgroup below our own with next to nothing in it: the kernel kills what faults in one page too many."""
    own = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    if not own or not Path(f"/sys/fs/cgroup/memory{own[0]}").exists() or shutil.which("mount") is None:
        pytest.skip("no memory cgroup (v1) to make one below")
    group = Path(f"/sys/fs/cgroup/memory{own[0]}/picluster-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("131072")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(left)
        group.rmdir()
