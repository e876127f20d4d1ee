"""The models of any node, for its owner: asked of this node's library, or of another's over a link.

picluster pull --node pi-2 ─▶ admin door ─▶ Stock.ask ─┬ pi-2 is we ─▶ library ─▶ lines
                                                       └ else: request `models` to pi-2 ─▶ the same lines

A line is a JSON object; a pull has one a step, everything else has one. A member asks on behalf of its owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from .board import sensors
from .errors import NotFound, PiclusterError, UserError
from .ids import NodeId
from .inference.catalogue import proposed
from .inference.library import Library
from .views import View
from .web.admin import ModelWish, as_json

MODELS = "models"
"""Request between peers; its body is a `ModelWish`, its answer the lines."""
SILENCE_S = 600.0
"""Between two lines: a load, or the hash of a large file on a slow card."""

Request = Callable[[NodeId, str, bytes, float], AsyncGenerator[bytes, None]]


class Stock:
    def __init__(self, me: NodeId, library: Library, request: Request, view: Callable[[], Awaitable[View]]) -> None:
        """`request` is `Links.request`, `view()` this node's picture."""
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
                return {"models": as_json(library.loaded())}
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
            case "unload":
                return {"unloaded": await library.unload(wish.name)}
            case _:
                raise PiclusterError(f"{wish.what} has lines of its own")
