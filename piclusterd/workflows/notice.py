"""Notice: the coordinator tells people of a run that was given up, or of an alarm. Pure; the words are in the event.

    hook (source cluster, event notice) ─▶ telling, sink by sink ─▶ Finish(done)

Who makes the events is `notices`. A notice that itself is given up is a dead letter like any other, and makes none.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from ..ids import RunId
from ..wire import Hook
from .neutral import plain
from .notifying import TEXT_MAX, TITLE_MAX, Notice, Sinks, telling
from .workflow import Finish, Results, Step

EVENT = "notice"


class Words(msgspec.Struct, frozen=True):
    """Body of the event."""

    title: Annotated[str, Meta(max_length=TITLE_MAX)]
    text: Annotated[str, Meta(max_length=TEXT_MAX)]
    priority: Annotated[int, Meta(ge=1, le=5)] = 3
    tags: tuple[str, ...] = ()


class Notices:
    name = "notice"

    def __init__(self, sinks: Sinks) -> None:
        self._sinks = sinks

    def wants(self, hook: Hook) -> str | None:
        words = _words(hook)
        return None if words is None or not self._sinks else plain(words.title, TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        words = _words(hook)
        if words is None:
            return Finish("failed", "this is no notice")
        notice = Notice(words.title, words.text, words.priority, words.tags)
        return telling(run, notice, self._sinks, results) or Finish("done", "told")


def _words(hook: Hook) -> Words | None:
    if (hook.source, hook.event) != ("cluster", EVENT):
        return None
    try:
        return msgspec.json.decode(hook.body, type=Words)
    except (ValueError, RecursionError):
        return None
