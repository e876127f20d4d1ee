"""What a line of the schedule does."""

from __future__ import annotations

import json

import pytest

from piclusterd.ids import RunId
from piclusterd.views import RunView
from piclusterd.wire import Hook
from piclusterd.workflows.errands import TEXT_CHARS_MAX, Errands, triage_report
from piclusterd.workflows.workflow import AskModel, Call, Finish

RUN = RunId("r" * 32)
ERRANDS = Errands("small")


def line(what: str, *, post: bool = False) -> Hook:
    body = json.dumps({"name": "daily", "what": what, "prompt": "Say hello.", "post": post}).encode()
    return Hook("schedule", "schedule:daily:1", what, body)


@pytest.mark.parametrize(("what", "service"), [("hub-health", "hub"), ("triage-report", "cluster")])
def test_it_asks_the_service_that_knows(what: str, service: str) -> None:
    assert ERRANDS.wants(line(what)) == f"daily: {what}"
    step = ERRANDS.next(RUN, line(what), {})
    assert isinstance(step, Call)
    assert step.service == service
    assert ERRANDS.next(RUN, line(what), {"find": {"text": "all well"}}) == Finish("done", "all well")


def test_a_prompt_is_put_to_the_model_and_its_answer_kept() -> None:
    step = ERRANDS.next(RUN, line("prompt"), {})
    assert isinstance(step, AskModel)
    assert (step.request["model"], step.prefer) == ("small", "")
    assert step.request["messages"] == [{"role": "user", "content": "Say hello."}]


def test_a_batch_asks_one_thing_after_the_other_and_the_droplet_first() -> None:
    body = {"name": "nightly", "what": "batch", "prompt": "", "post": False, "prompts": ["one", "two"]}
    hook = Hook("schedule", "schedule:nightly:1", "batch", json.dumps(body).encode())
    first = ERRANDS.next(RUN, hook, {})
    assert isinstance(first, AskModel)
    assert (first.name, first.prefer, first.request["messages"][0]["content"]) == ("find-1", "relay", "one")
    second = ERRANDS.next(RUN, hook, {"find-1": {"text": "1"}})
    assert isinstance(second, AskModel)
    assert (second.name, second.request["messages"][0]["content"]) == ("find-2", "two")
    assert ERRANDS.next(RUN, hook, {"find-1": {"text": "1"}, "find-2": {"text": "2"}}) == Finish("done", "1\n\n2")


def test_the_answer_is_posted_where_the_line_says_so_and_the_ledger_knows_no_address() -> None:
    hook = line("prompt", post=True)
    step = ERRANDS.next(RUN, hook, {"find": {"text": "x" * 2 * TEXT_CHARS_MAX}})
    assert isinstance(step, Call)
    assert step.arguments == {"line": "daily", "text": "x" * TEXT_CHARS_MAX}
    assert b"http" not in hook.body
    assert ERRANDS.next(RUN, hook, {"find": {"text": "hi"}, "post": {"posted": True}}) == Finish("done", "hi")


@pytest.mark.parametrize(
    "hook", [Hook("linear", "schedule:daily:1", "prompt", line("prompt").body), Hook("schedule", "k", "x", b"{")]
)
def test_what_is_no_line_of_the_schedule_is_not_wanted(hook: Hook) -> None:
    assert ERRANDS.wants(hook) is None
    end = ERRANDS.next(RUN, hook, {})
    assert isinstance(end, Finish)
    assert end.outcome == "failed"


def test_the_report_counts_ends_and_verdicts_and_names_the_dead() -> None:
    def run(state: str, detail: str, workflow: str = "triage") -> RunView:
        return RunView(RUN, workflow, "LIN-1 crash", state, "", 1, detail, 0)

    report = triage_report(
        [run("done", "bug P1: x"), run("done", "bug P1: y"), run("failed", "update: no"), run("done", "z", "errand")]
    )
    assert report == "Runs of triage: 2 done, 1 failed.\nVerdicts: 2 × bug P1.\nLIN-1 crash: update: no"
    assert triage_report([]) == "Runs of triage: none."
