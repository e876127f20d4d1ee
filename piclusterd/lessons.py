"""What triage learnt, for people: read from this node's ledger, so that any node tells the same.

picluster triage report ─▶ owner's door ─▶ Lessons.report ─▶ the fold of all cases ─▶ Report
picluster triage why X ──▶ owner's door ─▶ Lessons.why ────▶ what is remembered of one issue, in lines
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from .errors import NotFound
from .ledger import trail
from .web.triage import Explained
from .workflows.cases import CASE, CASE_END, Cases
from .workflows.triage_comment import why_lines
from .workflows.triage_report import Report, report


class Lessons:
    def __init__(self, ledger: Path) -> None:
        """`ledger`: this node's file."""
        self._ledger = ledger

    async def report(self) -> Report:
        return report(await asyncio.to_thread(self._cases))

    async def why(self, issue: str) -> Explained:
        """By identifier or id. Raises `NotFound`."""
        case = (await asyncio.to_thread(self._cases)).of(issue)
        if case is None:
            why = "it was not triaged, or it was forgotten to make room"
            raise NotFound(f"nothing is remembered of {issue[:64]}", why, "See `picluster jobs ls`.")
        told = case.as_dict()
        lines = (str(told.get("reason", "")), *why_lines(told))
        return Explained(case.issue, str(told.get("identifier", "")), str(told.get("title", "")), lines, told)

    def _cases(self) -> Cases:
        cases = Cases()
        for fact in trail.of_kinds(self._ledger, (CASE, CASE_END)):
            cases.grow(fact)
        return cases
