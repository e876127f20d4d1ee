"""The service `memory`: what triage remembers, for its runs. It reads the fold on this node and changes nothing.

    similar  {issue, team, encoder, text} ─▶ a vector (by a model of the cluster, or by words) ─▶ the nearest cases,
                                             how verdicts stood so far, what was said of this very issue before
    case     {issue, identifier}          ─▶ what is remembered of one, or {missing}; busy: triage of it is under way
    quiet    {hours, timezone}            ─▶ {wait_s}: until a team's quiet hours are over; 0 outside of them

Where no node embeds now, words alone tell what is similar: other cases of that kind are found, and none is mixed up
with a model's.
"""

from __future__ import annotations

import array
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from .errors import PiclusterError
from .inference.protocol import Embedded, EmbedRequest
from .integrations.outcome import CallFailed
from .views import Choice
from .workflows.cases import FIELDS, Case, Cases
from .workflows.triage_policy import quiet_hours
from .workflows.vectors import WORDS, of_words, quantised

log = logging.getLogger("piclusterd")

SHOWN_MAX, JUDGED_MAX = 3, 16
"""Cases told of one issue: the nearest, and the nearest that a person judged. They stay in the ledger with the run."""
TITLE_CHARS_MAX = 120

Embed = Callable[[EmbedRequest], Awaitable[tuple[Choice, Embedded]]]


class _Similar(msgspec.Struct, frozen=True):
    issue: str
    team: str
    encoder: str
    text: str
    with_text: bool = False
    """Of similar issues, too: for examples."""


class Memory:
    def __init__(
        self,
        cases: Callable[[], Cases],
        embed: Embed,
        open_titles: Callable[[], Iterable[str]] = tuple,
        clock: Callable[[ZoneInfo], datetime] = datetime.now,
    ) -> None:
        """`cases()`: the fold, as it is now. `open_titles()`: of the runs that may write to an issue just now."""
        self._cases = cases
        self._embed = embed
        self._open_titles = open_titles
        self._clock = clock

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        match operation:
            case "similar":
                return await self.similar(msgspec.convert(arguments, _Similar))
            case "case":
                case = self._cases().of(str(arguments["issue"]))
                busy = any(str(arguments.get("identifier")) in title.split() for title in self._open_titles())
                return {"busy": busy} | ({"missing": True} if case is None else {"case": case.as_dict()})
            case "quiet":
                return {"wait_s": self._quiet_s(str(arguments["hours"]), str(arguments["timezone"]))}
            case _:
                raise CallFailed(f"the memory has no operation {operation!r}", retryable=False)

    async def similar(self, ask: _Similar) -> dict[str, Any]:
        """As `workflows.triage_decide.Recalled`."""
        vector, encoder = await self.vector(ask.encoder, ask.text)
        cases = self._cases()
        known, near = cases.of(ask.issue), cases.near(vector, encoder, ask.team, ask.issue)
        return {
            "vector": vector,
            "encoder": encoder,
            "near": [_near(like, case, ask.with_text) for like, case in _chosen(near)],
            "bins": {name: cases.bins(name) for name in FIELDS},
            "case": {} if known is None else known.as_dict(),
        }

    async def vector(self, encoder: str, text: str) -> tuple[bytes, str]:
        """The vector of `text`, and what made it."""
        if encoder == WORDS:
            return of_words(text), WORDS
        try:
            _, embedded = await self._embed(EmbedRequest(encoder, (text,)))
        except (PiclusterError, OSError, TimeoutError) as fault:
            log.warning("similar issues are told by words alone: %s", fault)
            return of_words(text), WORDS
        numbers = array.array("f", embedded.vectors[0])
        if sys.byteorder == "big":
            numbers.byteswap()
        return quantised(numbers), encoder

    def _quiet_s(self, hours: str, timezone: str) -> float:
        between = quiet_hours(hours)
        if between is None:
            return 0.0
        begins, ends = between
        now = self._clock(ZoneInfo(timezone))
        at = now.time()
        inside = begins <= at < ends if begins < ends else at >= begins or at < ends
        until = now.replace(hour=ends.hour, minute=ends.minute, second=0, microsecond=0)
        return ((until if until > now else until + timedelta(days=1)) - now).total_seconds() if inside else 0.0


def _chosen(near: list[tuple[float, Case]]) -> list[tuple[float, Case]]:
    """The nearest, judged or not, for duplicates and for people; and the nearest that teach something."""
    judged = [pair for pair in near if pair[1].judged][:JUDGED_MAX]
    return [*near[:SHOWN_MAX], *(pair for pair in judged if pair not in near[:SHOWN_MAX])]


def _near(like: float, case: Case, with_text: bool) -> dict[str, Any]:
    told = {
        "identifier": case.get("identifier", ""),
        "title": case.get("title", "")[:TITLE_CHARS_MAX],
        "likeness": round(like, 4),
        "holds": {name: held for name in FIELDS if (held := case.holds(name))},
        "odds": {name: odds for name in FIELDS if (odds := case.get(f"odds.{name}", {}))},
    }
    return told | ({"text": case.get("text", "")} if with_text else {})
