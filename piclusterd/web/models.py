"""The owner's door to the models of any node: wishes in, lines of JSON out.

    picluster ──unix socket──▶ POST /admin/models        {what, name, node, …} → lines; a pull has one a step
                               POST /admin/models/file   the bytes of a GGUF file, ?name= → {"model": …}

What goes wrong before the first line is an answer of its own, with its status; afterwards it is the last line,
`{"error": {…}}`. A client that goes away ends its pull; what has come is kept.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from ..errors import PiclusterError, UserError
from .admin import ModelWish, owner_only

UPLOAD_CHUNK_BYTES = 256 * 1024

Ask = Callable[[ModelWish], AsyncGenerator[dict[str, Any], None]]
Take = Callable[[AsyncGenerator[bytes, None], int, str], Awaitable[dict[str, Any]]]


def routes(ask: Ask, take: Take) -> list[web.RouteDef]:
    """`take` gets the bytes, how many there will be, and the name."""

    async def wished(request: web.Request) -> web.StreamResponse:
        try:
            wish = msgspec.json.decode(await request.read(), type=ModelWish)
        except msgspec.DecodeError as fault:
            raise UserError("that is not understood", str(fault), 'Send {"what": "list"}.') from None
        async with aclosing(ask(wish)) as lines:
            return await _stream(request, lines)

    async def upload(request: web.Request) -> web.Response:
        size = request.content_length
        if not size:
            raise UserError("the file's length is missing", "", "Send it with Content-Length.")
        return web.json_response(await take(_body(request), size, request.query.get("name", "")), status=201)

    return [
        web.post("/admin/models", owner_only(wished)),
        web.post("/admin/models/file", owner_only(upload)),
    ]


async def _stream(request: web.Request, lines: AsyncGenerator[dict[str, Any], None]) -> web.StreamResponse:
    first = await anext(lines)
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    await response.write(msgspec.json.encode(first) + b"\n")
    try:
        async for line in lines:
            await response.write(msgspec.json.encode(line) + b"\n")
    except PiclusterError as fault:
        told = {"what": fault.what, "why": fault.why, "fix": fault.fix, "status": fault.status}
        await response.write(msgspec.json.encode({"error": told}) + b"\n")
    await response.write_eof()
    return response


async def _body(request: web.Request) -> AsyncGenerator[bytes, None]:
    async for chunk in request.content.iter_chunked(UPLOAD_CHUNK_BYTES):
        yield chunk
