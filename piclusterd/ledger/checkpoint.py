"""What a checkpoint says: an entry of the origin's own log that replaces everything before it.

    log     ┌ 1 ┐◀─ … ◀─┌ 98 ┐◀─┌ 99: log.checkpoint {key, name, keep} ✎ ┐◀─┌ 100 ┐◀─ …
            └──── prunable once 99 is stable ────┘

    keep    [[header, payload], …]: entries before it that are still open, as they were, so that their facts come back
            with their own (term, log, seq) and every fold ranks them as before

It is signed like any entry and holds the key again, so that a log can begin with it: `entry.extend` accepts it as an
opening after the tip that its own header names. The origin alone decides what is closed (`frontier.open_seqs`); nobody
prunes another's log by his own judgement. Where what is open does not fit one entry there is no checkpoint yet.

Sources: Raft §7 (snapshots), Bamboo (payloads may go, the chain stays), chitchat's `max_gc_version`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import UserError
from ..events import Fact, Record
from ..wire import PAYLOAD_BYTES_MAX, Dropped, Entry
from .entry import CHECKPOINT, Draft, Signer, decode_fact, encode_draft

KEEP_MAX = 4096
"""Entries one checkpoint may keep: msgpack's array cap here, and far more open work than a house of Pis has."""


def draft_checkpoint(signer: Signer, name: str, keep: Iterable[Entry]) -> Draft:
    """The checkpoint that keeps `keep`. Raises UserError where that does not fit one entry; nothing changed."""
    kept = [[entry.header, entry.payload] for entry in keep]
    if len(kept) > KEEP_MAX or sum(len(payload) + len(header) for header, payload in kept) > PAYLOAD_BYTES_MAX - 4096:
        why = f"{len(kept)} entries are still open and do not fit one entry"
        raise UserError("no checkpoint can be made now", why, "Wait until more of the work is done.")
    return encode_draft(Record(CHECKPOINT, {"key": signer.public_key, "name": name, "keep": kept}))


def kept_facts(checkpoint: Fact) -> Iterator[Fact]:
    """The facts that `checkpoint` carries on; none for any other kind of fact. Junk in it is skipped."""
    if checkpoint.kind != CHECKPOINT:
        return
    for entry in kept_entries(checkpoint):
        fact = decode_fact(entry)
        if not isinstance(fact, Dropped) and fact.log == checkpoint.log and fact.seq < checkpoint.seq:
            yield fact


def kept_entries(checkpoint: Fact) -> Iterator[Entry]:
    kept: Any = checkpoint.body.get("keep")
    for pair in kept if isinstance(kept, list) else ():
        if isinstance(pair, list) and len(pair) == 2 and all(type(part) is bytes for part in pair):
            yield Entry(pair[0], pair[1])
