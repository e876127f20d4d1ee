"""Where states of beginnings leave a child and come into it.

    Export ──longest beginning, shared with a fork──▶ saved ──hashed──▶ outgoing ──Take…──▶ gone (Cancel)
    Part… ──▶ incoming ──Import: all there? SHA-256? one cell for each token?──▶ a seat, idle ──▶ the next prompt's

llama.cpp reads a state by its own words, so nothing reaches it that is not to the byte what an authenticated peer
announced, of this very model, build and settings (`ferry`). The process it runs in has no network and no secrets, and
is all that a bad state could end. States in RAM are counted with those of answers that wait. Runs only in the child.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from ..errors import NotFound, UserError
from .protocol import GenerateRequest
from .residents import Residents
from .states import (
    PIECE_BYTES,
    TOKEN_BYTES,
    Export,
    Exported,
    FromDock,
    Import,
    Imported,
    Look,
    Looked,
    Part,
    Piece,
    Take,
    ToDock,
)

MAGIC = 0xAF143CD8
"""What a sequence's state begins with (llama.cpp, `llama-context.cpp`)."""
HEAD, CELL = struct.Struct("<IiII"), struct.Struct("<iIi")
"""Magic, sequence, streams, cells; then of each cell its position, how many sequences it has, and which."""


class Dock:
    """`tokens`: the prompt as the model reads it; `fork`: a sequence that is empty between steps."""

    def __init__(self, residents: Residents, fork: int, tokens: Callable[[GenerateRequest], list[int]]) -> None:
        self._residents, self._fork, self._tokens = residents, fork, tokens
        self._outgoing: dict[int, bytes] = {}
        self._incoming: dict[int, tuple[int, bytearray]] = {}
        """Of each: its size, and what of it is there."""

    def answer(self, frame: ToDock) -> FromDock | None:
        """None for a `Part`. Raises `UserError` or `NotFound`."""
        match frame:
            case Look(id=number, request=request):
                tokens = self._tokens(request)
                return Looked(number, packed(tokens), self._residents.held(tokens))
            case Export():
                return self._export(frame)
            case Take(id=number, of=of, at=at):
                piece = self._outgoing.get(of, b"")[at : at + PIECE_BYTES]
                if not piece:
                    raise NotFound("there is no such piece of a state")
                return Piece(number, piece)
            case Part(id=number, size=size, data=data):
                self._take_in(number, size, data)
                return None
            case Import():
                return self._import(frame)

    def drop(self, number: int) -> None:
        """What was exported or is coming under this id is not needed any more."""
        self._residents.free(len(self._outgoing.pop(number, b"")))
        if number in self._incoming:
            self._residents.free(self._incoming.pop(number)[0])

    def _export(self, frame: Export) -> Exported:
        count, state = self._residents.lend(unpacked(frame.tokens), frame.least, self._fork, frame.bytes_max)
        if not state:
            raise NotFound(
                "no such beginning is in the memory", f"{count} of its tokens are, {frame.least} were asked for."
            )
        self._outgoing[frame.id] = state
        return Exported(frame.id, count, len(state), hashlib.sha256(state).digest())

    def _take_in(self, number: int, size: int, data: bytes) -> None:
        """What does not fit is not kept, and missed by `_import`."""
        if number not in self._incoming:
            if not self._residents.reserve(size):
                return
            self._incoming[number] = (size, bytearray())
        whole, there = self._incoming[number]
        if len(there) + len(data) <= whole:
            there += data

    def _import(self, frame: Import) -> Imported:
        size, there = self._incoming.get(frame.id, (0, bytearray()))
        tokens = unpacked(frame.tokens)
        try:
            if not size:
                raise UserError("the state is not taken in", "There is no memory for it.")
            if len(there) != size or hashlib.sha256(there).digest() != frame.sha256:
                raise UserError("the state is not what was announced", f"{len(there)} of {size} bytes came.")
            if not holds(there, len(tokens)):
                raise UserError("the state is not of these tokens", f"There are {len(tokens)} of them.")
            if not self._residents.adopt(tokens, bytes(there)):
                raise UserError("the state is not taken in", "The memory has no room, or another shape.")
        finally:
            self.drop(frame.id)
        return Imported(frame.id)


def holds(state: bytes | bytearray, count: int) -> bool:
    """Whether `state` says of itself that it has one cell for each of the positions 0 to `count` - 1."""
    end = HEAD.size + count * CELL.size
    if len(state) <= end:
        return False
    magic, _, streams, cells = HEAD.unpack_from(state)
    if (magic, streams, cells) != (MAGIC, 1, count):
        return False
    found = list(CELL.iter_unpack(state[HEAD.size : end]))
    return all(sequences == 1 for _, sequences, _ in found) and sorted(at for at, _, _ in found) == list(range(count))


def packed(tokens: list[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


def unpacked(data: bytes) -> list[int]:
    """The inverse. Raises `UserError`."""
    if len(data) % TOKEN_BYTES:
        raise UserError("these are no tokens", f"{len(data)} bytes are no whole number of them.")
    return [token for (token,) in struct.iter_unpack("<i", data)]
