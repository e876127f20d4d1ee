"""What the kill loop checks at its end: three SQLite files and what Linear saw, against what was promised.

    promised webhook ─▶ in every ledger ─▶ one run, done ─▶ one comment, each field set at most once
    every ledger     ─▶ chains and signatures hold ─▶ heads equal

Reads the files as SQLite does, with no daemon's help. Returns faults, one sentence each; none means that all was kept.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..cluster import identity
from ..folding import fold
from ..ids import RunId, run_id
from ..ledger import database, store
from ..ledger.reconcile import Reconcile
from ..wire import Head
from ..workflows.journal import Journal
from .linear_double import LinearDouble

SUGGESTED = "Suggested:"
"""In a comment: triage was not sure enough of a field to write it."""


@dataclass(frozen=True, slots=True)
class Audit:
    """`digest`: of the heads of the first ledger."""

    faults: tuple[str, ...]
    entries: int
    digest: str


def audit(ledgers: Mapping[str, Path], promised: Collection[str], linear: LinearDouble) -> Audit:
    """`ledgers` by the node's name, `promised` issues by identifier. Raises Broken where a file cannot be opened."""
    faults: list[str] = []
    heads: dict[str, tuple[Head, ...]] = {}
    for name, path in ledgers.items():
        with closing(database.open_reader(path)) as conn:
            verdict = store.verify_all(conn, identity.verify)
            heads[name] = store.heads(conn)
        faults += [f"{name}: {fault}" for fault in verdict.faults]
        faults += [f"{name}: {fault}" for fault in _runs_faults(path, promised)]
    first, *others = heads
    faults += [f"{name} and {first} end differently" for name in others if heads[name] != heads[first]]
    faults += _linear_faults(promised, linear)
    digest = Reconcile(heads[first], 1.0, itertools.count()).digest.hex()
    return Audit(tuple(faults), sum(head.seq for head in heads[first]), digest)


def finished(path: Path, promised: Collection[str]) -> bool:
    """Does the ledger hold every promised issue, and no open run? Also while its daemon writes to it."""
    journal, runs = _read(path)
    return not journal.open_runs() and all(issue in runs for issue in promised)


def _read(path: Path) -> tuple[Journal, dict[str, set[RunId]]]:
    """The fold of a ledger, and the runs that each issue's webhooks caused."""
    journal = Journal()
    runs: dict[str, set[RunId]] = {}
    with closing(database.open_reader(path)) as conn:
        for fact in store.facts(conn):
            fold(journal, (fact,))
            if fact.kind == "hook" and fact.body["source"] == "linear":  # the cluster's own have no issue
                issue = str(json.loads(fact.body["body"])["data"]["identifier"])
                runs.setdefault(issue, set()).add(run_id(str(fact.body["workflow"]), str(fact.body["key"])))
    return journal, runs


def _runs_faults(path: Path, promised: Iterable[str]) -> list[str]:
    journal, runs = _read(path)
    faults = []
    for issue in promised:
        ended = [journal.runs[run].done for run in sorted(runs.get(issue, ()))]
        outcomes = [done[1] if done else "open" for done in ended]
        if outcomes != ["done"]:
            faults.append(f"{issue}: promised, and its runs are {outcomes or 'missing: the webhook is lost'}")
    return faults


def _linear_faults(promised: Iterable[str], linear: LinearDouble) -> list[str]:
    """Effects as Linear counted them: per issue one comment, and each field set once."""
    done: Counter[tuple[str, str]] = Counter()
    unsure: set[str] = set()
    for effect in linear.effects:
        done.update((effect.issue, name) for name in effect.change)
        if SUGGESTED in str(effect.change.get("body", "")):
            unsure.add(effect.issue)
    faults = [f"{issue}: {name} was written {times} times" for (issue, name), times in done.items() if times > 1]
    faults += [
        f"{issue}: {name} was never written"
        for issue in promised
        for name in ("body", *(() if issue in unsure else ("priority", "added_labels")))
        if not done[issue, name]
    ]
    return faults + [f"a call outside Linear's public schema: {violation}" for violation in linear.violations]
