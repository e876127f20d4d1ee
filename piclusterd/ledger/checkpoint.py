"""What a checkpoint says: an entry of the origin's own log that replaces everything before it.

    log     ┌ 1 ┐◀─ … ◀─┌ 98 ┐◀─┌ 99: log.checkpoint {key, name, keep, seen} ✎ ┐◀─┌ 100 ┐◀─ …
            └──── prunable once 99 is stable ────┘

    keep    [[header, payload], …]: entries before it that are still open, as they were, so that their facts come back
            with their own (term, log, seq) and every fold ranks them as before
    seen    [[hlc, digests], …]: by what a redelivery is known again of what it let go, SEEN_BYTES each, in groups
            by the checkpoint that did; carried on from one checkpoint to the next (`frontier.plan` says for how long).
            [hlc, nothing]: what was let go up to then is not known again

It is signed like any entry and holds the key again, so that a log can begin with it: `entry.extend` accepts it as an
opening after the tip that its own header names. The origin alone decides what is closed (`frontier.plan`); nobody
prunes another's log by his own judgement. Where what is open does not fit one entry there is no checkpoint yet.

Sources: Raft §7 (snapshots), Bamboo (payloads may go, the chain stays), chitchat's `max_gc_version`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from ..events import Fact, Record
from ..wire import PAYLOAD_BYTES_MAX, Dropped, Entry
from .entry import CHECKPOINT, Draft, Signer, decode_fact, encode_draft

SEEN_BYTES = 16
"""Of a digest: with 32,768 of them the chance that a new webhook is taken for an old one is 2^-113."""
SEEN_TOTAL_MAX = 512 * 1024
"""Bytes of digests in one checkpoint, half of an entry: 32,768 webhooks, a thousand a day for a month."""
KEEP_MAX = 4096
"""Entries one checkpoint may keep: msgpack's array cap here, and far more open work than a house of Pis has."""


class Seen(NamedTuple):
    """Digests of what one checkpoint let go, one after another; `hlc`: of the newest entry it replaced."""

    hlc: int
    digests: bytes


def draft_checkpoint(signer: Signer, name: str, keep: Iterable[Entry], seen: Sequence[Seen] = ()) -> Draft:
    """The checkpoint that keeps `keep`. Raises UserError where that does not fit one entry; nothing changed."""
    kept = [[entry.header, entry.payload] for entry in keep]
    groups = [[group.hlc, group.digests] for group in seen]
    size = sum(len(payload) + len(header) for header, payload in kept) + sum(len(group.digests) for group in seen)
    if len(kept) > KEEP_MAX or size > PAYLOAD_BYTES_MAX - 4096:
        why = f"{len(kept)} entries are still open and do not fit one entry"
        raise UserError("no checkpoint can be made now", why, "Wait until more of the work is done.")
    body = {"key": signer.public_key, "name": name, "keep": kept, "seen": groups}
    return encode_draft(Record(CHECKPOINT, body))


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


def seen_groups(checkpoint: Fact) -> Iterator[Seen]:
    """What `checkpoint` says was seen; junk in it is skipped."""
    groups: Any = checkpoint.body.get("seen")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, list) and len(group) == 2 and type(group[0]) is int and type(group[1]) is bytes:
            yield Seen(*group)


def aged(checkpoint: Fact) -> int:
    """Up to which hybrid clock webhooks that `checkpoint` let go are forgotten; 0: it has seen them all."""
    return max((group.hlc for group in seen_groups(checkpoint) if not group.digests), default=0)


def seen_digests(checkpoint: Fact) -> Iterator[bytes]:
    for group in seen_groups(checkpoint):
        for at in range(0, len(group.digests) - SEEN_BYTES + 1, SEEN_BYTES):
            yield group.digests[at : at + SEEN_BYTES]
