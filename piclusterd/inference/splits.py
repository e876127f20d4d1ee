"""Models too big for one board: planned, their parts held for other nodes, and the way between the children.

    owner ─▶ plan ──offer?──▶ every linked node ◀── free bytes, bandwidth | why not      `splitting` decides
    owner ─▶ load ──hold────▶ part's node: a child (`part`) is ready ─▶ "+", then what it says ─▶ the head's child
                    ◀──say──  the part's node asks the head in turn: what its child says       ─▶ the part's child

Each part has two streams over the link, one a direction, as relayed links have (`cluster.relay`): members only, TLS,
credits. Nodes take part where `[inference] split` is set, on both sides, and only with the same build of llama.cpp.
A part that is lost ends the model: llama.cpp cannot go on without its device. It is not split anew by itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec

from ..config import Inference
from ..errors import NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from ..ids import NodeId
from . import rpc
from .budget import Room, need, sequences
from .child import Child
from .gguf import read_shape
from .gguf_layers import read_layers
from .library import Library, Loaded
from .models import ModelSpec, default_threads
from .pool import Pool
from .splitting import Board, Plan, Refusal, Share, plan

log = logging.getLogger(__name__)

REQUEST = "model-part"
"""Request between peers; its body is a `Question` in JSON."""
HELD_MAX = 4
"""Parts on one board: each has buffers and threads of its own."""
OFFER_S = 10.0
SILENCE_S = 366 * 86400.0
"""A model nobody asks says nothing; links ping, and a link that ends ends its streams."""
READY = b"+"
READ_BYTES = 64 * 1024

Request = Callable[[NodeId, str, bytes, float], AsyncGenerator[bytes, None]]


class Linked(Protocol):
    """Of a linked node: `link.LinkInfo`."""

    @property
    def name(self) -> str: ...
    @property
    def rtt_s(self) -> float | None: ...


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`offer`: what could you hold? `hold`: so many bytes of `model`. `say`: what does your child say to part `id`?"""

    what: Literal["offer", "hold", "say"]
    build: Annotated[str, msgspec.Meta(max_length=64)] = ""
    id: Annotated[str, msgspec.Meta(max_length=64)] = ""
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""
    bytes: Annotated[int, msgspec.Meta(ge=0, le=2**48)] = 0


class Offer(msgspec.Struct, frozen=True):
    free: int = 0
    bandwidth: float = 0.0
    why_not: str = ""


class Planned(msgspec.Struct, frozen=True):
    """A prediction. `left_out`: nodes that take no part, with why."""

    model: str
    shares: tuple[Share, ...]
    tokens_s: float
    load_s: float
    guessed: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(slots=True)
class _Way:
    """Between the head's child and one part, on the head's side."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: asyncio.Future[None]
    hearing: asyncio.Task[None] | None = None

    def end(self) -> None:
        if self.hearing is not None:
            self.hearing.cancel()
        self.writer.close()


@dataclass(frozen=True, slots=True)
class _Given:
    """The one socket of a part's child."""

    tunnel: socket.socket

    def told(self) -> tuple[str, ...]:
        return ()

    async def open(self) -> list[socket.socket]:
        return [self.tunnel]


