"""Model files between nodes: a cluster downloads once, and every node that has a piece of a file gives it on.

    asker ── {have, sha256} ─────▶ every linked node      ◀── whole | these pieces | fetching it | nothing
          ── {digests, sha256} ──▶ one that has it whole  ◀── the digest of each piece
          ── {find, name} ───────▶ every linked node      ◀── its manifest, for what the hub cannot tell
          ── {piece, sha256, n} ─▶ several, two each      ◀── 1 MiB, checked by its digest as it comes
    all pieces there ──▶ store.adopt: SHA-256 of the whole ──▶ blob

Nodes that fetch the same file exchange what they have (`swarm`), so the one that had it sends each piece about once.
Where nobody has it, one of those who want it asks the hub, and the others wait for it. Who would do so says it first
and then looks again: it begins when nobody else says so, a higher node id takes its word back before a lower one, and
everybody before one that has begun. So of two that look at the same moment at least one sees the other. Requests go
over the links, so only members ask, and answers have the lowest priority there.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal

import msgspec

from ..errors import NotFound, PiclusterError, UserError
from ..ids import NodeId
from ..integrations.model_hub import SHA256, HubFile
from .fetching import WAIT_MAX_S
from .sealing import PIECE_BYTES
from .store import Manifest, Store
from .swarm import Going, Has, Peers, Swarm

log = logging.getLogger(__name__)

REQUEST = "model-blob"
"""Request between peers; its body is a `Question` in JSON."""
LOOK_S = 0.5
"""Between two looks at who has what."""
LOOK_AGAIN_S = 0.05
"""While a higher node id has yet to take its word back: it does so at its next look."""
ANSWER_S = 30.0
"""A peer that sends nothing for so long is left out until the next look."""
SENDING_MAX = 16
"""Pieces read and on their way at once, whoever asks: what they take of a small board's memory."""
ASKED_MAX = 32
"""Peers that are asked in one look; of more, some others the next time."""
ANSWER_BYTES_MAX = 1024 * 1024
"""Of `have` and `digests`, which has 27 bytes a piece: a file of 40 GB."""

Request = Callable[[NodeId, str, bytes, float], AsyncGenerator[bytes, None]]
Report = Callable[[str, int], None]


