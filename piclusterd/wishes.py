"""What a person and the clock tell the deciders of runs; `events` offers them to whoever speaks with the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .ids import RunId


@dataclass(frozen=True, slots=True)
class ChangeRun:
    """A person's word on a run. Answered with its `RunView` once durable, or with a `PiclusterError`."""

    ticket: int
    what: Literal["retry", "cancel", "approve", "reject"]
    run: RunId
    by: str


@dataclass(frozen=True, slots=True)
class ClockTold:
    """The wall clock's minute since 1970, where it is `synced`. The schedule's alone: no safety hangs on it."""

    minute: int
    synced: bool
