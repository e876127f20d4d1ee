"""When to tell the others about ourselves: not every reading is news.

A board is read every few seconds and never reads the same. Told each time, a thousand boards would send every node
200 lists of facts a second. So a new version is made

    at once      where the *shape* changed: name, addresses, models, flags … (routing needs it)
    after a gap  where the *load* moved by more than a page or a router would notice; the gap grows with N
    after longer where anything differs at all, so that no page shows an old figure for ever

Between versions our own pages show the newest reading; peers keep the last one told. Pure: `due` is a time.
"""

from __future__ import annotations

from ..wire import Facts, ModelFacts

CPU_POINTS = 10.0
TEMPERATURE_C = 2.0
"""Below the step between "warm" and "throttles" on any board, above the sensor's flutter."""
PART = 0.1
"""Of a measured rate (tokens/s) or of all memory: what would change the choice of a node."""
GAP_PER_MEMBER_S = 0.2
"""N = 1000: 200 s between two loads of one node, so that each node hears 5 a second: with 10, the busiest nodes sent
and heard more than 10 KB/s."""
REFRESH_S = 60.0
REFRESH_PER_MEMBER_S = 0.5


def shape(facts: Facts) -> tuple[object, ...]:
    """What is true of a node until somebody changes it."""
    models = tuple((m.name, m.embeddings, m.context) for m in facts.models)
    told = (facts.flags, facts.trouble, facts.handed_over)
    return (facts.name, facts.addresses, facts.api, facts.release, facts.role, facts.board, told, models)


def load_moved(old: Facts, new: Facts) -> bool:
    """Would a page or a router notice? Both have the same shape."""
    if old.temperature_c is None or new.temperature_c is None:
        warmer = old.temperature_c != new.temperature_c
    else:
        warmer = abs(new.temperature_c - old.temperature_c) >= TEMPERATURE_C
    return (
        warmer
        or abs(new.cpu_percent - old.cpu_percent) >= CPU_POINTS
        or abs(new.memory_used - old.memory_used) > PART * new.memory_total
        or new.ledger_entries != old.ledger_entries
        or any(_model_moved(before, after) for before, after in zip(old.models, new.models, strict=True))
    )


def _model_moved(old: ModelFacts, new: ModelFacts) -> bool:
    if (old.busy, old.queued) != (new.busy, new.queued):
        return True
    rates = ((old.prefill_tps, new.prefill_tps), (old.decode_tps, new.decode_tps))
    return any(abs(after - before) > PART * before for before, after in rates)


class OwnFacts:
    def __init__(self, told: Facts, now: float) -> None:
        self._told = told
        self._told_at = now
        self.newest = told
        self.due = float("inf")
        """When the newest reading is to be told."""

    def read(self, facts: Facts, gapless: bool, members: int, now: float) -> None:
        """A new reading, in a cluster of `members`. `gapless`: everybody is told directly, no need to wait."""
        self.newest = facts
        if self.reshaped:
            self.due = now
        elif load_moved(self._told, facts):
            self.due = max(now, self._told_at + (0.0 if gapless else GAP_PER_MEMBER_S * members))
        elif facts != self._told:
            self.due = self._told_at + max(REFRESH_S, REFRESH_PER_MEMBER_S * members)
        else:
            self.due = float("inf")

    @property
    def reshaped(self) -> bool:
        return shape(self.newest) != shape(self._told)

    def told(self, now: float) -> None:
        self._told, self._told_at, self.due = self.newest, now, float("inf")
