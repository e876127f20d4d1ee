"""Three nodes of etcd on loopback (Debian's `etcd-server`), for the benches that stand beside it.

Etcd(room, timers) ─start─▶ three processes ─leader─▶ which of them ─kill, start, close─▶ by their pids

Between its nodes it speaks TLS, as ours always do (`--peer-auto-tls`); clients come in clear, on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench import debian
from bench.load import Address
from piclusterd.demo.cluster import LOOPBACK, POLL_S
from piclusterd.demo.hub_process import free_port

SIZE = 3
READY_S = 30.0
STOP_S = 10.0
UNSUPPORTED = {"aarch64": "arm64", "armv7l": "arm"}
"""etcd 3.4 asks to be told that one knows it is not supported there."""


@dataclass(frozen=True, slots=True)
class Timers:
    """Milliseconds."""

    name: str
    heartbeat: int
    election: int


DEFAULT = Timers("default timers", 100, 1000)
TUNED = Timers("tuned for a LAN", 10, 100)
"""etcd's guide: a heartbeat of about the round trip, an election of ten heartbeats."""


@dataclass(slots=True)
class Member:
    name: str
    client: Address
    peer: Address
    process: asyncio.subprocess.Process | None = None

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.returncode is None


@dataclass(slots=True)
class Etcd:
    """`room`: where its data lies; the disk that is measured."""

    room: Path
    timers: Timers = DEFAULT
    members: list[Member] = field(default_factory=list)
    _program: str = ""

    async def start(self) -> None:
        """All three up, one of them leading. Raises NoPeer."""
        self._program = debian.program("etcd-server", "usr/bin/etcd")
        self.members = [
            Member(f"etcd-{n}", (LOOPBACK, free_port()), (LOOPBACK, free_port())) for n in range(1, SIZE + 1)
        ]
        for member in self.members:
            await self.start_member(member)
        await self.until_led()

    async def start_member(self, member: Member) -> None:
        """Also again, on its own data."""
        door, peer = f"{member.client[0]}:{member.client[1]}", f"{member.peer[0]}:{member.peer[1]}"
        everyone = ",".join(f"{m.name}=https://{m.peer[0]}:{m.peer[1]}" for m in self.members)
        command = [
            self._program, "--name", member.name, "--data-dir", str(self.room / member.name),
            "--listen-client-urls", f"http://{door}", "--advertise-client-urls", f"http://{door}",
            "--listen-peer-urls", f"https://{peer}", "--initial-advertise-peer-urls", f"https://{peer}",
            "--peer-auto-tls", "--initial-cluster", everyone, "--initial-cluster-state", "new", "--log-level", "error",
            "--heartbeat-interval", str(self.timers.heartbeat), "--election-timeout", str(self.timers.election),
        ]  # fmt: skip
        environ = dict(os.environ)
        if arch := UNSUPPORTED.get(platform.machine()):
            environ["ETCD_UNSUPPORTED_ARCH"] = arch
        with (self.room / f"{member.name}.log").open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )

    async def until_led(self) -> Member:
        """The leader, once every member that is up names one. Raises NoPeer after READY_S."""
        ends = time.monotonic() + READY_S
        while time.monotonic() < ends:
            if leader := await self._leader():
                return leader
            await asyncio.sleep(POLL_S)
        raise debian.NoPeer(f"etcd has no leader within {READY_S:g} s")

    async def _leader(self) -> Member | None:
        up = [member for member in self.members if member.up]
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1)) as http:
            said = await asyncio.gather(*(_status(http, member) for member in up))
        known = [ids for ids in said if ids is not None]
        if len(known) < len(up) or len({leader for _, leader in known}) != 1:
            return None
        return next((m for m, (me, leader) in zip(up, known, strict=True) if me == leader), None)

    def kill(self, member: Member) -> None:
        if member.process is not None and member.up:
            member.process.kill()

    async def close(self) -> None:
        for member in self.members:
            if member.process is not None and member.up:
                member.process.terminate()
        for member in self.members:
            if member.process is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await member.process.wait()
                self.kill(member)


async def _status(http: aiohttp.ClientSession, member: Member) -> tuple[str, str] | None:
    """Its id and its leader's; None where it does not answer, or knows none."""
    url = f"http://{member.client[0]}:{member.client[1]}/v3/maintenance/status"
    try:
        async with http.post(url, json={}) as answer:
            said = await answer.json(content_type=None)
            return (said["header"]["member_id"], said["leader"]) if int(said["leader"]) else None
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError):
        return None
