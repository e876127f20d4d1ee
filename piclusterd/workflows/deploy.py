"""Deploy: the cluster takes a new release upon itself, one node at a time, the coordinator last. Pure.

    GitHub workflow_run, success, default branch, the repository's own ─▶ confirm ─▶ [approve] ─┐
    the owner: picluster upgrade --rolling | --rollback ────────────────────────────────────────┤
                                                                                                ▼
      look ─▶ for each node that runs another release: leave-<n> ─▶ node-<n> ─▶ … ─▶ [hub] ─▶ Finish
    (source, nodes)            a coordinator hands over first   └ rolled back: Finish(failed), the rest stay as they are

Invariants
* A fork, a pull request, another branch or another workflow deploys nothing; what the webhook claims is asked of GitHub
  again, by the run's number, before anything follows from it.
* What is installed is what the owner's source has under its digest; no text of a webhook names a file or an address.
* The first node that does not take the release ends the run: nobody follows it.
* The hub comes last: its source is that of the new release, and what is at Cloudflare unchanged is left alone.

Source: GitHub's webhook `workflow_run` and REST "Get a workflow run"; research on update frameworks: one at a time.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .. import config, ids
from ..ids import RunId
from ..wire import HOOK_BYTES_MAX, Hook
from .neutral import plain
from .workflow import Approve, Call, Finish, Results, Step

EVENT = "upgrade"
"""Of the source `cluster`: the owner's own wish."""
TRUSTED_EVENTS = ("push", "release", "workflow_dispatch", "schedule")
"""What begins workflows that run the repository's own code on its default branch."""
TITLE_MAX = 120
NODES_MAX = 64


class _Repository(msgspec.Struct, frozen=True):
    full_name: str
    default_branch: str = ""
    fork: bool = False


class _Run(msgspec.Struct, frozen=True):
    id: Annotated[int, Meta(ge=0)]
    path: str
    event: str
    conclusion: str | None
    head_branch: str | None
    head_sha: Annotated[str, Meta(pattern="^[0-9a-f]{40}$")]
    head_repository: _Repository
    status: str = "completed"


class _Event(msgspec.Struct, frozen=True):
    """The part of GitHub's `workflow_run` that is read here."""

    action: str
    workflow_run: _Run
    repository: _Repository


class OwnersWish(msgspec.Struct, frozen=True):
    """Body of the owner's event. `version`: "" for the newest."""

    action: Literal["install", "rollback"] = "install"
    version: Annotated[str, Meta(max_length=32)] = ""


class _Node(msgspec.Struct, frozen=True):
    node: str
    name: str
    release: str
    models: tuple[str, ...] = ()


class _Seen(msgspec.Struct, frozen=True):
    """What `look` returns; see `upgrade_desk`."""

    version: str
    sha256: str
    nodes: Annotated[tuple[_Node, ...], Meta(max_length=NODES_MAX)]
    away: tuple[str, ...] = ()


