"""When a cron line fires: minutes since 1970, as a pure function of the line and a minute.

The expressions and their daylight-saving rules are those of Debian's cron, by the library cronsim: a line that names an
hour fires once on the days when the clock jumps, also where its minute does not exist or comes twice.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim


def last_due(cron: str, timezone: str, upto: int) -> int:
    """The newest minute up to `upto`, itself included, at which `cron` fires (what never does is no cron line)."""
    now = datetime.fromtimestamp(60 * upto, UTC).astimezone(ZoneInfo(timezone))
    at = next(CronSim(cron, now + timedelta(minutes=1), reverse=True))
    return int(at.timestamp()) // 60
