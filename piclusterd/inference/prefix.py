"""What two prompts have in common, known without reading either: digests of their beginnings. Pure.

    request ──marks──▶ (digest, bytes) at the end of each message and at growing distances ──▶ WhoServes
    a model answers it ──Cached.add──▶ digests ──gossip: ModelFacts.prefixes──▶ held(…): bytes another node has read

The daemon has no tokeniser, so beginnings are told apart by the bytes of the messages, before any chat template: the
same messages give the same prompt. What a child really holds only the child knows; this is what it most likely holds,
and a wrong guess costs time, never an answer.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from ..wire import Mark
from .protocol import GenerateRequest

FIRST_BYTES, GROWTH = 256, 1.25
"""Marks inside long texts stand where the prompt has grown by a quarter: a beginning counts for at least 4/5 of itself,
and the longest prompt there can be has some forty marks. Shorter beginnings are read in no time."""
HEAD_MESSAGES, TAIL_MESSAGES = 4, 12
"""Ends of messages that are marks too: what many chats begin with, and where a long one was last time."""
SAME_PART = 0.75
"""Of a prompt: what shares so much of it is read in its place (`residents.SHORT_PART`)."""
DIGEST_BYTES = 4
"""A chance hit costs one wrong guess in four billion."""
DIGESTS_MAX = 96
"""Told of one model: a few hundred bytes of gossip, some ten different prompts."""


def marks(request: GenerateRequest) -> tuple[Mark, ...]:
    """The beginnings of `request`'s prompt, the shortest first."""
    pieces = [request.tools.encode()] if request.tools else []
    pieces += [f"{message.role}\0{message.content}\0".encode() for message in request.messages]
    pieces += [request.prompt.encode("utf-8", "replace")] if request.prompt else []
    text = b"".join(pieces)
    digest, before, found = blake2b(digest_size=DIGEST_BYTES), 0, []
    for place in _places([len(piece) for piece in pieces], len(text)):
        digest.update(memoryview(text)[before:place])
        found.append(Mark(int.from_bytes(digest.digest(), "little"), place))
        before = place
    return tuple(found)


def _places(lengths: Sequence[int], total: int) -> list[int]:
    ends, end = [], 0
    for length in lengths:
        end += length
        ends.append(end)
    places = {*ends[:HEAD_MESSAGES], *ends[-TAIL_MESSAGES:]}
    at = float(FIRST_BYTES)
    while at < total:
        places.add(int(at))
        at *= GROWTH
    return sorted(places)


def held(prefixes: bytes, asked: Sequence[Mark]) -> int:
    """Bytes of the beginning that a model with `prefixes` has read before."""
    if not prefixes or not asked:
        return 0
    known = _digests(prefixes)
    return next((mark.length for mark in reversed(asked) if mark.digest in known), 0)


@lru_cache(256)
def _digests(prefixes: bytes) -> frozenset[int]:
    """Gossip says the same many times over."""
    whole = prefixes[: len(prefixes) // DIGEST_BYTES * DIGEST_BYTES]
    return frozenset(number for (number,) in struct.iter_unpack("<I", whole))


class Cached:
    """The prompts that a model's memory most likely holds: the newest, within `prompts` and `length` bytes."""

    def __init__(self, prompts: int, length: int) -> None:
        self._prompts_max, self._length_max = prompts, length
        self._prompts: OrderedDict[int, tuple[Mark, ...]] = OrderedDict()

    def add(self, asked: Sequence[Mark]) -> None:
        """A prompt with these marks is read now. It takes the place of one that it goes on from, or all but does."""
        if not asked:
            return
        digests = {mark.digest for mark in asked}
        for last, other in list(self._prompts.items()):
            shared = next((mark.length for mark in reversed(other) if mark.digest in digests), 0)
            if shared >= SAME_PART * other[-1].length:
                del self._prompts[last]
        self._prompts[asked[-1].digest] = tuple(asked)
        while len(self._prompts) > self._prompts_max or (len(self._prompts) > 1 and self._length > self._length_max):
            self._prompts.popitem(last=False)

    @property
    def _length(self) -> int:
        return sum(asked[-1].length for asked in self._prompts.values())

    def clear(self) -> None:
        """The child is a new one."""
        self._prompts.clear()

    def digests(self) -> bytes:
        """For gossip: those of the newest prompts first, each once."""
        newest = dict.fromkeys(mark.digest for asked in reversed(self._prompts.values()) for mark in asked)
        return b"".join(struct.pack("<I", digest) for digest in list(newest)[:DIGESTS_MAX])
