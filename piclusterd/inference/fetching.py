"""One file of the hub onto this disk: resumed where it broke off, and given its name once all of it is verified.

    partial ◀─append─ bytes from its length on ─┬─ cut off ──▶ again from there, after a pause
                                                ├─ more than promised ──▶ refused
                                                └─ all there ──▶ store.adopt (SHA-256 of the whole) ──▶ blob

What is on the disk is trusted for nothing but its length: the whole is read and hashed at the end. A resumed download
that does not verify is fetched once more from nothing, since a power cut may have spoilt its beginning.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from ..errors import Unavailable, UserError
from ..integrations.model_hub import HubFile
from .store import MIB, NoSpace, NotAsPromised, Store

WRITE_BYTES = MIB
"""Gathered before a thread writes them: one trip for many small reads off the network."""
SYNC_BYTES = 64 * MIB
"""Between two fsyncs, each with a look at the free space: what a power cut costs, and what may wait in memory."""
TRIES_MAX = 6
"""In a row that brought no byte."""
PAUSE_S, PAUSE_MAX_S = 0.5, 20.0
WAIT_MAX_S = 60.0
"""A server that asks for more is answered by giving up: the person is told, and the beginning is kept."""

Read = Callable[[int], AsyncGenerator[bytes, None]]
"""The bytes from an offset on; empty bytes first: from 0 on instead."""


class Progress(msgspec.Struct, frozen=True):
    """Where a pull is; bytes. `status`: resolving, waiting for NODE, downloading, from NODE, verifying, done."""

    status: str
    completed: int = 0
    total: int = 0
    digest: str = ""
    rate: float = 0.0
    """Bytes a second, of late."""


Report = Callable[[str, int], None]
"""(status, completed)"""


async def fetch(
    store: Store, file: HubFile, read: Read, report: Report, rng: random.Random, pause_s: float = PAUSE_S
) -> None:
    """Make `file` a blob. Raises `NotAsPromised`, `NoSpace` (the beginning is kept), or what `read` raises for good."""
    partial = store.partial(file.sha256)
    resumed = await asyncio.to_thread(_length, partial) > 0
    while True:
        try:
            await _complete(store, file, read, report, rng, pause_s)
        except OSError as fault:
            partial.unlink(missing_ok=True)  # whoever filled the disk, the ledger needs it more
            raise NoSpace("the disk failed while a model was fetched", f"{fault.strerror}; what had come was removed.",
                          "See `picluster doctor`.", retry_after_s=60.0) from None  # fmt: skip
        report("verifying", file.size)
        try:
            await asyncio.to_thread(store.adopt, partial, file.sha256, file.size)
        except NotAsPromised:
            if not resumed:
                raise
            resumed = False
            continue
        return


async def _complete(
    store: Store, file: HubFile, read: Read, report: Report, rng: random.Random, pause_s: float
) -> None:
    """The partial, until it has `file.size` bytes."""
    partial, tries = store.partial(file.sha256), 0
    while (have := await asyncio.to_thread(_length, partial)) < file.size:
        await asyncio.to_thread(store.check_space, file.size - have)
        report("downloading", have)
        fault: Unavailable = Unavailable("the download was cut off", "The server sent less than it told.")
        try:
            await _append(store, partial, have, file.size, read, report)
        except Unavailable as cut:
            if cut.status != Unavailable.status:
                raise
            fault = cut
        if (now := await asyncio.to_thread(_length, partial)) >= file.size:
            break
        tries = 0 if now > have else tries + 1
        if tries >= TRIES_MAX or fault.retry_after_s > WAIT_MAX_S:
            raise fault
        await asyncio.sleep(rng.uniform(0, min(PAUSE_MAX_S, pause_s * 2**tries)))
    if have > file.size:
        partial.unlink(missing_ok=True)
        raise NotAsPromised("the hub sends more than it promised", f"{file.size} bytes were promised.")


async def receive(store: Store, chunks: AsyncGenerator[bytes, None], size: int) -> str:
    """A file of `size` bytes that somebody sends, as a blob: its SHA-256. Raises `NotAsPromised`, `NoSpace`, …"""
    await asyncio.to_thread(store.check_space, size)
    partial = await asyncio.to_thread(store.new_partial)

    async def read(_: int) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk

    try:
        await _append(store, partial, 0, size, read, lambda status, completed: None)
        if (came := await asyncio.to_thread(_length, partial)) != size:
            raise UserError("the file was cut off on its way", f"{came} of {size} bytes came.", "Send it again.")
        return await asyncio.to_thread(store.settle, partial)
    finally:
        await asyncio.to_thread(partial.unlink, missing_ok=True)


async def _append(store: Store, partial: Path, have: int, size: int, read: Read, report: Report) -> None:
    buffer = bytearray()
    with _opened(partial) as out:  # not in a thread: cancelled there, nobody would close it
        try:
            async with aclosing(read(have)) as chunks:
                async for chunk in chunks:
                    if not chunk:
                        out.truncate(0)  # the server does not resume
                        have = 0
                    buffer += chunk
                    if have + len(buffer) > size:
                        out.truncate(0)
                        buffer.clear()
                        raise NotAsPromised("the hub sends more than it promised", f"{size} bytes were promised.")
                    if len(buffer) >= WRITE_BYTES:
                        have = await _flush(store, out, buffer, have, size)
                        report("downloading", have)
        finally:
            await _flush(store, out, buffer, have, size)
            await _finished(os.fsync, out.fileno())


async def _flush(store: Store, out: FileIO, buffer: bytearray, have: int, size: int) -> int:
    data = bytes(buffer)
    buffer.clear()
    await _finished(_write, store, out, data, have, size)
    return have + len(data)


async def _finished(work: Callable[..., None], *args: Any) -> None:
    """`work` in a thread; even if cancelled, it is over on return: the file it writes to is closed next."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _write(store: Store, out: FileIO, data: bytes, have: int, size: int) -> None:
    left = memoryview(data)
    while left:
        left = left[out.write(left) :]
    if have // SYNC_BYTES != (have + len(data)) // SYNC_BYTES:
        os.fsync(out.fileno())
        store.check_space(size - have - len(data))


def _opened(partial: Path) -> FileIO:
    return FileIO(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def _length(partial: Path) -> int:
    try:
        return partial.stat().st_size
    except FileNotFoundError:
        return 0
