"""What a node costs when nothing happens: memory, CPU, time to ready, bytes written to flash. Beside it serf's agent.

    three real nodes at a Pi's timings, at rest ──/proc/<pid>/{status,stat,io}──▶ RSS, CPU, bytes written
    their files on an ext4 of their own, where this may be mounted (root) ──its own count──▶ bytes written to flash
    one of them, stopped and started again ──READY=1 on NOTIFY_SOCKET──▶ time to ready

`write_bytes` is what a process dirtied, the filesystem's count has its journal and metadata on top: a card sees that.
Serf (Debian's `serf`, three agents on loopback, with a snapshot file) is membership alone: no ledger, no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench import debian, ours
from bench.report import Report, main, quantile
from piclusterd.demo.cluster import LOOPBACK, Cluster
from piclusterd.demo.hub_process import free_port

RSS_MAX_MB, CPU_MAX, READY_MAX_S, FLASH_MAX_MB = 80.0, 1.0, 1.0, 50.0
"""DESIGN §9: megabytes, per cent of a core, seconds, megabytes a day."""
DAY_S = 86_400.0
MB = 1e6
CHECK_BYTES = 4_000_000
IMAGE_BYTES = 512 << 20
"""Of the ext4 that the nodes' files lie on; sparse. Room for three ballasts."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Size:
    settle_s: float
    idle_s: float
    starts: int


QUICK = Size(10.0, 45.0, 3)
WHOLE = Size(60.0, 600.0, 20)


@dataclass(frozen=True, slots=True)
class Used:
    """By one process, since it began."""

    cpu_s: float
    written: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Of so many processes: megabytes, per cent of a core, megabytes a day."""

    rss: list[float]
    cpu: list[float]
    written: list[float]


def measure(report: Report, quick: bool) -> None:
    asyncio.run(_measure(report, QUICK if quick else WHOLE))


async def _measure(report: Report, size: Size) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-footprint-") as room, _flash(Path(room)) as disk:
        agents, why_not = _serf(Path(room))
        cluster = ours.make(disk.room, "pi")
        try:
            with _notified(Path(room)) as told:
                await cluster.found()
                await ours.until_led(cluster)
                await ours.until_equal(cluster, ours.LED_S)
                await asyncio.sleep(size.settle_s)
                pids = [member.process.pid for member in cluster.members if member.process]
                checked = disk.check()
                flash = disk.written()
                mine, theirs = await asyncio.gather(
                    _idle(pids, size.idle_s), _idle([a.pid for a in agents], size.idle_s)
                )
                flash_mb = (disk.written() - flash) / MB / len(pids) * DAY_S / size.idle_s
                ready = [await _restart(cluster, told) for _ in range(size.starts)]
        finally:
            await cluster.close()
            for agent in agents:
                agent.terminate()
                agent.wait()
    _tell(report, mine, theirs if agents else None, why_not, size)
    if disk.own:
        what = f"flash written in a day at rest, by the filesystem's own count, a node (of {size.idle_s:g} s)"
        report.add(what, flash_mb, "MB/day", at_most=FLASH_MAX_MB)
        report.add(f"{CHECK_BYTES / MB:g} MB written to see that it counts: counted", checked / MB, "MB")
    what = f"start to READY, of {size.starts} on an existing ledger"
    report.add(f"{what}: p50", quantile(ready, 0.5), "s", at_most=READY_MAX_S)
    report.add(f"{what}: worst", max(ready), "s")


def _tell(report: Report, mine: Idle, theirs: Idle | None, why_not: str, size: Size) -> None:
    peer = "serf agent" if theirs else None
    for what, unit, ours_, serfs, at_most in (
        ("memory at rest, the largest node's RSS" + why_not, "MB", mine.rss, theirs and theirs.rss, RSS_MAX_MB),
        ("CPU at rest, the busiest node", "% of a core", mine.cpu, theirs and theirs.cpu, CPU_MAX),
        (f"written in a day at rest, by the process (of {size.idle_s:g} s)", "MB/day", mine.written,
         theirs and theirs.written, FLASH_MAX_MB),
    ):  # fmt: skip
        report.add(what, max(ours_), unit, peer=peer, peer_value=max(serfs) if serfs else None, at_most=at_most)
    report.add("CPU at rest, mean of the nodes", fmean(mine.cpu), "% of a core")


# processes ---------------------------------------------------------------------------------------------------------
async def _idle(pids: list[int], seconds: float) -> Idle:
    before = [_used(pid) for pid in pids]
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    spans = [(was, _used(pid)) for was, pid in zip(before, pids, strict=True)]
    return Idle(
        [_rss(pid) / MB for pid in pids],
        [(now.cpu_s - was.cpu_s) / took * 100 for was, now in spans],
        [(now.written - was.written) / MB * DAY_S / took for was, now in spans],
    )


def _used(pid: int) -> Used:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    ticks = int(after_name[11]) + int(after_name[12])
    return Used(ticks / TICKS, int(io["write_bytes"]) - int(io["cancelled_write_bytes"]))


def _rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


@contextlib.contextmanager
def _notified(room: Path) -> Iterator[asyncio.Queue[float]]:
    """When each node that is started says READY=1, by the monotonic clock."""
    told: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind(str(room / "notify"))
        door.setblocking(False)

        def hear() -> None:
            if b"READY=1" in door.recv(4096):
                told.put_nowait(time.monotonic())

        loop.add_reader(door, hear)
        os.environ["NOTIFY_SOCKET"] = str(room / "notify")
        try:
            yield told
        finally:
            del os.environ["NOTIFY_SOCKET"]
            loop.remove_reader(door)


async def _restart(cluster: Cluster, told: asyncio.Queue[float]) -> float:
    """Seconds from the start of the last node's process to its READY."""
    member = cluster.members[-1]
    await cluster.stop(member)
    while not told.empty():
        told.get_nowait()
    began = time.monotonic()
    await cluster.start(member)
    return await told.get() - began


