"""What one ledger entry is: how it is made, hashed, chained, signed, and read back from bytes nobody vouches for.

    Record ─draft─▶ Draft ─chain─▶ Entry(header, payload, signature) ─wire─▶ decode_header ─▶ extend(tip, …) ─▶ Link

    header    msgpack [version, origin, epoch, seq, prev, kind, term, hlc, payload_hash, size]
    hash      BLAKE2b-256 of the header's bytes; `prev` is the hash of entry seq - 1, 32 zero bytes at seq 1
    payload   msgpack of the body; the header holds its hash, so that it can be pruned while the chain still verifies
    signature only on the last entry of a commit group, over `HEAD_PREFIX` + hash: the chain covers what is before

    log       ┌ seq 1: log.open {key, name} ✎ ┐◀─prev─┌ 2 ┐◀─┌ 3 ┐◀─┌ 4 ✎ ┐◀─ … ◀─┌ 9 ✎ ┐      ✎ signed

Invariants. Hash and signature are always over the bytes that arrived, never over a re-encoding. A log certifies itself:
its first entry holds the public key, `ids.node_id(key)` is its origin, and every signature in it verifies under that
key. What no signature covers yet is not accepted. Own bodies are decoded under the same caps as a peer's before they
are appended, so that no entry is written that another node would refuse.

It refuses, by returning `Dropped` whose reason starts with one of: `junk` (not an entry), `gap` (an entry before it is
missing), `broken chain`, `payload` (not the one that was hashed), `forged` (the signature is not the log's).

Sources: Secure Scuttlebutt and Bamboo (one signed append-only log a node), Certificate Transparency (RFC 6962: a signed
head covers all before it), Kulkarni et al., *Logical Physical Clocks* (OPODIS 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import msgpack

from ..errors import UserError
from ..events import Fact, Record
from ..ids import LogId, NodeId, Term, is_node_id, node_id
from ..wire import (
    BATCH_BYTES_MAX,
    BATCH_ENTRIES_MAX,
    DIGEST_BYTES,
    PAYLOAD_BYTES_MAX,
    Dropped,
    Entry,
    Head,
    unpack,
)

VERSION = 1
OPEN = "log.open"
"""Kind of the first entry of every log, and of no other."""
CHECKPOINT = "log.checkpoint"
"""Kind of an entry that replaces everything before it in its log: it holds the key again, and what is still open."""
HEAD_PREFIX = b"piclusterd ledger head v1\0"
"""Keeps a ledger signature from being one of anything else the same key signs."""
HASH_BYTES = 32
KEY_BYTES = 32
SIGNATURE_BYTES_MAX = 64
"""Ed25519's; the simulator's are shorter."""
ZERO_HASH = bytes(HASH_BYTES)
KIND_CHARS_MAX = 64
HEADER_BYTES_MAX = 256
"""The largest legal header takes 196 bytes; the rest is room for longer encodings of the same numbers."""
SEQ_MAX = 2**40 - 1
"""A thousand entries a second for 34 years; leaves the store room to keep log and seq in one 64-bit key."""
INT_MAX = 2**63 - 1
"""SQLite's largest integer: a header with a larger one could not be stored."""
HLC_COUNTER_BITS = 16
HEADERS_KEPT = 1024
"""Decoded headers at hand: one is looked at when it is checked, stored, served and told. About half a megabyte."""
FACTS_KEPT = 256
"""Decoded entries at hand, small ones only: one is read when it is checked, told and served. About half a megabyte."""
SMALL_BYTES = 512
"""Of a payload: most steps of runs; webhooks are mostly larger."""

Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, signature, data) → is it that key's signature of that data? Must not raise on junk."""


