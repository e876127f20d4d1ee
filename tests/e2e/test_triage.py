"""Triage on real daemons with the demo model and Linear's double: commands, corrections, kills, a liar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from piclusterd import ids
from piclusterd.demo.cluster import MODEL
from piclusterd.demo.linear_double import Fault
from piclusterd.demo.linear_workspace import PERSON, TEAM
from piclusterd.workflows.triage_comment import comment_id

from .rig import Rig, recorded, run, running

pytestmark = pytest.mark.e2e

DONE_S = 90.0
STEPS = ["context", "similar", "classify", "reason", "recheck", "update", "comment"]
OPS = {"id": ids.uuid4_of("team", "OPS"), "key": "OPS", "name": "Operations"}
POLICY = """
[default]
labels_more = ["web", "backend"]
commanders = ["ada@example.com"]
[[default.rules]]
title = ["outage"]
at_least = "P0"
labels = ["backend"]
"""


async def sent(rig: Rig, payload: Mapping[str, Any]) -> None:
    await rig.world.post(rig.cluster.http, json.dumps(payload).encode())


async def ended(rig: Rig, workflow: str, count: int, state: str = "done") -> list[dict[str, Any]]:
    """The runs of a workflow, once `count` of them have ended so."""

    async def look() -> list[dict[str, Any]]:
        for view in await rig.cluster.views():
            runs = [r for r in view["runs"] if r["workflow"] == workflow and r["state"] == state]
            if len(runs) >= count:
                return runs
        return []

    runs: list[dict[str, Any]] = await rig.cluster.until(look, f"{count} runs of {workflow} are {state}", DONE_S)
    return runs


def body_of_ours(rig: Rig, issue: str) -> str:
    linear = rig.world.linear
    key = comment_id(linear.issue(issue).id)
    (body,) = [comment["body"] for comment in linear.issue(issue).comments if comment["id"] == key]
    return body


async def test_rules_undo_and_why_on_three_nodes_whose_coordinator_is_killed(tmp_path: Path) -> None:
    (tmp_path / "triage.toml").write_text(POLICY)
    extra = f'[triage]\npolicy_file = "{tmp_path / "triage.toml"}"\n'
    async with running(tmp_path, hub="auto", extra=extra) as rig:
        linear = rig.world.linear
        for name in ("web", "backend"):
            linear.add_label(name)
        await sent(rig, linear.create_issue("Outage of the checkout", "Every customer sees a 500 error since 9."))
        (triaged,) = await ended(rig, "triage", 1)
        assert list(await recorded(rig.cluster, triaged["run"])) == STEPS
        issue = linear.issue("LIN-1")
        assert issue.priority == 1
        assert sorted(linear.labels[label] for label in issue.label_ids) == ["Bug", "backend"]
        coordinator = await rig.cluster.coordinator()
        assert coordinator is not None
        rig.cluster.kill(coordinator)
        await sent(rig, linear.said("LIN-1", "@picluster undo"))
        await sent(rig, linear.said("LIN-1", "@picluster undo", {**PERSON, "id": "eve", "email": "eve@example.com"}))
        await ended(rig, "triage-command", 1)
        assert (issue.priority, issue.label_ids) == (0, [])
        assert "undone by Ada" in body_of_ours(rig, "LIN-1")
        await sent(rig, linear.said("LIN-1", "/triage why"))
        runs = await ended(rig, "triage-command", 2)
        assert len(runs) == 2, "Eve is nobody who may command"
        assert "rule 1" in issue.comments[-1]["body"]
        heir = next(member for member in rig.cluster.members if member.up)
        told = await run("piclusterd.cli.main", "--socket", str(heir.state / "api.sock"), "triage", "why", "LIN-1")
        assert "rule 1" in told.out, told
        assert linear.violations == []


async def test_corrections_are_learnt_and_a_liar_ends_in_the_dead_letters_with_words_to_act_on(tmp_path: Path) -> None:
    extra = "[triage]\nattempts_max = 2\n"
    async with running(tmp_path, size=1, extra=extra) as rig:
        linear = rig.world.linear
        titles = ("Login is slow", "Dark mode please", "Typo in the footer", "Export fails with 500", "Printer jams")
        for title in titles:
            await sent(rig, linear.create_issue(title, f"{title} in the cupboard"))
        await ended(rig, "triage", len(titles))
        await sent(rig, linear.changed("LIN-5", priority=4, labels=["Chore"]))
        (lesson,) = await ended(rig, "triage-watch", 1)
        assert lesson["detail"] == "learnt: priority P3, type chore"
        await sent(rig, linear.create_issue("Printer jams", "Printer jams in the cupboard"))
        await ended(rig, "triage", len(titles) + 1)
        issue = linear.issue("LIN-6")
        assert (issue.priority, [linear.labels[label] for label in issue.label_ids]) == (4, ["Chore"])
        assert "Perhaps the same as LIN-5" in body_of_ours(rig, "LIN-6")

        linear.faults.extend([Fault("wrong-id")] * 2)
        await sent(rig, linear.create_issue("Nobody knows this one", "It is new."))
        (dead,) = await ended(rig, "triage", 1, "failed")
        assert "Linear answered about something else" in dead["detail"]
        assert "by hand" in dead["detail"]
        socket = str(rig.member.state / "api.sock")
        retried = await run("piclusterd.cli.main", "--socket", socket, "jobs", "retry", dead["run"])
        assert retried.code == 0, retried
        await ended(rig, "triage", len(titles) + 2)
        assert len(linear.issue("LIN-7").comments) == 1
        report = await run("piclusterd.cli.main", "--socket", socket, "triage", "report")
        assert "7 issues remembered, 1 of them judged by people" in report.out, report
        assert linear.violations == []


async def test_a_team_with_a_model_of_its_own_is_answered_by_the_pi_that_has_it(tmp_path: Path) -> None:
    (tmp_path / "triage.toml").write_text('[teams.OPS]\nmodel = "ops-demo"\n')
    extra = f'[triage]\npolicy_file = "{tmp_path / "triage.toml"}"\n'
    own = {1: '[[models]]\nname = "ops-demo"\npath = "builtin:triage-demo"\ncontext = 4096\n'}
    async with running(tmp_path, hub="auto", with_model=(0,), extra=extra, own=own) as rig:
        asked = {}
        for title, team in (("Disk full", OPS), ("Login fails", TEAM), ("Fan is loud", OPS), ("Typo", TEAM)):
            payload = rig.world.linear.create_issue(title, f"{title} in the cupboard.", team=team)
            asked[f"{payload['data']['identifier']} {title}"] = team["key"]
            await sent(rig, payload)
        first, second, _ = rig.cluster.members
        by = {"OPS": ("ops-demo", second.node), "LIN": (MODEL, first.node)}
        for one in await ended(rig, "triage", len(asked)):
            results = await recorded(rig.cluster, one["run"])
            for step in ("classify", "reason"):
                assert (results[step]["model"], results[step]["node"]) == by[asked[one["title"]]], one["title"]
        assert rig.world.linear.violations == []


async def test_a_slow_and_rate_limited_linear_costs_time_and_no_run(tmp_path: Path) -> None:
    async with running(tmp_path, size=1) as rig:
        linear = rig.world.linear
        linear.faults.extend([Fault("ratelimited", seconds=2), Fault("slow", seconds=1), Fault("unsuccessful"), None])
        linear.faults.extend(
            [Fault("partial"), Fault("lost"), Fault("spent", seconds=1), None, Fault("quota-spent", 2)]
        )
        for number in range(4):
            await sent(rig, linear.create_issue(f"Crash of service {number}", "It crashes for every customer."))
        await ended(rig, "triage", 4)
        for number in range(1, 5):
            kinds = [effect.kind for effect in linear.effects if effect.issue == f"LIN-{number}"]
            assert kinds == ["issue-update", "comment-create"]
        assert linear.violations == []
