"""What a node answers: one consistent picture of itself for status page, CLI, /health and /metrics, and smaller things.

    Snapshot ─▶ node.view(now) ─▶ Answer(View)      WhoServes ─▶ Answer(Choice)      HookArrived ─▶ Answer(HookTaken)

Types without logic; `events` offers them to whoever speaks with the node.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ids import NodeId, RunId, Term
from .wire import Facts, Head


@dataclass(frozen=True, slots=True)
class MemberView:
    node: NodeId
    state: str
    since_s: float
    """Seconds in this state."""
    heard_s: float | None
    """Seconds since it was last heard; None for ourselves."""
    facts: Facts
    voter: bool
    why: str


@dataclass(frozen=True, slots=True)
class RunView:
    run: RunId
    workflow: str
    title: str
    state: str
    """open, done, failed (a dead letter), ignored or cancelled."""
    step: str
    attempts: int
    detail: str
    hlc: int
    asks: str = ""
    """What it asks a person; "" where it waits for nobody."""


@dataclass(frozen=True, slots=True)
class ServiceView:
    """A service outside that is left alone for `waits_s` after `failures` failures in a row, the last for `why`."""

    name: str
    failures: int
    waits_s: float
    why: str


@dataclass(frozen=True, slots=True)
class View:
    """Answer to `Snapshot`: one consistent picture for status page, CLI, /health and /metrics."""

    me: NodeId
    name: str
    cluster: str
    role: str
    """leader, recovering, candidate, follower or learner."""
    term: Term
    leader: NodeId | None
    voters: tuple[NodeId, ...]
    quorum: int
    """Voters heard within an election timeout, ourselves included (leader only; elsewhere the alive voters)."""
    members: tuple[MemberView, ...]
    heads: tuple[Head, ...]
    digest: str
    entries: int
    runs: tuple[RunView, ...]
    hooks: int
    """Webhooks in the ledger."""
    handovers: int = 0
    """Times that this node handed leadership over since it started; `facts.handed_over` says why, of its own accord."""
    slowest_write_s: float = 0.0
    """The slowest write of late, decaying."""
    stretch: float = 1.0
    """What that multiplies this node's election timeout by."""
    dead: int = 0
    """Runs that were given up and can be retried."""
    asking: int = 0
    """Runs that wait for a person."""
    services: tuple[ServiceView, ...] = ()
    """Those that are left alone now (the coordinator knows)."""
    copying: int = 0
    """Urgent runs that wait until the relay outside holds a copy (the coordinator knows)."""
    copying_s: float = 0.0
    """How long the first of them has waited."""
    clockless: bool = False
    """The schedule waits for this node's clock to be set (the coordinator knows)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Answer to `WhoServes`."""

    node: NodeId
    name: str
    model: str
    reason: str
    predicted_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HookTaken:
    """Answer to `HookArrived`: durable on W ledgers; `run` is set where a workflow took it up."""

    run: RunId | None
    duplicate: bool
