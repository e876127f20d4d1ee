"""Files that clients give the cluster, and what batches make of them: on several nodes, found from any.

    keep ─▶ disk here, fsynced ─▶ `shelf-take` to every worker ─▶ it asks back for the bytes ─▶ W disks have it
    open ─▶ here? else the workers are asked: `shelf-find`, `shelf-give` ─▶ here, checked by SHA-256

A file is a record (small, JSON) and a blob (its bytes, named by their SHA-256). Of two records of one id the higher
version stands; what was deleted leaves a record that says so, so that a node that was away does not bring it back.
W is the ledger's, or all workers where they are fewer: what is promised outlives whom the ledger outlives.
Owns `<state_dir>/shelf`. Refuses what is too large, or more than the disk's share. The ledger holds references only:
a file of 50,000 lines in every node's log would be there for weeks.

Relays hold no files: what clients ask is nobody's business outside the house.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from .board.private import make_private_directory, sync_directory, write_private
from .errors import Broken, NotFound, PiclusterError, Unavailable, UserError
from .ids import NodeId

log = logging.getLogger("piclusterd")

TAKE, FIND, GIVE, FORGET = "shelf-take", "shelf-find", "shelf-give", "shelf-forget"
NAMES = frozenset({TAKE, FIND, GIVE, FORGET})
"""Requests between peers."""
FILE_BYTES_MAX = 100 * 1024 * 1024
"""Of one file: 50,000 lines of 2 KB."""
SHELF_BYTES_MAX = 1024 * 1024 * 1024
"""Of all files on one node: a thirtieth of a small card."""
FREE_BYTES_MIN = 512 * 1024 * 1024
"""Left free on the disk, for the ledger."""
RECORDS_MAX = 20_000
CHUNK_BYTES = 64 * 1024
SILENCE_S = 60.0
"""A node that takes or gives a file may be silent this long: a slow card syncs."""
FIND_S = 5.0
SWEEP_S = 86400
GONE_S = 30 * 86400
"""How long it is remembered that a file was deleted."""

ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
Sha256 = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")]
Request = Callable[[NodeId, str, bytes, float], AsyncGenerator[bytes, None]]
"""`Links.request`."""


class Company(NamedTuple):
    others: Sequence[NodeId]
    """The workers that are up and linked."""
    copies: int
    """On how many disks a file is before it is promised, this one's included."""


class Gone(NotFound):
    """It was deleted, so it will not turn up with a node that is away."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`expires_at` in Unix seconds; `owner` is the name of the key that made it; `told` is the maker's own."""

    id: Annotated[str, Meta(pattern=rf"^{ID.pattern}$")]
    purpose: str
    created_at: int
    expires_at: int
    version: int = 1
    sha256: Sha256 = ""
    bytes: Annotated[int, Meta(ge=0, le=FILE_BYTES_MAX)] = 0
    filename: str = ""
    owner: str = ""
    deleted: bool = False
    told: dict[str, Any] = {}


class Wanted(msgspec.Struct, frozen=True):
    """By id, or by purpose."""

    id: str = ""
    purpose: str = ""


