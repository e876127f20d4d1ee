"""Closed-loop load on a server: so many connections, each with one request under way, and how long each took.

    Client ──next request──▶ server ──answer──▶ Client ──its next request──▶ …      (keep-alive, one event loop)

The same loop drives both sides of a comparison, and speaks to each in bytes made beforehand, so that what is measured
is the server: `Webhook` is HTTP/1.1, `Put` is etcd's gRPC (HTTP/2, one stream a request). Neither needs a library. What
the loop itself costs is told (`Loaded.client_cpu`): a client that is the limit would be at 100 % of a core.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from piclusterd.demo.signing import sign

Address = tuple[str, int]

ANSWER_S = 30.0
"""No answer for so long: the request failed."""


CLOSED = "the connection was closed"


@dataclass(slots=True)
class Loaded:
    """What came of one load. Times in seconds."""

    took_s: list[float] = field(default_factory=list)
    failed: int = 0
    why: str = ""
    """Of the first that failed."""
    wall_s: float = 0.0
    client_cpu: float = 0.0
    """Of a core, used by this process meanwhile."""

    @property
    def rate(self) -> float:
        """Answered a second."""
        return len(self.took_s) / self.wall_s if self.wall_s else 0.0

    def add(self, other: Loaded) -> None:
        """What a later turn of the same load gave."""
        self.client_cpu = max(self.client_cpu, other.client_cpu)
        self.took_s += other.took_s
        self.wall_s += other.wall_s
        self.failed += other.failed
        self.why = self.why or other.why


class Client(asyncio.Protocol):
    """One connection; `request` sends one and waits for its answer. A subclass knows the protocol."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._answer: asyncio.Future[str] | None = None
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._done(CLOSED)

    async def request(self, prepared: bytes) -> str:
        """Why it failed; "": it was done. Cancel it to give up."""
        if self.transport.is_closing():
            return CLOSED
        self._answer = asyncio.get_running_loop().create_future()
        self.send(prepared)
        return await self._answer

    def send(self, prepared: bytes) -> None:
        self.transport.write(prepared)

    def _done(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(why)


class Webhook(Client):
    """HTTP/1.1; done is a 200."""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or len(body) < _content_length(head):
            return
        self._buffer = b""
        self._done(
            "" if head.startswith(b"HTTP/1.1 200") else (head[9:40] + b" " + body[:200]).decode(errors="replace")
        )


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def webhook(body: bytes, secret: str, delivery: str) -> bytes:
    """A whole request: a delivery of GitHub's, signed."""
    headers = sign("github", body, secret, delivery=delivery) | {"Host": "localhost", "Content-Length": str(len(body))}
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /hooks/github HTTP/1.1", *lines, "", ""]).encode() + body


# gRPC: RFC 9113 (frames), RFC 7541 §6.2.2 (a header that is not indexed), etcd's rpc.proto --------------------------
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 1 << 30
"""Given once: no run is answered more bytes than that on one connection."""


class Put(Client):
    """etcd's KV/Put; done is an answer with a body (a refusal of gRPC's is trailers alone)."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._stream = -1
        transport.write(PREFACE + _frame(SETTINGS, 0, 0, b"") + _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW)))

    def send(self, prepared: bytes) -> None:
        self._stream += 2
        message = b"\0" + struct.pack(">I", len(prepared)) + prepared
        self.transport.write(
            _frame(HEADERS, END_HEADERS, self._stream, PUT_HEADERS) + _frame(DATA, END_STREAM, self._stream, message)
        )
        self._told = False

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at = 0
        while len(data) - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if len(data) - at < 9 + size:
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9], "big")
            self._frame(kind, flags, stream, data[at + 9 : at + 9 + size])
            at += 9 + size
        self._buffer = data[at:]

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == DATA and stream == self._stream:
            self._told = True
        elif kind == HEADERS and flags & END_STREAM and stream == self._stream:
            self._done("" if self._told else f"refused: {body!r}")
        elif kind == RST_STREAM and stream == self._stream:
            self._done(f"the stream was reset: {body!r}")
        elif kind == SETTINGS and not flags & ACK:
            self.transport.write(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self.transport.write(_frame(PING, ACK, 0, body))
        elif kind == GOAWAY:
            self._done(f"the server said goodbye: {body!r}")


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + body


def _header(name: str, value: str) -> bytes:
    return b"\0" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


PUT_HEADERS = b"".join(
    _header(name, value)
    for name, value in (
        (":method", "POST"), (":scheme", "http"), (":path", "/etcdserverpb.KV/Put"), (":authority", "localhost"),
        ("te", "trailers"), ("content-type", "application/grpc"),
    )
)  # fmt: skip


def put(key: bytes, value: bytes) -> bytes:
    """A PutRequest in protobuf: field 1 the key, field 2 the value."""
    return b"\x0a" + _varint(len(key)) + key + b"\x12" + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


# driving -----------------------------------------------------------------------------------------------------------
async def connect(kind: type[Client], where: Address) -> Client:
    """Raises OSError."""
    _, client = await asyncio.get_running_loop().create_connection(kind, *where)
    return client


async def load(kind: type[Client], where: Address, requests: Iterator[bytes], clients: int, seconds: float) -> Loaded:
    """`clients` connections to `where`, each with its next of `requests` as soon as the last is answered."""
    loaded = Loaded()
    pool = [await connect(kind, where) for _ in range(clients)]
    ends = time.monotonic() + seconds

    async def drive(client: Client) -> None:
        while (began := time.monotonic()) < ends and (prepared := next(requests, None)) is not None:
            async with asyncio.timeout(ANSWER_S):
                why = await client.request(prepared)
            if why:
                loaded.failed, loaded.why = loaded.failed + 1, loaded.why or why
            else:
                loaded.took_s.append(time.monotonic() - began)

    wall, cpu = time.monotonic(), time.process_time()
    try:
        await asyncio.gather(*(drive(client) for client in pool))
    finally:
        loaded.wall_s = time.monotonic() - wall
        loaded.client_cpu = (time.process_time() - cpu) / loaded.wall_s
        for client in pool:
            client.transport.abort()
    return loaded


async def until_done(
    kind: type[Client], doors: Sequence[Address], prepared: bytes, every_s: float, patience_s: float
) -> float | None:
    """Seconds until one attempt at `prepared` is answered: a new one every `every_s`, at the next of `doors`.

    An attempt under way is left to go on (etcd answers late, not at all, where its leader died). None: `patience_s`.
    """
    began = time.monotonic()
    done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def attempt(where: Address) -> None:
        with contextlib.suppress(OSError):
            client = await connect(kind, where)
            try:
                if not await client.request(prepared) and not done.done():
                    done.set_result(time.monotonic() - began)
            finally:
                client.transport.abort()

    async def attempts() -> None:
        number = 0
        while True:
            tasks.append(asyncio.create_task(attempt(doors[number % len(doors)])))
            number += 1
            await asyncio.sleep(every_s)

    tasks: list[asyncio.Task[None]] = []
    trying = asyncio.create_task(attempts())
    try:
        async with asyncio.timeout(patience_s):
            return await done
    except TimeoutError:
        return None
    finally:
        for task in (trying, *tasks):
            task.cancel()
        await asyncio.gather(trying, *tasks, return_exceptions=True)


def numbered(make: Callable[[int], bytes], many: int, first: int = 0) -> Iterator[bytes]:
    """`many` requests made now, so that making them is not measured."""
    return iter([make(number) for number in range(first, first + many)])