class Splits:
    def __init__(
        self, me: NodeId, name: str, settings: Inference, library: Library, pool: Pool, request: Request,
        peers: Callable[[], Mapping[NodeId, Linked]], room: Callable[[], Room] | None = None,
    ) -> None:  # fmt: skip
        """`request` is `Links.request`, `peers()` the linked nodes; `room()`: this board's memory."""
        self._me, self._name, self._settings = me, name, settings
        self._library, self._pool, self._request, self._peers = library, pool, request, peers
        self._room = room or library.loads.room
        self._ways: dict[tuple[NodeId, str], _Way] = {}
        self._split: dict[str, None] = {}
        self._held: dict[str, Loaded] = {}

    # the head --------------------------------------------------------------------------------------------------------
    async def plan(self, name: str) -> Planned:
        """How the model would be divided, and what that is worth. Raises what stands in the way, with the numbers."""
        spec, found, left_out = await self._planned(name)
        return Planned(spec.name, found.shares, found.tokens_s, found.load_s, found.guessed, left_out)

    async def load(self, name: str) -> Loaded:
        """Have it in memory, divided. Raises as `plan` does, or what stopped it."""
        spec, found, _ = await self._planned(name)
        layers = tuple(share.layers for share in found.shares[1:])
        parts = Boards(self, spec.name, found)
        self._split[spec.name] = None
        return await self._library.load_split(replace(spec, shares=layers, apart=found.apart, parts=parts))

    async def _planned(self, name: str) -> tuple[ModelSpec, Plan, tuple[str, ...]]:
        if why := self._why_not():
            raise why
        self._library.store.get(name)
        spec = self._library.spec(name)
        assert spec is not None, "the store has it"
        shape, layers = await asyncio.to_thread(read_shape, spec.path), await asyncio.to_thread(read_layers, spec.path)
        head = Board(self._me, self._name, self._room().free, self._pool.calibration.bandwidth)
        boards, left_out = await self._offers()
        asked = need(shape, spec.size, spec.context, sequences(spec.slots))
        found = plan(spec.name, layers, shape.width, asked, head, boards)
        if isinstance(found, Refusal):
            why_out = f" Left out: {'; '.join(left_out)}." if left_out else ""
            raise UserError(found.what, found.why + why_out, found.fix)
        if len(found.shares) > rpc.PARTS_MAX:
            raise UserError(f"{spec.name} needs too many boards", f"llama.cpp divides over {rpc.PARTS_MAX} at most.")
        return spec, found, left_out

    async def _offers(self) -> tuple[list[Board], tuple[str, ...]]:
        peers = dict(sorted(self._peers().items()))
        offers = await asyncio.gather(*(self._offer(node) for node in peers))
        told = list(zip(peers.items(), offers, strict=True))
        boards = [
            Board(node, link.name, offer.free, offer.bandwidth, link.rtt_s or 0.0)
            for (node, link), offer in told
            if not offer.why_not
        ]
        return boards, tuple(f"{link.name}: {offer.why_not}" for (_, link), offer in told if offer.why_not)

    async def _offer(self, node: NodeId) -> Offer:
        body = msgspec.json.encode(Question("offer", rpc.built()))
        try:
            async with aclosing(self._request(node, REQUEST, body, OFFER_S)) as chunks:
                return msgspec.json.decode(b"".join([chunk async for chunk in chunks]), type=Offer)
        except (PiclusterError, msgspec.DecodeError) as fault:
            return Offer(why_not=str(fault).rstrip("."))

    async def open(self, model: str, share: Share) -> socket.socket:
        """The socket of the head's child to that share's part, which is ready. Raises what stopped it."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        way = _Way(reader, writer, asyncio.get_running_loop().create_future())
        node, id = NodeId(share.node), secrets.token_hex(16)
        self._ways[node, id] = way
        question = Question("hold", rpc.built(), id, model, share.bytes)
        way.hearing = asyncio.create_task(self._hear(way, node, share.name, question), name=f"part of {model}")
        way.hearing.add_done_callback(lambda _: self._ways.pop((node, id), None))
        try:
            await way.ready
        except BaseException:
            theirs.close()
            way.end()
            raise
        return theirs

    async def _hear(self, way: _Way, node: NodeId, name: str, question: Question) -> None:
        """What the part says, for the head's child, until either is gone."""
        fault: PiclusterError = Unavailable("its stream ended")
        try:
            async with aclosing(self._request(node, REQUEST, msgspec.json.encode(question), SILENCE_S)) as chunks:
                async for chunk in chunks:
                    if way.ready.done():
                        way.writer.write(chunk)
                        await way.writer.drain()
                    else:
                        way.ready.set_result(None)
        except ConnectionError:
            return  # the head's own child is gone, which the pool sees
        except PiclusterError as told:
            fault = told
        if way.ready.done():
            self._lost(question.model, f"The part on {name} was lost: {fault}")
        else:
            way.ready.set_exception(fault)
        way.writer.close()

    def _lost(self, model: str, why: str) -> None:
        served = self._pool.served(model)
        if served is not None and served.spec.shares and served.state != "failed":
            served.lose(f"{why} Load it again when that node is back: `picluster load {model} --split`.")

    async def _say(self, peer: NodeId, id: str) -> AsyncGenerator[bytes, None]:
        way = self._ways.get((peer, id))
        if way is None:
            raise NotFound("this node has no such part")
        while data := await way.reader.read(READ_BYTES):
            yield data
        way.end()  # the head's child closed it: it is unloaded

    # the parts -------------------------------------------------------------------------------------------------------
    async def serve(self, peer: NodeId, body: bytes) -> AsyncGenerator[bytes, None]:
        """The answer to a member's `Question`. Raises `UserError`, `Refused`, `NotFound` or `Unavailable`."""
        try:
            asked = msgspec.json.decode(body, type=Question)
        except msgspec.DecodeError as fault:
            raise UserError("the question about a part is not valid", str(fault)) from None
        match asked.what:
            case "offer":
                why = self._why_not(asked.build)
                offer = Offer(self._room().free, self._pool.calibration.bandwidth)
                yield msgspec.json.encode(Offer(why_not=str(why).rstrip(".")) if why else offer)
            case "hold":
                async with aclosing(self._hold(peer, asked)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            case "say":
                async with aclosing(self._say(peer, asked.id)) as chunks:
                    async for chunk in chunks:
                        yield chunk

    async def _hold(self, peer: NodeId, asked: Question) -> AsyncGenerator[bytes, None]:
        """Ready, then what our child says. It lives for as long as the head listens."""
        if why := self._why_not(asked.build):
            raise why
        if asked.id in self._held or len(self._held) >= HELD_MAX:
            raise Overloaded(f"{self._name} holds enough parts already", f"It holds {len(self._held)}.")
        if asked.bytes > (free := self._room().free):
            raise Unavailable(f"{self._name} has not enough memory", f"{asked.bytes} bytes are asked, {free} are free.")
        for_whom = f"for {self._peers()[peer].name}"
        name = f"part of {asked.model}"
        self._held[asked.id] = Loaded(name, "held", for_whom, asked.bytes, 0, 0, 0, None)
        try:
            child, reader, writer = await self._start(name, asked.bytes)
            log.info("holding a %s %s: %d MiB", name, for_whom, asked.bytes // 2**20)
            pulling = asyncio.create_task(self._pull(peer, asked.id, writer), name=name)
            try:
                yield READY
                with suppress(ConnectionError):  # reset: it died with bytes unread
                    while data := await reader.read(READ_BYTES):
                        yield data
                raise Unavailable(f"the process that held it on {self._name} ended")
            finally:
                pulling.cancel()
                writer.close()
                await child.close(grace_s=0)
        finally:
            del self._held[asked.id]

    async def _start(self, name: str, size: int) -> tuple[Child, asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        threads = default_threads()
        spec = ModelSpec(name, Path(), 0, 0, 1, *threads, kind="part", apart=size, parts=_Given(theirs))
        try:
            child, _ = await Child.start(spec, self._settings.load_timeout_s, self._pool.worker_socket)
        except BaseException:
            theirs.close()
            writer.close()
            raise
        return child, reader, writer

    async def _pull(self, peer: NodeId, id: str, writer: asyncio.StreamWriter) -> None:
        """What the head's child says, for ours."""
        try:
            body = msgspec.json.encode(Question("say", id=id))
            async with aclosing(self._request(peer, REQUEST, body, SILENCE_S)) as chunks:
                async for chunk in chunks:
                    writer.write(chunk)
                    await writer.drain()
        except (PiclusterError, ConnectionError) as fault:
            log.info("a part's head is gone: %s", fault)
        finally:
            writer.close()  # our child ends with it

    # both ------------------------------------------------------------------------------------------------------------
    def held(self) -> tuple[Loaded, ...]:
        """The parts that this node holds for others."""
        return tuple(self._held.values())

    def _why_not(self, build: str = "") -> PiclusterError | None:
        """Why this node takes no part with a node of that build; None where it does."""
        if not self._settings.split:
            return Refused(f"{self._name} splits no models", "", "Set [inference] split = true there.")
        if not (ours := rpc.built()):
            what, why, fix = rpc.NO_RPC
            return Refused(f"{self._name}: {what}", why, fix)
        if build and build != ours:
            return Refused(f"{self._name} has another llama.cpp", f"llama-cpp-python {ours}, not {build}.", "Upgrade.")
        return None

    async def close(self) -> None:
        """Unload what is split, and let go of all parts."""
        for name in self._split:
            await self._library.loads.unload(name)
        hearing = [way.hearing for way in self._ways.values() if way.hearing is not None]
        for way in tuple(self._ways.values()):
            way.end()
        await asyncio.gather(*hearing, return_exceptions=True)


@dataclass(frozen=True, slots=True, eq=False)
class Boards:
    """The `models.Parts` of one split model."""

    splits: Splits
    model: str
    plan: Plan

    def told(self) -> tuple[str, ...]:
        return tuple(f"{share.name} {share.layers}" for share in self.plan.shares)

    async def open(self) -> list[socket.socket]:
        opened: list[socket.socket] = []
        try:
            for share in self.plan.shares[1:]:
                opened.append(await self.splits.open(self.model, share))  # noqa: PERF401 - closed where one fails
        except BaseException:
            for one in opened:
                one.close()
            raise
        return opened
