"""A wall clock for the processes that a test starts: it goes on by itself, and hours at a time where the test says so.

    gcc stepped_clock.c ──▶ LD_PRELOAD of every child (daemons, workerd, commands) ──reads──▶ CLOCK_STEP, a file

The test's own process keeps the real clock. Timers go by the monotonic clock and keep their pace everywhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("stepped_clock.c")
HOUR_S = 3600


class SteppedClock:
    """For all children started from now on until the test ends. Skips the test where nothing can be compiled."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or sys.platform != "linux":
            pytest.skip("no C compiler (or no Linux) here, so no wall clock that can be stepped")
        library, self._file = directory / "stepped_clock.so", directory / "clock_step"
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True)
        self.ahead_s = 0
        self.step(0)
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("CLOCK_STEP", str(self._file))

    def step(self, seconds: int) -> None:
        self.ahead_s += seconds
        if not self._file.exists():
            self._file.write_bytes(bytes(8))
        with self._file.open("r+b") as file:  # in place: the children have it mapped
            file.write(self.ahead_s.to_bytes(8, sys.byteorder, signed=True))