NOTHING = "0" * 64


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    what: Literal["have", "digests", "piece", "find"]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] = NOTHING
    number: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    name: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Lan:
    """`peers` names the linked nodes; `request` is `Links.request`."""

    def __init__(
        self, me: NodeId, store: Store, request: Request, peers: Callable[[], Mapping[NodeId, str]], rng: random.Random,
        look_s: float = LOOK_S,
    ) -> None:  # fmt: skip
        self._me, self._store, self._request, self._peers, self._rng = me, store, request, peers, rng
        self._look_s = look_s
        self._going: dict[str, Going] = {}
        self._sending = asyncio.Semaphore(SENDING_MAX)

    # giving ----------------------------------------------------------------------------------------------------------
    async def serve(self, body: bytes) -> AsyncGenerator[bytes, None]:
        """The answer to a member's `Question`. Raises `UserError` or `NotFound`."""
        try:
            asked = msgspec.json.decode(body, type=Question)
        except msgspec.DecodeError as fault:
            raise UserError("the question about a blob is not valid", str(fault)) from None
        match asked.what:
            case "have":
                yield msgspec.json.encode(self._has(asked.sha256))
            case "digests":
                yield msgspec.json.encode(await asyncio.to_thread(self._store.pieces, asked.sha256))
            case "find":
                yield msgspec.json.encode(self._named(asked.name))
            case "piece":
                async with self._sending:
                    yield await asyncio.to_thread(self._piece, asked.sha256, asked.number)

    def _named(self, name: str) -> Manifest | None:
        """A model of ours by its name, or by where it is from."""
        named = self._store.find(name)
        return named or next((one for one in self._store.entries.values() if one.source == name), None)

    def _has(self, sha256: str) -> Has:
        if self._store.has(sha256):
            return Has(whole=True)
        going = self._going.get(sha256)
        return Has() if going is None else going.has()

    def _piece(self, sha256: str, number: int) -> bytes:
        going = self._going.get(sha256)
        path = self._store.blob(sha256)
        if not path.exists() and going is not None and going.done >> number & 1:
            path = self._store.partial(sha256, "lan")
        try:
            with path.open("rb") as file:
                file.seek(number * PIECE_BYTES)
                piece = file.read(PIECE_BYTES)
        except OSError:
            piece = b""
        if not piece:
            raise NotFound(f"piece {number} of {sha256[:16]}… is not here")
        return piece

    # taking ----------------------------------------------------------------------------------------------------------
    async def find(self, name: str) -> Manifest | None:
        """What a peer has under that name or source."""
        question = Question("find", name=name)
        told = await asyncio.gather(*(self._ask(node, question, Manifest | None) for node in self._some_peers()))
        found = [one for one in told if one is not None and SHA256.fullmatch(one.sha256) and one.size > 0]
        return found[0] if found else None

    async def fetch(self, file: HubFile, report: Report) -> bool:
        """Make `file` a blob with what peers have. False: none has it, and it is ours to fetch from the hub.

        Raises `NoSpace`. Between True and the end of a pull from the hub, others are told that we fetch it: see `over`.
        """
        going = self._going[file.sha256] = Going()
        silent_s, seen = 0.0, -1
        while True:
            told = await self._ask_all(file.sha256)
            if any(has.whole for has in told.values()):
                if await self._swarm(file, going, report).run():
                    return True
                going.digests = ()
                told = await self._ask_all(file.sha256)
            fetching = {node: has.fetching for node, has in told.items() if has.fetching is not None}
            pause_s = LOOK_AGAIN_S
            if not fetching or silent_s > WAIT_MAX_S:
                if going.claimed:
                    going.from_hub = 1
                    return False
                going.claimed, pause_s = True, 0.0
            elif self._is_before_us(fetching):
                going.claimed, pause_s = False, self._look_s
                report(f"waiting for {self._peers().get(min(fetching), min(fetching))}", max(fetching.values()))
            farthest = max(fetching.values(), default=0)
            silent_s, seen = (0.0, farthest) if farthest > seen else (silent_s + pause_s, seen)
            await asyncio.sleep(pause_s)

    def _swarm(self, file: HubFile, going: Going, report: Report) -> Swarm:
        sha256 = file.sha256

        async def digests(node: NodeId) -> tuple[bytes, ...]:
            told = await self._answer(node, Question("digests", sha256), ANSWER_BYTES_MAX)
            try:
                return msgspec.json.decode(told, type=tuple[bytes, ...])
            except msgspec.DecodeError as fault:
                raise UserError("these are no digests", str(fault)) from None

        async def piece(node: NodeId, number: int) -> bytes:
            return await self._answer(node, Question("piece", sha256, number), PIECE_BYTES)

        peers = Peers(lambda: self._ask_all(sha256), digests, piece, lambda node: self._peers().get(node, node))
        return Swarm(self._store, sha256, file.size, going, peers, report, self._rng, self._look_s)

    def _is_before_us(self, fetching: Mapping[NodeId, int]) -> bool:
        """Is somebody else to download it? Who has begun; of those that are about to, the lowest id."""
        return any(completed > 0 for completed in fetching.values()) or min(fetching) < self._me

    def downloaded(self, sha256: str, completed: int) -> None:
        """The hub has sent us so many bytes of it."""
        if going := self._going.get(sha256):
            going.from_hub = max(1, completed)

    def over(self, sha256: str) -> None:
        """The pull has ended, well or not."""
        self._going.pop(sha256, None)

    async def _ask_all(self, sha256: str) -> dict[NodeId, Has]:
        nodes = self._some_peers()
        told = await asyncio.gather(*(self._ask(node, Question("have", sha256), Has) for node in nodes))
        return {node: has for node, has in zip(nodes, told, strict=True) if has is not None}

    def _some_peers(self) -> list[NodeId]:
        nodes = sorted(self._peers())
        return self._rng.sample(nodes, ASKED_MAX) if len(nodes) > ASKED_MAX else nodes

    async def _ask(self, node: NodeId, question: Question, shape: Any) -> Any:
        """A `shape`; None where the peer cannot say: it is gone, or of an older release."""
        try:
            return msgspec.json.decode(await self._answer(node, question, ANSWER_BYTES_MAX), type=shape)
        except (PiclusterError, OSError, msgspec.DecodeError) as fault:
            log.debug("%s was asked about a blob: %s", node, fault)
            return None

    async def _answer(self, node: NodeId, question: Question, bytes_max: int) -> bytes:
        body = bytearray()
        async with aclosing(self._request(node, REQUEST, msgspec.json.encode(question), ANSWER_S)) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > bytes_max:
                    raise UserError(f"{node} sends more than was asked for")
        return bytes(body)
