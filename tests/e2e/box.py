"""A booted Debian with systemd as its first process: systemd-nspawn over a copy-on-write root, with nothing but lo.

    debootstrap, once ─▶ <cache>/rootfs-bookworm ─overlay─▶ Box ─nspawn --boot─▶ leader (its PID 1) ─nsenter─▶ commands

The root is read-only below an overlay, so that a box costs seconds and leaves nothing. A second `up` boots the same
disk again. Each box is put into cgroups of its own. The wall clock is the machine's: commands lose CAP_SYS_TIME.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "piclusterd"
ROOTFS = Path(os.environ.get("PICLUSTER_E2E_ROOTFS") or CACHE / "rootfs-bookworm")
WHEELS = Path(os.environ.get("PICLUSTER_E2E_WHEELS") or CACHE / "wheels-bookworm")
PACKAGES = "systemd,systemd-sysv,dbus,procps,iproute2,python3,python3-venv,libgomp1"
CHECKOUT = Path(__file__).parents[2]
BUILD_S, BOOT_S, COMMAND_S = 900, 60, 240
TOOLS = ("systemd-nspawn", "debootstrap", "nsenter", "setpriv")
CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("systemd", "unified", "cpu", "pids")
DROPPED = "-sys_time,-sys_boot,-sys_rawio,-mknod"


def require() -> None:
    """Skip where no box can be had on this machine."""
    if os.geteuid() != 0:
        pytest.skip("booting a container needs root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (apt install systemd-container debootstrap)")


def prepare() -> None:
    """The root file system and the wheels for it, made once and kept."""
    if not (ROOTFS / "etc/os-release").exists():
        half = ROOTFS.with_name(ROOTFS.name + ".half")
        shutil.rmtree(half, ignore_errors=True)
        half.parent.mkdir(parents=True, exist_ok=True)
        _run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(half))
        half.rename(ROOTFS)
    if not WHEELS.exists():
        half = WHEELS.with_name(WHEELS.name + ".half")
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
        wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "numpy", "diskcache"]
        _run(
            sys.executable, "-m", "pip", "download", "-q", "-d", str(half),
            "-c", str(CHECKOUT / "config/constraints.txt"),
            "--only-binary=:all:", "--python-version", "3.11", *wanted,
        )  # fmt: skip
        half.rename(WHEELS)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} failed: {(done.stderr or done.stdout)[-500:]}")


class Box:
    """One container; `up` and `down` as often as wanted, then `close`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.root = directory / "root"
        self.console = directory / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        for part in ("root", "upper", "work"):
            (directory / part).mkdir(parents=True)
        layers = f"lowerdir={ROOTFS},upperdir={directory}/upper,workdir={directory}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)
        (self.root / "etc/hostname").write_text(f"{name}\n")
        (self.root / "etc/machine-id").write_text("")

    async def up(self, *binds: str) -> None:
        """Boot, with the host's paths `binds` (HOST:INSIDE) to be read inside. Returns once the boot is over."""
        self._nspawn = await asyncio.to_thread(self._boot, binds)
        async with asyncio.timeout(BOOT_S):
            while not await self._is_up():
                assert self._nspawn.poll() is None, self.console.read_text()[-2000:]
                await asyncio.sleep(0.2)

    def _boot(self, binds: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [
            "systemd-nspawn", "-q", "-D", str(self.root), "--boot", "--register=no", "--keep-unit", "--private-network",
            f"--machine={self.name}", "--console=pipe", *(f"--bind-ro={bind}" for bind in binds),
        ]  # fmt: skip
        with self.console.open("ab") as console:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, preexec_fn=self._enter_cgroups
            )

    async def _is_up(self) -> bool:
        said = await self.run("systemctl", "is-system-running", check=False) if self._leader() else ""
        return said.strip() in ("running", "degraded")

    async def run(self, *command: str, check: bool = True, stdin: str = "") -> str:
        """What `command` says inside, stdout and stderr together. Fails the test where it fails, unless told not to."""
        child = await asyncio.create_subprocess_exec(
            "setpriv", "--bounding-set", DROPPED, "--", "nsenter", "-t", str(self._leader()), "-m", "-u", "-i", "-n",
            "-p", "env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
            "LANG=C.UTF-8", "XDG_CACHE_HOME=/cache", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels", *command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(COMMAND_S):
                out, _ = await child.communicate(stdin.encode())
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        text = out.decode(errors="replace")
        assert child.returncode == 0 or not check, f"{command} ended with {child.returncode}:\n{text[-4000:]}"
        return text

    async def down(self) -> None:
        """An orderly power-off; by force where it takes too long."""
        if self._nspawn is None:
            return
        for ending in (signal.SIGRTMIN + 4, signal.SIGKILL):  # systemd's word for poweroff
            if leader := self._leader():
                os.kill(leader, ending)
            try:
                await asyncio.to_thread(self._nspawn.wait, BOOT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        self._nspawn = None

    async def close(self) -> None:
        await self.down()
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        subprocess.run(["umount", str(self.root)], check=True)
        for controller in CONTROLLERS:
            for group in sorted((CGROUPS / controller).glob(f"{self._group}/**/"), reverse=True):
                try:
                    group.rmdir()
                except OSError:
                    pass  # a process of it is still going; the next boot of the machine clears it

    def _leader(self) -> int | None:
        """Process id of the first process inside, as the machine counts; None before it is there and after."""
        assert self._nspawn is not None
        try:
            children = psutil.Process(self._nspawn.pid).children()
            return next((child.pid for child in children if child.name() in ("systemd", "init")), None)
        except psutil.Error:
            return None

    @property
    def _group(self) -> str:
        return f"piclusterd-{self.name}"

    def _enter_cgroups(self) -> None:
        for controller in CONTROLLERS:
            if (CGROUPS / controller / "cgroup.procs").exists():
                group = CGROUPS / controller / self._group
                group.mkdir(exist_ok=True)
                (group / "cgroup.procs").write_text(str(os.getpid()))
