"""The workflow of a selftest: its steps, and that it cares for nothing else."""

from __future__ import annotations

from piclusterd.ids import RunId
from piclusterd.wire import Hook
from piclusterd.workflows.selftest import Selftest
from piclusterd.workflows.workflow import Call, Finish

RUN = RunId("r1")


def hook(source: str, body: bytes = b'{"id": "t1"}') -> Hook:
    return Hook(source, "k", "", body)


def test_it_wants_its_own_source_only_and_names_its_run_by_the_id() -> None:
    workflow = Selftest()
    assert workflow.wants(hook("selftest")) == "selftest t1"
    assert workflow.wants(hook("selftest", b"junk")) == "selftest"
    assert [workflow.wants(hook(source)) for source in ("linear", "github", "notion")] == [None] * 3


def test_it_calls_the_echo_and_ends() -> None:
    workflow = Selftest()
    assert workflow.next(RUN, hook("selftest"), {}) == Call("echo", "selftest", "echo", {}, "r1:echo")
    assert workflow.next(RUN, hook("selftest"), {"echo": {"node": "pi-2"}}) == Finish("done", "echoed by pi-2")
