"""What `doctor` judges, gathered: this board, this node's files and daemon, and its neighbours.

    board.survey ──▶ Board ─┐
    state directory ─▶ Node ┼──▶ Survey
    /status.json, peers' /health and ports, mDNS ─▶ Cluster ─┘

It changes nothing: the write test is a small file that it removes.
"""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil

from ..board import survey
from ..board.doctor import Cluster, ModelFile, Node, Peer, Survey
from ..cluster.identity import Identity, load
from ..config import Config
from ..errors import Broken, PiclusterError
from .client import Target, connect

MDNS_S = 5.0
"""To listen for the others: answers come within two seconds where multicast works at all."""
PEER_S = 3.0
"""For a peer's port or page to answer."""
HALF_SECOND = 0.5
"""`/health` cuts its time off to whole seconds; on average that is this much."""
DAEMON = "piclusterd"


class _Facts(msgspec.Struct, frozen=True):
    name: str = ""
    role: str = "worker"
    release: str = ""
    api: str = ""
    addresses: tuple[str, ...] = ()


class _Member(msgspec.Struct, frozen=True):
    node: str
    state: str
    facts: _Facts


class _Picture(msgspec.Struct, frozen=True):
    """What is used of /status.json."""

    me: str
    members: tuple[_Member, ...]


async def look(where: Target, config: Config, state: Path, root: Path) -> Survey:
    """Takes some seconds where there are neighbours to listen for."""
    picture = await _picture(where)
    me, joined = await asyncio.to_thread(_identity, state)
    return Survey(
        await asyncio.to_thread(_board, state, root),
        await asyncio.to_thread(_node, config, me, joined, picture is not None),
        await _cluster(config, picture, me),
    )


def _board(state: Path, root: Path) -> survey.Board:
    return survey.gather(
        state,
        root,
        firmware_flags=survey.firmware_flags(),
        llama=survey.llama_features(),
        clock_synced=survey.clock_synced(),
    )


# this node -------------------------------------------------------------------------------------------------------
def _identity(state: Path) -> tuple[Identity | None, bool | None]:
    """(identity, does it belong to a cluster); the latter None where its files are closed to this user."""
    try:
        me = load(state)
    except (OSError, Broken):
        return None, None
    return me, me is not None


def _node(config: Config, me: Identity | None, joined: bool | None, running: bool) -> Node:
    return Node(
        running=running,
        joined=joined,
        certificate_s=_certificate_s(me) if me is not None else None,
        ports=(("api", config.api.port), ("peers", config.peers.port)),
        models=tuple(map(_model_file, config.models)),
        fds=_fds(),
    )


def _certificate_s(me: Identity) -> float:
    from cryptography import x509

    return x509.load_pem_x509_certificate(me.cert_pem).not_valid_after_utc.timestamp() - time.time()


def _model_file(model: Any) -> ModelFile:
    """Looked at as the daemon would, and compared with the `.sha256` beside it (sha256sum's format) where one is."""
    from ..inference.models import file_sha256, resolve

    try:
        path = resolve(model).path
        told = path.with_name(path.name + ".sha256")
        wanted = told.read_text().split()[0].lower() if told.exists() else ""
        if wanted and file_sha256(path) != wanted:
            return ModelFile(model.name, str(path), f"its content is not what {told} says")
        return ModelFile(model.name, str(path), "", public=bool(path.stat().st_mode & 0o004))
    except (PiclusterError, OSError, IndexError, UnicodeDecodeError) as fault:
        return ModelFile(model.name, model.path, str(fault))


def _fds() -> tuple[int, int] | None:
    """Open and allowed files of the daemon on this machine, where this user may see them."""
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] == DAEMON:
                return process.num_fds(), process.rlimit(psutil.RLIMIT_NOFILE)[0]
        except (psutil.Error, OSError):
            continue
    return None


# the others ------------------------------------------------------------------------------------------------------
async def _picture(where: Target) -> _Picture | None:
    try:
        async with connect(where) as client:
            return msgspec.json.decode(await client.get("/status.json"), type=_Picture)
    except (PiclusterError, msgspec.DecodeError):
        return None


async def _cluster(config: Config, picture: _Picture | None, me: Identity | None) -> Cluster:
    if picture is None:
        return Cluster()
    own = next((member.facts for member in picture.members if member.node == picture.me), _Facts())
    others = [member for member in picture.members if member.node != picture.me]
    heard, twins = await _heard(config, picture, me, own)
    peers = await asyncio.gather(*(_peer(member, heard is None or member.node in heard) for member in others))
    return Cluster(own.release, tuple(peers), twins)


async def _heard(
    config: Config, picture: _Picture, me: Identity | None, own: _Facts
) -> tuple[set[str] | None, tuple[str, ...]]:
    """(nodes heard over mDNS, or None where nobody listened; addresses of others that go by our id)."""
    if not config.discovery.enabled or me is None:
        return None, ()
    from ..cluster.discovery import find, lan_addresses

    seen = await find(MDNS_S, me.cluster_id, config.discovery.interfaces)
    ours = {address.rpartition(":")[0] for address in own.addresses} | set(lan_addresses(config.discovery.interfaces))
    claimed = [address for sighting in seen if sighting.node == picture.me for address in sighting.addresses]
    twins = tuple(address for address in claimed if address.rpartition(":")[0] not in ours)
    return {str(sighting.node) for sighting in seen}, twins


async def _peer(member: _Member, advertised: bool) -> Peer:
    facts = member.facts
    reachable = await asyncio.gather(*(_takes_connections(address) for address in facts.addresses))
    return Peer(
        name=facts.name or member.node,
        state=member.state,
        release=facts.release,
        reachable=any(reachable) or not reachable,
        offset_s=await _offset_s(facts.api) if member.state == "alive" and facts.api else None,
        advertised=advertised,
        relay=facts.role == "relay",
    )


async def _takes_connections(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(PEER_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError):
        return False
    writer.close()
    return True


async def _offset_s(api: str) -> float | None:
    """Seconds by which the clock at `api` is ahead; None where it does not say."""
    try:
        async with asyncio.timeout(PEER_S), connect(Target(Path(), url=api)) as client:
            told = json.loads(await client.get("/health"))["time"]
            return datetime.fromisoformat(told).timestamp() + HALF_SECOND - time.time()
    except (PiclusterError, OSError, ValueError, LookupError, TypeError):
        return None
