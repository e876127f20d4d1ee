"""Peers from Debian packages, unpacked beside the system: no daemon is started by a package, nothing is installed.

program("etcd-server", "usr/bin/etcd") ──apt-get download, dpkg-deb -x──▶ ~/.cache/piclusterd/bench/…/usr/bin/etcd
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "piclusterd" / "bench"
FETCH_S = 120.0


class NoPeer(Exception):
    """The peer cannot be run here; the text says why."""


def program(package: str, path: str) -> str:
    """The program at `path` of `package`: the installed one, else out of the package, downloaded. Raises NoPeer."""
    found = shutil.which(Path(path).name)
    if found:
        return found
    room = CACHE / package
    if not (room / path).exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise NoPeer(f"{package} is not installed, and this is no Debian")
        room.mkdir(parents=True, exist_ok=True)
        _fetch(package, room)
    return str(room / path)


def _fetch(package: str, room: Path) -> None:
    try:
        try:
            _run(room, "apt-get", "download", package)
        except subprocess.CalledProcessError:
            _run(room, "apt-get", "update")  # the lists may be missing, or too old; needs root
            _run(room, "apt-get", "download", package)
        archive = next(room.glob("*.deb"))
        _run(room, "dpkg-deb", "-x", str(archive), str(room))
        archive.unlink()
    except (OSError, StopIteration, subprocess.SubprocessError) as fault:
        said = fault.stderr.decode(errors="replace") if isinstance(fault, subprocess.CalledProcessError) else str(fault)
        raise NoPeer(f"{package} could not be fetched: {said.strip()[-200:]}") from fault


def _run(room: Path, *command: str) -> None:
    subprocess.run(command, cwd=room, check=True, capture_output=True, timeout=FETCH_S)
