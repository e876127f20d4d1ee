"""How triage does, measured against what people made of it: pure functions over the cases that a person judged.

    agreement     by week and field: verdicts judged, and those that stood
    calibration   by tenths of confidence: how often a verdict of that confidence stood, and the error that this leaves
    auto          the lowest confidence from which on 95 of 100 verdicts stood, and the share of all that reaches it

Of verdicts that nobody judged nothing is known: they are counted, and are in no rate. Agreement in shadow mode is
blind, elsewhere a person saw what triage had said.

Source for the error: Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015 (ECE).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .cases import BINS, FIELDS, Case

PRECISION = 0.95
HLC_BITS = 16
"""Of an entry's hybrid clock below its milliseconds."""
Judged = tuple[float, bool]
"""Confidence, and whether it was right."""


@dataclass(frozen=True, slots=True)
class FieldReport:
    field: str
    judged: int
    agreed: int
    weeks: tuple[tuple[str, int, int], ...]
    """ISO week, judged, agreed; the oldest first."""
    bins: tuple[tuple[float, int, int, float], ...]
    """Lower end of the tenth, judged, agreed, mean confidence; tenths without any are left out."""
    error: float
    """Expected calibration error, 0 to 1."""
    auto_from: float | None
    """The lowest confidence from which on PRECISION stood; None where no verdict reaches that."""
    auto_share: float


@dataclass(frozen=True, slots=True)
class Report:
    cases: int
    """Issues remembered."""
    judged: int
    """Of them, those of which a person judged something."""
    fields: tuple[FieldReport, ...]


def report(cases: Iterable[Case]) -> Report:
    known = list(cases)
    return Report(len(known), sum(case.judged for case in known), tuple(_field(name, known) for name in FIELDS))


def _field(name: str, cases: Sequence[Case]) -> FieldReport:
    judged: list[Judged] = []
    weeks: dict[str, list[int]] = {}
    for case in cases:
        said, human = case.said(name), case.get(f"human.{name}", None)
        if said is None or not isinstance(human, str):
            continue
        right = human == said[0]
        judged.append((said[2], right))
        week = weeks.setdefault(_week(case.hlc), [0, 0])
        week[0] += 1
        week[1] += right
    auto_from, auto_share = share_at(judged)
    table = calibration(judged)
    return FieldReport(
        name, len(judged), sum(right for _, right in judged),
        tuple((week, count, agreed) for week, (count, agreed) in sorted(weeks.items())),
        tuple(table), calibration_error(judged), auto_from, auto_share,
    )  # fmt: skip


def calibration(judged: Iterable[Judged]) -> list[tuple[float, int, int, float]]:
    """Lower end of a tenth, verdicts in it, right ones, mean confidence."""
    tenths: dict[int, list[Judged]] = {}
    for confidence, right in judged:
        tenths.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, right))
    return [
        (at / BINS, len(of), sum(right for _, right in of), sum(confidence for confidence, _ in of) / len(of))
        for at, of in sorted(tenths.items())
    ]


def calibration_error(judged: Sequence[Judged]) -> float:
    """Mean distance between confidence and being right, over tenths weighted by how many are in each; 0 without any."""
    return sum(abs(right / count - mean) * count for _, count, right, mean in calibration(judged)) / max(len(judged), 1)


def share_at(judged: Sequence[Judged], precision: float = PRECISION) -> tuple[float | None, float]:
    """The lowest confidence from which on `precision` of the verdicts were right, and the share of all that reaches it.

    Verdicts of one confidence go together: a threshold cannot tell them apart.
    """
    best: tuple[float | None, float] = (None, 0.0)
    ranked = sorted(judged, reverse=True)
    right = 0
    for at, (confidence, was_right) in enumerate(ranked, start=1):
        right += was_right
        last = at == len(ranked) or ranked[at][0] < confidence
        if last and right / at >= precision:
            best = (confidence, at / len(ranked))
    return best


def _week(hlc: int) -> str:
    year, week, _ = datetime.fromtimestamp((hlc >> HLC_BITS) / 1000, UTC).isocalendar()
    return f"{year}-W{week:02}"
