"""Which of the waiting texts go through a network together, so that little of the work is padding. Pure.

    waiting, oldest first ──▶ the oldest, and those of the next few that are nearest to it in length ──▶ one pack

All rows of a batch are as long as its longest: a word beside an essay costs as much as the essay.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 128
"""So many of the oldest are looked at: the oldest itself never waits, the others only while nearer ones go first."""


def pack(lengths: Sequence[int], count_max: int, tokens_max: int) -> list[int]:
    """Indices into `lengths` (tokens; the oldest first), in their order: the oldest is always among them.

    At most `count_max`, and no more than `tokens_max` tokens with the padding, unless the oldest alone has more.
    """
    if not lengths:
        return []
    oldest = lengths[0]
    taken, longest = [0], oldest
    nearest = sorted(range(1, min(len(lengths), WINDOW)), key=lambda index: (abs(lengths[index] - oldest), index))
    for index in nearest:
        if len(taken) >= count_max:
            break
        width = max(longest, lengths[index])
        if width * (len(taken) + 1) <= tokens_max:
            taken.append(index)
            longest = width
    return sorted(taken)
