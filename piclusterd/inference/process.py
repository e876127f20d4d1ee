"""The process at the other end of a child's socket: one of our own, or one that systemd started for our connection.

    Spawned     socketpair + exec ─▶ worker --fd N                        ended: socket closed, then SIGKILL by its id
    Activated   connect ─▶ piclusterd-worker.socket ─▶ piclusterd-worker@N.service     ended: socket closed

A process of our own inherits our confinement and our user; one from systemd has its own user, no network and none of
our files, which is why it is preferred where it is to be had. It is not ours to kill: the worker ends itself when the
socket closes (see `worker`). Neither gets any environment but what it needs to run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Protocol

EXIT_GRACE_S = 2.0
"""From closing the socket to SIGKILL: a step of a slow board may be running. Nothing in the child needs saving."""
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LLAMA_CPP_LIB_PATH")
"""All the child inherits, beside OMP_* and GGML_*: no key, no token."""
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class Process(Protocol):
    @property
    def pid(self) -> int | None:
        """None where it is not ours."""

    async def end(self, grace_s: float) -> None:
        """Returns once it is gone or no longer ours to wait for; its socket is closed already."""

    def epitaph(self) -> str:
        """How it ended, for people."""


class Spawned:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, alone: bool = False) -> tuple[Spawned, asyncio.StreamReader, asyncio.StreamWriter]:
        """`alone`: in a network of its own, if it can. Raises OSError where no process can be had."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "piclusterd.inference.worker", "--fd", str(theirs.fileno()),
                    *(("--alone",) if alone else ()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=_environment(),
                    start_new_session=True,
                )  # fmt: skip
            except BaseException:
                writer.close()
                raise
        return cls(process), reader, writer

    @property
    def pid(self) -> int:
        return self._process.pid

    async def end(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass
            await self._process.wait()

    def epitaph(self) -> str:
        code = self._process.returncode or 0
        return f"It was ended by {signal.Signals(-code).name}." if code < 0 else f"It exited with status {code}."


class Activated:
    pid = None

    async def end(self, grace_s: float) -> None:
        pass

    def epitaph(self) -> str:
        return "`journalctl -u 'piclusterd-worker@*'` tells why."


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ENVIRONMENT or key.startswith(("OMP_", "GGML_"))}
    return kept | {"PYTHONPATH": PACKAGE_PARENT}
