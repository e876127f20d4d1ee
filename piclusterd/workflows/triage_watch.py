"""What people make of issues, watched: every change by a person of a priority or a type is a lesson.

    Issue update by a person ─▶ case ─▶ [settle ─▶ case-again] ─▶ [similar] ─▶ Finish(case: human.<field>)
    priority or labels changed ─▶ that is what the field should have been
    taken out of triage (to backlog, unstarted, started) with our values still there ─▶ they were right

Not watched: bots, ourselves, and an echo of our own write (where nobody told us our own id). What was never triaged
here is learnt from as well, with the vector that its text has now: so triage knows a team before it wrote anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import ids
from ..ids import RunId
from ..wire import Hook
from .neutral import plain
from .triage import Triage
from .triage_ask import recalled_of, text_of
from .triage_issue import NAMES, HookIssue, IssueEvent, issue_event
from .triage_policy import Policy
from .triage_prompt import TITLE_MAX
from .triage_write import CASE_TEXT_CHARS_MAX, Wrote, wrote_before
from .workflow import Approve, Call, Finish, Results, Step

SETTLE_S = 60.0
"""Where triage of the issue is under way, a change may be our own write told back: its run is waited for so long."""
ACCEPTED_STATES = frozenset({"backlog", "unstarted", "started"})
"""To which a person moves an issue that was looked at."""


class Watch:
    name = "triage-watch"

    def __init__(self, triage: Triage, actor_id: str = "") -> None:
        """`actor_id`: ourselves in Linear; "" where unknown."""
        self._triage = triage
        self._actor_id = actor_id

    def wants(self, hook: Hook) -> str | None:
        event = issue_event(hook, "update")
        if event is None or not self._is_persons(event) or event.data.trashed:
            return None
        policy = self._triage.policies.of(event.data.team_key)
        if policy.mode == "off" or not policy.encoder:
            return None
        before = event.updated_from or {}
        accepted = "stateId" in before and event.data.state.type in ACCEPTED_STATES
        if not (accepted or "priority" in before or "labelIds" in before):
            return None
        return plain(f"{event.data.identifier} {event.data.title}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        event = issue_event(hook, "update")
        if event is None:
            return Finish("failed", "the webhook's body is not a change of an issue of Linear")
        issue, policy = event.data, self._triage.policies.of(event.data.team_key)
        known = self._known(run, issue, results)
        if not isinstance(known, Mapping):
            return known
        case = known.get("case")
        if isinstance(case, Mapping):
            lesson = _lesson(event, case, policy)
            if not lesson:
                return Finish("ignored", "nothing to learn: it is our own write, or says nothing of a verdict")
            return Finish("done", _told(lesson), case={"issue": issue.id, "set": lesson})
        lesson = _as_it_is(issue, policy)
        if not lesson:
            return Finish("ignored", "nothing to learn: it has neither priority nor type")
        if "similar" not in results:
            asked = {"issue": issue.id, "team": issue.team_key, "encoder": policy.encoder,
                     "text": text_of(issue.title, issue.description or "")}  # fmt: skip
            return Call("similar", "memory", "similar", asked, "", optional=True)
        recalled = recalled_of(results["similar"])
        told = {
            "identifier": issue.identifier,
            "team": issue.team_key,
            "title": issue.title[:CASE_TEXT_CHARS_MAX],
            "text": (issue.description or "")[:CASE_TEXT_CHARS_MAX],
            "encoder": recalled.encoder,
            "vector": recalled.vector,
        }
        return Finish("done", _told(lesson), case={"issue": issue.id, "set": told | lesson})

    def _known(self, run: RunId, issue: HookIssue, results: Results) -> Mapping[str, Any] | Step:
        """What the memory says of the issue, once no run of ours is at it."""
        for name in ("case", "case-again"):
            if name not in results:
                asked = {"issue": issue.id, "identifier": issue.identifier}
                return Call(name, "memory", "case", asked, ids.uuid4_of(run, name))
            if not results[name].get("busy"):
                return results[name]
            if "settle" not in results:
                return Approve("settle", f"triage of {issue.identifier} is under way: learn now?", within_s=SETTLE_S)
        return Finish("ignored", "nothing to learn: triage of it is still under way")

    def _is_persons(self, event: IssueEvent) -> bool:
        actor = event.actor
        if actor is None or actor.type not in ("", "user") or event.data.bot_actor:
            return False
        return not self._actor_id or actor.id != self._actor_id


def _lesson(event: IssueEvent, case: Mapping[str, Any], policy: Policy) -> dict[str, str]:
    """`human.<field>` of what this change says of an issue that is remembered."""
    issue, before = event.data, event.updated_from or {}
    wrote, said = wrote_before(case), _as_it_is(issue, policy)
    lesson: dict[str, str] = {}
    if "priority" in before and not _is_echo_of_priority(before["priority"], int(issue.priority), wrote):
        lesson["human.priority"] = NAMES.get(int(issue.priority), "")
    if "labelIds" in before and not _is_echo_of_labels(before["labelIds"], issue, wrote):
        gone = _taken_away(before["labelIds"], issue, wrote)
        for name, group in (("type", tuple(policy.labels.values())), ("label", policy.labels_more)):
            value = said.get(f"human.{name}", "")
            if value or any(label in group for label in gone):
                lesson[f"human.{name}"] = value
    if not lesson and "stateId" in before:
        lesson = {
            f"human.{name}": _stood(case, name)
            for name in ("type", "priority", "label")
            if f"human.{name}" not in case and _stood(case, name) and said.get(f"human.{name}") == _stood(case, name)
        }
    return lesson


def _as_it_is(issue: HookIssue, policy: Policy) -> dict[str, str]:
    """`human.<field>` of an issue that a person has just touched: what it has is what it should have."""
    labels = {label.name.casefold() for label in issue.labels}
    kinds = [kind for kind, label in policy.labels.items() if label.casefold() in labels]
    more = [label for label in policy.labels_more if label.casefold() in labels]
    found = {
        "human.priority": NAMES.get(int(issue.priority), ""),
        "human.type": kinds[0] if kinds else "",
        "human.label": more[0] if more else "",
    }
    return {name: value for name, value in found.items() if value}


def _is_echo_of_priority(before: Any, now: int, wrote: Wrote) -> bool:
    """Our own write, told back: from none to what we wrote."""
    return before == 0 and now == wrote.priority != 0


def _is_echo_of_labels(before: Any, issue: HookIssue, wrote: Wrote) -> bool:
    was = set(before) if isinstance(before, list) else set()
    ours = {label.id for label in wrote.labels}
    return bool(ours) and {label.id for label in issue.labels} - was == ours and was <= {one.id for one in issue.labels}


def _taken_away(before: Any, issue: HookIssue, wrote: Wrote) -> list[str]:
    """Names of our labels that this change took from the issue."""
    was = set(before) if isinstance(before, list) else set()
    left = {label.id for label in issue.labels}
    return [label.name for label in wrote.labels if label.id in was - left]


def _stood(case: Mapping[str, Any], name: str) -> str:
    said = case.get(f"said.{name}")
    return str(said[0]) if isinstance(said, list | tuple) and said else ""


def _told(lesson: Mapping[str, str]) -> str:
    return "learnt: " + ", ".join(f"{name.removeprefix('human.')} {value or 'none'}" for name, value in lesson.items())
