from __future__ import annotations

import pytest

from piclusterd.inference.eviction import Resident, evictions, idle

OLD, MID, NEW = Resident("old", 100, 1.0), Resident("mid", 300, 2.0), Resident("new", 50, 3.0)
BUSY, KEPT = Resident("busy", 500, 0.0, busy=True), Resident("kept", 500, 0.0, kept=True)
ALL = (NEW, BUSY, MID, KEPT, OLD)


@pytest.mark.parametrize(
    ("needed", "free", "chosen"),
    [
        (10, 10, ()),
        (110, 10, ("old",)),
        (111, 10, ("mid",)),  # old was chosen first, and turned out not to be needed
        (410, 10, ("old", "mid")),
        (460, 10, ("old", "mid", "new")),
        (461, 10, None),  # what is kept or in flight stays
        (0, 0, ()),
    ],
)
def test_the_longest_unused_go_until_it_fits_and_none_in_vain(
    needed: int, free: int, chosen: tuple[str, ...] | None
) -> None:
    assert evictions(needed, free, ALL) == chosen


def test_only_what_nobody_waits_for_is_idle() -> None:
    assert idle(ALL, 1.5, 3.4) == ("old",)
    assert idle(ALL, 1.5, 3.5) == ("mid", "old")
    assert idle((), 0.0, 9.0) == ()
