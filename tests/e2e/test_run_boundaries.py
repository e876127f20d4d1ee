"""Runs on real processes: killed at the boundaries of its steps, delivered again and again, given up and opened again.

Linear is a double in this process that says when it is called: before it has done anything (the intent is on W ledgers,
the act has not happened) and after (the act has happened, no result is recorded). There and then the coordinator gets
SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from piclusterd.demo.cluster import Member
from piclusterd.demo.linear_double import LinearDouble
from piclusterd.demo.signing import sign

from .rig import Rig, run, running

pytestmark = pytest.mark.e2e

REQUESTS = ("IssueContext", "IssueContext", "IssueGlance", "IssueUpdate", "CommentCreate")
"""What one run of triage sends, in order."""
DONE_S = 60.0
ATTEMPTS_MAX = 3
"""An election that nobody asked for (a busy machine) makes other requests, and the kill hits another one."""


class Watched(LinearDouble):
    """Tells each request of a run twice, before and after it is performed; `refuses` are answered with a refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Callable[[str, str], None] = lambda request, when: None
        self.refuses = ""

    def answer(self, document: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        request = document.split("(")[0].split()[-1]
        self.called(request, "before")
        if request == self.refuses:
            code = {"type": "forbidden", "code": "FORBIDDEN", "userError": True}
            return 200, {"data": None, "errors": [{"message": "Not allowed here", "extensions": code}]}
        answer = super().answer(document, variables)
        self.called(request, "after")
        return answer


@asynccontextmanager
async def watched(root: Path) -> AsyncIterator[tuple[Rig, Watched]]:
    linear = Watched()
    async with running(root, linear=linear) as rig:
        yield rig, linear


async def issue(rig: Rig, title: str) -> str:
    identifier, body = rig.world.new_issue(title, "Nothing answers.")
    await rig.world.post(rig.cluster.http, body)
    return identifier


async def finished(rig: Rig, title: str, state: str = "done") -> list[dict[str, Any]]:
    """The pictures of the nodes that are up, once each shows the run of `title` in that state."""

    async def all_show() -> list[dict[str, Any]]:
        views = await rig.cluster.views()
        shown = [any(title in r["title"] and r["state"] == state for r in view["runs"]) for view in views]
        return views if shown and all(shown) else []

    views: list[dict[str, Any]] = await rig.cluster.until(all_show, f"{title} is {state}", DONE_S)
    return views


def writes(linear: LinearDouble, identifier: str) -> list[str]:
    return [effect.kind for effect in linear.effects if effect.issue == identifier]


ONCE = ["issue-update", "comment-create"]


async def leading(rig: Rig) -> Member:
    member: Member = await rig.cluster.until(rig.cluster.coordinator, "a coordinator", DONE_S)
    return member


async def killed_at(rig: Rig, linear: Watched, number: int, when: str, title: str) -> list[str]:
    """One issue whose coordinator dies `when` request `number` is performed. The request that was hit, if any."""
    coordinator = await leading(rig)
    seen: list[str] = []
    hit: list[str] = []

    def called(request: str, moment: str) -> None:
        seen.extend([request] if moment == "before" else [])
        if not hit and (len(seen) - 1, moment) == (number, when):
            hit.append(request)
            rig.cluster.kill(coordinator)

    linear.called = called
    identifier = await issue(rig, title)
    await finished(rig, title)
    assert writes(linear, identifier) == ONCE, f"killed {when} request {number}"
    if hit:
        assert coordinator.process is not None
        await coordinator.process.wait()
        await rig.cluster.start(coordinator)
        await rig.cluster.until_served()
    return hit


async def test_killed_between_any_two_steps_the_run_completes_once(tmp_path: Path) -> None:
    async with watched(tmp_path) as (rig, linear):
        issues = 0
        for number, when in [(number, when) for number in range(len(REQUESTS)) for when in ("before", "after")]:
            for attempt in range(ATTEMPTS_MAX):
                issues += 1
                hit = await killed_at(rig, linear, number, when, f"Server down {number} {when} {attempt}")
                if hit == [REQUESTS[number]]:
                    break
            assert hit == [REQUESTS[number]], f"the kill {when} request {number}"
        await rig.cluster.until_equal()
        assert [effect.kind for effect in linear.effects] == ONCE * issues


async def test_everything_delivered_again_and_reworded_in_any_order_has_one_effect(tmp_path: Path) -> None:
    async with watched(tmp_path) as (rig, linear):
        http, secret = rig.cluster.http, rig.world.linear_secret
        issues = [rig.world.new_issue(f"Crash {n}", "It crashes.") for n in range(4)]
        ways = [rig.world.told_to_nodes().hub_url, *(member.url for member in rig.cluster.members)]
        posts = []
        for _, body in issues:
            an_hour_ago = int((time.time() - 3600) * 1000)
            reworded = json.dumps({**json.loads(body), "webhookTimestamp": an_hour_ago}).encode()
            posts += [(way, body) for way in ways for _ in range(2)] + [(way, reworded) for way in ways[1:]]
        random.Random(7).shuffle(posts)
        for way, body in posts:
            async with http.post(f"{way}/hooks/linear", data=body, headers=sign("linear", body, secret)) as answer:
                assert answer.status == 200, await answer.text()
        for n in range(len(issues)):
            await finished(rig, f"Crash {n}")
        views = await rig.cluster.until_equal()
        assert [len(view["runs"]) for view in views] == [len(issues)] * len(views)
        for identifier, _ in issues:
            assert writes(linear, identifier) == ONCE


async def test_a_dead_letter_is_retried_from_another_node_and_what_never_came_is_found(tmp_path: Path) -> None:
    async with watched(tmp_path) as (rig, linear):
        linear.refuses = "CommentCreate"
        identifier = await issue(rig, "Login fails")
        await finished(rig, "Login fails", "failed")
        coordinator = await leading(rig)
        other = next(member for member in rig.cluster.members if member is not coordinator)

        async def jobs(*words: str) -> Any:
            return await run("piclusterd.cli.main", "--socket", str(other.state / "api.sock"), "jobs", *words)

        listed = await jobs("ls", "--state", "failed")
        assert "comment: Linear refused: Not allowed here" in listed.out
        number = listed.out.splitlines()[1].split()[0]
        linear.refuses = ""
        retried = await jobs("retry", number)
        assert (retried.code, retried.err) == (0, "")
        assert "is open again" in retried.out
        await finished(rig, "Login fails")
        assert writes(linear, identifier) == ONCE
        shown = (await jobs("show", number)).out
        for kind in ("hook", "run.intent", "run.result", "run.done", "run.retry"):
            assert kind in shown, shown
        again = await jobs("retry", number)
        assert (again.code, "this run is done" in again.err) == (1, True)

        lost, _ = rig.world.new_issue("Nobody heard of this", "Its webhook was lost.")
        rig.cluster.kill(coordinator)
        await finished(rig, "Nobody heard of this")
        assert writes(linear, lost) == ONCE
        assert coordinator.process is not None
        await coordinator.process.wait()
        await rig.cluster.start(coordinator)
        await rig.cluster.until_equal()
        assert [effect.kind for effect in linear.effects].count("comment-create") == 2
        await asyncio.sleep(0)
