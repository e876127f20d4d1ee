"""Specs on real processes: from a signed webhook through the hub and a local model to a page of Notion, whatever fails.

Linear and Notion are doubles in this process. Notion's says when it is called, so that the coordinator can be killed
right before and right after a page is made.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from piclusterd.demo import workerd
from piclusterd.demo.doubles import Fault
from piclusterd.demo.linear_flows_double import LinearFlowsDouble
from piclusterd.demo.notion_double import NotionDouble

from .rig import Rig, recorded, running
from .rig import run as client

pytestmark = pytest.mark.e2e

DONE_S = 60.0
STEPS = ["look", "write", "recheck", "page", "attach"]


class Watched(NotionDouble):
    """Tells of each making of a page, before and after it is performed."""

    called: Callable[[str], None] = staticmethod(lambda when: None)

    async def _create(self, request: web.Request) -> web.Response:
        self.called("before")
        answer = await super()._create(request)
        self.called("after")
        return answer


@asynccontextmanager
async def house(root: Path, hub: str = "python") -> AsyncIterator[tuple[Rig, LinearFlowsDouble, Watched]]:
    notion, linear = Watched(), LinearFlowsDouble()
    extra = f'[spec]\nmode = "on"\ndata_source = "{notion.data_source}"\n[triage]\nmode = "off"\n'
    async with running(root, hub=hub, linear=linear, notion=notion, extra=extra) as rig:
        yield rig, linear, notion


async def complete(rig: Rig, linear: LinearFlowsDouble, title: str, body: str = "It crashed when it was cold.") -> str:
    identifier = str(linear.create_issue(title, body)["data"]["identifier"])
    linear.say(identifier, "We restart it when that happens.")
    await rig.world.post(rig.cluster.http, json.dumps(linear.complete(identifier)).encode())
    return identifier


async def ended(rig: Rig, about: str, state: str = "done") -> dict[str, Any]:
    """The run about it, once it is in that state on every node that is up."""

    async def shown() -> dict[str, Any] | None:
        views = await rig.cluster.views()
        found = [[run for run in view["runs"] if about in run["title"] and run["state"] == state] for view in views]
        return dict(found[0][0]) if found and all(found) else None

    run: dict[str, Any] = await rig.cluster.until(shown, f"{about} is {state}", DONE_S)
    return run


@pytest.mark.parametrize("hub", ["python", "workerd"])
async def test_a_completed_issue_gets_a_page_and_people_s_edits_of_it_are_noticed(tmp_path: Path, hub: str) -> None:
    if hub == "workerd" and workerd.available() is None:
        pytest.skip(f"no workerd here: {workerd.find().why}")
    async with house(tmp_path, hub) as (rig, linear, notion):
        identifier = await complete(rig, linear, "Crash in the cold")
        run = await ended(rig, identifier)
        (page,) = notion.pages.values()
        assert list(await recorded(rig.cluster, run["run"])) == STEPS
        assert list(linear.attachments) == [page.told()["url"]]
        assert "Written by a small local model" in page.markdown
        await rig.world.post(rig.cluster.http, notion.edit(page.id, "people wrote this"), source="notion")
        await ended(rig, "a page of Notion was changed")
        linear.edit(identifier, state="unstarted")
        await rig.world.post(rig.cluster.http, json.dumps(linear.complete(identifier)).encode())

        async def both() -> bool:
            views = await rig.cluster.views()
            return sum("stood already" in run["detail"] for run in views[0]["runs"]) == 1

        await rig.cluster.until(both, "it is completed again", DONE_S)
        assert page.markdown == "people wrote this"
        assert len(notion.pages) == len(linear.attachments) == 1
        assert linear.violations == notion.violations == []


async def test_killed_before_or_after_the_page_is_made_there_is_one(tmp_path: Path) -> None:
    async with house(tmp_path) as (rig, linear, notion):
        for when in ("before", "after"):
            coordinator = await rig.cluster.until(rig.cluster.coordinator, "a coordinator", DONE_S)
            hit: list[str] = []

            def called(moment: str, at: str = when, victim: Any = coordinator, hit: list[str] = hit) -> None:
                if not hit and moment == at:
                    hit.append(moment)
                    rig.cluster.kill(victim)

            notion.called = called
            identifier = await complete(rig, linear, f"Killed {when}")
            await ended(rig, identifier)
            assert hit == [when]
            assert coordinator.process is not None
            await coordinator.process.wait()
            await rig.cluster.start(coordinator)
            await rig.cluster.until_served()
        titles = [page.properties["Name"]["title"][0]["text"]["content"] for page in notion.pages.values()]
        assert sorted(titles) == ["LIN-1 Killed before", "LIN-2 Killed after"]
        assert sorted(linear.attachments) == sorted(page.told()["url"] for page in notion.pages.values())


async def test_a_limited_slow_and_lying_notion_ends_right_or_with_a_reason_to_act_on(tmp_path: Path) -> None:
    async with house(tmp_path) as (rig, linear, notion):
        notion.faults.extend([Fault("ratelimited", 1), Fault("unavailable", 1), None, Fault("lost"), Fault("slow", 1)])
        linear.faults.extend([Fault("ratelimited", 1), Fault("slow", 1), None, Fault("partial")])
        identifier = await complete(rig, linear, "All of it at once")
        await ended(rig, identifier)
        assert len(notion.pages) == len(linear.attachments) == 1
        notion.full = True
        run = await ended(rig, await complete(rig, linear, "A full workspace"), "failed")
        assert "upgrade it" in run["detail"]
        assert len(notion.pages) == 1
        notion.full = False
        socket = str(rig.member.state / "api.sock")
        said = await client("piclusterd.cli.main", "--socket", socket, "jobs", "retry", run["run"])
        assert said.code == 0, said
        await ended(rig, "A full workspace")
        assert len(notion.pages) == len(linear.attachments) == 2
