"""The Ollama API: what Home Assistant, Open WebUI and `ollama` itself speak, on the same models as the OpenAI API.

    request ──▶ name ──▶ Serving.generate ──Delta*──▶ one JSON a line ──Done──▶ the last line: counts and durations

Streams are the default. While a request waits for its turn the stream gets a blank every 10 s, which is white space
before the next JSON value. A name with the tag `latest` is the name without it. `keep_alive` goes along to the node
that answers; an empty request loads the model there, with `keep_alive` 0 it unloads it everywhere. What the owner
pinned or configured stays.
Refuses: to create, copy, push or delete models (403): a guest of the API must not change what the house serves.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from ..errors import NotFound, PiclusterError, Refused, Unavailable, UserError
from ..inference.answering import Answering
from ..inference.calling import Calling
from ..inference.protocol import Delta, Done, GenerateRequest
from ..inference.serving import Started
from ..views import View
from . import ollama_schema as schema
from . import refusals
from .node_headers import cache_header, node_headers
from .ollama_body import (
    LATEST,
    AnsweredBody,
    ChatBody,
    EmbedBody,
    GenerateBody,
    NamedBody,
    OldEmbedBody,
    chat_request,
    embed_request,
    generate_request,
    load_request,
    read,
)
from .ollama_schema import Card, Clock, Shape
from .refusals import Handler
from .silences import KEEP_ALIVE_S, with_silences

COMPATIBLE = "0.12.6"
"""The release of Ollama whose API this is. Clients compare it before they send tools or a schema."""

Cards = Callable[[], Awaitable[Sequence[Card]]]
"""What the cluster serves or holds."""
Pull = Callable[[str], AsyncGenerator[dict[str, Any], None]]
"""Fetches a model by name; yields Ollama's progress objects: `status`, and `digest`, `total`, `completed` in bytes."""


def routes(serving: Answering, cards: Cards, running: Cards, pull: Pull | None = None) -> list[web.RouteDef]:
    """The API's routes. `running`: what is in memory. Without `pull` this node fetches no models for clients."""
    api = _Api(serving, cards, running, pull)
    made = [
        web.get("/api/version", api.version),
        web.get("/api/tags", _answered(api.tags)),
        web.get("/api/ps", _answered(api.running)),
        web.post("/api/show", _answered(api.show)),
        web.post("/api/chat", _answered(api.chat)),
        web.post("/api/generate", _answered(api.generate)),
        web.post("/api/embed", _answered(api.embed)),
        web.post("/api/embeddings", _answered(api.old_embed)),
        web.post("/api/pull", _answered(api.pull)),
    ]
    closed = [("POST", "create"), ("POST", "copy"), ("POST", "push"), ("DELETE", "delete"), ("POST", "blobs/{digest}")]
    return made + [web.route(method, f"/api/{name}", _answered(_closed)) for method, name in closed]


async def _closed(_request: web.Request) -> web.StreamResponse:
    raise Refused("models are not changed over this API", fix="Use `picluster pull`, `load`, `rm` on a node.")


def cards(view: View) -> list[Card]:
    """What alive nodes serve, each model once."""
    alive = [member for member in view.members if member.state == "alive"]
    found = [facts for member in alive for facts in member.facts.models]
    told = {facts.name: facts for facts in sorted(found, key=lambda facts: facts.load_s == 0)}
    return [
        Card(
            name,
            context=facts.context,
            generates=facts.does("generate"),
            embeds=facts.does("embed"),
            tools=facts.tools,
        )
        for name, facts in sorted(told.items())
    ]


def _answered(handler: Handler) -> Handler:
    """`handler` with its errors in Ollama's shape."""
    return refusals.answered(handler, schema.error)


