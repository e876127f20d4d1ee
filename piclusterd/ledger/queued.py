"""What waits for the ledger's owner (`writer`): appends, which it takes by the group, and whole transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..events import Fact
from ..wire import Entry
from .connection import Work
from .entry import Draft

Appended = tuple[tuple[Entry, ...], tuple[Fact, ...]]


@dataclass(frozen=True, slots=True)
class QueuedAppend:
    drafts: tuple[Draft, ...]
    size: int
    """Bytes in a batch, at most."""
    since: float
    """Event loop's time when it was queued."""
    tell: Callable[[Appended | Exception], None]
    """Hears what came of it; must not raise."""


@dataclass(frozen=True, slots=True)
class QueuedWork:
    work: Work[Any]
    done: asyncio.Future[Any]
