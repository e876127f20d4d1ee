"""The bytes on a link: a WebSocket message is a frame, `msgpack [stream, kind, body]`, or a list of frames. Pure.

    hello ⇄ hello                       first on every link, nothing before it
    control  body = a wire.PeerMessage  stream 0
    ping → pong                         the same 8 bytes back, stream 0
    open → data* → end | reset          a request and its answer; `reset` from either side ends it
    credit                              the asker took so many bytes off the stream

Streams are numbered by the asker: odd by the node that dialled, even by the other (as HTTP/2 does).
An answer may have `WINDOW_BYTES` on the way at most, in chunks of `CHUNK_BYTES_MAX`: neither a slow reader nor a large
file makes the sender hold more, and a ping never waits behind more than a chunk (memberlist #357 and its kin are
why every length is checked before it is believed). Whatever is not a frame is *returned* as `wire.Dropped`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from ..errors import Broken, NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from ..ids import NodeId
from ..wire import MESSAGE_BYTES_MAX, Dropped, unpack

CHUNK_BYTES_MAX = 64 * 1024
WINDOW_BYTES = 256 * 1024
STREAMS_MAX = 128
"""Answers open at once in one direction of a link: more than any board computes side by side."""
SMALL_BYTES_MAX = 4096
"""Hello, reset and the like."""
ENVELOPE_BYTES = 64
"""The frame's own msgpack around a body, generously."""
FRAME_BYTES_MAX = MESSAGE_BYTES_MAX + ENVELOPE_BYTES
PACK_FRAMES_MAX = 64
PACK_BYTES_MAX = CHUNK_BYTES_MAX
"""Frames that wait go in one message: one TLS record and one system call; no more than a ping may wait behind."""
STREAM_MAX = 2**53
REQUEST_NAME_CHARS_MAX = 128
REQUEST_BYTES_MAX = MESSAGE_BYTES_MAX - 2 * REQUEST_NAME_CHARS_MAX
PING_BYTES = 8
RELAY, RELAYED = "relay", "relayed"
"""Requests that pipe another link's bytes: of an end to the relay, and of the relay to the other end (`relay`)."""
CIRCUIT_BYTES = 16
"""Of a relayed circuit's name: chosen by chance, so long that nobody else hits it."""


_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]{1,253}):(\d{1,5})")


def is_address(text: str) -> bool:
    """Is `text` a `host:port` (IPv6 in brackets)? Whoever dials what others say asks first."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 65536


class Kind(IntEnum):
    HELLO = 0
    CONTROL = 1
    OPEN = 2
    DATA = 3
    END = 4
    RESET = 5
    PING = 6
    PONG = 7
    CREDIT = 8


_BODY_MAX = {
    Kind.HELLO: SMALL_BYTES_MAX,
    Kind.CONTROL: MESSAGE_BYTES_MAX,
    Kind.OPEN: MESSAGE_BYTES_MAX,
    Kind.DATA: CHUNK_BYTES_MAX,
    Kind.END: 0,
    Kind.RESET: SMALL_BYTES_MAX,
    Kind.PING: PING_BYTES,
    Kind.PONG: PING_BYTES,
    Kind.CREDIT: 8,
}
_ON_A_STREAM = frozenset({Kind.OPEN, Kind.DATA, Kind.END, Kind.RESET, Kind.CREDIT})


class Frame(NamedTuple):
    stream: int
    kind: Kind
    body: bytes = b""


_Id = Annotated[str, Meta(max_length=64, pattern=r"\A[A-Za-z0-9-]*\Z")]
"""Ids and names end up in logs and on terminals, so they bring nothing but letters, digits and dashes."""
_Address = Annotated[str, Meta(max_length=262, pattern=r"\A[A-Za-z0-9_.:\[\]-]*\Z")]


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Who speaks, and which versions of the protocol. Append only, with a default."""

    lowest: int
    highest: int
    node: NodeId
    cluster_id: _Id
    name: _Id
    addresses: Annotated[tuple[_Address, ...], Meta(max_length=16)] = ()
    life: int = 0
    """Drawn by each process; 0 from a release that draws none."""
    packs: bool = False
    """Does it read several frames in one message?"""


def no_protocol(theirs: Hello, ours: Hello) -> str:
    """Why the two have no protocol in common, and which side is to be upgraded; empty where they have one."""
    if max(theirs.lowest, ours.lowest) <= min(theirs.highest, ours.highest):
        return ""
    older = "this node" if ours.highest < theirs.lowest else f"{theirs.name or theirs.node}"
    return (
        f"{theirs.name} speaks protocol {theirs.lowest} to {theirs.highest}, {ours.name} speaks {ours.lowest} to"
        f" {ours.highest}: upgrade {older} to a release between the two first"
    )


