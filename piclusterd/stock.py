"""The models of any node, for its owner: asked of this node's library, or of another's over a link.

picluster pull --node pi-2 ─▶ admin door ─▶ Stock.ask ─┬ pi-2 is we ─▶ library ─▶ lines
                                                       └ else: request `models` to pi-2 ─▶ the same lines

A line is a JSON object; a pull has one a step, everything else has one. A member asks on behalf of its owner.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from .board import sensors
from .errors import NotFound, PiclusterError, Refused, UserError
from .ids import NodeId
from .inference.catalogue import named, proposed
from .inference.library import Library, Loaded
from .inference.splits import Splits
from .views import View
from .web import ollama
from .web.admin import ModelWish, as_json
from .web.keys import visible
from .web.ollama_schema import Card

log = logging.getLogger(__name__)

MODELS = "models"
"""Request between peers; its body is a `ModelWish`, its answer the lines."""
RUNNING_S = 2.0
"""For a node to say what it has in memory: a page that lists it is being looked at."""
SILENCE_S = 600.0
"""Between two lines: a load, or the hash of a large file on a slow card."""

Request = Callable[[NodeId, str, bytes, float], AsyncGenerator[bytes, None]]


class Stock:
    def __init__(
        self, me: NodeId, library: Library, request: Request, view: Callable[[], Awaitable[View]],
        splits: Splits, client_pulls: str = "none",
    ) -> None:  # fmt: skip
        """`request` is `Links.request`, `view()` this node's picture; `client_pulls`: catalogue or any."""
        self._client_pulls, self._splits = client_pulls, splits
        self.client_pull = None if client_pulls == "none" else self._for_client
        self._me, self._library, self._request, self._view = me, library, request, view

    async def ask(self, wish: ModelWish) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of the answer. Raises what was objected."""
        node = await self._chosen(wish.node)
        if node == self._me:
            async with aclosing(self._here(wish)) as lines:
                async for line in lines:
                    yield line
            return
        body = msgspec.json.encode(msgspec.structs.replace(wish, node=""))
        rest = b""
        async with aclosing(self._request(node, MODELS, body, SILENCE_S)) as chunks:
            async for chunk in chunks:
                *whole, rest = (rest + chunk).split(b"\n")
                for told in whole:
                    yield msgspec.json.decode(told, type=dict[str, Any])

    async def serve_peer(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The lines for a member, who asks on behalf of its owner."""
        wish = msgspec.json.decode(body, type=ModelWish)
        async with aclosing(self._here(wish)) as lines:
            async for line in lines:
                yield msgspec.json.encode(line) + b"\n"

    async def take(self, chunks: AsyncGenerator[bytes, None], size: int, name: str) -> dict[str, Any]:
        """A file that the owner sends."""
        async with aclosing(chunks):
            return {"model": as_json(await self._library.take_stream(chunks, size, name))}

    async def _for_client(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """A pull in Ollama's words. Raises `Refused` where the owner has not allowed it, and what stopped it."""
        if self._client_pulls == "catalogue" and named(name) is None:
            fix = "Its owner runs `picluster pull`."
            raise Refused(f"{name[:128]} may not be pulled by clients", "It is not in the catalogue.", fix)
        async with aclosing(self._library.pull(name)) as steps:
            async for step in steps:
                told = {"status": "success" if step.status == "done" else step.status}
                sizes = {"digest": f"sha256:{step.digest}", "total": step.total, "completed": step.completed}
                yield {**told, **sizes} if step.digest and step.status != "done" else told

    async def cards(self) -> list[Card]:
        """What alive nodes serve, of that what the caller may know of."""
        return [await self.card(card) for card in ollama.cards(await self._view()) if visible(card.name)]

    async def card(self, card: Card) -> Card:
        """With what this node's file of it says."""
        found = self._library.store.find(card.name)
        if found is None:
            return card
        about = await self._library.about(found.name)
        return replace(
            card, size=found.size, sha256=found.sha256, modified=found.added,
            family=str(about.get("architecture") or card.family), parameters=str(about.get("parameters", "")),
            quantisation=str(about.get("quantization", "")), context=card.context or int(about.get("context", 0)),
        )  # fmt: skip

    async def running(self) -> list[Card]:
        """What is in memory on any node, and until when, as each says itself; who cannot be asked is left out, and what
        the caller may not know of."""
        alive = [member for member in (await self._view()).members if member.state == "alive"]
        nodes = [member.node for member in alive if any(not facts.load_s for facts in member.facts.models)]
        told = await asyncio.gather(*map(self._loaded_at, nodes))
        found: dict[str, Card] = {}
        for one in chain.from_iterable(told):
            expires = math.inf if one.expires_s is None else one.expires_s
            for name in (one.name, *one.aliases):
                longest = max(expires, found[name].expires_s if name in found else 0.0)
                found[name] = Card(name, size=one.size, sha256=one.sha256, context=one.context, expires_s=longest)
        return [await self.card(card) for name, card in sorted(found.items()) if visible(name)]

    async def _loaded_at(self, node: NodeId) -> list[Loaded]:
        try:
            async with asyncio.timeout(RUNNING_S):
                async with aclosing(self.ask(ModelWish("loaded", node=node))) as lines:
                    told = [msgspec.convert(line["models"], list[Loaded]) async for line in lines]
        except (PiclusterError, OSError, TimeoutError) as fault:
            log.info("%s does not say what it has in memory: %s", node, fault)
            return []
        return [one for one in chain.from_iterable(told) if one.state == "ready"]

    async def _chosen(self, wanted: str) -> NodeId:
        if wanted in ("", self._me):
            return self._me
        members = (await self._view()).members
        found = [one for one in members if wanted in (one.node, one.facts.name)]
        if len(found) == 1:
            return found[0].node
        there = ", ".join(one.facts.name or one.node for one in members)
        raise NotFound(f"no node is called {wanted[:64]!r}", f"There are: {there}.")

    async def _here(self, wish: ModelWish) -> AsyncGenerator[dict[str, Any], None]:
        if wish.what != "pull":
            yield await self._done(wish)
            return
        async with aclosing(self._library.pull(wish.name, wish.to)) as steps:
            async for step in steps:
                yield as_json(step)

    async def _done(self, wish: ModelWish) -> dict[str, Any]:
        library = self._library
        match wish.what:
            case "list":
                return {"models": as_json(library.list())}
            case "loaded":
                return {"models": as_json((*library.loaded(), *self._splits.held()))}
            case "propose":
                ram = (await asyncio.to_thread(sensors.read)).memory_total
                return {"models": as_json(proposed(ram)), "memory_total": ram}
            case "show":
                return {**as_json(library.show(wish.name)), "about": await library.about(wish.name)}
            case "import":
                if not Path(wish.name).is_absolute():
                    raise UserError(f"{wish.name[:200]!r} is no absolute path", "The daemon runs elsewhere.")
                return {"model": as_json(await library.take_file(Path(wish.name), wish.to, wish.hard_link))}
            case "remove":
                return {"freed": await library.remove(wish.name)}
            case "pin" | "unpin":
                return {"model": as_json(await library.pin(wish.name, wish.what == "pin"))}
            case "alias":
                return {"model": as_json(await library.alias(wish.name, wish.aliases))}
            case "load":
                return {"model": as_json(await library.load(wish.name))}
            case "plan":
                return {"plan": as_json(await self._splits.plan(wish.name))}
            case "split":
                return {"model": as_json(await self._splits.load(wish.name))}
            case "unload":
                return {"unloaded": await library.unload(wish.name)}
            case _:
                raise PiclusterError(f"{wish.what} has lines of its own")
