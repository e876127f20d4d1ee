"""The world outside for demo, kill loop and tests: the hub (real workerd where it runs), a Linear and a Notion."""

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
from .linear_flows_double import LinearFlowsDouble
from .notion_double import NotionDouble
from .signing import sign


class World:
    """A hub, a Linear and a Notion, with secrets made for this run."""

    def __init__(self, root: Path, kind: str = "auto") -> None:
        """`kind`: workerd, python, or auto for workerd where this machine can run it."""
        self.linear: LinearDouble = LinearFlowsDouble()
        self.notion = NotionDouble()
        self.hub_token = secrets.token_hex(16)
        self.linear_secret = secrets.token_hex(16)
        self.notion_secret = secrets.token_hex(16)
        self.github_secret = secrets.token_hex(16)
        self.hub: hub_process.HubProcess | None = None
        self._root = root / "hub"
        self._kind = kind
        self._port = hub_process.free_port()

    async def start(self) -> None:
        await self.linear.start()
        await self.notion.start()
        await self.start_hub()

    async def start_hub(self) -> None:
        """Also after it was killed: same port, same outbox."""
        self._root.mkdir(parents=True, exist_ok=True)
        env = {"HUB_TOKEN": self.hub_token}
        env |= {f"{source.upper()}_SECRET": self._secret_of(source) for source in ("linear", "notion", "github")}
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
        await self.notion.stop()

    @property
    def kind(self) -> str:
        return self._kind

    def told_to_nodes(self) -> Outside:
        assert self.hub is not None, "the hub is started first"
        return Outside(
            self.hub.url, self.hub_token, self.linear.url, self.linear.key, self.linear_secret, self.notion.url,
            self.notion.key, self.notion_secret, self.github_secret,
        )  # fmt: skip

    def _secret_of(self, source: str) -> str:
        return str(getattr(self, f"{source}_secret"))

    def new_issue(self, title: str, body: str) -> tuple[str, bytes]:
        """An issue in Linear: its identifier, and the webhook that Linear sends."""
        payload: Mapping[str, Any] = self.linear.create_issue(title, body)
        return str(payload["data"]["identifier"]), json.dumps(payload).encode()

    async def post(
        self, http: aiohttp.ClientSession, body: bytes, node_url: str | None = None, source: str = "linear",
        event: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The webhook, signed as `source` signs it, to the hub, or straight to a node; the answer.

        Raises `DemoFailed` unless 200.
        """
        assert self.hub is not None
        headers = sign(source, body, self._secret_of(source), event=event)
        async with http.post(f"{node_url or self.hub.url}/hooks/{source}", data=body, headers=headers) as answer:
            if answer.status != 200:
                who = "the node" if node_url else "the hub"
                raise DemoFailed(f"{who} answered {answer.status}: {await answer.text()}")
            said: dict[str, Any] = await answer.json()
            return said
