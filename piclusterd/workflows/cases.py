"""The fold of the ledger that triage learns from: what was said of an issue, and what people made of it.

    case     {issue, set: {part: value, …}}   parts of what is known of one issue; the newest of each part counts
    case.end {issue}                          it is forgotten, to make room: the oldest that nobody judged goes first

Parts: `identifier, team, title, text, encoder, vector` (what it is about), `said.<field>` ([value, confidence before
and after calibration]), `odds.<field>` (the model's), `from.<field>` (who decided), `wrote` (what is ours, for undo),
`suggested, reason, why, model, node, run, mode, near` (for people), `human.<field>` (what a person made it or let
stand; "" where only that it is not so), `undone`. A field is type, priority or label.

Entries come in any order and more than once: each part is chosen by rank. A checkpoint keeps every case that has not
been ended, so what is remembered is bounded by CASES_BYTES_MAX and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from ..events import Fact, Record
from ..ids import LogId, Term
from .vectors import likeness

CASE, CASE_END = "case", "case.end"
Rank = tuple[Term, LogId, int]

CASES_BYTES_MAX = 384 * 1024
"""Of all cases together, as they stand in the ledger: a checkpoint, which must fit one entry of 1 MB, carries them on.
With a sentence encoder of 384 numbers that is some 350 issues."""
ENTRY_BYTES = 300
"""Header and signature of an entry, about."""
MEAN_PRIOR, MEAN_PRIOR_CASES = 0.5, 8
"""How alike two texts are on average is taken to be this until there are some cases to tell."""
BINS = 10
FIELDS = ("type", "priority", "label")


@dataclass(slots=True)
class Case:
    issue: str
    hlc: int = 0
    """Of its oldest entry."""
    bytes: int = 0
    parts: dict[str, tuple[Rank, Any]] = field(default_factory=dict)

    def get(self, part: str, default: Any = None) -> Any:
        """The part as it stands; `default` where it was never told or is of another type than `default`."""
        value = self.parts[part][1] if part in self.parts else default
        return value if default is None or isinstance(value, type(default)) else default

    @property
    def judged(self) -> bool:
        return any(f"human.{name}" in self.parts for name in FIELDS)

    def said(self, name: str) -> tuple[str, float, float] | None:
        """What we said of a field: value, confidence before and after calibration."""
        said = self.get(f"said.{name}", [])
        return (str(said[0]), float(said[1]), float(said[2])) if len(said) == 3 else None

    def holds(self, name: str) -> str:
        """What a person made the field; "" where nobody judged it, or said only what it is not."""
        human: str = self.get(f"human.{name}", "")
        return human

    def as_dict(self) -> dict[str, Any]:
        """Every part but the vector."""
        return {"issue": self.issue, **{name: v for name, (_, v) in self.parts.items() if name != "vector"}}


class Cases:
    def __init__(self) -> None:
        self._cases: dict[str, Case] = {}
        self._ended: dict[str, Rank] = {}

    def __iter__(self) -> Iterator[Case]:
        """Oldest first."""
        return iter(sorted(self._cases.values(), key=lambda case: (case.hlc, case.issue)))

    def __len__(self) -> int:
        return len(self._cases)

    def of(self, issue: str) -> Case | None:
        """By id or by identifier (LIN-12)."""
        found = self._cases.get(issue)
        wanted = issue.casefold()
        return found or next((c for c in self._cases.values() if c.get("identifier", "").casefold() == wanted), None)

    def grow(self, fact: Fact) -> None:
        """A `case` or `case.end`; what is not of their shape means nothing."""
        issue, parts = fact.body.get("issue"), fact.body.get("set", {})
        if not isinstance(issue, str) or not isinstance(parts, Mapping):
            return
        ended = self._ended.get(issue)
        if fact.kind == CASE_END:
            self._end(issue, fact.order)
        elif ended is None or fact.order > ended:
            case = self._cases.setdefault(issue, Case(issue, fact.hlc))
            case.hlc = min(case.hlc, fact.hlc)
            case.bytes += weight(fact.body)
            for name, value in parts.items():
                if name not in case.parts or fact.order > case.parts[name][0]:
                    case.parts[name] = (fact.order, value)

    def _end(self, issue: str, rank: Rank) -> None:
        self._ended[issue] = max(rank, self._ended.get(issue, rank))
        case = self._cases.get(issue)
        if case is not None:
            case.parts = {name: told for name, told in case.parts.items() if told[0] > rank}
            if not case.parts:
                del self._cases[issue]

    def records(self, case: Mapping[str, Any], term: Term) -> tuple[Record, ...]:
        """The entries that tell `case` ({issue, set}), and those that make room for it."""
        room = CASES_BYTES_MAX - weight(case) - sum(old.bytes for old in self._cases.values())
        ends = []
        for old in sorted(self, key=lambda old: old.judged):
            if room >= 0:
                break
            if old.issue != case["issue"]:
                ends.append(Record(CASE_END, {"issue": old.issue}, term))
                room += old.bytes
        return (Record(CASE, dict(case), term), *ends)

    # looks ---------------------------------------------------------------------------------------------------
    def near(self, vector: bytes, encoder: str, team: str, but: str) -> list[tuple[float, Case]]:
        """The cases of `team` most like `vector`, best first; `but` is left out.

        Likeness is rescaled: 0 for one that is as like as any, 1 for the same. Encoders differ in how alike they find
        any two texts, so that a bare cosine says little.
        """
        found = [
            (likeness(vector, case.get("vector", b"")), case)
            for case in self
            if case.get("encoder", "") == encoder and case.get("team", "") == team
        ]
        mean = sum(like for like, _ in found) + MEAN_PRIOR * MEAN_PRIOR_CASES
        mean /= len(found) + MEAN_PRIOR_CASES
        scaled = [((like - mean) / max(1.0 - mean, 1e-6), case) for like, case in found if case.issue != but]
        ranked = sorted(scaled, key=lambda pair: (-pair[0], pair[1].issue))
        return [(like, case) for like, case in ranked if like > 0]

    def bins(self, name: str) -> list[list[int]]:
        """By tenths of confidence (before calibration): [verdicts that a person judged, those that stood]."""
        table = [[0, 0] for _ in range(BINS)]
        for case in self:
            said, human = case.said(name), case.get(f"human.{name}", None)
            if said and isinstance(human, str):
                at = min(int(said[1] * BINS), BINS - 1)
                table[at][0] += 1
                table[at][1] += human == said[0]
        return table


def weight(body: Mapping[str, Any]) -> int:
    """Bytes in the ledger."""
    return ENTRY_BYTES + len(msgpack.packb(dict(body)))


def calibrated(raw: float, bins: Sequence[Sequence[int]]) -> float:
    """How often a verdict of this confidence stood, as far as people judged such; `raw` where they did not.

    Shrunk to `raw` as if PRIOR_JUDGED verdicts had said it right; neighbouring tenths count half.
    """
    at = min(int(raw * BINS), BINS - 1)
    judged, stood = float(PRIOR_JUDGED), raw * PRIOR_JUDGED
    for number, (count, right) in enumerate(bins[:BINS]):
        share = {0: 1.0, 1: 0.5}.get(abs(number - at), 0.0)
        judged, stood = judged + share * count, stood + share * right
    return stood / judged


PRIOR_JUDGED = 10
"""So many judged verdicts weigh as much as what the model says of itself."""
