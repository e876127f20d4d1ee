"""Stands for systemd on one machine: one node's daemon, restarted when it ends, its API's sockets held meanwhile.

    keeper ── holds TCP and unix socket of the API (piclusterd.socket)
       ├───── runs <prefix>/current/bin/piclusterd, again whenever it ends (Restart=always); SIGHUP: restart it
       └───── <state>/upgrade/wish.json appears ─▶ python -m piclusterd.upgrade (piclusterd-upgrade.path)

    python -m piclusterd.demo.keeper PREFIX CONFIG STATE HOST PORT SOCKET

Ends on SIGTERM, and its daemon with it. For tests and rehearsals; on a board systemd does all this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

AGAIN_S = 0.3
LOOK_S = 0.1
STOP_S = 20.0
_AS_SYSTEMD = """\
import fcntl, os, sys
held = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(held):
    os.dup2(fd, 3 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""A process that puts the sockets where systemd puts them, names itself as theirs, and becomes the daemon."""


class Keeper:
    def __init__(self, prefix: Path, config: Path, state: Path, listeners: list[socket.socket], path: Path) -> None:
        self._prefix, self._config, self._state, self._path = prefix, config, state, path
        self._listeners = listeners
        self._daemon: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        """Until cancelled."""
        upgrades = asyncio.create_task(self._upgrade_when_asked())
        try:
            while True:
                self._daemon = await self._start()
                await self._daemon.wait()
                await asyncio.sleep(AGAIN_S)
        finally:
            upgrades.cancel()
            await asyncio.gather(upgrades, return_exceptions=True)
            await self._end()

    def restart(self) -> None:
        """The daemon's end is the new one's beginning."""
        if self._daemon is not None and self._daemon.returncode is None:
            self._daemon.terminate()

    async def _start(self) -> asyncio.subprocess.Process:
        program = str(self._prefix / "current" / "bin" / "piclusterd")
        fds = [listener.fileno() for listener in self._listeners]
        environ = _plain() | {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join("api" for _ in fds)}
        with (self._state.parent / "piclusterd.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-c", _AS_SYSTEMD, ",".join(map(str, fds)), program, "--config", str(self._config),
                env=environ, pass_fds=fds, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def _upgrade_when_asked(self) -> None:
        wish = self._state / "upgrade" / "wish.json"
        while True:
            if wish.exists():
                with (self._state.parent / "upgrade.log").open("ab") as log:
                    program = await asyncio.create_subprocess_exec(
                        str(self._prefix / "good" / "bin" / "python"), "-m", "piclusterd.upgrade",
                        "--prefix", str(self._prefix), "--state", str(self._state), "--config", str(self._config),
                        "--socket", str(self._path), "--restart", f"kill -HUP {os.getpid()}",
                        env=_plain(), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                    )  # fmt: skip
                await program.wait()
            await asyncio.sleep(LOOK_S)

    async def _end(self) -> None:
        if self._daemon is None or self._daemon.returncode is not None:
            return
        self._daemon.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await self._daemon.wait()
        except TimeoutError:
            self._daemon.kill()
            await self._daemon.wait()


def _plain() -> dict[str, str]:
    """Without what would lead a release to another one's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def listen(host: str, port: int, path: Path) -> list[socket.socket]:
    tcp = socket.create_server((host, port), backlog=128)
    local = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    local.bind(str(path))
    local.listen(128)
    return [tcp, local]


async def _main(arguments: list[str]) -> None:
    prefix, config, state, host, port, path = arguments
    listeners = listen(host, int(port), Path(path))
    keeper = Keeper(Path(prefix), Path(config), Path(state), listeners, Path(path))
    work = asyncio.create_task(keeper.run())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, work.cancel)
    loop.add_signal_handler(signal.SIGHUP, keeper.restart)
    with contextlib.suppress(asyncio.CancelledError):
        await work


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
