"""Keys for the ledger's tests: real Ed25519, and a signer that counts and can be held up."""

from __future__ import annotations

import threading

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from piclusterd.ids import LogId, NodeId, node_id


class Key:
    """An Ed25519 key made of `seed`, so that a run can be repeated."""

    def __init__(self, seed: int = 1) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))
        self.signatures = 0

    @property
    def public_key(self) -> bytes:
        return self._private.public_key().public_bytes_raw()

    @property
    def node(self) -> NodeId:
        return node_id(self.public_key)

    def log(self, epoch: int = 1) -> LogId:
        return LogId(self.node, epoch)

    def sign(self, data: bytes) -> bytes:
        self.signatures += 1
        return self._private.sign(data)


class SlowKey(Key):
    """Signing waits for `go`: holds a transaction open for as long as a test wants."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.signing, self.go = threading.Event(), threading.Event()
        self.go.set()

    def sign(self, data: bytes) -> bytes:
        self.signing.set()
        assert self.go.wait(30)
        return super().sign(data)


def verify(key: bytes, signature: bytes, data: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
