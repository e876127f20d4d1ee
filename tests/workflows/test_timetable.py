"""When a cron line fires."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from piclusterd.workflows.timetable import last_due


def minute(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) // 60


def told(cron: str, timezone: str, upto: str) -> str:
    due = last_due(cron, timezone, minute(upto))
    return datetime.fromtimestamp(60 * due, UTC).isoformat(timespec="minutes")


@pytest.mark.parametrize(
    ("cron", "timezone", "upto", "due"),
    [
        ("30 9 * * *", "UTC", "2026-11-23T09:30+00:00", "2026-11-23T09:30+00:00"),
        ("30 9 * * *", "UTC", "2026-11-23T09:29+00:00", "2026-11-22T09:30+00:00"),
        ("30 9 * * *", "Europe/Berlin", "2026-11-23T09:30+00:00", "2026-11-23T08:30+00:00"),
        ("*/5 * * * *", "UTC", "2026-11-23T09:34+00:00", "2026-11-23T09:30+00:00"),
        ("0 0 1 1 *", "UTC", "2026-11-23T09:34+00:00", "2026-01-01T00:00+00:00"),
        # the clock jumps from 02:00 to 03:00: the minute does not exist, and 03:00 stands in for it
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T12:00+02:00", "2026-03-29T01:00+00:00"),
        # 02:30 comes twice: the first of them counts
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T12:00+01:00", "2026-10-25T00:30+00:00"),
    ],
)
def test_the_newest_time_that_is_not_after_now(cron: str, timezone: str, upto: str, due: str) -> None:
    assert told(cron, timezone, upto) == due
