"""What has been answered before: the least recently used goes first, and nothing stays for long.

    key ──find──▶ value | None          key, value ──keep──▶ the oldest go until all fit in `capacity` bytes

A pure decider: the time is given. Values are bytes as they were encoded, so that their size is what they weigh.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

Value = tuple[bytes, ...]

ITEM_BYTES = 256
"""What an entry weighs beside its parts: its key (a digest and names), the dict's place and the tuple."""
PART_BYTES = 40
"""What CPython adds to each bytes object, with the pointer to it."""


@dataclass(frozen=True, slots=True)
class _Kept:
    value: Value
    size: int
    since: float


class Remembered:
    """`capacity` bytes; nothing older than `age_s` seconds is told."""

    def __init__(self, capacity: int, age_s: float) -> None:
        self._capacity, self._age_s = capacity, age_s
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.size = 0

    def find(self, key: Hashable, now: float) -> Value | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if now - kept.since >= self._age_s:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept.value

    def keep(self, key: Hashable, value: Value, now: float) -> None:
        """What does not fit by itself is not kept."""
        self._drop(key)
        size = ITEM_BYTES + sum(PART_BYTES + len(part) for part in value)
        if size > self._capacity:
            return
        while self.size + size > self._capacity:
            self._drop(next(iter(self._kept)))
        self._kept[key] = _Kept(value, size, now)
        self.size += size

    def _drop(self, key: Hashable) -> None:
        kept = self._kept.pop(key, None)
        self.size -= kept.size if kept is not None else 0
