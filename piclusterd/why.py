"""What the cluster remembers of a request: asked of this node, and of every member it has a link to.

/why/{id} ─▶ Whys.find ─┬ our own decisions
                        └ request `why` to each peer ─▶ theirs, as JSON lines; who is silent is left out
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec

from .cluster.links import Links
from .errors import PiclusterError
from .ids import NodeId
from .inference.decisions import Decisions

WHY = "why"
"""Request between peers: its body is the id, its answer a JSON list."""
ANSWER_S = 3.0
"""A look into memory; a peer that needs longer has other worries."""


class Whys:
    def __init__(self, name: str, decisions: Decisions, links: Links) -> None:
        self._name, self._decisions, self._links = name, decisions, links

    async def find(self, request: str) -> list[dict[str, Any]]:
        """Every node's decisions about `request`, those of the node that was asked first."""
        asked = [self._ask(peer, request) for peer in self._links.peers()]
        seen = [*self._here(request), *(one for told in await asyncio.gather(*asked) for one in told)]
        return sorted(seen, key=lambda one: (bool(one["relayed_by"]), one["at"]))

    def answer(self, body: bytes) -> bytes:
        """Ours, for a peer."""
        return msgspec.json.encode(self._here(body.decode("ascii", "replace")))

    def _here(self, request: str) -> list[dict[str, Any]]:
        peers = self._links.peers()

        def named(node: str) -> str:
            return peers[NodeId(node)].name if node in peers else node

        told = [decision.told() for decision in self._decisions.of(request)]
        return [one | {"node": self._name, "relayed_by": named(one["relayed_by"])} for one in told]

    async def _ask(self, peer: NodeId, request: str) -> list[dict[str, Any]]:
        try:
            async with aclosing(self._links.request(peer, WHY, request.encode(), ANSWER_S)) as chunks:
                body = b"".join([chunk async for chunk in chunks])
            return msgspec.json.decode(body, type=list[dict[str, Any]])
        except (PiclusterError, OSError, msgspec.DecodeError):
            return []
