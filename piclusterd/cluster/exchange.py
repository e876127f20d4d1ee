"""Two member lists compared without sending them: digests, then lines, then the members that differ.

    A ──digests of buckets──▶ B          equal: silence
    A ◀──lines of those that differ── B  (node, incarnation, rank, facts version): 40 bytes a member
    A ──members B lacks or has older, and which it wants──▶ B ──those──▶ A

In a cluster small enough for its lists to be the same at rest, the one digest rides on every ping and answer.
Up to ONE_BUCKET_MAX members there is one bucket. A digest is the XOR of a hash of each line, so it does not depend on
order and costs no sorting; it is compared, never trusted, and a wrong "equal" lasts until the next change of either.
Tombstones are in no digest, only among the lines: who never knew a removed member need not hear of it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..ids import NodeId
from ..wire import Line, Member, PushPull
from .roster import RANK, Roster

ONE_BUCKET_MAX = 256
MEMBERS_A_BUCKET = 4
BUCKETS_MAX = 1024
MARK_BYTES = 6
"""Of a line's hash: a false "equal" once in 10^14 comparisons."""
MARKS_CACHED = 16_384
"""A few versions of every line of the largest cluster."""
MEMBERS_A_MESSAGE = 128
"""Members with facts in one message: about 40 KiB, so that a ping never waits long behind a list."""


@lru_cache(maxsize=MARKS_CACHED)
def _mark(line: Line) -> int:
    text = f"{line.node} {line.incarnation} {line.rank} {line.version}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=MARK_BYTES).digest(), "big")


@lru_cache(maxsize=MARKS_CACHED)
def _hash(node: NodeId) -> int:
    return zlib.crc32(node.encode())


def _line(member: Member) -> Line:
    return Line(member.node, member.incarnation, RANK[member.state], member.facts.version)


def digests(roster: Roster, buckets: int = 0) -> tuple[bytes, ...]:
    """One a bucket; 0: as many as suit the list's length."""
    marks = [0] * (buckets or _buckets(len(roster.peers) + 1))
    for member in roster.listed():
        marks[_hash(member.node) % len(marks)] ^= _mark(_line(member))
    return tuple(mark.to_bytes(MARK_BYTES, "big") for mark in marks)


class ListDigest:
    """The digest of a list that fits one bucket, worked out again only when the list changed: every ping asks."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._mine: Member | None = None
        self._changes = 0
        self._digest = b""

    def __call__(self) -> bytes:
        roster = self._roster
        if roster.mine is not self._mine or roster.changes != self._changes:
            self._mine, self._changes = roster.mine, roster.changes
            (self._digest,) = digests(roster, 1)
        return self._digest


def answers(roster: Roster, theirs: PushPull) -> list[PushPull]:
    """What to send back; its members have been merged already. Nothing where the lists are the same."""
    buckets = len(theirs.digests)
    if buckets > BUCKETS_MAX:
        return []
    if theirs.lines is not None:
        return _compare(roster, theirs.digests, theirs.lines)
    if theirs.digests:
        differ = _differing(roster, theirs.digests)
        known = [*roster.listed(), *roster.tombstones()]
        lines = tuple(_line(member) for member in known if _hash(member.node) % buckets in differ)
        return [PushPull((), True, digests(roster, buckets), lines)] if differ else []
    if theirs.reply:
        return _parts(list(roster.members()), ())
    wanted = [roster.line_of(node) for node in theirs.want]
    return _parts([member for member in wanted if member], ())


def _differing(roster: Roster, theirs: Sequence[bytes]) -> frozenset[int]:
    """The buckets whose digests are not the same."""
    ours = digests(roster, len(theirs)) if theirs else ()
    return frozenset(number for number, digest in enumerate(theirs) if ours[number] != digest)


def _compare(roster: Roster, theirs: Sequence[bytes], lines: Iterable[Line]) -> list[PushPull]:
    """What they lack or have older, and whom we lack or have older. `lines` are theirs where `theirs` differ."""
    differ = _differing(roster, theirs)
    said = {line.node: line for line in lines}
    give = [m for m in roster.listed() if m.node not in said and differ and _hash(m.node) % len(theirs) in differ]
    want = []
    for node, line in said.items():
        known = roster.line_of(node)
        if known is None:
            want += [node] if line.rank != RANK["removed"] else []
            continue
        ours = _line(known)
        if ours[1:3] > line[1:3] or ours.version > line.version:
            give.append(known)
        if ours[1:3] < line[1:3] or ours.version < line.version:
            want.append(node)
    return _parts(give, tuple(want))


def _parts(members: Sequence[Member], want: tuple[NodeId, ...]) -> list[PushPull]:
    parts = [tuple(members[at : at + MEMBERS_A_MESSAGE]) for at in range(0, len(members), MEMBERS_A_MESSAGE)]
    first, *rest = parts or [()]
    out = [PushPull(first, False, want=want)] if first or want else []
    return [*out, *(PushPull(part, False) for part in rest)]


def _buckets(members: int) -> int:
    return 1 if members <= ONE_BUCKET_MAX else min(BUCKETS_MAX, 1 << (members // MEMBERS_A_BUCKET).bit_length())
