"""What is known of a verified file: how it looked then, and the digest of each of its pieces.

    file ──one read──▶ SHA-256 of the whole (its name), BLAKE2b of each piece (how peers send it)

The pieces' digests are worth what the whole's is: a peer that tells wrong ones is found out when the whole is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import msgspec

PIECE_BYTES = 1024 * 1024
"""What a peer sends in one answer: held in memory at both ends, and lost when a link breaks. Nodes that share a file
give on whole pieces, so they are small. 4 GB: 4,000 pieces."""
READ_BYTES = 1024 * 1024


class Stamp(NamedTuple):
    """Unchanged means not written to: the kernel moves `ctime_ns` with every write, and nobody can put it back."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Seal(msgspec.Struct, frozen=True):
    stamp: Stamp
    pieces: tuple[bytes, ...]


def stamp_of(path: Path) -> Stamp:
    stat = path.stat()
    return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def digest(path: Path) -> tuple[str, tuple[bytes, ...]]:
    """SHA-256 of the file as hex, and the digest of each piece of it. Blocks: a 2 GB model takes a Pi 4 some 20 s."""
    whole, piece, at = hashlib.sha256(), piece_digest(), 0
    pieces = []
    with path.open("rb") as file:
        while read := file.read(READ_BYTES):
            if at and at % PIECE_BYTES == 0:
                pieces.append(piece.digest())
                piece = piece_digest()
            whole.update(read)
            piece.update(read)
            at += len(read)
    if at:
        pieces.append(piece.digest())
    return whole.hexdigest(), tuple(pieces)


def piece_digest(data: bytes = b"") -> hashlib.blake2b:
    """A Pi 4 has no instructions for SHA-256, and two of them would double its wait."""
    return hashlib.blake2b(data, digest_size=16)
