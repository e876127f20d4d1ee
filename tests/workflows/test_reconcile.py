"""What never came is taken as if it had come; what came is not taken again."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from piclusterd import config
from piclusterd.ids import RunId
from piclusterd.integrations.signatures import event_key
from piclusterd.wire import Hook
from piclusterd.workflows.reconcile import PAGES_MAX, REDELIVER_MAX, Reconcile
from piclusterd.workflows.triage import Triage
from piclusterd.workflows.workflow import Call, Finish, Step

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


def page(*names: str, more: str = "") -> dict[str, Any]:
    return {"now_ms": NOW, "issues": [issue(n) for n in names], "more": more}


def read(taken: int, more: str = "") -> dict[str, Any]:
    """What the ledger keeps of a page."""
    return {"now_ms": NOW, "more": more, "taken": taken}


def found(answer: dict[str, Any]) -> tuple[list[Hook], dict[str, Any]]:
    call = step()
    assert isinstance(call, Call)
    assert call.found is not None
    hooks, kept = call.found(answer)
    return list(hooks), dict(kept)


def test_it_wants_what_the_schedule_asks_and_nothing_that_came_from_outside() -> None:
    assert Reconcile().wants(asked()) == "what never came from linear"
    assert Reconcile().wants(Hook("linear", "reconcile:linear:1:1", "linear", b"{}")) is None


def test_it_asks_page_by_page() -> None:
    first = step()
    assert isinstance(first, Call)
    assert (first.name, first.service, first.operation) == ("page-1", "linear", "issues_since")
    assert first.arguments == {"since_ms": SINCE, "after": ""}
    second = step(page_1=read(1, "next"))
    assert isinstance(second, Call)
    assert (second.name, second.arguments) == ("page-2", {"since_ms": SINCE, "after": "next"})
    assert step(page_1=read(1, "next"), page_2=read(2)) == Finish(
        "done", "3 events had not come", marks={"linear": NOW}
    )


def test_what_it_makes_is_the_event_of_the_same_creation() -> None:
    (made,), _ = found(page("a"))
    body = {"action": "create", "type": "Issue", "data": {"id": "a"}, "webhookTimestamp": 7}
    assert made.key == event_key("linear", {}, body, json.dumps(body).encode())
    assert Triage(config.Triage(), "m", "").wants(made) == "LIN-a t"


def test_of_a_page_only_the_cursor_and_the_time_are_remembered() -> None:
    assert found(page("a", "b", more="next")) == (found(page("a", "b"))[0], {"now_ms": NOW, "more": "next"})


def test_too_much_is_for_a_person() -> None:
    results = {f"page_{n}": read(0, "next") for n in range(1, PAGES_MAX + 1)}
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
    for end in (Reconcile().next(RUN, asked(body=b"{"), {}), step(page_1={"more": 7})):
        assert isinstance(end, Finish)
        assert end.outcome == "failed"
    with pytest.raises(msgspec.ValidationError):
        found({"now_ms": 1, "more": "", "issues": 7})
