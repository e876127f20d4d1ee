"""What providers were used for today outlives the daemon: a restart does not begin the day's budget anew.

    Fallback ──each request, each answer──▶ file, replaced in one step ──next start──▶ Standby.resume

Not fsynced: a kill loses nothing, a power cut at most what the kernel had not written yet, some seconds of requests.
A file that cannot be read counts as none, and one that cannot be written is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .standby import Used

log = logging.getLogger(__name__)


class Spending:
    """Kept in the file at `path`; with None, for this run only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._failed = False

    def read(self) -> dict[str, Used]:
        """By the provider's name."""
        if self._path is None:
            return {}
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Used])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as fault:
            log.warning("what providers were used for today is not known, their budgets begin anew: %s", fault)
            return {}

    def write(self, used: Mapping[str, Used]) -> None:
        if self._path is None:
            return
        try:
            draft = self._path.with_suffix(".new")
            draft.write_bytes(msgspec.json.encode(used))
            draft.replace(self._path)
            self._failed = False
        except OSError as fault:
            if not self._failed:
                log.warning("what providers are used for is not kept, a restart begins their budgets anew: %s", fault)
            self._failed = True
