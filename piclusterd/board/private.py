"""Small files that matter (keys, votes, marks): replaced in one step, durable on return, their owner's only."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import UserError


def make_private_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def hold(state: Path) -> int:
    """One daemon a state directory: two would extend one log, and vote twice. The kernel lets go when a process ends.

    Returns the file descriptor that holds the lock. Raises `UserError`.
    """
    lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(
            f"another piclusterd runs on {state}", "it holds the lock there", "Stop it, or give this one a state_dir."
        ) from None
    return lock


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` with `data`: written beside, fsynced, renamed, directory fsynced; 0600 under any umask."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make what was created, renamed or removed in `path` durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
