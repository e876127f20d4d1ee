"""The world outside for demo, kill loop and tests: the hub (real workerd where it runs) and Linear's double."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from . import hub_process, workerd
from .cluster import DemoFailed, Outside
from .linear_double import LinearDouble
from .signing import sign


class World:
    """A hub and a Linear, with secrets made for this run."""

    def __init__(self, root: Path, kind: str = "auto") -> None:
        """`kind`: workerd, python, or auto for workerd where this machine can run it."""
        self.linear = LinearDouble()
        self.hub_token = secrets.token_hex(16)
        self.linear_secret = secrets.token_hex(16)
        self.hub: hub_process.HubProcess | None = None
        self._root = root / "hub"
        self._kind = kind
        self._port = hub_process.free_port()

    async def start(self) -> None:
        await self.linear.start()
        await self.start_hub()

    async def start_hub(self) -> None:
        """Also after it was killed: same port, same outbox."""
        self._root.mkdir(parents=True, exist_ok=True)
        env = {"HUB_TOKEN": self.hub_token, "LINEAR_SECRET": self.linear_secret}
        if self._kind == "workerd" or (self._kind == "auto" and workerd.available()):
            self._kind = "workerd"
            self.hub = await workerd.start(self._port, self._root, env)
        else:
            self._kind = "python"
            self.hub = await hub_process.start_python(self._port, self._root / "hub.db", env)

    async def close(self) -> None:
        if self.hub is not None:
            await self.hub.stop()
        await self.linear.stop()

    @property
    def kind(self) -> str:
        return self._kind

    def told_to_nodes(self) -> Outside:
        assert self.hub is not None, "the hub is started first"
        return Outside(self.hub.url, self.hub_token, self.linear.url, self.linear.key, self.linear_secret)

    def new_issue(self, title: str, body: str) -> tuple[str, bytes]:
        """An issue in Linear: its identifier, and the webhook that Linear sends."""
        payload: Mapping[str, Any] = self.linear.create_issue(title, body)
        return str(payload["data"]["identifier"]), json.dumps(payload).encode()

    async def post(self, http: aiohttp.ClientSession, body: bytes, node_url: str | None = None) -> dict[str, Any]:
        """The webhook, signed as Linear signs it, to the hub, or straight to a node; the answer.

        Raises `DemoFailed` unless 200.
        """
        assert self.hub is not None
        headers = sign("linear", body, self.linear_secret)
        async with http.post(f"{node_url or self.hub.url}/hooks/linear", data=body, headers=headers) as answer:
            if answer.status != 200:
                who = "the node" if node_url else "the hub"
                raise DemoFailed(f"{who} answered {answer.status}: {await answer.text()}")
            said: dict[str, Any] = await answer.json()
            return said
