"""What the tests of the hub hold in their hands: a real hub in its own process, and a bare client without any wits.

    Rig ──start/kill/stop──► hub process (python or workerd), same port and same storage across restarts
     ├── post("linear", {...})  signs as the provider does
     ├── call("GET", "/pull")   with the bearer token
     └── dial() ──► Line        hello, hooks(n), send(...), closed()

Every wait is on a message, a process or an answer, under WAIT_S; nothing sleeps.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from piclusterd.demo import workerd
from piclusterd.demo.hub_process import HubProcess, free_port, start_python
from piclusterd.demo.signing import sign
from piclusterd.integrations.signatures import selftest_secret

TOKEN = "hub-token"
SECRETS = {source: f"{source}-secret" for source in ("linear", "github", "notion")}
ENV = {"HUB_TOKEN": TOKEN} | {f"{source.upper()}_SECRET": secret for source, secret in SECRETS.items()}
SECRETS["selftest"] = selftest_secret(TOKEN)
WAIT_S = 20.0  # a loaded two-core machine; everything here takes milliseconds on an idle one
Answer = tuple[int, Any]


def fresh(**fields: Any) -> bytes:
    """A Linear body, signed content that is fresh."""
    return json.dumps({"webhookTimestamp": int(time.time() * 1000), **fields}).encode()


class Line:
    """One WebSocket to the hub, as bare as it can be."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.welcome: dict[str, Any] = {}

    async def send(self, **message: Any) -> None:
        await self.ws.send_json(message)

    async def receive(self) -> dict[str, Any]:
        message = await self.ws.receive(timeout=WAIT_S)
        assert message.type is aiohttp.WSMsgType.TEXT, message
        found = json.loads(message.data)
        assert isinstance(found, dict)
        return found

    async def hello(self, *, node: str = "a", term: int = 1, **more: Any) -> dict[str, Any]:
        await self.send(**{"type": "hello", "proto": 1, "node": node, "term": term, "acked": None, **more})
        self.welcome = await self.receive()
        return self.welcome

    async def hooks(self, count: int) -> list[dict[str, Any]]:
        found = [await self.receive() for _ in range(count)]
        assert [message["type"] for message in found] == ["hook"] * count, found
        return found

    async def seqs(self, count: int) -> list[int]:
        return [hook["seq"] for hook in await self.hooks(count)]

    async def nothing_more(self) -> None:
        """Messages of one socket are answered in order: a complaint first proves that nothing else waited."""
        await self.send(type="no such type")
        assert (await self.receive())["type"] == "error"

    async def closed(self) -> int:
        message = await self.ws.receive(timeout=WAIT_S)
        assert message.type is aiohttp.WSMsgType.CLOSE, message
        return int(message.data)  # not ws.close_code: that is 1006 when the peer hung up before our half of the close


class Rig:
    """One hub of either kind, and a client session."""

    def __init__(self, kind: str, home: Path, http: aiohttp.ClientSession) -> None:
        self.kind = kind
        self.home = home
        self.http = http
        self.port = free_port()
        self.hub: HubProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, env: Mapping[str, str] = ENV, /, **more: str) -> None:
        everything = {**env, **more}
        if self.kind == "workerd":
            self.hub = await workerd.start(self.port, self.home, everything)
        else:
            self.hub = await start_python(self.port, self.home / "hub.sqlite", everything)

    async def kill(self) -> None:
        assert self.hub is not None
        assert await self.hub.kill() == -9

    async def stop(self) -> int:
        assert self.hub is not None
        return await self.hub.stop()

    async def post(self, source: str, body: bytes | dict[str, Any], *, secret: str | None = None, **how: Any) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.send_hook(source, raw, sign(source, raw, secret or SECRETS[source], **how))

    async def send_hook(self, source: str, body: Any, headers: Mapping[str, str]) -> Answer:
        data = io.BytesIO(body) if isinstance(body, bytes) else body  # aiohttp warns of large plain bytes
        return await self.call("POST", f"/hooks/{source}", token=None, data=data, headers=dict(headers))

    async def accept(self, count: int, start: int = 0) -> list[int]:
        """Post `count` good hooks; returns their seqs."""
        answers = [await self.post("linear", fresh(n=start + n)) for n in range(count)]
        assert [(status, answer["duplicate"]) for status, answer in answers] == [(200, False)] * count
        return [answer["seq"] for _, answer in answers]

    async def call(self, method: str, path: str, *, token: str | None = TOKEN, **options: Any) -> Answer:
        headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token else {})
        request = self.http.request(method, self.url + path, headers=headers, **options)
        async with asyncio.timeout(WAIT_S), request as answer:
            return answer.status, await answer.json()

    async def health(self) -> dict[str, Any]:
        status, found = await self.call("GET", "/health", token=None)
        assert status == 200
        assert isinstance(found, dict)
        return found

    async def until(self, **expected: Any) -> None:
        """Ask /health until it says so: an ack has no answer of its own."""
        async with asyncio.timeout(WAIT_S):
            found: dict[str, Any] = {}
            while {name: found.get(name, "unasked") for name in expected} != expected:
                found = await self.health()

    async def open(self, token: str = TOKEN) -> Line:
        headers = {"Authorization": f"Bearer {token}"}
        return Line(await self.http.ws_connect(f"{self.url}/connect", headers=headers))

    async def dial(self, *, node: str = "a", term: int = 1, **more: Any) -> Line:
        line = await self.open()
        assert (await line.hello(node=node, term=term, **more))["type"] == "welcome"
        return line


def body_of(hook: Mapping[str, Any]) -> bytes:
    """The raw bytes of a `hook` message."""
    return base64.b64decode(hook["body"], validate=True)
