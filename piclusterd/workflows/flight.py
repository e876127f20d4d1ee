"""A run in progress on this coordinator, and how patient it is. `run` moves it.

intent ─▶ acting ⇄ waiting ─▶ result ─▶ … ─▶ [copying] ─▶ done        retry ─▶ …
   └────▶ asking ─────────────▶ result
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..events import Ticket, Token
from ..ids import RunId
from .workflow import Approve, AskModel, Call, Finish

Phase = Literal["intent", "acting", "waiting", "result", "done", "retry", "asking", "copying"]
ASIDE = ("asking", "copying")
"""Phases of runs that wait for a person or for the relay, and take nobody's place meanwhile."""


@dataclass(frozen=True, slots=True)
class Patience:
    """`attempts_max` tries of one step before its run is given up; `approval_s` for a person's answer."""

    attempts_max: int = 8
    approval_s: float = 72 * 3600.0


@dataclass(slots=True)
class Flight:
    run: RunId
    phase: Phase
    token: Token
    step: AskModel | Call | Approve | None = None
    attempt: int = 1
    due: float = float("inf")
    probe: bool = False
    """Its call is the one that finds out whether an ailing service is well again."""
    finish: Finish | None = None
    """Its end, which waits for a copy."""
    since: float = 0.0
    """When it stood aside."""
    tickets: list[Ticket] = field(default_factory=list)
    """Who waits for what is being recorded."""
