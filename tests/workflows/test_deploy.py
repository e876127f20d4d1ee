"""Deploy as a decision table: who may begin one, which node is next, and where it stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from piclusterd import config, ids
from piclusterd.wire import Hook
from piclusterd.workflows.deploy import Deploy
from piclusterd.workflows.workflow import Approve, Call, Finish, Step, Workflow

RUN = ids.run_id("deploy", "key")
REPOSITORY = "octo/house"
SHA = "a" * 40


def workflow(upgrades: bool = True, **policy: Any) -> Deploy:
    return Deploy(config.Deploy(**{"mode": "auto", "repository": REPOSITORY, **policy}), upgrades)


def ran(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "id": 7, "path": ".github/workflows/ci.yml", "event": "push", "status": "completed", "conclusion": "success",
        "head_branch": "main", "head_sha": SHA, "head_repository": {"full_name": REPOSITORY, "fork": False},
    }  # fmt: skip
    return told | changes


def hook(action: str = "completed", repository: str = REPOSITORY, **changes: Any) -> Hook:
    event = {"action": action, "workflow_run": ran(**changes)}
    event["repository"] = {"full_name": repository, "default_branch": "main"}
    return Hook("github", "key", "workflow_run", json.dumps(event).encode())


def owner(**wish: Any) -> Hook:
    return Hook("cluster", "upgrade:1", "upgrade", json.dumps(wish).encode())


def seen(*releases: str, version: str = "0.2.0", away: tuple[str, ...] = ()) -> dict[str, Any]:
    nodes = [
        {"node": str(n) * 16, "name": f"pi-{n}", "release": release, "models": ["small"]}
        for n, release in enumerate(releases, start=1)
    ]
    return {"version": version, "sha256": "b" * 64, "nodes": nodes, "away": list(away)}


DONE = {"state": "done", "why": "", "release": "0.2.0"}


def step(results: Mapping[str, Any], event: Hook | None = None, upgrades: bool = True, **policy: Any) -> Step:
    return workflow(upgrades, **policy).next(RUN, event or owner(), results)


# who may begin -------------------------------------------------------------------------------------------------------
def test_it_is_a_workflow_that_wants_successes_of_the_repository_s_own_default_branch() -> None:
    flow: Workflow = workflow()
    assert flow.wants(hook()) == f"{REPOSITORY} {SHA[:12]}"
    assert flow.wants(hook(path=".github/workflows/ci.yml@refs/heads/main")) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"action": "requested"},
        {"conclusion": "failure"},
        {"conclusion": None},
        {"status": "in_progress"},
        {"repository": "octo/other"},
        {"head_branch": "feature"},
        {"head_branch": None},
        {"event": "pull_request"},
        {"event": "pull_request_target"},
        {"event": "issue_comment"},
        {"path": ".github/workflows/evil.yml"},
        {"path": "ci.yml"},
        {"head_sha": "../x"},
        {"head_repository": {"full_name": "stranger/house", "fork": True}},
        {"head_repository": {"full_name": REPOSITORY, "fork": True}},
        {"head_repository": None},
    ],
)
def test_nothing_else_of_github_is_wanted(changes: dict[str, Any]) -> None:
    assert workflow().wants(hook(**changes)) is None
    assert step({}, hook(**changes)) == Finish("ignored", "nothing that deploys")


def test_off_wants_only_the_owner_s_word() -> None:
    assert workflow(mode="off").wants(hook()) is None
    assert workflow(mode="off").wants(owner(version="0.2.0")) == "upgrade to 0.2.0"
    assert workflow().wants(owner()) == "upgrade to the newest release"
    assert workflow().wants(owner(action="rollback")) == "rollback"
    junk = [Hook("github", "k", "workflow_run", b"["), Hook("cluster", "k", "upgrade", b"[")]
    for other in (owner(action="rm"), Hook("github", "k", "upgrade", b"{}"), *junk):
        assert workflow().wants(other) is None


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"missing": True}, "no such run"),
        (ran(head_sha="c" * 40), "another commit"),
        (ran(conclusion="failure"), "did not succeed"),
        (ran(head_repository={"full_name": "stranger/house"}), "a fork's code"),
        (ran(head_branch="feature"), "not the default branch"),
        (ran(event="pull_request"), "strangers"),
        (ran(path="other.yml"), "another workflow"),
        ({"id": 7}, "no workflow run"),
    ],
)
def test_what_the_webhook_claims_is_asked_of_github_again(told: dict[str, Any], says: str) -> None:
    ask = step({}, hook())
    assert isinstance(ask, Call)
    assert (ask.service, ask.operation, ask.arguments) == ("github", "run_look", {"repository": REPOSITORY, "run": 7})
    end = step({"confirm": told}, hook())
    assert isinstance(end, Finish)
    assert end.outcome == "ignored"
    assert says in end.detail


def test_a_person_is_asked_where_the_policy_says_so() -> None:
    ask = step({"confirm": ran()}, hook(), mode="ask")
    assert isinstance(ask, Approve)
    no = step({"confirm": ran(), "approve": {"approved": False, "by": "the owner"}}, hook(), mode="ask")
    assert no == Finish("ignored", "not deployed, says the owner")
    yes = step({"confirm": ran(), "approve": {"approved": True, "by": "the owner"}}, hook(), mode="ask")
    assert isinstance(yes, Call)
    assert yes.operation == "look"


# which node is next --------------------------------------------------------------------------------------------------
def test_each_node_that_is_behind_leaves_office_and_is_upgraded_in_the_order_that_was_seen() -> None:
    results: dict[str, Any] = {"look": seen("0.1.0", "0.2.0", "0.1.0", away=("pi-9",))}
    steps = []
    while isinstance(now := step(results), Call):
        steps.append(now.name)
        assert now == step(results), "the same results give the same step"
        results[now.name] = DONE if now.operation == "node" else {"moved": False}
    assert steps == ["leave-pi-1", "node-pi-1", "leave-pi-3", "node-pi-3"]
    assert now == Finish("done", "2 nodes now run 0.2.0; away and left as they are: pi-9")


def test_a_node_is_asked_for_the_digest_that_was_seen_and_gets_its_models_back() -> None:
    call = step({"look": seen("0.1.0"), "leave-pi-1": {}})
    assert isinstance(call, Call)
    assert call.arguments == {
        "node": "1" * 16, "name": "pi-1", "models": ["small"], "action": "install", "version": "0.2.0",
        "sha256": "b" * 64,
    }  # fmt: skip


def test_the_first_node_that_goes_back_ends_it() -> None:
    back = {"state": "rolled-back", "why": "0.2.0 was not ready in 60 s", "release": "0.1.0"}
    end = step({"look": seen("0.1.0", "0.1.0"), "leave-pi-1": {}, "node-pi-1": back})
    assert isinstance(end, Finish)
    assert end.outcome == "failed"
    assert end.detail == "pi-1 rolled-back: 0.2.0 was not ready in 60 s; nobody else was touched"
    results = {"look": seen("0.1.0", "0.1.0"), "leave-pi-1": {}, "node-pi-1": DONE, "leave-pi-2": {}, "node-pi-2": back}
    end = step(results)
    assert isinstance(end, Finish)
    assert end.detail.endswith("the rest stay as they are")


def test_where_all_run_it_nothing_is_done_and_a_rollback_asks_everyone() -> None:
    assert step({"look": seen("0.2.0", "0.2.0")}) == Finish("done", "all run 0.2.0")
    call = step({"look": seen("0.2.0", version="")}, owner(action="rollback"), upgrades=False)
    assert isinstance(call, Call)
    assert call.name == "leave-pi-1"


def test_the_hub_comes_last_and_only_for_github_s_sake() -> None:
    results: dict[str, Any] = {"confirm": ran(), "look": seen("0.2.0")}
    call = step(results, hook(), cloudflare_account="0" * 32)
    assert isinstance(call, Call)
    assert (call.service, call.operation) == ("deployer", "hub")
    for uploaded, word in ((True, "uploaded"), (False, "unchanged")):
        end = step({**results, "hub": {"uploaded": uploaded}}, hook(), cloudflare_account="0" * 32)
        assert end == Finish("done", f"all run 0.2.0; hub {word}")
    assert step(results, hook()) == Finish("done", "all run 0.2.0")


def test_without_a_source_nothing_is_upgraded() -> None:
    end = step({"confirm": ran()}, hook(), upgrades=False)
    assert end == Finish("done", "no upgrades here: [upgrade] source is empty")


def test_a_look_that_is_none_is_given_up() -> None:
    end = step({"look": {"version": 5}})
    assert isinstance(end, Finish)
    assert end.outcome == "failed"
