"""What happened in so many seeds, counted by kind: what stands at zero was never rehearsed, whatever the checks say.

    faults   as the storm, the owner and the images name them
    effects  of `events.Effect`, as nodes asked for them
    notes    of `events.Note`, as nodes gave them
    events   of `events.Event`, as nodes were handed them

`NEVER` lists the kinds that the simulator has no use for, each with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from .. import events
from ..events import Effect, Event, Noted
from .storm import FAULTS
from .world import Actor, Plan, World

NEVER = {
    "Stopped": "a node that is asked to stop; the storm kills, which is worse",
    "Shutdown": "the same",
    "Sealed": "the first voters are on every disk when the world begins",
    "FactsChanged": "boards are read in `gossip`",
    "WhoServes": "told in the story `completion`",
    "RemoveNode": "told in `tests/test_node.py`: no machine of a rehearsal is removed for good",
    "Deny": "the same",
    "KeyShared": "the links' handshake tells of it, and the rehearsal's links have none",
    "ChangeRun": "told in `tests/workflows/test_run.py`: the owner of a rehearsal leaves runs alone",
    "ClockTold": "the kernel's word on the clock; a rehearsal's clocks jump without one",
    "Snapshot": "the checks look at the node itself",
}

KINDS: dict[str, tuple[str, ...]] = {
    "faults": FAULTS,
    "effects": tuple(kind.__name__ for kind in get_args(events.Effect)),
    "notes": tuple(kind.__name__ for kind in get_args(events.Note)),
    "events": tuple(kind.__name__ for kind in get_args(events.Event)),
}


class Census:
    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {group: Counter() for group in KINDS}

    def take(self, plan: Plan) -> None:
        """Play `plan` and count. Raises `Violation`."""
        world = World(plan)
        world.watch = self._watch
        try:
            world.run()
        finally:
            self._counts["faults"].update(world.faults)
            world.close()

    def _watch(self, _: Actor, event: Event, effects: list[Effect]) -> None:
        self._counts["events"][type(event).__name__] += 1
        for effect in effects:
            self._counts["effects"][type(effect).__name__] += 1
            if isinstance(effect, Noted):
                self._counts["notes"][type(effect.note).__name__] += 1

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """Group, kind, count: the rarest of each group first."""
        for group, kinds in KINDS.items():
            counts = self._counts[group]
            yield from sorted(((group, kind, counts[kind]) for kind in kinds), key=lambda row: (row[2], row[1]))

    def missing(self) -> list[str]:
        """Kinds that did not happen, and should have."""
        return [kind for _, kind, count in self.rows() if not count and kind not in NEVER]


def lines(census: Census) -> Iterable[str]:
    for group, kind, count in census.rows():
        why = f"  {NEVER[kind]}" if not count and kind in NEVER else ""
        yield f"{group:<9}{kind:<18}{count:>9}{why}"
