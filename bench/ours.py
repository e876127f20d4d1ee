"""Three real `piclusterd` on loopback for the benches: founded, with GitHub's webhooks let in, no model, no hub."""

from __future__ import annotations

import json
from pathlib import Path

from bench.load import Address, webhook
from piclusterd.demo.cluster import LOOPBACK, Cluster, Member, Outside
from piclusterd.integrations.signatures import event_key

SECRET = "bench"
SIZE = 3
BODY_BYTES = 512
"""Of a webhook, and of the value put into etcd. (Linear's are 1 to 3 KB, GitHub's 5 to 30.)"""
LED_S = 60.0


def make(root: Path, preset: str = "lan") -> Cluster:
    """Its files under `root`. Nothing runs yet; no workflow wants a `push`, so no run follows a webhook."""
    return Cluster(root, outside=Outside(github_secret=SECRET), size=SIZE, with_model=(), preset=preset)


async def until_led(cluster: Cluster) -> Member:
    """The coordinator, once it is active. Raises DemoFailed."""
    member: Member = await cluster.until(cluster.coordinator, "a coordinator is active", LED_S)
    return member


async def until_equal(cluster: Cluster, timeout_s: float) -> None:
    """Every node up holds the same ledger. Raises DemoFailed."""

    async def equal() -> bool:
        views = await cluster.views()
        up = sum(member.up for member in cluster.members)
        return len(views) == up and len({view["digest"] for view in views}) == 1

    await cluster.until(equal, "the ledgers are equal", timeout_s)


def door(member: Member) -> Address:
    return LOOPBACK, member.api_port


def body(number: int) -> bytes:
    said = json.dumps({"ref": "refs/heads/main", "after": f"{number:040x}", "message": ""}).encode()
    return said[:-2] + b"." * (BODY_BYTES - len(said)) + said[-2:]


def delivery(number: int) -> str:
    """GitHub's id of the delivery."""
    return f"bench-{number}"


def event(number: int) -> str:
    """The key under which the ledger knows webhook `number`: GitHub signs its body only."""
    said = body(number)
    return event_key("github", {}, json.loads(said), said)


def hook(number: int) -> bytes:
    """Webhook `number`, ready to send."""
    return webhook(body(number), SECRET, delivery(number))
