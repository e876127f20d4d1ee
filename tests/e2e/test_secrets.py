"""Secrets are planted, the main job runs, and everything that leaves a node or stays on its disk is searched for them.

planted: the hub's token, Linear's webhook secret and API token, an API key, a join token, the CA's and nodes' keys
searched: every file of every node but the one a secret was put into, logs, pages, metrics, events, and what a
          fourth member is told by gossip, heartbeats and ledger batches, as it was decoded from the wire
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path

import aiohttp
import pytest

from piclusterd import wire
from piclusterd.cluster import identity
from piclusterd.cluster.links import Links
from piclusterd.demo.cluster import Member
from piclusterd.events import Event, LinkUp, Received
from piclusterd.ids import Term

from .rig import Rig, run, running

pytestmark = pytest.mark.e2e

PAGES = ("/metrics", "/health", "/status.json", "/", "/readyz?verbose", "/healthz")
ENOUGH = 20
"""Messages a listener is told before the search: member lists, heartbeats, ledger batches."""


class Listener:
    """A joined node that only listens: what peers tell it, as decoded."""

    def __init__(self, member: Member) -> None:
        me = identity.load(member.state)
        assert me is not None
        self.heard: list[bytes] = []
        self.kinds: set[str] = set()
        self._links = Links(me, self._on_event, self._serve, random.Random(1))

    async def _serve(self, peer: str, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        yield b""

    async def _on_event(self, event: Event) -> None:
        if isinstance(event, LinkUp):
            self._links.send(event.peer, wire.PushPull((), True))
            self._links.send(event.peer, wire.Held(Term(0), b""))
        if isinstance(event, Received):
            self.heard.append(wire.encode(event.message))
            self.kinds.add(type(event.message).__name__)
            if isinstance(event.message, wire.Held) and event.message.heads:
                spans = tuple(wire.Span(*head.log, 1, head.seq) for head in event.message.heads)
                self._links.send(event.sender, wire.Want(spans))

    @contextlib.asynccontextmanager
    async def listening(self, peers: Iterable[Member]) -> AsyncIterator[Listener]:
        await self._links.start("127.0.0.1", 0)
        try:
            for peer in peers:
                self._links.dial(f"{peer.host}:{peer.peer_port}")
            yield self
        finally:
            await self._links.close()


def forms(secret: str) -> list[bytes]:
    """The secret as it may stand somewhere: plain, hex, base64 of it alone."""
    raw = secret.encode()
    return [raw, raw.hex().encode(), base64.b64encode(raw).rstrip(b"=")[:-1]]


def found(text: bytes, planted: dict[str, str]) -> list[str]:
    return [name for name, secret in planted.items() if any(form in text for form in forms(secret))]


async def told(rig: Rig, member: Member) -> bytes:
    """All that the node's doors say to anybody."""
    pages = []
    for page in PAGES:
        async with rig.cluster.http.get(member.url + page) as answer:
            pages.append(await answer.read())
    timeout = aiohttp.ClientTimeout(total=None, sock_read=1)
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with rig.cluster.http.get(f"{member.url}/events?format=jsonl&after=0", timeout=timeout) as stream:
            pages.extend([line async for line in stream.content])
    return b"\n".join(pages)


def private_key(pem: Path) -> str:
    """A line from the middle of a PEM."""
    return pem.read_text().splitlines()[1]


def leaks_on_disk(member: Member, planted: dict[str, str], own: set[str]) -> list[str]:
    """Files of a node that hold a secret, but for the files where it was put: `*.secret`, and its own keys."""
    leaks = []
    for path in sorted(member.home.rglob("*")):
        if path.is_file() and path.suffix not in (".secret", ".key"):
            leaks += [f"{path}: {name}" for name in found(path.read_bytes(), planted)]
        if path.is_file() and path.suffix == ".key":
            leaks += [f"{path}: {name}" for name in found(path.read_bytes(), planted) if name not in own]
    return leaks


async def test_no_planted_secret_is_found_where_it_was_not_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api_key, linear_key = f"sk-{secrets.token_hex(16)}", f"lin_api_{secrets.token_hex(16)}"
    keys = tmp_path / "keys"
    keys.write_text(api_key + "\n")
    monkeypatch.setenv("PICLUSTER_API_KEYS_FILE", str(keys))
    async with running(tmp_path, hub="auto", linear_key=linear_key) as rig:
        token = await rig.cluster.token()
        planted = {"hub token": rig.world.hub_token, "webhook secret": rig.world.linear_secret, "api key": api_key}
        planted |= {"linear token": linear_key, "join token": token.rsplit(".", 1)[1]}
        members = rig.cluster.members
        fourth = rig.cluster._member(3)
        rig.cluster._write_config(fourth, model=False)
        await rig.cluster.join(fourth, token)
        planted |= {f"key of {m.name}": private_key(m.state / "identity" / "node.key") for m in (*members, fourth)}
        planted |= {"key of the CA": private_key(members[0].state / "identity" / "ca.key")}
        async with Listener(fourth).listening(members) as listener:
            await work(rig, api_key)
            await rig.cluster.until(lambda: enough(listener), f"{ENOUGH} messages are heard", 60)
        heard = b"\n".join(listener.heard)
        assert b"Checkout" in heard, "the ledger was among what it was told"
        assert found(heard, planted) == []
        for member in members:
            said = await told(rig, member)
            assert len(said) > 10_000
            assert found(said, planted) == []
            exported = await run("piclusterd.cli.main", "ledger", "export", "--jsonl", "--config", str(member.config))
            assert "Checkout" in base64_opened(exported.out)
            assert found(base64_opened(exported.out).encode(), planted) == []
        await asyncio.gather(*(rig.cluster.stop(member) for member in members))
        for member in members:
            own = {f"key of {member.name}", *(["key of the CA"] if member is members[0] else [])}
            assert leaks_on_disk(member, planted, own) == []


async def enough(listener: Listener) -> bool:
    return len(listener.heard) >= ENOUGH and {"Held", "PushPull", "Batch"} <= listener.kinds


async def work(rig: Rig, api_key: str) -> None:
    """A webhook to a closed run, a chat with a key and one without, a webhook with a wrong signature."""
    http, member = rig.cluster.http, rig.member
    _, body = rig.world.new_issue("Checkout is down", "since this morning, for everybody")
    await rig.world.post(http, body)
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    for key, status in ((api_key, 200), ("sk-wrong", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        async with http.post(
            f"{member.url}/v1/chat/completions", json=chat, headers=headers, timeout=aiohttp.ClientTimeout(total=60)
        ) as answer:
            assert answer.status == status
    async with http.post(f"{member.url}/hooks/linear", data=body, headers={"Linear-Signature": "0" * 64}) as answer:
        assert answer.status == 401

    async def closed() -> bool:
        views = await rig.cluster.views()
        return all(any(run["state"] == "done" for run in view["runs"]) for view in views)

    await rig.cluster.until(closed, "the issue is triaged", 60)


def base64_opened(text: str) -> str:
    """`text`, and behind it every base64 string in it, decoded: bodies of webhooks are exported so."""
    import re

    opened = [base64.b64decode(part).decode(errors="replace") for part in re.findall(r'"base64": "([^"]*)"', text)]
    return "\n".join([text, *opened])
