"""What a node writes down: into its ledger, what it reads out of one, and its hard state (`events` offers them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ids import LogId, NodeId, Term
from .wire import Voters


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to append to this node's log. `body` must be msgpack-able."""

    kind: str
    body: Mapping[str, Any]
    term: Term = 0


@dataclass(frozen=True, slots=True)
class Fact:
    """One ledger entry as deciders see it: verified, decoded."""

    log: LogId
    seq: int
    term: Term
    kind: str
    body: Mapping[str, Any]
    hlc: int = 0
    """Hybrid logical clock, milliseconds << 16 | counter. For display, and for the ledger's own sense of age."""

    @property
    def order(self) -> tuple[Term, LogId, int]:
        """The order in which folds rank entries; the same on every node."""
        return (self.term, self.log, self.seq)


@dataclass(frozen=True, slots=True)
class HardState:
    """What election must never forget (Raft §5.1): durable before any message that depends on it leaves."""

    term: Term = 0
    voted_for: NodeId | None = None
    voters: Voters = field(default_factory=Voters)
    incarnation: int = 0
