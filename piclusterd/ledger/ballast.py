"""Room kept for the day the disk is full: a file of nothing that is given up when a write fails for lack of space.

    start ─▶ 64 MiB allocated ── SQLITE_FULL ─▶ released ─▶ votes, pruning, checkpoints go on ─▶ start ─▶ allocated

A full disk must not stop the node from voting, from handing over, or from deleting what makes room. `posix_fallocate`
gives the blocks without writing them, so the ballast costs no flash wear. On a disk with little room there is none:
it would bring about what it is for.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import Broken

BALLAST_BYTES = 64 * 1024 * 1024
"""Some thousand votes and a whole WAL; a thousandth of a 64 GB card."""
FREE_BYTES_MIN = 4 * 1024 * 1024
"""Less room than a WAL grows to between two checkpoints is none."""
ROOM_FACTOR = 4
"""The ballast is made only where this many times its size is free."""


class Ballast:
    def __init__(self, path: Path, size: int = BALLAST_BYTES) -> None:
        self._path, self._size = path, size
        self._given_up = False

    @property
    def held(self) -> bool:
        return self._path.exists()

    def take(self) -> bool:
        """Allocate it, if there is room and it is not there yet. Blocking. True: it is held now."""
        if self.held:
            return True
        try:
            if shutil.disk_usage(self._path.parent).free < ROOM_FACTOR * self._size:
                return False
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(handle, 0, self._size)
            finally:
                os.close(handle)
        except OSError:  # a file system that cannot, or less room than it said
            self.release()
            return False
        return True

    def retake(self) -> None:
        """Have it again where it was given up. Blocking. Raises Broken while the disk has no room for that."""
        room = self.take() if self._given_up else shutil.disk_usage(self._path.parent).free >= FREE_BYTES_MIN
        if not room:
            where = self._path.parent
            raise Broken("the disk is full", f"{where} has too little room.", "Free space there.")
        self._given_up = False

    def give_up(self) -> None:
        """Release it for lack of space: only with it taken again is there room."""
        self._given_up = self.release() or self._given_up

    def release(self) -> bool:
        """Give the space back. True: there was some."""
        held = self.held
        try:
            self._path.unlink(missing_ok=True)
        except OSError:
            return False
        return held
