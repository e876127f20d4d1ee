"""Signatures for rehearsals: as deterministic as the rest of the world, and a hundred times cheaper than Ed25519."""

from __future__ import annotations

import hashlib


class SimKey:
    """A `ledger.entry.Signer`. Anyone could forge it; nobody in the simulator does."""

    def __init__(self, number: int) -> None:
        self.public_key = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=32).digest()

    def sign(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, key=self.public_key, digest_size=64).digest()


def verify(key: bytes, signature: bytes, data: bytes) -> bool:
    return hashlib.blake2b(data, key=key, digest_size=64).digest() == signature
