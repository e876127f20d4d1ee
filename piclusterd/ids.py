"""Names of things: nodes, terms, logs, runs. Plain values, no behaviour beyond checking their own shape."""

from __future__ import annotations

import hashlib
from typing import NamedTuple, NewType

NodeId = NewType("NodeId", str)
"""16 lower-case hex digits: the first 8 bytes of SHA-256 over the node's raw Ed25519 public key."""

RunId = NewType("RunId", str)
"""32 lower-case hex digits, a function of the workflow and the deduplication key of the event (`run_id`)."""

Term = int
"""Election term (Raft §5.1). Grows; at most one coordinator acts in a term."""

NODE_ID_LENGTH = 16
HEX_DIGITS = "0123456789abcdef"
RUN_ID_LENGTH = 32


class LogId(NamedTuple):
    """One append-only log: a node has one log per epoch; a rewound disk starts a new epoch."""

    origin: NodeId
    epoch: int


def node_id(public_key: bytes) -> NodeId:
    """The id of the node that owns `public_key` (32 raw bytes, Ed25519)."""
    return NodeId(hashlib.sha256(public_key).hexdigest()[:NODE_ID_LENGTH])


def is_node_id(text: str) -> bool:
    return len(text) == NODE_ID_LENGTH and not text.strip(HEX_DIGITS)


def run_id(workflow: str, dedupe_key: str) -> RunId:
    """The id every node derives for the run that `workflow` makes of the event with `dedupe_key`."""
    return RunId(hashlib.sha256(f"{workflow}\0{dedupe_key}".encode()).hexdigest()[:RUN_ID_LENGTH])


def uuid4_of(*parts: str) -> str:
    """A UUID of version 4's shape that is a function of `parts`: the same effect asks for the same id again.

    Services that accept a client-made id (Linear's `commentCreate`) then refuse the second of two equal effects.
    """
    raw = bytearray(hashlib.sha256("\0".join(parts).encode()).digest()[:16])
    raw[6] = (raw[6] & 0x0F) | 0x40  # version 4 (RFC 9562 §5.4)
    raw[8] = (raw[8] & 0x3F) | 0x80  # variant
    text = raw.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
