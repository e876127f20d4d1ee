"""Which loaded models make room for another. Pure.

needed > free? ──▶ idle, not kept, longest unused first ──▶ until it fits ──▶ names | None: it never would
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory. `kept`: pinned or configured; `busy`: it answers, or somebody waits for it."""

    name: str
    bytes: int
    used_at: float
    busy: bool = False
    kept: bool = False


def evictions(needed: int, free: int, residents: Sequence[Resident]) -> tuple[str, ...] | None:
    """The models to unload so that `needed` bytes are free; None where that cannot be had now.

    Never one that is kept, or in flight. Those that turn out not to be needed stay: one large may do for many small.
    """
    chosen: list[Resident] = []
    for one in sorted(residents, key=lambda one: (one.used_at, one.name)):
        if free + sum(each.bytes for each in chosen) >= needed:
            break
        if not one.kept and not one.busy:
            chosen.append(one)
    if free + sum(each.bytes for each in chosen) < needed:
        return None
    for one in sorted(chosen, key=lambda one: (-one.used_at, one.name)):
        if free + sum(each.bytes for each in chosen if each is not one) >= needed:
            chosen.remove(one)
    return tuple(one.name for one in chosen)


def idle(residents: Sequence[Resident], keep_alive_s: float, now: float) -> tuple[str, ...]:
    """Those that nobody has asked for so long that their memory is better free."""
    return tuple(one.name for one in residents if not one.kept and not one.busy and now - one.used_at >= keep_alive_s)
