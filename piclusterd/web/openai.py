"""The OpenAI API: chat, completions, embeddings, models; for any client that lets its base URL be set.

    request ──parse──▶ Serving.generate ──Started──▶ headers ──Delta*──▶ SSE or one JSON ──Done──▶ usage, [DONE]

While a request waits for its turn, a stream gets a comment every 10 s, so that proxies and clients keep it open. A
client that goes away cancels its request: at once where the application cancels handlers (`web.app` does), else at the
next write of a stream, or the next token. Answers name
the node (`X-Picluster-Node`, `X-Picluster-Why`); errors are OpenAI's objects, with `Retry-After` where waiting helps.
Who may call, how large a body may be and the request's id are the application's business (`web.app`).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from ..errors import NotFound, PiclusterError, Unavailable
from ..events import Choice
from ..inference.answering import Answering
from ..inference.calling import Calling
from ..inference.openai_body import (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    SamplingBody,
    chat_request,
    completion_request,
    embed_request,
    parse,
)
from ..inference.protocol import CallPart, Delta, Done, GenerateRequest
from ..inference.serving import Started
from . import openai_schema as schema
from . import refusals
from .node_headers import cache_header, end_headers, node_headers
from .refusals import Handler
from .silences import KEEP_ALIVE_S, with_silences

ListModels = Callable[[], Awaitable[Sequence[Mapping[str, Any]]]]
Item = Started | Delta | Done
Indexed = tuple[int, Item]
"""An item, and which of the `n` answers it belongs to."""


def routes(serving: Answering, list_models: ListModels) -> list[web.RouteDef]:
    """The API's routes. `list_models` tells what the cluster serves: dicts with at least `id`."""
    api = _Api(serving, list_models)
    return [
        web.post("/v1/chat/completions", answered(api.chat)),
        web.post("/v1/completions", answered(api.completions)),
        web.post("/v1/embeddings", answered(api.embeddings)),
        web.get("/v1/models", answered(api.models)),
        web.get("/v1/models/{id:.+}", answered(api.model)),
    ]


def answered(handler: Handler) -> Handler:
    """`handler` with its errors as OpenAI's objects."""
    return refusals.answered(handler, schema.error)


class _Api:
    def __init__(self, serving: Answering, list_models: ListModels) -> None:
        self._serving = serving
        self._list_models = list_models

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), ChatBody)
        return await self._complete(request, body, chat_request(body), chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), CompletionBody)
        return await self._complete(request, body, completion_request(body), chat=False)

    async def _complete(
        self, request: web.Request, body: SamplingBody, asked: GenerateRequest, chat: bool
    ) -> web.StreamResponse:
        prefix = "chatcmpl-" if chat else "cmpl-"
        name = prefix + secrets.token_hex(12)
        shape = schema.Shape(name, int(time.time()), body.model, chat, asked.choices, asked.logprobs)
        count = body.n or 1
        async with aclosing(side_by_side([self._serving.generate(one) for one in varied(asked, count)])) as items:
            if body.stream:
                usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                return await _Stream(request, shape, usage).send(items)
            return await _whole(request, shape, items, count)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        body = parse(await request.read(), EmbeddingsBody)
        choice, embedded = await self._serving.embed(embed_request(body))
        answer = schema.embeddings(choice.model, embedded, body.encoding_format == "base64")
        return web.json_response(answer, headers=node_headers(choice) | cache_header(embedded))

    async def models(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(schema.models(await self._list_models()))

    async def model(self, request: web.Request) -> web.StreamResponse:
        wanted = request.match_info["id"]
        entries = await self._list_models()
        for entry in entries:
            if entry["id"] == wanted:
                return web.json_response(schema.model(entry))
        there = ", ".join(str(entry["id"]) for entry in entries) or "none"
        raise NotFound(f"there is no model {wanted!r}.", f"There are: {there}.", param="model")


def varied(asked: GenerateRequest, count: int) -> list[GenerateRequest]:
    """`count` times the same request, each with a seed of its own where a seed is given."""
    if asked.seed is None or count == 1:
        return [asked] * count
    return [msgspec.structs.replace(asked, seed=(asked.seed + number) % 2**32) for number in range(count)]


async def side_by_side(answers: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Indexed, None]:
    """The items of all `answers` as they come, with the number of the answer. Closing it closes them all."""
    if len(answers) == 1:
        async with aclosing(answers[0]) as items:
            async for item in items:
                yield 0, item
        return
    coming: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(len(answers))
    pumps = [asyncio.create_task(_pump(index, answer, coming)) for index, answer in enumerate(answers)]
    try:
        for _ in answers:
            while (got := await coming.get()) is not None:
                if isinstance(got, Exception):
                    raise got
                yield got
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, answer: AsyncGenerator[Item, None], coming: asyncio.Queue[Indexed | Exception | None]
) -> None:
    try:
        async with aclosing(answer) as items:
            async for item in items:
                await coming.put((index, item))
    except Exception as fault:  # whatever it is, the one who reads is to have it
        await coming.put(fault)
    await coming.put(None)


