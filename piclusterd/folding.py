"""The ledger's facts on their way into the fold of workflows: rooms meet only in the hall, and a checkpoint is of both.

facts ─┬ hook, run.*, case, case.end ─▶ journal.grow
       └ log.checkpoint ─▶ what it keeps and has seen (`ledger.checkpoint`) ─▶ journal.close
"""

from __future__ import annotations

from collections.abc import Iterable

from .events import Fact
from .ledger.checkpoint import aged, kept_facts, seen_digests
from .ledger.entry import CHECKPOINT
from .ledger.frontier import Meaning
from .workflows.journal import Journal, digest_of, subject

MEANING = Meaning(
    subject,
    opens=lambda fact: fact.kind in ("hook", "case"),
    ends=lambda fact: fact.kind in ("run.done", "case.end"),
    reopens=lambda fact: fact.kind in ("run.retry", "case"),
    key=lambda fact: digest_of(str(fact.body["key"])) if fact.kind == "hook" else None,
)
"""What a checkpoint must know of the fold of workflows."""


def fold(journal: Journal, facts: Iterable[Fact]) -> None:
    """Add `facts`, in any order, to `journal`."""
    for fact in facts:
        if fact.kind == CHECKPOINT:
            kept = {kept.seq: kept.hlc for kept in kept_facts(fact)}
            journal.close(fact, kept, seen_digests(fact), aged(fact))
        else:
            journal.grow((fact,))
