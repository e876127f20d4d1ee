"""What is written into a ledger, and what is read out of one: plain facts, for every room (`events` offers them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .ids import LogId, Term


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
