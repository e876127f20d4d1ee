"""What `doctor` looks at on the board, gathered once: files below a root, a few commands, a few fsyncs.

    /proc, /sys, /etc, /run below `root` ─┐
    vcgencmd, llama.cpp's build, pip ─────┼──▶ Board ──▶ doctor.examine
    fsyncs in the state directory ────────┘

Sensors come first (see `sensors`); vcgencmd only adds what has happened since boot, and is not missed where it is not.
Whatever cannot be read is None or empty, and what depends on it is not judged: no root is needed, it only sees more.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from . import sensors
from .sensors import text

COMMAND_S = 30.0
"""llama.cpp takes a second to load on a Pi, more from a cold card."""
WRITES, WRITE_BYTES = 16, 4096
"""Of the write test: what the ledger does to a card in a busy second. 64 KiB do not wear it."""
TIME_ERROR = 5
"""adjtimex(2): the kernel's clock is not synchronised."""
CARD = "/dev/mmcblk"
LISTENING = "0A"
"""TCP_LISTEN in /proc/net/tcp."""
SYSTEM_INFO = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"


@dataclass(frozen=True, slots=True)
class Board:
    readings: sensors.Readings
    arm: bool
    firmware_flags: int | None
    """`vcgencmd get_throttled`: bits 0-3 are now, 16-19 since boot; None: not to be had."""
    memory_cgroup: bool | None
    """Limits of memory are enforced."""
    card_swaps: tuple[str, ...]
    """Swap areas on an SD card."""
    clock_synced: bool
    avahi_alone: bool
    """avahi-daemon is told to let no other mDNS stack run."""
    listening: frozenset[int]
    """TCP ports that some process listens on."""
    llama: str
    """llama.cpp's build features; "" where it is not installed."""
    cuda_packages: tuple[str, ...]
    state_free: int
    state_total: int
    """Bytes on the state directory's file system."""
    write_s: float | None
    """Mean of a small write with fsync there; None: not ours to write."""


def gather(
    state_dir: Path, root: Path = Path("/"), *, firmware_flags: int | None, llama: str, clock_synced: bool
) -> Board:
    """Blocks for a few reads and `WRITES` fsyncs. The keywords are what only this very machine can tell."""
    free, total = _space(state_dir)
    return Board(
        readings=sensors.read(root),
        arm="CPU implementer" in text(root / "proc/cpuinfo") or "Features" in text(root / "proc/cpuinfo"),
        firmware_flags=firmware_flags,
        memory_cgroup=_memory_cgroup(root),
        card_swaps=_card_swaps(root),
        clock_synced=clock_synced or (root / "run/systemd/timesync/synchronized").exists(),
        avahi_alone=_avahi_alone(root),
        listening=_listening(root),
        llama=llama,
        cuda_packages=cuda_packages(),
        state_free=free,
        state_total=total,
        write_s=_write_s(state_dir),
    )


# this machine only -----------------------------------------------------------------------------------------------
def firmware_flags() -> int | None:
    told = _output("vcgencmd", "get_throttled").strip().partition("throttled=0x")[2]
    try:
        return int(told, 16)
    except ValueError:
        return None


def llama_features() -> str:
    """`AVX2 = 1 | DOTPROD = 1 …`, asked of a process of its own: this one never loads the library."""
    return _output(sys.executable, "-c", SYSTEM_INFO)


def clock_synced() -> bool:
    """As the kernel sees it, whoever keeps the time."""
    timex = ctypes.create_string_buffer(512)  # struct timex with room to spare; modes 0: only look
    return int(_libc().adjtimex(timex)) not in (-1, TIME_ERROR)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def cuda_packages() -> tuple[str, ...]:
    """NVIDIA's libraries in our environment, which pip installs with torch unless told not to."""
    names = {str(found.metadata["Name"]).lower() for found in metadata.distributions()}
    return tuple(sorted(name for name in names if name.startswith("nvidia-")))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# below the root --------------------------------------------------------------------------------------------------
def _memory_cgroup(root: Path) -> bool | None:
    if controllers := text(root / "sys/fs/cgroup/cgroup.controllers"):
        return "memory" in controllers.split()
    rows = [line.split() for line in text(root / "proc/cgroups").splitlines()]
    return next((row[3] == "1" for row in rows if row[:1] == ["memory"] and len(row) == 4), None)


def _card_swaps(root: Path) -> tuple[str, ...]:
    """Of /proc/swaps, the partitions of a card and the files on one."""
    areas = [line.split()[:2] for line in text(root / "proc/swaps").splitlines()[1:] if line.strip()]
    mounts = [line.split()[:2] for line in text(root / "proc/mounts").splitlines() if line.count(" ") >= 2]

    def device(name: str, kind: str) -> str:
        if kind != "file":
            return name
        holds = [(len(at), source) for source, at in mounts if Path(name).is_relative_to(at)]
        return max(holds, default=(0, ""))[1]

    return tuple(name for name, kind in areas if device(name, kind).startswith(CARD))


def _avahi_alone(root: Path) -> bool:
    lines = text(root / "etc/avahi/avahi-daemon.conf").splitlines()
    return any(line.replace(" ", "").lower() == "disallow-other-stacks=yes" for line in lines)


def _listening(root: Path) -> frozenset[int]:
    ports = set()
    for table in ("proc/net/tcp", "proc/net/tcp6"):
        for line in text(root / table).splitlines()[1:]:
            cells = line.split()
            if len(cells) > 3 and cells[3] == LISTENING:
                ports.add(int(cells[1].rpartition(":")[2], 16))
    return frozenset(ports)


def _space(state_dir: Path) -> tuple[int, int]:
    """(free, total) bytes of the file system that holds, or would hold, `state_dir`."""
    for place in (state_dir, *state_dir.parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    return 0, 0


def _write_s(directory: Path) -> float | None:
    probe = directory / f".doctor-{os.getpid()}"
    try:
        file = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        began = time.monotonic()
        for _ in range(WRITES):
            os.write(file, b"\0" * WRITE_BYTES)
            os.fsync(file)
        return (time.monotonic() - began) / WRITES
    except OSError:
        return None
    finally:
        os.close(file)
        probe.unlink(missing_ok=True)
