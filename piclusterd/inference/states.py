"""What is said of the states of beginnings: between pool and child, and between two nodes.

    pool ──Look(request)──▶ child ──Looked: its tokens, and how many of them are in the memory──▶ pool
    pool ──Export(tokens)──▶ child ──Exported: how many, bytes, SHA-256──▶ pool ──Take(at)──▶ child ──Piece──▶ pool …
    pool ──Part*, Import(tokens, SHA-256)──▶ child ──Imported──▶ pool           pool ──Cancel(id)──▶ child: let it go
    node ──Ask(key, tokens)──▶ node ──Offer, then the state's bytes──▶ node

No call is open while bytes are on their way over a link: a child is never taken for hung because a peer is slow.
Tokens are little-endian int32, so that what is compared is what the model reads, and not a digest of it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from .protocol import Frame, FromChild, GenerateRequest, ToChild

TOKEN_BYTES = 4
PIECE_BYTES = 4 * 1024 * 1024
"""Of a state in one frame to or from a child, half of a frame's cap: a busy one says a frame a step."""
SHA256_BYTES = 32

Tokens = Annotated[bytes, Meta(max_length=TOKEN_BYTES * 1024 * 1024)]
Size = Annotated[int, Meta(ge=1, le=2**40)]
Count = Annotated[int, Meta(ge=0, le=2**31)]
Sha256 = Annotated[bytes, Meta(min_length=SHA256_BYTES, max_length=SHA256_BYTES)]


# pool → child ----------------------------------------------------------------------------------------------------
class Look(Frame, frozen=True, tag="look"):
    id: int
    request: GenerateRequest


class Export(Frame, frozen=True, tag="export"):
    """Keep the state of the longest beginning of `tokens` ready, if it is `least` long and has at most `bytes_max`."""

    id: int
    tokens: Tokens
    least: Count
    bytes_max: int


class Take(Frame, frozen=True, tag="take"):
    """The piece of what was exported under the id `of` that begins at byte `at`."""

    id: int
    of: int
    at: Count


class Part(Frame, frozen=True, tag="part"):
    """The next bytes of a state of `size` in all. Not answered."""

    id: int
    size: Size
    data: bytes


class Import(Frame, frozen=True, tag="import"):
    """The parts are all there: they are the state of `tokens`."""

    id: int
    tokens: Tokens
    sha256: Sha256


# child → pool ----------------------------------------------------------------------------------------------------
class Looked(Frame, frozen=True, tag="looked"):
    id: int
    tokens: Tokens
    held: Count


class Exported(Frame, frozen=True, tag="exported"):
    id: int
    tokens: Count
    size: Count
    sha256: Sha256


class Piece(Frame, frozen=True, tag="piece"):
    id: int
    data: bytes


class Imported(Frame, frozen=True, tag="imported"):
    id: int


# between nodes ---------------------------------------------------------------------------------------------------
Key = Annotated[bytes, Meta(min_length=SHA256_BYTES, max_length=SHA256_BYTES)]
"""Digest of the model's file, its adapter, the build of llama.cpp and the settings that a state depends on."""


class Ask(Frame, frozen=True):
    model: Annotated[str, Meta(max_length=256)]
    key: Key
    tokens: Tokens
    least: Count
    bytes_max: Count


class Offer(Frame, frozen=True):
    """The first message of the answer: the state of so many of the first tokens asked for."""

    key: Key
    tokens: Annotated[int, Meta(ge=1, le=2**31)]
    size: Size
    sha256: Sha256


ToDock = Look | Export | Take | Part | Import
FromDock = Looked | Exported | Piece | Imported
AnyToChild = ToChild | ToDock
AnyFromChild = FromChild | FromDock