# the disk ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Disk:
    room: Path
    own: Path | None
    """ext4's directory in /sys, where the filesystem is for the nodes alone."""

    def written(self) -> int:
        """Bytes that the filesystem has sent to its disk, ever; 0 where it is not of our own."""
        if self.own is None:
            return 0
        subprocess.run(["sync", "-f", str(self.room)], check=True)
        return int((self.own / "lifetime_write_kbytes").read_text()) * 1024

    def check(self) -> int:
        """What a write of CHECK_BYTES adds."""
        before = self.written()
        (self.room / "check").write_bytes(os.urandom(CHECK_BYTES))
        return self.written() - before


@contextlib.contextmanager
def _flash(room: Path) -> Iterator[Disk]:
    """An ext4 in a file, mounted; a plain directory where that cannot be."""
    image, place = room / "flash.img", room / "flash"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        _run("mount", "-o", "loop,noatime", str(image), str(place))
    except (OSError, subprocess.CalledProcessError):
        yield Disk(place, None)
        return
    try:
        yield Disk(place, Path("/sys/fs/ext4") / _device(place))
    finally:
        _run("umount", str(place))


def _device(place: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next(Path(device).name for device, where, *_ in mounts if where == str(place))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


# serf --------------------------------------------------------------------------------------------------------------
def _serf(room: Path) -> tuple[list[subprocess.Popen[bytes]], str]:
    """Three agents that know each other; none, and why."""
    try:
        program = debian.program("serf", "usr/bin/serf")
    except debian.NoPeer as fault:
        return [], f" (no serf: {fault})"
    first = f"{LOOPBACK}:{free_port()}"
    return [_agent(program, room, f"serf-{n}", first, n == 0) for n in range(ours.SIZE)], ""


def _agent(program: str, room: Path, name: str, first: str, founds: bool) -> subprocess.Popen[bytes]:
    bind = first if founds else f"{LOOPBACK}:{free_port()}"
    command = [
        program, "agent", "-node", name, "-bind", bind, "-rpc-addr", f"{LOOPBACK}:{free_port()}",
        "-profile", "lan", "-snapshot", str(room / f"{name}.snapshot"), *([] if founds else ["-retry-join", first]),
    ]  # fmt: skip
    with (room / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


if __name__ == "__main__":
    main("footprint", measure)