async def _whole(
    request: web.Request, shape: schema.Shape, items: AsyncGenerator[Indexed, None], count: int
) -> web.StreamResponse:  # fmt: skip
    answers = [schema.Answer() for _ in range(count)]
    headers: dict[str, str] = {}
    began = time.monotonic()
    async for index, item in items:
        match item:
            case Started(choice=choice):
                headers, shape = node_headers(choice), _of_model(shape, choice)
            case Delta():
                answers[index].text += item.text
                answers[index].logprobs += item.logprobs
                if request.transport is None or request.transport.is_closing():
                    raise Unavailable("the client has gone away")  # nobody reads this; leaving cancels the request
            case Done():
                answers[index].done = item
                headers |= end_headers(item, time.monotonic() - began)
    return web.json_response(shape.whole(answers), headers=headers)


def _of_model(shape: schema.Shape, choice: Choice) -> schema.Shape:
    return replace(shape, model=choice.model)


class _Stream:
    """One answer as server-sent events. Errors before the first item keep their status; later ones are events."""

    def __init__(self, request: web.Request, shape: schema.Shape, usage: bool) -> None:
        self._request = request
        self._shape = shape
        self._usage = usage
        self._ended: list[Done] = []
        self._calling: defaultdict[int, Calling] = defaultdict(Calling)
        self._began = time.monotonic()
        self._response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def send(self, items: AsyncGenerator[Indexed, None]) -> web.StreamResponse:
        try:
            async with aclosing(with_silences(items, KEEP_ALIVE_S)) as heard:
                async for heard_of in heard:
                    await self._item(*(heard_of or (0, None)))
            if self._usage:
                await self._event(self._shape.usage_chunk(self._ended))
        except PiclusterError as fault:
            if not self._response.prepared:
                raise
            await self._event(schema.error(fault))
        except ConnectionResetError:
            return self._response  # the client has gone away; leaving cancels the request
        await self._response.write(b"data: [DONE]\n\n")
        await self._response.write_eof()
        return self._response

    async def _item(self, index: int, item: Item | None) -> None:
        if isinstance(item, Started):
            self._shape = _of_model(self._shape, item.choice)
            if not self._response.prepared:
                self._response.headers.update(node_headers(item.choice))
        if not self._response.prepared:
            await self._response.prepare(self._request)
        match item:
            case None:
                await self._response.write(b": queued\n\n")
            case Started():
                if self._shape.chat:
                    await self._event(self._shape.opening(index))
            case Delta():
                if item.text or item.logprobs or not item.calls:
                    await self._event(self._shape.part(index, item.text, item.logprobs))
                await self._called(index, item.calls)
            case Done():
                self._ended.append(item)
                await self._called(index, self._calling[index].rest(item))
                await self._event(self._shape.ending(index, item))
                told = end_headers(item, time.monotonic() - self._began)
                await self._response.write(f": {json.dumps(told)}\n\n".encode())

    async def _called(self, index: int, parts: Sequence[CallPart]) -> None:
        self._calling[index].add(parts)
        for part in parts:
            await self._event(self._shape.calling(index, [part]))

    async def _event(self, data: Mapping[str, Any]) -> None:
        await self._response.write(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")