class Shelf:
    def __init__(
        self,
        root: Path,
        request: Request,
        company: Callable[[], Awaitable[Company]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._blobs, self._records = root / "blobs", root / "records"
        self._request, self._company, self._wall = request, company, wall
        self._held: dict[str, Record] | None = None
        self._order = asyncio.Lock()

    # keeping -----------------------------------------------------------------------------------------------------
    async def receive(self, chunks: AsyncIterator[bytes]) -> tuple[str, int]:
        """The bytes, on this disk: their SHA-256 and number. Raises `UserError`, `Unavailable` (no room), `Broken`."""
        await self._load()
        await asyncio.to_thread(self._check_room)
        path, digest, size = self._blobs / f".{secrets.token_hex(8)}.part", hashlib.sha256(), 0
        try:
            with await asyncio.to_thread(path.open, "xb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > FILE_BYTES_MAX:
                        raise UserError("the file is too large", f"At most {FILE_BYTES_MAX} bytes.", param="file")
                    digest.update(chunk)
                    await asyncio.to_thread(file.write, chunk)
                await asyncio.to_thread(_settle, file, path, self._blobs / digest.hexdigest())
        except OSError as fault:
            raise Broken("the file cannot be written", f"{fault}.") from fault
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return digest.hexdigest(), size

    async def keep(self, record: Record) -> None:
        """`record`, whose blob is here, on every worker within reach.

        Raises `Unavailable` where too few took it: then it is on those, and may be kept again.
        """
        await self._put(record)
        others, copies = await self._company()
        body = msgspec.json.encode(record)
        held = 1 + sum(await asyncio.gather(*(self._told(node, TAKE, body) for node in others)))
        if held < copies:
            why = f"it is on {held} of the {copies} disks that a promise takes."
            raise Unavailable("the file is not safe yet", why, "Are the other nodes up? Try again.")

    async def _told(self, node: NodeId, name: str, body: bytes) -> bool:
        try:
            async with aclosing(self._request(node, name, body, SILENCE_S)) as answer:
                async for _ in answer:
                    pass
        except (PiclusterError, OSError) as fault:
            log.info("%s did not %s: %s", node, name, fault)
            return False
        return True

    async def remove(self, record: Record) -> None:
        """Here and wherever it is reached; where it is not, the record that says so arrives when it is asked for."""
        await self.keep(
            msgspec.structs.replace(
                record, deleted=True, version=record.version + 1, sha256="", bytes=0, told={},
                expires_at=int(self._wall()) + GONE_S,
            )
        )  # fmt: skip

    async def forget(self, ids: Iterable[str]) -> None:
        """Parts that nobody will ask for: gone here and wherever it is reached, without a trace."""
        body = msgspec.json.encode(list(ids))
        await self._forget_here(msgspec.json.decode(body, type=list[str]))
        await asyncio.gather(*(self._told(node, FORGET, body) for node in (await self._company()).others))

    # looking -----------------------------------------------------------------------------------------------------
    async def find(self, id: str, everywhere: bool = False) -> Record:
        """Raises `NotFound`. `everywhere`: others may know a newer one."""
        held = (await self._load()).get(id)
        if held is None or everywhere:
            for record in await self._asked(Wanted(id=id)):
                held = _newer(held, record)
        if held is None or held.expires_at <= self._wall():
            raise NotFound(f"there is no file {id[:128]!r}", param="id")
        if held.deleted:
            await self._put(held)  # this node was away when it was
            raise Gone(f"there is no file {id[:128]!r} any more", param="id")
        return held

    async def all(self, purpose: str) -> list[Record]:
        """Those of `purpose` that any worker within reach knows, the newest first."""
        merged = {record.id: record for record in (await self._load()).values() if record.purpose == purpose}
        for record in await self._asked(Wanted(purpose=purpose)):
            merged[record.id] = _newer(merged.get(record.id), record)
        now = self._wall()
        there = [record for record in merged.values() if not record.deleted and record.expires_at > now]
        return sorted(there, key=lambda record: (-record.created_at, record.id))

    async def open(self, record: Record) -> Path:
        """Where its bytes are on this disk, fetched if need be. Raises `Unavailable` where no worker within reach has
        them now."""
        path = self.path(record.sha256)
        if await asyncio.to_thread(path.exists):
            return path
        for node in (await self._company()).others:
            try:
                await self._fetch(node, record.sha256)
            except (PiclusterError, OSError) as fault:
                log.info("%s does not give %s: %s", node, record.id, fault)
                continue
            return path
        raise Unavailable(f"the bytes of {record.id} are out of reach", "no worker that is up has them.")

    def path(self, sha256: str) -> Path:
        """Where the bytes of that digest are, if they are here."""
        return self._blobs / sha256

    async def discard(self, sha256: str) -> None:
        """Bytes that were received and are not wanted, unless a record names them."""
        await self._drop_blobs({sha256})

    async def _asked(self, wanted: Wanted) -> list[Record]:
        body = msgspec.json.encode(wanted)

        async def one(node: NodeId) -> list[Record]:
            try:
                async with aclosing(self._request(node, FIND, body, FIND_S)) as answer:
                    return msgspec.json.decode(b"".join([chunk async for chunk in answer]), type=list[Record])
            except (PiclusterError, OSError, msgspec.DecodeError):
                return []

        return [record for found in await asyncio.gather(*map(one, (await self._company()).others)) for record in found]

    async def _fetch(self, node: NodeId, sha256: str) -> None:
        async with aclosing(self._request(node, GIVE, sha256.encode(), SILENCE_S)) as chunks:
            found, _ = await self.receive(chunks)
        if found != sha256:
            raise Broken("the bytes that came are others", f"asked for {sha256[:16]}, got {found[:16]}.")

    # peers -------------------------------------------------------------------------------------------------------
    async def serve_peer(self, peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """Answers a worker's request. Raises `UserError` where it is none."""
        try:
            match name:
                case "shelf-take":
                    record = msgspec.json.decode(body, type=Record)
                    if record.sha256 and not await asyncio.to_thread((self._blobs / record.sha256).exists):
                        await self._fetch(peer, record.sha256)
                    await self._put(record)
                case "shelf-find":
                    wanted = msgspec.json.decode(body, type=Wanted)
                    yield msgspec.json.encode(_matching(wanted, await self._load()))
                case "shelf-forget":
                    await self._forget_here(msgspec.json.decode(body, type=list[str]))
                case _:
                    sha256 = msgspec.convert(body.decode(), Sha256)
                    async for chunk in _chunks(self._blobs / sha256):
                        yield chunk
        except (msgspec.MsgspecError, UnicodeDecodeError) as fault:
            raise UserError("that is no request for files", f"{fault}.") from None

    # disk --------------------------------------------------------------------------------------------------------
    async def _load(self) -> dict[str, Record]:
        async with self._order:
            if self._held is None:
                self._held = await asyncio.to_thread(self._read)
            return self._held

    def _read(self) -> dict[str, Record]:
        for directory in (self._blobs, self._records):
            make_private_directory(directory)
        held = {}
        for path in self._records.glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=Record)
                held[record.id] = record
            except msgspec.DecodeError as fault:
                log.error("the record %s cannot be read: %s", path, fault)
        return held

    async def _put(self, record: Record) -> None:
        held = await self._load()
        async with self._order:
            before = held.get(record.id)
            if before is not None and _newer(before, record) is before:
                return
            if before is None and len(held) >= RECORDS_MAX:
                raise Unavailable("there are too many files", f"At most {RECORDS_MAX}.", "Delete some.")
            path = self._records / f"{record.id}.json"
            await asyncio.to_thread(write_private, path, msgspec.json.encode(record))
            held[record.id] = record
        if before is not None and before.sha256 != record.sha256:
            await self._drop_blobs({before.sha256})

    async def _forget_here(self, ids: Sequence[str]) -> None:
        held = await self._load()
        known = [held[id] for id in ids if id in held]
        for record in known:
            del held[record.id]
            await asyncio.to_thread((self._records / f"{record.id}.json").unlink, missing_ok=True)
        await self._drop_blobs({record.sha256 for record in known})

    async def _drop_blobs(self, digests: set[str]) -> None:
        """Those that no record names any more."""
        named = {record.sha256 for record in (await self._load()).values()}
        for sha256 in digests - named - {""}:
            await asyncio.to_thread((self._blobs / sha256).unlink, missing_ok=True)

    async def run(self) -> None:
        """Sweep at the start and once a day, until cancelled."""
        while True:
            try:
                await self.sweep()
            except OSError as fault:
                log.error("the files that have expired are not swept: %s", fault)
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> None:
        """Away with what has expired, and with bytes that a stop in the middle left."""
        held, now = await self._load(), self._wall()
        await self._forget_here([record.id for record in held.values() if record.expires_at <= now])
        there = await asyncio.to_thread(lambda: {path.name for path in self._blobs.iterdir() if _old(path, now)})
        for part in (name for name in there if name.startswith(".")):
            await asyncio.to_thread((self._blobs / part).unlink, missing_ok=True)
        await self._drop_blobs({name for name in there if not name.startswith(".")})

    def _check_room(self) -> None:
        used = sum(path.stat().st_size for path in self._blobs.iterdir())
        if used > SHELF_BYTES_MAX:
            raise Unavailable("the files of this node have their share of the disk", fix="Delete some.")
        if shutil.disk_usage(self._blobs).free < FREE_BYTES_MIN + FILE_BYTES_MAX:
            raise Unavailable("the disk is too full for files", "The ledger needs what is left.", "Free some space.")


def _matching(wanted: Wanted, held: dict[str, Record]) -> list[Record]:
    if wanted.id:
        return [held[wanted.id]] if wanted.id in held else []
    return [record for record in held.values() if record.purpose == wanted.purpose]


def _old(path: Path, now: float) -> bool:
    """Long enough here that nobody is about to name it."""
    try:
        return now - path.stat().st_mtime > 3600
    except FileNotFoundError:
        return False


def _settle(file: Any, path: Path, blob: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    path.chmod(0o600)
    path.rename(blob)
    sync_directory(blob.parent)


def _newer(one: Record | None, other: Record) -> Record:
    return other if one is None or (other.deleted, other.version) > (one.deleted, one.version) else one


async def _chunks(path: Path) -> AsyncGenerator[bytes, None]:
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except OSError as fault:
        raise NotFound("the file is not here", f"{fault.strerror}.") from None
    with file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
