"""A hub as a child process: started, waited for, stopped, killed. The same handle for either kind.

    start_python(port, db, env) ─┐
                                 ├─► spawn in its own session ─► GET /health answers ─► HubProcess
    workerd.start(port, dir, env)┘

Owns the child and its process group: `stop` asks (SIGTERM) and then insists, `kill` is SIGKILL at once and is what the
crash tests use. The child inherits only the environment it is given and what a process needs to run; its output goes to
a file, which the error shows when the hub does not come up.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

READY_S = 30.0  # workerd needs 0.2 s, Python 0.5 s; a Pi with a busy SD card needs much longer
POLL_S = 0.05
STOP_S = 5.0  # a stopping Python hub says goodbye to its sockets first
WORKERD_STOP_S = 1.0  # workerd only waits for its sockets to end by themselves; all it promised is on disk already
_LOW_PORT, _HIGH_PORT = 20_000, 32_000  # below Linux's ephemeral range, from which outgoing connections take theirs
_TAIL = 2000  # characters of a failed child's output shown in the error
_INHERITED = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", "LD_PRELOAD", "CLOCK_STEP")


class HubFailed(RuntimeError):
    """The hub did not come up. The message ends with what it printed."""


@dataclass(frozen=True, slots=True)
class HubProcess:
    """A running hub. `url` is its base, without a slash at the end."""

    kind: str
    url: str
    process: asyncio.subprocess.Process

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL when that takes too long. Returns the exit status (negative: the signal)."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(WORKERD_STOP_S if self.kind == "workerd" else STOP_S):
                return await self.process.wait()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """SIGKILL to the whole group, now."""
        self._signal(signal.SIGKILL)
        return await self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)  # it leads its own session, so its pid names the group


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on just now."""
    for _ in range(100):
        port = random.randint(_LOW_PORT, _HIGH_PORT)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port found between {_LOW_PORT} and {_HIGH_PORT}")


async def start_python(port: int, db: Path, env: Mapping[str, str]) -> HubProcess:
    """The hub for machines without workerd, on 127.0.0.1:`port`, its outbox in the file `db`."""
    command = [sys.executable, "-m", "piclusterd.demo.hub_double", "--port", str(port), "--db", str(db)]
    return await spawn("python", command, port, env, log=db.with_suffix(".log"))


async def spawn(kind: str, command: Sequence[str], port: int, env: Mapping[str, str], log: Path) -> HubProcess:
    """Start `command` in its own session and wait until /health answers. Raises HubFailed."""
    needed = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env={**needed, **env},
            start_new_session=True,
        )  # fmt: skip
    hub = HubProcess(kind, f"http://127.0.0.1:{port}", process)
    try:
        async with asyncio.timeout(READY_S):
            await _until_healthy(hub)
    except BaseException as error:
        await hub.kill()
        if isinstance(error, TimeoutError | HubFailed):
            tail = (await asyncio.to_thread(log.read_text, errors="replace"))[-_TAIL:]
            raise HubFailed(f"the {kind} hub did not answer on {hub.url}: {error}\n{tail}") from error
        raise
    return hub


async def _until_healthy(hub: HubProcess) -> None:
    async with aiohttp.ClientSession() as session:
        while hub.process.returncode is None:
            try:
                async with session.get(f"{hub.url}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # not listening yet
            await asyncio.sleep(POLL_S)
    raise HubFailed(f"it exited with status {hub.process.returncode}")
