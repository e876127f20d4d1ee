"""Real `piclusterd` processes on this machine: founded, joined, started, killed, looked at.

    picluster init ─▶ piclusterd (pi-1) ─▶ token ─▶ picluster join (mDNS) ─▶ piclusterd (pi-2) …

Used by the demo, the kill loop, end-to-end tests and benches. Every socket and all mDNS stay on loopback. Each process
leads its own session and is ended by its pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from .hub_process import free_port

READY_S = 60.0
"""Start to answering: one second here, much longer on a Pi whose card is busy."""
POLL_S = 0.02
LOOPBACK = "127.0.0.1"
MODEL = "triage-demo"


class DemoFailed(RuntimeError):
    """A step of the demo did not happen; the text says which and why."""


@dataclass(slots=True)
class Member:
    """One node: its files, its ports, its process."""

    name: str
    home: Path
    peer_port: int
    api_port: int
    process: asyncio.subprocess.Process | None = None
    node: str = ""
    host: str = LOOPBACK
    """Where its peers find it."""
    api_host: str = LOOPBACK
    role: str = "worker"
    seeds: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    """What its commands begin with, where it lives in a network of its own (`netns`)."""

    @property
    def url(self) -> str:
        return f"http://{self.api_host}:{self.api_port}"

    @property
    def config(self) -> Path:
        return self.home / "piclusterd.toml"

    @property
    def state(self) -> Path:
        return self.home / "state"

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.returncode is None


@dataclass(slots=True)
class Outside:
    """What the nodes are told of the world: all of it optional."""

    hub_url: str = ""
    hub_token: str = ""
    linear_url: str = ""
    linear_key: str = ""
    linear_secret: str = ""
    notion_url: str = ""
    notion_key: str = ""
    notion_secret: str = ""
    github_secret: str = ""


@dataclass(slots=True)
class Cluster:
    root: Path
    outside: Outside = field(default_factory=Outside)
    size: int = 3
    voters: int | None = None
    """Founding voters; None: all. The rest join as learners."""
    with_model: Sequence[int] = (0, 1)
    """Which nodes hold the demo model; the others relay to them."""
    relays: Sequence[int] = ()
    """Which nodes play the droplet."""
    preset: str = "lan"
    extra: str = ""
    """TOML added to the end of every node's configuration."""
    own: Mapping[int, str] = field(default_factory=dict)
    """The same for single nodes, by their index."""
    members: list[Member] = field(default_factory=list)
    _http: aiohttp.ClientSession | None = None

    # founding ------------------------------------------------------------------------------------------------
    def prepare(self) -> list[Member]:
        """The nodes' directories, ports and configuration files; nothing runs yet."""
        self.members = [self._member(i) for i in range(self.size)]
        for index, member in enumerate(self.members):
            self._write_config(member, index in self.with_model, self.own.get(index, ""))
        return self.members

    async def found(
        self,
        told: Callable[[str, str], None] = lambda who, text: None,
        started: Callable[[Member], None] = lambda member: None,
    ) -> None:
        """All nodes made, joined and running. `told(who, text)` hears of each step, `started` of each node up."""
        first, *others = self.prepare()
        await self.picluster(
            first, "init", "--cluster", "demo", "--name", first.name, "--expect", str(self.voters or self.size)
        )
        told(first.name, "picluster init: made the cluster's CA and its own key")
        await self.start(first)
        started(first)
        for member in others:
            said = await self.join(member, await self.token())
            told(member.name, f"picluster join over TLS 1.3: {_joined_line(said)}")
            await self.start(member)
            started(member)

    async def join(self, member: Member, token: str) -> str:
        """What `picluster join` said; the admitting node is found over mDNS."""
        return await self.picluster(member, "join", token, "--name", member.name)

    async def token(self) -> str:
        said = await self.picluster(self.members[0], "token", "create", "--ttl", "10m")
        return next(word for word in said.split() if word.startswith("pcl1."))

    def _member(self, index: int) -> Member:
        name = f"pi-{index + 1}"
        home = self.root / name
        home.mkdir(parents=True, exist_ok=True)
        return Member(name, home, free_port(), free_port(), role="relay" if index in self.relays else "worker")

    def _write_config(self, member: Member, model: bool, own: str = "") -> None:
        out = self.outside
        sections: dict[str, dict[str, Any]] = {
            "node": {"name": member.name, "state_dir": str(member.state), "role": member.role},
            "peers": {"host": member.host, "port": member.peer_port, "seeds": list(member.seeds)},
            "api": {"host": member.api_host, "port": member.api_port},
            "discovery": {"interfaces": [member.host]},
            "cluster": {"preset": self.preset},
            "inference": {"default_model": MODEL},
        }
        if out.hub_url:
            sections["hub"] = {"url": out.hub_url, "token_file": self._secret(member, "hub", out.hub_token)}
        if out.linear_url:
            sections["linear"] = {"url": out.linear_url, "token_file": self._secret(member, "key", out.linear_key)}
        if out.notion_url:
            sections["notion"] = {
                "url": out.notion_url,
                "token_file": self._secret(member, "notion-key", out.notion_key),
            }
        secrets = {"linear": out.linear_secret, "notion": out.notion_secret, "github": out.github_secret}
        sections["webhooks"] = {
            f"{source}_secret_file": self._secret(member, source, secret)
            for source, secret in secrets.items()
            if secret
        }
        lines = [_toml(name, keys) for name, keys in sections.items()]
        if model:
            lines.append(f'[[models]]\nname = "{MODEL}"\npath = "builtin:triage-demo"\ncontext = 4096\nslots = 4\n')
        lines += [self.extra, own]
        member.config.write_text("\n".join(lines))

    def _secret(self, member: Member, name: str, value: str) -> str:
        path = member.home / f"{name}.secret"
        path.write_text(value + "\n")
        path.chmod(0o600)
        return str(path)

    async def picluster(self, member: Member, *words: str) -> str:
        """The client, as a person would run it on that node, with its configuration."""
        return await self._client(member, *words, "--config", str(member.config))

    async def owner(self, member: Member, *words: str) -> str:
        """The client at that node's socket, where its owner's doors are."""
        return await self._client(member, "--socket", str(member.state / "api.sock"), *words)

    async def _client(self, member: Member, *words: str) -> str:
        command = [*member.within, sys.executable, "-m", "piclusterd.cli.main", *words]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        said, _ = await process.communicate()
        if process.returncode != 0:
            raise DemoFailed(f"`picluster {' '.join(words)}` on {member.name} failed: {said.decode().strip()}")
        return said.decode()

    # processes -----------------------------------------------------------------------------------------------
    async def start(self, member: Member) -> None:
        """The daemon of `member`, until it answers."""
        with (member.home / "piclusterd.log").open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                *member.within, sys.executable, "-m", "piclusterd.daemon", "--config", str(member.config),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        await self.until(lambda: self._answers(member), f"{member.name} answers", READY_S)

    async def _answers(self, member: Member) -> bool:
        if not member.up:
            tail = (member.home / "piclusterd.log").read_text(errors="replace")[-2000:]
            raise DemoFailed(f"{member.name} did not start:\n{tail}")
        status = await self.status(member)
        if status is None:
            return False
        member.node = status["me"]
        return True

    def kill(self, member: Member) -> None:
        """SIGKILL, as a pulled plug would be, but for the disk's cache."""
        if member.process is not None and member.up:
            os.killpg(member.process.pid, signal.SIGKILL)

    async def stop(self, member: Member) -> int:
        """SIGTERM; the exit status. A daemon that needs more than 15 s is killed and that is an error."""
        if member.process is None or not member.up:
            return 0
        member.process.terminate()
        try:
            async with asyncio.timeout(15):
                return await member.process.wait()
        except TimeoutError:
            self.kill(member)
            await member.process.wait()
            raise DemoFailed(f"{member.name} did not stop on SIGTERM") from None

    async def close(self) -> None:
        """No process is left behind."""
        for member in self.members:
            with contextlib.suppress(DemoFailed):
                await self.stop(member)
        if self._http is not None:
            await self._http.close()

    # looking -------------------------------------------------------------------------------------------------
    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        return self._http

    async def status(self, member: Member) -> dict[str, Any] | None:
        """`/status.json`, or None where nobody answers."""
        try:
            async with self.http.get(f"{member.url}/status.json") as answer:
                return await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
            return None

    async def views(self) -> list[dict[str, Any]]:
        """The picture of every node that is up."""
        found = await asyncio.gather(*(self.status(member) for member in self.members if member.up))
        return [status for status in found if status is not None]

    async def coordinator(self) -> Member | None:
        """The node that says it is the active coordinator of the highest term."""
        leading = [(view["term"], view["me"]) for view in await self.views() if view["role"] == "leader"]
        if not leading:
            return None
        node = max(leading)[1]
        return next(member for member in self.members if member.node == node)

    async def until(self, holds: Callable[[], Awaitable[Any]], what: str, timeout_s: float) -> Any:
        """The first true value of `holds()`. Raises `DemoFailed` after `timeout_s`."""
        ends = time.monotonic() + timeout_s
        while True:
            value = await holds()
            if value:
                return value
            if time.monotonic() > ends:
                raise DemoFailed(f"{what}: not within {timeout_s:g} s")
            await asyncio.sleep(POLL_S)

    async def until_served(self, timeout_s: float = 60.0) -> Member:
        """A coordinator is active and every node up sees the model."""

        async def served() -> Member | None:
            views = await self.views()
            ready = [view for view in views if any(m["facts"]["models"] for m in view["members"])]
            return await self.coordinator() if len(ready) == len(views) else None

        member: Member = await self.until(served, "a coordinator and a model", timeout_s)
        return member

    async def until_equal(self, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """All nodes up, their ledgers the same, no run open: the views."""

        async def equal() -> list[dict[str, Any]]:
            views = await self.views()
            same = len({view["digest"] for view in views}) == 1 and len(views) == len(self.members)
            still = any(run["state"] == "open" for view in views for run in view["runs"])
            return views if same and not still else []

        views: list[dict[str, Any]] = await self.until(equal, "the ledgers are equal", timeout_s)
        return views


def _joined_line(said: str) -> str:
    """What `picluster join` said of the cluster and its CA, on one line."""
    return " ".join(line for line in said.splitlines() if line.startswith(("Joined", "The cluster's CA")))


def _toml(section: str, keys: dict[str, Any]) -> str:
    return f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