class _Api:
    def __init__(self, serving: Answering, cards: Cards, running: Cards, pull: Pull | None) -> None:
        self._serving, self._cards, self._running, self._pull = serving, cards, running, pull

    # models ------------------------------------------------------------------------------------------------------
    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": COMPATIBLE})

    async def tags(self, _request: web.Request) -> web.Response:
        return web.json_response(schema.tags(await self._cards()))

    async def running(self, _request: web.Request) -> web.Response:
        return web.json_response(schema.running(await self._running(), time.time()))

    async def show(self, request: web.Request) -> web.Response:
        asked = read(await request.read(), NamedBody)
        return web.json_response(schema.shown(await self._card(asked.called)))

    async def pull(self, request: web.Request) -> web.StreamResponse:
        """A model that is there is pulled already: Home Assistant asks for what its owner typed."""
        asked = read(await request.read(), NamedBody)
        try:
            await self._card(asked.called)
            steps = _already()
        except NotFound:
            if self._pull is None:
                why = "This node fetches no models for clients."
                fix = "Its owner runs `picluster pull`, or sets [store] client_pulls."
                raise Refused(f"{asked.called} is not here", why, fix, param="model") from None
            steps = self._pull(asked.called)
        return await _progress(request, steps, asked.stream is not False)

    async def _card(self, name: str) -> Card:
        there = await self._cards()
        for called in (name, name.removesuffix(LATEST)):
            for card in there:
                if card.name == called:
                    return card
        names = ", ".join(card.name for card in there) or "none"
        raise NotFound(f"model {name!r} not found, try pulling it first.", f"There are: {names}.", param="model")

    # answers -----------------------------------------------------------------------------------------------------
    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = read(await request.read(), ChatBody)
        card, shape = await self._card(body.model), Shape(body.model, chat=True)
        if not body.messages:
            return await self._only_loaded(load_request(body, card.name), shape)
        return await self._answer(request, chat_request(body, card.name), shape, body)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = read(await request.read(), GenerateBody)
        card, shape = await self._card(body.model), Shape(body.model, chat=False)
        if not body.prompt and not body.images:
            return await self._only_loaded(load_request(body, card.name), shape)
        return await self._answer(request, generate_request(body, card.name), shape, body)

    async def _only_loaded(self, asked: GenerateRequest, shape: Shape) -> web.Response:
        headers = await self._only_load(asked)
        nothing = shape.nothing("unload" if asked.keep_alive_s == 0 else "load", time.time())
        return web.json_response(nothing, headers=headers)

    async def _only_load(self, asked: GenerateRequest) -> dict[str, str]:
        """Done once it returns: the headers, which say where."""
        async with aclosing(self._serving.generate(asked)) as items:
            [started, *_] = [item async for item in items]
        assert isinstance(started, Started), "an answer starts with Started"
        return node_headers(started.choice)

    async def _answer(
        self, request: web.Request, asked: GenerateRequest, shape: Shape, body: AnsweredBody
    ) -> web.StreamResponse:
        async with aclosing(self._serving.generate(asked)) as items:
            if body.stream is not False:
                return await _Lines(request, shape).send(items)
            return await _whole(request, shape, items)

    async def embed(self, request: web.Request) -> web.Response:
        body, began = read(await request.read(), EmbedBody), time.monotonic()
        card = await self._card(body.model)
        if not body.input:
            headers = await self._only_load(load_request(body, card.name))
            return web.json_response({"model": body.model, "embeddings": []}, headers=headers)
        choice, embedded = await self._serving.embed(embed_request(body, card.name))
        answer = schema.embeddings(body.model, embedded, time.monotonic() - began)
        return web.json_response(answer, headers=node_headers(choice) | cache_header(embedded))

    async def old_embed(self, request: web.Request) -> web.Response:
        body = read(await request.read(), OldEmbedBody)
        card = await self._card(body.model)
        asked = EmbedBody(body.model, body.prompt, body.keep_alive)
        if not body.prompt:
            return web.json_response({"embedding": []}, headers=await self._only_load(load_request(asked, card.name)))
        choice, embedded = await self._serving.embed(embed_request(asked, card.name))
        return web.json_response(schema.old_embedding(embedded), headers=node_headers(choice) | cache_header(embedded))


async def _already() -> AsyncGenerator[dict[str, Any], None]:
    yield {"status": "pulling manifest"}
    yield {"status": "success"}


Item = Started | Delta | Done


async def _whole(request: web.Request, shape: Shape, items: AsyncGenerator[Item, None]) -> web.Response:
    asked, first, text = time.monotonic(), 0.0, ""
    headers: dict[str, str] = {}
    async for item in items:
        first = first if isinstance(item, Started) else first or time.monotonic()
        match item:
            case Started(choice=choice):
                headers = node_headers(choice)
            case Delta():
                text += item.text
                if request.transport is None or request.transport.is_closing():
                    raise Unavailable("the client has gone away")  # nobody reads this; leaving cancels the request
            case Done():
                clock = Clock(asked, first, time.monotonic())
                return web.json_response(shape.whole(text, item, clock, time.time()), headers=headers)
    raise AssertionError("an answer ends with Done")


class _Lines:
    """A stream of JSON objects, one a line. Errors before the first keep their status; later ones are lines."""

    def __init__(self, request: web.Request, shape: Shape | None = None) -> None:
        self._request, self._shape = request, shape
        self._asked, self._first = time.monotonic(), 0.0
        self._calling, self._called = Calling(), 0
        headers = {"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"}
        self._response = web.StreamResponse(headers=headers)

    async def send(self, items: AsyncGenerator[Any, None]) -> web.StreamResponse:
        """Of an answer's items where there is a shape, else of objects as they are."""
        try:
            async with aclosing(with_silences(items, KEEP_ALIVE_S)) as heard:
                async for item in heard:
                    await self._item(item)
        except PiclusterError as fault:
            if not self._response.prepared:
                raise
            await self._line(schema.error(fault))
        except ConnectionResetError:
            return self._response  # the client has gone away; leaving cancels the request
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write_eof()
        return self._response

    async def _item(self, item: Any) -> None:
        match item:
            case Started(choice=choice):
                if not self._response.prepared:
                    self._response.headers.update(node_headers(choice))
            case None:
                await self._write(b" ")
            case Delta() | Done():
                await self._part(item)
            case _:
                await self._line(item)

    async def _part(self, item: Delta | Done) -> None:
        assert self._shape is not None, "answers have a shape"
        self._first = self._first or time.monotonic()
        if isinstance(item, Delta):
            if item.text:
                await self._line(self._shape.part(item.text, time.time()))
            self._calling.add(item.calls)
            for part in item.calls:
                if part.last:
                    await self._line(
                        self._shape.calling(self._calling.calls[self._called : part.index + 1], time.time())
                    )
                    self._called = part.index + 1
            return
        if item.tool_calls[self._called :]:
            await self._line(self._shape.calling(item.tool_calls[self._called :], time.time()))
        clock = Clock(self._asked, self._first, time.monotonic())
        await self._line(self._shape.ending(item, clock, time.time()))

    async def _line(self, told: Any) -> None:
        await self._write(json.dumps(told, ensure_ascii=False).encode() + b"\n")

    async def _write(self, data: bytes) -> None:
        if not self._response.prepared:
            await self._response.prepare(self._request)
        await self._response.write(data)


async def _progress(
    request: web.Request, steps: AsyncGenerator[dict[str, Any], None], stream: bool
) -> web.StreamResponse:
    async with aclosing(steps):
        if stream:
            return await _Lines(request).send(steps)
        last: dict[str, Any] = {}
        async for step in steps:
            last = step
    if last.get("status") != "success":
        raise UserError("the model was not pulled", str(last.get("status") or "Nothing came."))
    return web.json_response(last)
