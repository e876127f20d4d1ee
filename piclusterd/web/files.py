"""OpenAI's files and batches: the doors. What is behind them is the daemon's (`uploads`, `batches`).

    POST /v1/files (multipart: purpose, file, expires_after)   GET /v1/files[?purpose=]
    GET, DELETE /v1/files/{id}   GET …/content
    POST /v1/batches {input_file_id, endpoint, completion_window, metadata, output_expires_after}
    GET /v1/batches[/{id}]   POST …/cancel

An upload is streamed to the disk: it is never in memory as a whole, and has a limit of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from aiohttp import BodyPartReader, web
from msgspec import Meta

from ..errors import UserError
from ..inference.openai_body import parse
from .batch_lines import Endpoint

PART_BYTES = 64 * 1024
FIELD_BYTES_MAX = 64
"""Of a field of the form beside the file."""
FIELDS_MAX = 8
LISTED_MAX = 100
METADATA_MAX = 16

Json = dict[str, Any]
Received = tuple[str, int]
"""What is on this disk without a name: its SHA-256, and its bytes."""
KEEP_S_MIN, KEEP_S_MAX = 3600, 30 * 86400
"""How long a file is kept, as its client may say; the most where nothing is said."""


class Files(Protocol):
    async def receive(self, chunks: AsyncIterator[bytes]) -> Received: ...
    async def add(self, received: Received, filename: str, purpose: str, keep_s: int) -> Json: ...
    async def all(self, purpose: str) -> list[Json]: ...
    async def show(self, id: str) -> Json: ...
    async def content(self, id: str) -> Path: ...
    async def remove(self, id: str) -> None: ...


class Batches(Protocol):
    async def create(self, wanted: BatchBody) -> Json: ...
    async def show(self, id: str) -> Json: ...
    async def all(self) -> list[Json]: ...
    async def cancel(self, id: str) -> Json: ...


MetaKey = Annotated[str, Meta(max_length=64)]
MetaText = Annotated[str, Meta(max_length=512)]


class ExpiresAfter(msgspec.Struct):
    seconds: Annotated[int, Meta(ge=KEEP_S_MIN, le=KEEP_S_MAX)]
    anchor: Literal["created_at"] = "created_at"


class BatchBody(msgspec.Struct):
    input_file_id: Annotated[str, Meta(min_length=1, max_length=128)]
    endpoint: Endpoint
    completion_window: Literal["24h"] = "24h"
    metadata: Annotated[dict[MetaKey, MetaText], Meta(max_length=METADATA_MAX)] | None = None
    output_expires_after: ExpiresAfter | None = None


def routes(files: Files, batches: Batches) -> list[web.RouteDef]:
    doors = _Doors(files, batches)
    return [
        web.post("/v1/files", doors.upload),
        web.get("/v1/files", doors.files),
        web.get("/v1/files/{id}", doors.file),
        web.get("/v1/files/{id}/content", doors.content),
        web.delete("/v1/files/{id}", doors.delete),
        web.post("/v1/batches", doors.create),
        web.get("/v1/batches", doors.batches),
        web.get("/v1/batches/{id}", doors.batch),
        web.post("/v1/batches/{id}/cancel", doors.cancel),
    ]


class _Doors:
    def __init__(self, files: Files, batches: Batches) -> None:
        self._files, self._batches = files, batches

    async def upload(self, request: web.Request) -> web.Response:
        if not request.content_type.startswith("multipart/"):
            raise UserError(
                "a file is sent as multipart/form-data", "With the fields `purpose` and `file`.", param="file"
            )
        fields: dict[str, str] = {}
        received: Received | None = None
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader) or part.name is None or len(fields) > FIELDS_MAX:
                    raise ValueError("it has parts that are no fields, or too many")
                if part.name != "file":
                    fields[part.name] = (await part.read_chunk(FIELD_BYTES_MAX)).decode("utf-8", "replace")
                elif received is None:
                    received, fields["file"] = await self._files.receive(_parts(part)), part.filename or ""
        except ValueError as fault:
            raise UserError("the form cannot be read", f"{fault}.", param="file") from None
        for needed in ("file", "purpose"):
            if needed not in fields:
                raise UserError(f"`{needed}` is missing", param=needed)
        assert received is not None
        added = await self._files.add(received, fields["file"], fields["purpose"], _keep_s(fields))
        return web.json_response(added)

    async def files(self, request: web.Request) -> web.Response:
        return _list(request, await self._files.all(request.query.get("purpose", "")))

    async def file(self, request: web.Request) -> web.Response:
        return web.json_response(await self._files.show(request.match_info["id"]))

    async def content(self, request: web.Request) -> web.StreamResponse:
        path = await self._files.content(request.match_info["id"])
        return web.FileResponse(path, headers={"Content-Type": "application/jsonl"})

    async def delete(self, request: web.Request) -> web.Response:
        await self._files.remove(id := request.match_info["id"])
        return web.json_response({"id": id, "object": "file", "deleted": True})

    async def create(self, request: web.Request) -> web.Response:
        body = parse(await request.read(), BatchBody)
        return web.json_response(await self._batches.create(body))

    async def batches(self, request: web.Request) -> web.Response:
        return _list(request, await self._batches.all())

    async def batch(self, request: web.Request) -> web.Response:
        return web.json_response(await self._batches.show(request.match_info["id"]))

    async def cancel(self, request: web.Request) -> web.Response:
        return web.json_response(await self._batches.cancel(request.match_info["id"]))


def _keep_s(fields: Mapping[str, str]) -> int:
    """How long the file is to be kept, seconds."""
    said = fields.get("expires_after[seconds]")
    if said is None:
        return KEEP_S_MAX
    if not said.isdecimal() or not KEEP_S_MIN <= int(said) <= KEEP_S_MAX:
        why = f"It is {KEEP_S_MIN} to {KEEP_S_MAX}."
        raise UserError("`expires_after.seconds` is not valid", why, param="expires_after.seconds")
    return int(said)


async def _parts(part: BodyPartReader) -> AsyncGenerator[bytes, None]:
    while chunk := await part.read_chunk(PART_BYTES):
        yield chunk


def _list(request: web.Request, rows: Sequence[Json]) -> web.Response:
    """A page of `rows`: those after `after`, at most `limit`."""
    limit = request.query.get("limit", "")
    most = min(int(limit), LISTED_MAX) if limit.isdigit() and int(limit) else LISTED_MAX
    after = request.query.get("after", "")
    ids = [row["id"] for row in rows]
    start = ids.index(after) + 1 if after in ids else 0
    shown = list(rows[start : start + most])
    edges = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return web.json_response({"object": "list", "data": shown, **edges, "has_more": start + most < len(rows)})
