"""Logs: one JSON object a line on stderr, for journald or for whoever reads the terminal.

    logging ──▶ Formatter ──▶ {"time", "level", "logger", "message", "request_id"?, extras…, "error"?} ──▶ stderr

Under journald ($JOURNAL_STREAM names the very file behind stderr) each line starts with its priority, `<N>` of
sd-daemon(3), so that `journalctl -p warning` works; the journal removes it again. Line breaks and terminal escapes
inside a message become JSON escapes: one record is one line, and what came from outside cannot paint the terminal.
Secrets are not logged by those who hold them; this module does not look for any.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal, TextIO

Level = Literal["debug", "info", "warning", "error"]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the current task serves; empty outside requests."""

MESSAGE_CHARACTERS_MAX = 8192
"""Of one message or traceback: journald splits lines at 48 KiB, and nobody reads longer ones."""
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes every record has; all others were given as `extra`."""


class Formatter(logging.Formatter):
    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        # ASCII only: C1 controls and direction marks are escaped like all the rest.
        line = json.dumps(_fields(self, record), default=str)
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{line}" if self._journal else line


def setup(level: Level, stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Sends all loggers of this process to `stream` (stderr), replacing what was set up before."""
    out = stream or sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(Formatter(journal=_is_journal(out, environ)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def _fields(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage()[:MESSAGE_CHARACTERS_MAX],
    }
    if current := request_id.get():
        fields["request_id"] = current
    fields |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in fields}
    if record.exc_info:
        # The end of a traceback says what went wrong, so the beginning is cut.
        fields["error"] = formatter.formatException(record.exc_info)[-MESSAGE_CHARACTERS_MAX:]
    return fields


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether `stream` is the one systemd connected: $JOURNAL_STREAM is its `device:inode` (systemd.exec(5))."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
