"""Agreement, calibration and what could be automatic, from cases that people judged."""

from __future__ import annotations

from typing import Any

import pytest

from piclusterd.events import Fact
from piclusterd.ids import LogId, NodeId
from piclusterd.workflows.cases import Cases
from piclusterd.workflows.triage_report import calibration, calibration_error, report, share_at

LOG = LogId(NodeId("a" * 16), 1)
WEEK_MS = 7 * 24 * 3600 * 1000
MONDAY_MS = 1_767_571_200_000  # 2026-01-05, week 2


def cases(*told: tuple[int, float, bool | None]) -> Cases:
    """Of (week, confidence, right?)."""
    made = Cases()
    for number, (week, sure, right) in enumerate(told):
        parts: dict[str, Any] = {"said.priority": ["P1", sure, sure]}
        parts |= {} if right is None else {"human.priority": "P1" if right else "P3"}
        hlc = (MONDAY_MS + week * WEEK_MS + number) << 16
        made.grow(Fact(LOG, number + 1, 1, "case", {"issue": f"i-{number}", "set": parts}, hlc=hlc))
    return made


def test_only_what_people_judged_is_in_a_rate() -> None:
    told = report(cases((0, 0.9, True), (0, 0.9, False), (1, 0.8, True), (1, 0.8, None)))
    assert (told.cases, told.judged) == (4, 3)
    priority = next(field for field in told.fields if field.field == "priority")
    assert (priority.judged, priority.agreed) == (3, 2)
    assert priority.weeks == (("2026-W02", 2, 1), ("2026-W03", 1, 1))
    assert next(field for field in told.fields if field.field == "type").judged == 0


def test_the_share_that_could_be_automatic_at_a_precision() -> None:
    good = [(0.9, True)] * 19 + [(0.9, False)]
    assert share_at(good) == (0.9, 1.0)
    assert share_at([*good, (0.5, False)]) == (0.9, 20 / 21)
    assert share_at([(0.99, False), *good]) == (None, 0.0)
    assert share_at([(0.99, True), (0.9, True), (0.9, False)]) == (0.99, 1 / 3)
    assert share_at([]) == (None, 0.0)


def test_calibration_is_the_distance_between_what_was_said_and_what_was_right() -> None:
    judged = [(0.95, True)] * 3 + [(0.95, False)] + [(0.25, False)] * 4
    assert [row[:3] for row in calibration(judged)] == [(0.2, 4, 0), (0.9, 4, 3)]
    assert [row[3] for row in calibration(judged)] == pytest.approx([0.25, 0.95])
    assert calibration_error(judged) == pytest.approx((0.25 + 0.2) / 2)
    assert calibration_error([]) == 0.0
    assert calibration([(1.0, True)])[0][0] == 0.9
