"""What never came is taken as if it had come; what came is not taken again."""

from __future__ import annotations

import json
from typing import Any

from piclusterd import config
from piclusterd.ids import RunId
from piclusterd.integrations.signatures import event_key
from piclusterd.wire import Hook
from piclusterd.workflows.reconcile import PAGES_MAX, REDELIVER_MAX, Reconcile
from piclusterd.workflows.triage import Triage
from piclusterd.workflows.workflow import Call, Finish, Step, Take

RUN = RunId("r" * 32)
SINCE, NOW = 1000, 9000


def asked(service: str = "linear", body: bytes | None = None) -> Hook:
    return Hook("cluster", f"reconcile:{service}:1:1", service, body or json.dumps({"since_ms": SINCE}).encode())


def step(service: str = "linear", **results: dict[str, Any]) -> Step:
    return Reconcile().next(RUN, asked(service), {name.replace("_", "-"): value for name, value in results.items()})


def issue(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": name, "identifier": f"LIN-{name}", "title": "t", "priority": 0, "labels": [],
        "state": {"type": "triage"}, "creatorId": None, "botActor": None, "trashed": None, **fields,
    }  # fmt: skip


def page(*names: str, created: int = SINCE, more: str = "") -> dict[str, Any]:
    return {"now_ms": NOW, "issues": [issue(n) for n in names], "created": [created] * len(names), "more": more}


def test_it_wants_what_the_schedule_asks_and_nothing_that_came_from_outside() -> None:
    assert Reconcile().wants(asked()) == "what never came from linear"
    assert Reconcile().wants(Hook("linear", "reconcile:linear:1:1", "linear", b"{}")) is None


def test_it_asks_page_by_page_and_takes_each_before_the_next() -> None:
    first = step()
    assert isinstance(first, Call)
    assert (first.name, first.service, first.operation) == ("page-1", "linear", "issues_since")
    assert first.arguments == {"since_ms": SINCE, "after": ""}
    take = step(page_1=page("a", "b", more="next"))
    assert isinstance(take, Take)
    second = step(page_1=page("a", "b", more="next"), take_1={"taken": 1})
    assert isinstance(second, Call)
    assert (second.name, second.arguments) == ("page-2", {"since_ms": SINCE, "after": "next"})
    last = step(page_1=page("a", more="next"), take_1={"taken": 1}, page_2=page("b"), take_2={"taken": 2})
    assert last == Finish("done", "3 events had not come", marks={"linear": NOW})


def test_what_it_makes_is_the_event_of_the_same_creation() -> None:
    take = step(page_1=page("a"))
    assert isinstance(take, Take)
    (made,) = take.hooks
    body = {"action": "create", "type": "Issue", "data": {"id": "a"}, "webhookTimestamp": 7}
    assert made.key == event_key("linear", {}, body, json.dumps(body).encode())
    assert Triage(config.Triage(), "m", "").wants(made) == "LIN-a t"


def test_issues_that_only_changed_are_not_made_up() -> None:
    take = step(page_1=page("old", created=SINCE - 1))
    assert isinstance(take, Take)
    assert take.hooks == ()


def test_too_much_is_for_a_person() -> None:
    results = {f"page_{n}": page(more="next") for n in range(1, PAGES_MAX + 1)}
    results |= {f"take_{n}": {"taken": 0} for n in range(1, PAGES_MAX + 1)}
    end = Reconcile().next(RUN, asked(), {name.replace("_", "-"): value for name, value in results.items()})
    assert isinstance(end, Finish)
    assert (end.outcome, end.marks) == ("failed", {})
    lost = {"now_ms": NOW, "failed": {str(n): n for n in range(REDELIVER_MAX + 1)}}
    end = step("github", page_1=lost)
    assert isinstance(end, Finish)
    assert end.outcome == "failed"


def test_github_is_asked_to_send_again_what_arrived_by_no_delivery() -> None:
    first = step("github")
    assert isinstance(first, Call)
    assert (first.service, first.operation) == ("github", "deliveries_since")
    pages: dict[str, Any] = {
        "page_1": {"now_ms": NOW, "failed": {"x": 9}, "arrived": ["y"], "more": "c"},
        "page_2": {"now_ms": NOW + 1, "failed": {"y": 3, "z": 2}, "arrived": []},
    }
    for delivery in (2, 9):
        call = step("github", **pages)
        assert isinstance(call, Call)
        assert (call.operation, call.arguments) == ("redeliver", {"delivery": delivery})
        pages[call.name.replace("-", "_")] = {"accepted": True}
    assert step("github", **pages) == Finish("done", "2 deliveries asked for again", marks={"github": NOW})


def test_junk_ends_as_a_dead_letter() -> None:
    for end in (Reconcile().next(RUN, asked(body=b"{"), {}), step(page_1={"issues": 7})):
        assert isinstance(end, Finish)
        assert end.outcome == "failed"
