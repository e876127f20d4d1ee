"""Telling people: one step for each place that notices go to, so that none is told twice for another's sake. Pure.

    Notice ─▶ notify-webhook ─▶ notify-ntfy ─▶ notify-linear ─▶ None: all have been told

What is told are words of ours and names made inert; a stranger's text stays where it is, and the notice says where.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import ids
from ..ids import RunId
from .neutral import plain
from .workflow import Call, Results

TITLE_MAX = 120
TEXT_MAX = 2000


@dataclass(frozen=True, slots=True)
class Sinks:
    """Where notices go: `names` of the service `notify`'s operations, and the Linear team that gets issues."""

    names: tuple[str, ...] = ()
    linear_team: str = ""

    def __bool__(self) -> bool:
        return bool(self.names or self.linear_team)


@dataclass(frozen=True, slots=True)
class Notice:
    """`priority`: 1 to 5 as ntfy counts, 3 is usual. `link`: where to look; "" for nowhere."""

    title: str
    text: str
    priority: int = 3
    tags: tuple[str, ...] = ()
    link: str = ""


def telling(run: RunId, notice: Notice, sinks: Sinks, results: Results) -> Call | None:
    """The next step of telling it to all sinks; None once all have been told."""
    title, text = plain(notice.title, TITLE_MAX), notice.text[:TEXT_MAX]
    for name in sinks.names:
        step = f"notify-{name}"
        if step not in results:
            arguments = {"title": title, "text": text, "priority": notice.priority, "tags": list(notice.tags)}
            return Call(step, "notify", name, {**arguments, "link": notice.link}, ids.uuid4_of(run, step))
    if sinks.linear_team and "notify-linear" not in results:
        key = ids.uuid4_of(run, "notify-linear")
        body = f"{text}\n\n{notice.link}".strip()
        arguments = {"id": key, "team": sinks.linear_team, "title": title, "body": body}
        return Call("notify-linear", "linear", "issue_create", arguments, key)
    return None