class Signer(Protocol):
    """The node's key. `public_key`: 32 raw bytes."""

    @property
    def public_key(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes: ...


class Header(NamedTuple):
    """The header's fields in wire order. `hlc`: ms << 16 | counter; `size`: the payload's, in bytes."""

    version: int
    origin: NodeId
    epoch: int
    seq: int
    prev: bytes
    kind: str
    term: Term
    hlc: int
    payload_hash: bytes
    size: int

    @property
    def log(self) -> LogId:
        return LogId(self.origin, self.epoch)

    @property
    def place(self) -> str:
        """In words."""
        return f"{self.origin}/{self.epoch} seq {self.seq}"

    def describes(self, payload: bytes) -> bool:
        """Is `payload` the one that was hashed into this header?"""
        return len(payload) == self.size and _payload_hash(payload) == self.payload_hash


class Draft(NamedTuple):
    """A record that has been checked and encoded, waiting for its place in the log."""

    kind: str
    term: Term
    payload: bytes
    body: Mapping[str, Any]
    """The payload as every node will read it."""


class Tip(NamedTuple):
    """Where a log ends: the key it is signed with, its last seq, and that entry's hash."""

    key: bytes
    seq: int
    hash: bytes


class Link(NamedTuple):
    """An entry that hangs on the chain: the new tip, and what the entry says."""

    tip: Tip
    fact: Fact


EMPTY = Tip(b"", 0, ZERO_HASH)
"""The tip of a log nothing is known of."""

_TYPES = (int, str, int, int, bytes, str, int, int, bytes, int)


def entry_hash(header: bytes) -> bytes:
    """BLAKE2b-256 of the header's bytes, as they arrived."""
    return hashlib.blake2b(header, digest_size=HASH_BYTES).digest()


def digest(heads: Iterable[Head]) -> bytes:
    """8 bytes that differ when the heads do (their order does not matter)."""
    packed: bytes = msgpack.packb(sorted(heads))
    return hashlib.blake2b(packed, digest_size=DIGEST_BYTES).digest()


def next_hlc(last: int, wall_ms: int) -> int:
    """The hybrid clock after `last`: the wall's time where that is later, else one count more.

    A wall clock that is wrong is never refused (Pis have none that survives a power cut): the value only orders what
    people see. It sticks at `INT_MAX`, so that one absurd clock cannot make the next entry illegal.
    """
    return min(max(last + 1, wall_ms << HLC_COUNTER_BITS), INT_MAX)


# making -----------------------------------------------------------------------------------------------------------
def draft(record: Record) -> Draft:
    """`record`, encoded. Raises UserError where another node would refuse it; nothing changed."""
    if record.kind in (OPEN, CHECKPOINT) or not _is_kind(record.kind) or not 0 <= record.term <= INT_MAX:
        raise UserError(f"{record.kind!r} in term {record.term} cannot be a ledger entry", "kind or term is not legal")
    return encode_draft(record)


def draft_open(signer: Signer, name: str) -> Draft:
    """The first entry of a log of `signer`'s."""
    return encode_draft(Record(OPEN, {"key": signer.public_key, "name": name}))


def encode_draft(record: Record) -> Draft:
    """`record` encoded, its body checked as a peer will check it. Raises UserError."""
    try:
        payload: bytes = msgpack.packb(dict(record.body))
    except (TypeError, ValueError, OverflowError) as fault:
        raise UserError(f"the body of a {record.kind} entry cannot be encoded", str(fault)) from None
    body = decode_body(payload)
    if isinstance(body, Dropped):
        raise UserError(f"the body of a {record.kind} entry is not legal", body.reason, "Keep less in one entry.")
    return Draft(record.kind, record.term, payload, body)


def chain(
    log: LogId, tip: Tip, drafts: Sequence[Draft], signer: Signer, last_hlc: int, wall_ms: int
) -> tuple[Entry, ...]:
    """Entries for `drafts`, chained to `tip`; the last is signed, and so is each after which a wire batch is full."""
    entries: list[Entry] = []
    seq, prev, hlc = tip.seq, tip.hash, last_hlc
    for group in _groups(drafts):
        for item in group:
            seq, hlc = seq + 1, next_hlc(hlc, wall_ms)
            header = encode_header(log, seq, prev, item, hlc)
            prev = entry_hash(header)
            entries.append(Entry(header, item.payload))
        entries[-1] = Entry(entries[-1].header, entries[-1].payload, signer.sign(HEAD_PREFIX + prev))
    return tuple(entries)


def encode_header(log: LogId, seq: int, prev: bytes, item: Draft, hlc: int) -> bytes:
    """The header's bytes for `item` as entry `seq` of `log`."""
    header = Header(
        VERSION, log.origin, log.epoch, seq, prev, item.kind, item.term, hlc, _payload_hash(item.payload),
        len(item.payload),
    )  # fmt: skip
    packed: bytes = msgpack.packb(header)
    return packed


def draft_bytes(item: Draft) -> int:
    """What `item` will take at most in a batch: its payload, a header, a signature."""
    return len(item.payload) + HEADER_BYTES_MAX + SIGNATURE_BYTES_MAX


def _groups(drafts: Sequence[Draft]) -> Iterator[list[Draft]]:
    """`drafts` cut so that each group fits a batch; one that is larger than a batch by itself goes alone."""
    group: list[Draft] = []
    size = 0
    for item in drafts:
        if group and (size + draft_bytes(item) > BATCH_BYTES_MAX or len(group) == BATCH_ENTRIES_MAX):
            yield group
            group, size = [], 0
        group.append(item)
        size += draft_bytes(item)
    if group:
        yield group


# reading ----------------------------------------------------------------------------------------------------------
def decode_header(data: bytes) -> Header | Dropped:
    """The header in `data`: every type and range checked, or why it is none."""
    return _decode_header(data) if len(data) <= HEADER_BYTES_MAX else Dropped(f"junk: header of {len(data)} bytes")


@lru_cache(HEADERS_KEPT)
def _decode_header(data: bytes) -> Header | Dropped:
    raw = unpack(data, HEADER_BYTES_MAX)
    if isinstance(raw, Dropped):
        return Dropped(f"junk: header: {raw.reason}")
    if not isinstance(raw, list) or tuple(map(type, raw)) != _TYPES:
        return Dropped("junk: header: fields missing or of the wrong type")
    header = Header(*raw)
    if not _in_range(header):
        return Dropped("junk: header: a field is out of range")
    return header


def _in_range(header: Header) -> bool:
    opening = header.seq == 1
    return (
        header.version == VERSION
        and is_node_id(header.origin)
        and 0 <= header.epoch <= INT_MAX
        and 1 <= header.seq <= SEQ_MAX
        and len(header.prev) == HASH_BYTES
        and _is_kind(header.kind)
        and 0 <= header.term <= INT_MAX
        and 0 <= header.hlc <= INT_MAX
        and len(header.payload_hash) == HASH_BYTES
        and 1 <= header.size <= PAYLOAD_BYTES_MAX
        and (header.kind == OPEN) == opening
        and (header.prev == ZERO_HASH) == opening
    )


def _is_kind(kind: str) -> bool:
    return 1 <= len(kind) <= KIND_CHARS_MAX and kind.isascii() and kind.isprintable()


def decode_body(payload: bytes) -> dict[str, Any] | Dropped:
    """The mapping in `payload`, or why it is none."""
    body = unpack(payload, PAYLOAD_BYTES_MAX)
    if isinstance(body, Dropped):
        return Dropped(f"junk: payload: {body.reason}")
    if not isinstance(body, dict) or not all(type(key) is str for key in body):
        return Dropped("junk: payload: not a mapping with text keys")
    return body


def decode_fact(entry: Entry) -> Fact | Dropped:
    """What `entry` says. Checks its shape, not its place in the chain: for entries that were verified when stored."""
    small = len(entry.payload) <= SMALL_BYTES and len(entry.header) <= HEADER_BYTES_MAX
    return _small_fact(entry.header, entry.payload) if small else _decode_fact(entry.header, entry.payload)


def _decode_fact(header_bytes: bytes, payload: bytes) -> Fact | Dropped:
    header = decode_header(header_bytes)
    if isinstance(header, Dropped):
        return header
    body = decode_body(payload)
    if isinstance(body, Dropped):
        return body
    return Fact(header.log, header.seq, header.term, header.kind, body, header.hlc)


_small_fact = lru_cache(FACTS_KEPT)(_decode_fact)
"""Nobody writes into the body of a fact, so whoever reads the same entry may be given the same one."""


def extend(tip: Tip, header: Header, entry: Entry, verify: Verify) -> Link | Dropped:
    """The chain that ends at `tip`, one entry longer, or why `entry` (whose header is `header`) does not hang on it."""
    if header.seq != tip.seq + 1:
        return Dropped(f"gap: {header.place} came after seq {tip.seq}")
    if header.prev != tip.hash:
        return Dropped(f"broken chain: {header.place} does not follow the entry before it")
    if not header.describes(entry.payload):
        return Dropped(f"payload: that of {header.place} is not the one that was hashed")
    fact = decode_fact(entry)
    if isinstance(fact, Dropped):
        return Dropped(f"{fact.reason} ({header.place})")
    key = tip.key or _opening_key(header, fact.body)
    if not key:
        return Dropped(f"forged: {header.place} does not hold the key of its origin")
    hashed = entry_hash(entry.header)
    if entry.signature and not is_signed(key, hashed, entry.signature, verify):
        return Dropped(f"forged: the signature of {header.place} is not its origin's")
    return Link(Tip(key, header.seq, hashed), fact)


def extend_pruned(tip: Tip, header: Header, entry: Entry, verify: Verify) -> Tip | Dropped:
    """As `extend`, for an entry whose payload was pruned here: the chain still verifies without it."""
    if (header.seq, header.prev) != (tip.seq + 1, tip.hash):
        return Dropped(f"broken chain: {header.place} does not follow the entry before it")
    hashed = entry_hash(entry.header)
    if entry.signature and not is_signed(tip.key, hashed, entry.signature, verify):
        return Dropped(f"forged: the signature of {header.place} is not its origin's")
    return Tip(tip.key, header.seq, hashed)


def is_signed(key: bytes, hashed: bytes, signature: bytes, verify: Verify) -> bool:
    """Does `signature` vouch for the log up to the entry whose hash is `hashed`?"""
    return len(signature) <= SIGNATURE_BYTES_MAX and verify(key, signature, HEAD_PREFIX + hashed)


def _opening_key(header: Header, body: Mapping[str, Any]) -> bytes:
    """The key a log.open entry certifies itself with; empty where it does not."""
    key = body.get("key")
    if type(key) is not bytes or len(key) != KEY_BYTES or type(body.get("name")) is not str:
        return b""
    return key if node_id(key) == header.origin else b""


def _payload_hash(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=HASH_BYTES).digest()
