"""Commands in comments: `@picluster undo`, or `/triage undo`, at the beginning of a new comment on an issue.

    undo   case ─▶ context ─▶ update: what is still as we made it, back to what it was ─▶ comment edited ─▶ Finish
    apply  case ─▶ context ─▶ update: what was said and nobody has set ─▶ comment edited ─▶ Finish
    why    case ─▶ an answer below the comment ─▶ Finish
    retry  the whole of triage once more, as a run of its own

Who may command is in the team's policy; others, bots and people from outside the workspace are not heard, nor are
edits of a comment. A command is one word after the name: nothing else of the comment reaches a model or a write. What a
person says by it is remembered: `apply` agrees, `undo` takes back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .. import ids
from ..ids import RunId
from ..wire import Hook
from .neutral import plain
from .triage import Triage, issue_of, look, put_comment, updated
from .triage_comment import applied, explained, undone, unknown
from .triage_decide import Judged, Verdict
from .triage_issue import CLOSED_STATES, CommentEvent, Issue, Party, comment_event
from .triage_policy import ANYBODY, Policy
from .triage_prompt import TITLE_MAX
from .triage_write import Plan, Wrote, plan, stands, wrote_before
from .workflow import Call, Finish, Results, Step

COMMAND = re.compile(r"\s*(?:@picluster|/triage)\s+(apply|undo|why|retry)\b", re.IGNORECASE)


class Commands:
    name = "triage-command"

    def __init__(self, triage: Triage, actor_id: str = "") -> None:
        """`actor_id`: ourselves in Linear, who command nothing."""
        self._triage = triage
        self._actor_id = actor_id

    def wants(self, hook: Hook) -> str | None:
        event = comment_event(hook)
        word = None if event is None else self._heard(event)
        if event is None or word is None:
            return None
        assert event.data.issue is not None
        return plain(f"{word} {event.data.issue.identifier} {event.data.issue.title}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        event = comment_event(hook)
        word = None if event is None else self._heard(event)
        if event is None or event.data.issue is None or word is None:
            return Finish("failed", "this comment commands nothing, or who wrote it may not")
        policy, issue = self._policy(event), event.data.issue.id
        if word == "retry":
            return self._triage.course(run, issue, policy, results, again=True)
        if "case" not in results:
            return Call("case", "memory", "case", {"issue": issue}, ids.uuid4_of(run, "case"))
        case = results["case"].get("case")
        if not isinstance(case, Mapping):
            return _answer(run, event, unknown(run), results) or Finish("done", f"{word}: nothing is remembered of it")
        match word:
            case "why":
                return _answer(run, event, explained(run, case), results) or Finish("done", "explained")
            case "undo":
                return self._undo(run, event, policy, case, results)
            case _:
                return self._apply(run, event, policy, case, results)

    def _heard(self, event: CommentEvent) -> str | None:
        """The command, where there is one and its author may give it."""
        match = COMMAND.match(event.data.body[:TITLE_MAX])
        author = _author(event)
        policy = self._policy(event)
        if match is None or policy.mode == "off" or (self._actor_id and author.id == self._actor_id):
            return None
        allowed = ANYBODY in policy.commanders or author.among(policy.commanders)
        return match[1].lower() if allowed else None

    def _policy(self, event: CommentEvent) -> Policy:
        issue = event.data.issue
        return self._triage.policies.of(issue.team.key if issue and issue.team else "")

    # undo ----------------------------------------------------------------------------------------------------
    def _undo(self, run: RunId, event: CommentEvent, policy: Policy, case: Mapping[str, Any], results: Results) -> Step:
        issue = self._issue(run, event, policy, results)
        if not isinstance(issue, Issue):
            return issue
        planned = _taking_back(issue, wrote_before(case))
        changed = updated(run, issue.id, planned, results)
        if not isinstance(changed, list):
            return changed
        if "comment" not in results:
            return put_comment("comment", issue.id, undone(run, _author(event).name, changed))
        rejected = {f"human.{name}": "" for name in changed_fields(changed, case)}
        told = {"undone": True, "wrote": Wrote().as_dict(), **rejected}
        return Finish("done", f"took back {' and '.join(changed) or 'nothing'}", case={"issue": issue.id, "set": told})

    # apply ---------------------------------------------------------------------------------------------------
    def _apply(
        self, run: RunId, event: CommentEvent, policy: Policy, case: Mapping[str, Any], results: Results
    ) -> Step:
        issue = self._issue(run, event, policy, results)
        if not isinstance(issue, Issue):
            return issue
        verdict = _verdict(case)
        if verdict is None:
            return Finish("ignored", "nothing was said of this issue that could be applied")
        planned = plan(issue, verdict, policy, wrote_before(case), apply_all=True)
        changed = updated(run, issue.id, planned, results)
        if not isinstance(changed, list):
            return changed
        if "comment" not in results:
            return put_comment("comment", issue.id, applied(run, _author(event).name, case, changed))
        agreed = {f"human.{name}": judged.value for name, judged in verdict.fields.items() if name not in planned.kept}
        told = {
            "undone": False,
            "wrote": stands(planned.wanted, results.get("update", {})).as_dict(),
            "suggested": {},
            **agreed,
        }
        return Finish(
            "done", f"applied {' and '.join(changed) or 'nothing new'}", case={"issue": issue.id, "set": told}
        )

    def _issue(self, run: RunId, event: CommentEvent, policy: Policy, results: Results) -> Issue | Step:
        """The issue as it is now: an order is about what its author sees, not about what was."""
        assert event.data.issue is not None
        if "context" not in results:
            return look("context", run, event.data.issue.id, policy)
        issue = issue_of(results["context"])
        if isinstance(issue, Issue) and issue.state in CLOSED_STATES:
            return Finish("ignored", f"the issue is {issue.state}")
        return issue


def changed_fields(changed: list[str], case: Mapping[str, Any]) -> list[str]:
    """Fields of a verdict, of what was written: a label may stand for the type or for itself."""
    found = ["priority"] if "priority" in changed else []
    return found + [name for name in ("type", "label") if "label" in changed and case.get(f"said.{name}")]


def _taking_back(issue: Issue, wrote: Wrote) -> Plan:
    """What is still as we made it, back to what it was: we only ever write what is unset."""
    change: dict[str, Any] = {}
    if wrote.priority and issue.priority == wrote.priority:
        change |= {"priority": 0, "instead_of": [wrote.priority]}
    standing = [label.id for label in wrote.labels if issue.named(label.name)]
    return Plan(change | ({"removed_label_ids": standing} if standing else {}))


def _verdict(case: Mapping[str, Any]) -> Verdict | None:
    said = {}
    for name in ("type", "priority", "label"):
        told = case.get(f"said.{name}")
        if isinstance(told, list | tuple) and len(told) == 3:
            said[name] = Judged(str(told[0]), float(told[1]), float(told[2]), "model")
    if "type" not in said or "priority" not in said:
        return None
    return Verdict(said["type"], said["priority"], said.get("label"), None, str(case.get("reason", "")), "", "")


def _answer(run: RunId, event: CommentEvent, body: str, results: Results) -> Step | None:
    """A comment below the command; None where it is written."""
    if "answer" in results:
        return None
    assert event.data.issue is not None
    key = ids.uuid4_of(run, "answer")
    parent = event.data.parent_id or event.data.id
    asked = {"issue": event.data.issue.id, "id": key, "body": body, "parent": parent}
    return Call("answer", "linear", "comment_create", asked, key)


def _author(event: CommentEvent) -> Party:
    user = event.data.user or Party()
    return Party(event.data.user_id or user.id, user.name, user.email)