class Deploy:
    """`policy` is the operator's; `upgrades`: a source of releases is configured."""

    name = "deploy"

    def __init__(self, policy: config.Deploy, upgrades: bool) -> None:
        self._policy = policy
        self._upgrades = upgrades

    def wants(self, hook: Hook) -> str | None:
        wish = _wish(hook)
        if wish is not None:
            wanted = plain(wish.version, 32) or "the newest release"
            return f"upgrade to {wanted}" if wish.action == "install" else "rollback"
        event = self._event(hook)
        if event is None:
            return None
        return plain(f"{event.repository.full_name} {event.workflow_run.head_sha[:12]}", TITLE_MAX)

    def next(self, run: RunId, hook: Hook, results: Results) -> Step:
        """The next step of `run`. The same results give the same step, on any node."""
        wish = _wish(hook)
        if wish is not None:
            return self._roll(run, wish, results, hub=False)
        event = self._event(hook)
        if event is None:
            return Finish("ignored", "nothing that deploys")
        if "confirm" not in results:
            arguments = {"repository": self._policy.repository, "run": event.workflow_run.id}
            return Call("confirm", "github", "run_look", arguments, ids.uuid4_of(run, "confirm"))
        doubt = self._doubt(event, results["confirm"])
        if doubt:
            return Finish("ignored", f"GitHub says otherwise: {doubt}")
        if self._policy.mode == "ask":
            if "approve" not in results:
                return Approve("approve", f"deploy {event.workflow_run.head_sha[:12]} of {self._policy.repository}?")
            if not results["approve"]["approved"]:
                return Finish("ignored", f"not deployed, says {plain(str(results['approve']['by']), 64)}")
        return self._roll(run, OwnersWish(), results, hub=bool(self._policy.cloudflare_account))

    # the nodes -----------------------------------------------------------------------------------------------
    def _roll(self, run: RunId, wish: OwnersWish, results: Results, *, hub: bool) -> Step:
        done = "no upgrades here: [upgrade] source is empty"
        if self._upgrades or wish.action == "rollback":
            if "look" not in results:
                arguments = {"version": wish.version, "action": wish.action}
                return Call("look", "upgrades", "look", arguments, ids.uuid4_of(run, "look"))
            try:
                seen = msgspec.convert(results["look"], _Seen)
            except msgspec.ValidationError as fault:
                return Finish("failed", f"the look is not what it should be: {fault}")
            step = self._next_node(run, wish, seen, results)
            if not isinstance(step, str):
                return step
            done = step
        if hub:
            if "hub" not in results:
                return Call("hub", "deployer", "hub", {}, ids.uuid4_of(run, "hub"))
            done += f"; hub {'uploaded' if results['hub'].get('uploaded') else 'unchanged'}"
        return Finish("done", done)

    def _next_node(self, run: RunId, wish: OwnersWish, seen: _Seen, results: Results) -> Step | str:
        """The next step of the next node; in words what was done once all have had their turn."""
        behind = [one for one in seen.nodes if wish.action == "rollback" or one.release != seen.version]
        for one in behind:
            leave, step = f"leave-{one.name}", f"node-{one.name}"
            if step in results:
                end = results[step]
                if end.get("state") != "done":
                    why = plain(str(end.get("why", "")), 300)
                    rest = "nobody else was touched" if one is behind[0] else "the rest stay as they are"
                    return Finish("failed", f"{one.name} {end.get('state')}: {why}; {rest}")
                continue
            if leave not in results:
                return Call(leave, "upgrades", "leave", {"node": one.node}, ids.uuid4_of(run, leave))
            arguments: dict[str, Any] = {
                "node": one.node, "name": one.name, "models": list(one.models), "action": wish.action,
                "version": seen.version, "sha256": seen.sha256,
            }  # fmt: skip
            return Call(step, "upgrades", "node", arguments, ids.uuid4_of(run, step))
        away = f"; away and left as they are: {', '.join(seen.away)}" if seen.away else ""
        if not behind:
            return f"all run {seen.version}{away}"
        releases = sorted({str(results[f"node-{one.name}"].get("release", "")) for one in behind})
        return f"{len(behind)} nodes now run {', '.join(releases)}{away}"

    # the webhook ---------------------------------------------------------------------------------------------
    def _event(self, hook: Hook) -> _Event | None:
        """A success that deploys, as the signed body tells it, or None."""
        if hook.source != "github" or self._policy.mode == "off" or len(hook.body) > HOOK_BYTES_MAX:
            return None
        try:
            event = msgspec.json.decode(hook.body, type=_Event)
        except (ValueError, RecursionError):
            return None
        return None if event.action != "completed" or self._objection(event.workflow_run, event.repository) else event

    def _objection(self, run: _Run, repository: _Repository) -> str:
        """Why this run deploys nothing; "" where it does."""
        tests = {
            "it did not succeed": (run.status, run.conclusion) == ("completed", "success"),
            "another repository": repository.full_name == self._policy.repository,
            "a fork's code": run.head_repository.full_name == repository.full_name and not run.head_repository.fork,
            "not the default branch": run.head_branch == repository.default_branch != "",
            "begun by an event that strangers cause": run.event in TRUSTED_EVENTS,
            "another workflow": run.path.split("@")[0] == self._policy.workflow,
        }
        return next((why for why, holds in tests.items() if not holds), "")

    def _doubt(self, event: _Event, told: Any) -> str:
        """What GitHub says now that the webhook did not; "" where both say the same."""
        if told.get("missing"):
            return "there is no such run"
        try:
            run = msgspec.convert(told, _Run)
        except msgspec.ValidationError as fault:
            return f"no workflow run: {fault}"
        if run.head_sha != event.workflow_run.head_sha or run.id != event.workflow_run.id:
            return "another commit"
        return self._objection(run, event.repository)


def _wish(hook: Hook) -> OwnersWish | None:
    if (hook.source, hook.event) != ("cluster", EVENT):
        return None
    try:
        return msgspec.json.decode(hook.body, type=OwnersWish)
    except (ValueError, RecursionError):
        return None
