"""What a node starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .cluster.timings import Timings
from .events import Fact, HardState, Rules
from .ids import LogId, NodeId
from .ledger.pruning import Retention
from .wire import Facts, Head, Span
from .workflows.flight import Patience
from .workflows.schedule import Agenda
from .workflows.workflow import Workflow


@dataclass(frozen=True, slots=True)
class Setup:
    """What a node starts from: its identity, and what its disk remembers."""

    me: NodeId
    cluster: str
    facts: Facts
    timings: Timings
    hard: HardState = field(default_factory=HardState)
    heads: tuple[Head, ...] = ()
    ledger: Iterable[Fact] = ()
    workflows: Mapping[str, Workflow] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    agenda: Agenda = field(default_factory=Agenda)
    rules: Rules = field(default_factory=Rules)
    retention: Retention = field(default_factory=Retention)
    log: LogId | None = None
    """The log this node appends to."""
    lost: str = ""
    """Why the ledger may lack what this node acknowledged; "" where it does not."""
    votes_lost: str = ""
    """Why this node may have voted and does not know for whom: as long as it runs it does not vote."""
    damaged: tuple[Span, ...] = ()
