"""Files of clients (`/v1/files`), as OpenAI's API words them, on the shelf.

POST ─▶ bytes to this disk ─▶ all lines looked at ─▶ record on several nodes ─▶ {"id", "object": "file", …}

A file for a batch is refused here, by its line, rather than hours later.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from .batches import check_file, is_ours, owned, owner_name
from .errors import Unavailable, UserError
from .shelf import Record, Shelf
from .web.files import KEEP_S_MAX as KEEP_S

PURPOSES = ("batch", "batch_output", "user_data")
"""Of files that clients see; the first and the last they may make."""
NAME_CHARS_MAX = 255

Json = dict[str, Any]


class Uploads:
    def __init__(self, shelf: Shelf, wall: Callable[[], float] = time.time) -> None:
        self._shelf, self._wall = shelf, wall

    async def receive(self, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
        """Raises `UserError` (size), `Unavailable` (no room)."""
        return await self._shelf.receive(chunks)

    async def add(self, received: tuple[str, int], filename: str, purpose: str, keep_s: int = KEEP_S) -> Json:
        """Raises `UserError` (purpose, a line), `Unavailable` (too few others take it)."""
        sha256, size = received
        try:
            if purpose not in (PURPOSES[0], PURPOSES[2]):
                raise UserError(f"purpose {purpose[:64]!r} is not supported", "Files are for batches.", param="purpose")
            if purpose == PURPOSES[0]:
                await asyncio.to_thread(check_file, self._shelf.path(sha256))
        except UserError:
            await self._shelf.discard(sha256)
            raise
        now = int(self._wall())
        record = Record(
            id=f"file-{secrets.token_hex(12)}", purpose=purpose, created_at=now, expires_at=now + keep_s, sha256=sha256,
            bytes=size, filename=filename[:NAME_CHARS_MAX], owner=owner_name(),
        )  # fmt: skip
        try:
            await self._shelf.keep(record)
        except Unavailable:
            await self._shelf.forget([record.id])  # its client comes again, with another
            raise
        return _object(record)

    async def all(self, purpose: str) -> list[Json]:
        found = [one for each in PURPOSES if purpose in ("", each) for one in await self._shelf.all(each)]
        return [_object(record) for record in found if is_ours(record)]

    async def show(self, id: str) -> Json:
        """Raises `NotFound`."""
        return _object(await self._record(id))

    async def content(self, id: str) -> Path:
        """Where its bytes are on this disk. Raises `NotFound`, `Unavailable`."""
        return await self._shelf.open(await self._record(id))

    async def remove(self, id: str) -> None:
        """Raises `NotFound`."""
        await self._shelf.remove(await self._record(id))

    async def _record(self, id: str) -> Record:
        record = await self._shelf.find(id, everywhere=True)  # it may have been deleted elsewhere
        if record.purpose not in PURPOSES:
            raise UserError(f"{id[:128]!r} is no file", param="file_id")
        return owned(record)


def _object(record: Record) -> Json:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }
