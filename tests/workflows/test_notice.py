"""A notice goes to each sink once, and is no other workflow's business."""

from __future__ import annotations

import json
from typing import Any

import pytest

from piclusterd import ids
from piclusterd.wire import Hook
from piclusterd.workflows.notice import Notices
from piclusterd.workflows.notifying import Notice, Sinks, telling
from piclusterd.workflows.reconcile import Reconcile
from piclusterd.workflows.workflow import Call, Finish, Workflow

RUN = ids.run_id("notice", "key")
WORDS = {"title": "given up: spec", "text": "the workspace is full", "priority": 4, "tags": ["warning"]}


def hook(body: Any = WORDS, source: str = "cluster", event: str = "notice") -> Hook:
    return Hook(source, "notice:1", event, json.dumps(body).encode())


def test_it_is_a_workflow_that_tells_each_sink_in_turn() -> None:
    flow: Workflow = Notices(Sinks(("webhook", "ntfy"), "team"))
    assert flow.wants(hook()) == "given up: spec"
    results: dict[str, Any] = {}
    told = []
    while isinstance(step := flow.next(RUN, hook(), results), Call):
        told.append(step.name)
        assert step == flow.next(RUN, hook(), results)
        results[step.name] = {"told": True}
    assert told == ["notify-webhook", "notify-ntfy", "notify-linear"]
    assert step == Finish("done", "told")


def test_without_sinks_and_of_other_events_nothing_is_wanted() -> None:
    flow = Notices(Sinks(("ntfy",)))
    assert Notices(Sinks()).wants(hook()) is None
    for other in (hook(event="linear"), hook(source="linear"), hook({"title": 1}), hook({"text": "no title"})):
        assert flow.wants(other) is None
    assert flow.next(RUN, hook({}), {}) == Finish("failed", "this is no notice")
    assert Reconcile().wants(hook()) is None


@pytest.mark.parametrize("title", ["a\nTags: evil", "x" * 500, "\u202eevil"])
def test_a_title_is_one_plain_line(title: str) -> None:
    call = telling(RUN, Notice(title, "text"), Sinks(("ntfy",)), {})
    assert call is not None
    told = call.arguments["title"]
    assert "\n" not in told
    assert "\u202e" not in told
    assert len(told) <= 120