class Request(msgspec.Struct, frozen=True, array_like=True):
    name: Annotated[str, Meta(max_length=REQUEST_NAME_CHARS_MAX)]
    body: bytes


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """What an end asks of a relay, and a relay of an end: `other` is the node at the far side."""

    other: NodeId
    circuit: Annotated[bytes, Meta(min_length=CIRCUIT_BYTES, max_length=CIRCUIT_BYTES)]


def encode(frame: Frame) -> bytes:
    packed: bytes = msgpack.packb((frame.stream, int(frame.kind), frame.body))
    return packed


def pack(encoded: Sequence[bytes]) -> bytes:
    """Encoded frames as one message: at most `PACK_FRAMES_MAX`, for a peer that reads several."""
    if len(encoded) == 1:
        return encoded[0]
    packer = msgpack.Packer()
    return b"".join((packer.pack_array_header(len(encoded)), *encoded))


def decode(data: bytes) -> Frame | Dropped:
    """The only frame in `data`, or why there is none. Never raises."""
    frames = decode_all(data)
    if isinstance(frames, Dropped):
        return frames
    return frames[0] if len(frames) == 1 else Dropped("several frames")


def decode_all(data: bytes) -> list[Frame] | Dropped:
    """The frames in the message `data`, one at least, or why it is none. Never raises."""
    raw = unpack(data, FRAME_BYTES_MAX)
    if isinstance(raw, Dropped):
        return raw
    packed = isinstance(raw, list) and raw and isinstance(raw[0], list)
    if packed and len(raw) > PACK_FRAMES_MAX:
        return Dropped(f"{len(raw)} frames in one message, over the cap of {PACK_FRAMES_MAX}")
    frames: list[Frame] = []
    for each in raw if packed else (raw,):
        frame = _frame(each)
        if isinstance(frame, Dropped):
            return frame
        frames.append(frame)
    return frames


def _frame(raw: Any) -> Frame | Dropped:
    match raw:
        case [int(stream), int(number), bytes(body)] if 0 <= stream <= STREAM_MAX and number in _KINDS:
            kind = _KINDS[number]
        case _:
            return Dropped("not a frame")
    if len(body) > _BODY_MAX[kind]:
        return Dropped(f"{kind.name} of {len(body)} bytes, over the cap of {_BODY_MAX[kind]}")
    if (stream > 0) != (kind in _ON_A_STREAM):
        return Dropped(f"{kind.name} on stream {stream}")
    return Frame(stream, kind, body)


_KINDS = {int(kind): kind for kind in Kind}


def decode_hello(body: bytes) -> Hello | Dropped:
    return _convert(body, Hello)


def decode_request(body: bytes) -> Request | Dropped:
    return _convert(body, Request)


def decode_wish(body: bytes) -> Wish | Dropped:
    return _convert(body, Wish)


def encode_body(value: Hello | Request | Wish) -> bytes:
    return msgspec.msgpack.encode(value)


def decode_credit(body: bytes) -> int | Dropped:
    """Bytes the asker took; more than a window cannot have been on the way."""
    amount = int.from_bytes(body, "big")
    return amount if 0 < amount <= WINDOW_BYTES else Dropped(f"a credit of {amount} bytes")


def encode_credit(amount: int) -> bytes:
    return amount.to_bytes(4, "big")


_ERRORS: dict[int, type[PiclusterError]] = {
    kind.status: kind for kind in (UserError, NotFound, Refused, Unavailable, Overloaded, Broken)
}


def encode_reset(error: PiclusterError) -> bytes:
    """Why a stream ended early; each text is cut so that the frame stays small."""
    retry = error.retry_after_s if isinstance(error, Unavailable) else 0.0
    texts = [text.encode()[:1000].decode(errors="ignore") for text in (error.what, error.why, error.fix)]
    packed: bytes = msgpack.packb([error.status, *texts, retry])
    return packed


def decode_reset(body: bytes) -> PiclusterError:
    """The error the other side met, as one of ours; `Unavailable` if it does not say."""
    raw = unpack(body, SMALL_BYTES_MAX)
    match raw:
        case [int(status), str(what), str(why), str(fix), float(retry)]:
            kind = _ERRORS.get(status, Unavailable)
            if issubclass(kind, Unavailable):
                return kind(what, why, fix, retry_after_s=min(max(retry, 0.0), 3600.0))
            return kind(what, why, fix)
        case _:
            return Unavailable("the other node ended the answer")


_T = TypeVar("_T")


def _convert(body: bytes, shape: type[_T]) -> _T | Dropped:
    raw: Any = unpack(body, MESSAGE_BYTES_MAX)
    if isinstance(raw, Dropped):
        return raw
    try:
        return msgspec.convert(raw, shape, strict=True)
    except msgspec.ValidationError as fault:
        return Dropped(f"not a {shape.__name__}: {fault}")
