"""Triage: a new Linear issue gets a type, a priority, a label and one quiet comment. Pure: it only says the next step.

    wants ─▶ context ─▶ [similar] ─▶ classify … (triage_ask) ─▶ shadow: Finish
             (read)     (memory)     (models)  └▶ [quiet] ─▶ recheck ─▶ [again …] ─▶ [update] ─▶ [comment] ─▶ Finish
                                                             (read)    text edited   what is still unset    (case)

Invariants
* Human edits win. What a person set, changed or took away is never written; the issue is read again after the model has
  answered, and the actuator looks once more right before it writes (`integrations.linear`).
* The issue's text is hostile: it is the user's turn of the chat and nothing else, cut to a limit. The model has no
  tools, no URLs, no secrets; its answer must lie in fixed sets: it picks names, never ids, and no name that the team's
  policy does not list.
* Of the model's own words only `reason` reaches Linear, after `neutral` has made it inert.
* Every effect carries a key that is a function of the run, so that a step tried twice has one effect.
* Nothing is written about an issue that people have triaged, closed or deleted meanwhile, nor in shadow mode; where the
  mode is suggest, only the comment.

Sources: Linear's public GraphQL schema (payloads, priorities 0 none … 4 low, state types); GitHub Agentic Workflows'
"safe outputs" (the writer is not the model); "Clinejection" (2026-02), an issue title that drove a bot with tools.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from .. import config, ids
from ..ids import RunId
from ..wire import Hook
from .neutral import plain
from .triage_ask import Asker, recalled_of
from .triage_comment import comment, comment_id, is_useful
from .triage_decide import Recalled, Verdict
from .triage_issue import CLOSED_STATES, Issue, IssueEvent, issue_event
from .triage_policy import Policies, Policy, of_config
from .triage_prompt import BODY_BYTES_MAX, TITLE_MAX
from .triage_rules import passed_by
from .triage_write import Plan, case_of, plan, stands, wrote_before
from .workflow import TIMEOUT_SAYS, Approve, Call, Finish, Results, Step

URGENT = ("P0", "P1")
"""Such a run ends only once the relay outside holds a copy of it."""
GONE = Finish("ignored", "the issue is gone")


class Triage:
    """`triage` is the operator's, `model` the name to ask for, `actor_id` ourselves in Linear ("" where unknown).

    `policies`: the teams'; without them `triage` alone decides. `body_bytes` of a description are shown to the model.
    """

    name = "triage"

    def __init__(
        self,
        triage: config.Triage,
        model: str,
        actor_id: str,
        policies: Policies | None = None,
        *,
        body_bytes: int = BODY_BYTES_MAX,
    ) -> None:
        self.policies = policies or of_config(triage)
        self._copy_urgent = triage.copy_urgent
        self._actor_id = actor_id
        self._asker = Asker(model, body_bytes)

    def wants(self, hook: Hook) -> str | None:
        """The run's title for a new issue that people have not triaged; None for every other event and for junk."""
        event = issue_event(hook, "create")
        if event is None or self._is_bots(event):
            return None
        issue = event.data
        policy = self.policies.of(issue.team_key)
        if policy.mode == "off" or issue.trashed or issue.state.type in CLOSED_STATES:
            return None
        if issue.priority and _typed(policy, [label.name for label in issue.labels]):
            return None
        return plain(f"{issue.identifier} {issue.title}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        """The next step of `run`. The same results give the same step, on any node."""
        event = issue_event(hook, "create")
        if event is None:
            return Finish("failed", "the webhook's body is not an issue of Linear")
        return self.course(run, event.data.id, self.policies.of(event.data.team_key), results)

    def course(self, run: RunId, issue_id: str, policy: Policy, results: Results, again: bool = False) -> Step:
        """The whole way for one issue. `again`: a person wants it done once more, whatever was set before."""
        if policy.mode == "off":
            return Finish("ignored", "triage is off")
        if "context" not in results:
            return look("context", run, issue_id, policy)
        issue = self._open(results["context"], policy, again)
        if isinstance(issue, Finish):
            return issue
        verdict = self._asker.verdict("", issue, policy, results)
        if not isinstance(verdict, Verdict):
            return verdict
        recalled = recalled_of(results.get("similar", {}))
        if policy.mode == "shadow":
            case = case_of(run, issue, verdict, recalled, policy.mode, wrote_before({}), {})
            return Finish("done", f"shadow: {verdict}", case=case)
        if policy.quiet and verdict.priority.value != "P0":
            waits = _until_morning(run, policy, results)
            if waits is not None:
                return waits
        if "recheck" not in results:
            return look("recheck", run, issue_id, policy)
        now = self._open(results["recheck"], policy, again)
        if isinstance(now, Finish):
            return now
        if (now.title, now.description) != (issue.title, issue.description):
            # The verdict is about a text that is gone. Once: whoever keeps typing gets the verdict on this version.
            verdict = self._asker.verdict("re", now, policy, results)
            if not isinstance(verdict, Verdict):
                return verdict
            recalled = recalled_of(results.get("resimilar", {}))
        return self._write(run, now, verdict, recalled, policy, results)

    def _write(
        self, run: RunId, issue: Issue, verdict: Verdict, recalled: Recalled, policy: Policy, results: Results
    ) -> Step:
        """From a verdict that stands to the end."""
        planned = plan(issue, verdict, policy, wrote_before(recalled.case))
        changed = updated(run, issue.id, planned, results)
        if not isinstance(changed, list):
            return changed
        useful = policy.comment == "always" or (policy.comment != "never" and is_useful(verdict, planned, changed))
        if useful and "comment" not in results:
            return put_comment("comment", issue.id, comment(run, verdict, planned, changed))
        if results.get("comment", {}).get("missing"):
            return GONE
        wrote = stands(planned.wanted, results.get("update", {}))
        case = case_of(run, issue, verdict, recalled, policy.mode, wrote, planned.suggested)
        urgent = self._copy_urgent and verdict.priority.value in URGENT
        return Finish("done", str(verdict), urgent=urgent, case=case)

    def _is_bots(self, event: IssueEvent) -> bool:
        """True for what we or another bot created: answering those can loop."""
        if event.data.bot_actor:
            return True
        authors = (event.actor.id if event.actor else None, event.data.creator_id)
        return bool(self._actor_id) and self._actor_id in authors

    def _open(self, result: Mapping[str, Any], policy: Policy, again: bool) -> Issue | Finish:
        """The issue that `issue_context` returned, or the end where there is nothing left to do about it."""
        issue = issue_of(result)
        if isinstance(issue, Finish):
            return issue
        if issue.state in CLOSED_STATES:
            return Finish("ignored", f"the issue is {issue.state}")
        if not again and issue.priority and _typed(policy, [label.name for label in issue.labels]):
            return Finish("ignored", "people have triaged it")
        why = "" if again else passed_by(policy, issue)
        return Finish("ignored", why) if why else issue


def issue_of(result: Mapping[str, Any]) -> Issue | Finish:
    """The issue in an answer of `issue_context`; the end where it is gone or none."""
    try:
        issue = msgspec.convert(result, Issue)
    except msgspec.ValidationError as fault:
        return Finish("failed", f"the answer of issue_context is not an issue: {fault}")
    return GONE if issue.missing else issue


def look(name: str, run: RunId, issue: str, policy: Policy) -> Call:
    return Call(name, "linear", "issue_context", {"issue": issue, "labels": policy.all_labels}, ids.uuid4_of(run, name))


def updated(run: RunId, issue: str, planned: Plan, results: Results) -> list[str] | Step:
    """What was changed as planned; the step to it while it is not, the end where the issue is gone."""
    if planned.change and "update" not in results:
        asked = {"issue": issue, **planned.change}
        return Call("update", "linear", "issue_update", asked, ids.uuid4_of(run, "update"))
    done = results.get("update", {})
    return GONE if done.get("missing") else list(done.get("changed", ()))


def put_comment(name: str, issue: str, body: str) -> Call:
    """The one comment on `issue`: made, or edited where it is there."""
    key = comment_id(issue)
    return Call(name, "linear", "comment_put", {"issue": issue, "id": key, "body": body}, key)


def _until_morning(run: RunId, policy: Policy, results: Results) -> Step | None:
    """What a run waits for in quiet hours; None where it may go on. A person may let it write at once, or end it."""
    if "quiet" not in results:
        asked = {"hours": policy.quiet, "timezone": policy.timezone}
        return Call("quiet", "memory", "quiet", asked, ids.uuid4_of(run, "quiet"))
    wait_s = float(results["quiet"].get("wait_s", 0.0))
    if wait_s <= 0:
        return None
    if "quiet-wait" not in results:
        return Approve("quiet-wait", f"quiet hours {policy.quiet}: write now?", within_s=wait_s)
    waited = results["quiet-wait"]
    if waited.get("approved") or waited.get("by") == TIMEOUT_SAYS:
        return None
    return Finish("ignored", f"not written: {waited.get('by')} said no in quiet hours")


def _typed(policy: Policy, labels: list[str]) -> bool:
    """True where one of the policy's type labels is among `labels` (names compare without case, as in Linear)."""
    ours = {name.casefold() for name in policy.labels.values()}
    return any(name.casefold() in ours for name in labels)
