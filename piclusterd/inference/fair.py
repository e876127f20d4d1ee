"""Whose turn it is before a model: by priority, fair among those who ask, bounded. Pure.

    push ──▶ [interactive | workflow | batch] ──pop: the highest kind, and in it who had least──▶ a place
      └── full: whoever would go last gives way, and that may be the newcomer ──▶ 429

Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996): a request starts, in virtual time, where its tenant's last
one ended, and ends its cost later; the earliest start goes next. So who asks seldom is served at once, who floods waits
for himself, and nobody's share depends on how many requests he has. Costs are guesses in tokens, put right by `settle`.
Who waits long moves up a kind every `AGE_S`, so that nothing waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("interactive", "workflow", "batch")
"""Priorities, the highest first."""
AGE_S = 60.0
"""A batch behind endless chats gets its turn after two minutes in the queue, and then like a chat."""
TENANTS_MAX = 4096
"""Tenants remembered beyond those waiting; the ones that are owed nothing are forgotten first."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue. `cost` in tokens; `start` in virtual time; `since` in seconds."""

    number: int
    tenant: str
    rank: int
    cost: float
    start: float
    since: float


@dataclass(slots=True)
class Fair:
    """At most `size` requests wait."""

    size: int
    _waiting: list[Waiting] = field(default_factory=list)
    _ends: dict[str, float] = field(default_factory=dict)
    """Where each tenant's last request ends, in virtual time."""
    _now: float = 0.0
    """Virtual: the start of whoever went last."""
    _last: int = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def cost(self) -> float:
        """Of all that wait, tokens."""
        return sum(one.cost for one in self._waiting)

    def enter(self, tenant: str, cost: float) -> None:
        """Charge a request that finds a free place."""
        self._now = max(self._now, self._charge(tenant, cost))

    def _charge(self, tenant: str, cost: float) -> float:
        """Where the request starts, in virtual time."""
        start = self._start(tenant)
        self._ends[tenant] = start + cost
        if len(self._ends) > TENANTS_MAX:
            self._ends = {name: end for name, end in self._ends.items() if end > self._now}
        return start

    def _start(self, tenant: str) -> float:
        return max(self._now, self._ends.get(tenant, 0.0))

    def push(self, tenant: str, priority: str, cost: float, now: float) -> tuple[Waiting, Waiting | None]:
        """The request as it waits now, and who gives way to it: None where there is room, itself where it must."""
        self._last += 1
        rank = KINDS.index(priority)
        victim = self._crowded_out(tenant, rank) if len(self._waiting) >= self.size else None
        if len(self._waiting) >= self.size and victim is None:
            refused = Waiting(self._last, tenant, rank, cost, 0.0, now)
            return refused, refused
        if victim is not None:
            self.remove(victim)
        one = Waiting(self._last, tenant, rank, cost, self._charge(tenant, cost), now)
        self._waiting.append(one)
        return one, victim

    def _crowded_out(self, tenant: str, rank: int) -> Waiting | None:
        """Who would go last; None where that is the newcomer."""
        last = max(self._waiting, key=lambda one: (one.rank, one.start, one.number))
        return last if (rank, self._start(tenant)) < (last.rank, last.start) else None

    def pop(self, now: float) -> Waiting | None:
        """Who goes next; None where nobody waits."""
        if not self._waiting:
            return None
        chosen = min(self._waiting, key=lambda one: (_aged(one, now), one.start, one.number))
        self._waiting.remove(chosen)
        self._now = max(self._now, chosen.start)
        return chosen

    def remove(self, one: Waiting) -> None:
        """It does not wait any more, and pays nothing."""
        if one in self._waiting:
            self._waiting.remove(one)
            self.settle(one.tenant, -one.cost)

    def settle(self, tenant: str, more: float) -> None:
        """The tenant's request cost `more` tokens (or less, where negative) than it was charged."""
        if tenant in self._ends:
            self._ends[tenant] += more


def _aged(one: Waiting, now: float) -> int:
    return max(0, one.rank - int((now - one.since) / AGE_S))
