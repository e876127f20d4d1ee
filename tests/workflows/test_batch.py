"""A batch's steps: from line to line by what each says, then the finish; another coordinator asks for the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from piclusterd.ids import RunId
from piclusterd.wire import Hook
from piclusterd.workflows.batch import Batch, Progress, Wish, hook_of, progress, wish_of
from piclusterd.workflows.workflow import Call, Finish

RUN = RunId("0" * 32)
WISH = Wish("batch_1", "/v1/chat/completions", "file-1", 10, 100, 200, "ha")
HOOK = hook_of(WISH)


def lines(next_: int, completed: int, failed: int = 0, **more: Any) -> dict[str, Any]:
    return {"next": next_, "completed": completed, "failed": failed, "part": f"part-{next_}", **more}


def step(results: Mapping[str, Mapping[str, Any]]) -> Call:
    found = Batch().next(RUN, HOOK, results)
    assert isinstance(found, Call)
    return found


def test_a_batch_is_known_by_its_source_and_shown_by_its_size() -> None:
    assert wish_of(HOOK) == WISH
    assert Batch().wants(HOOK) == "batch_1: 10 × /v1/chat/completions"
    assert Batch().wants(Hook("linear", "k", "created", HOOK.body)) is None
    assert Batch().next(RUN, Hook("batch", "k", "created", b"{"), {}) == Finish("failed", "this is no batch")


def test_each_step_begins_where_the_one_before_ended() -> None:
    first = step({})
    assert (first.name, first.operation, first.arguments["next"]) == ("lines-0", "lines", 0)
    assert first.arguments["file"] == "file-1"
    second = step({"lines-0": lines(4, 3, 1)})
    assert (second.name, second.arguments["next"]) == ("lines-4", 4)
    assert first.key != second.key == step({"lines-0": lines(4, 3, 1)}).key


def test_the_finish_gets_all_parts_in_order_and_then_it_is_done() -> None:
    results = {"lines-4": lines(10, 6), "lines-0": lines(4, 3, 1)}
    last = step(results)
    assert (last.name, last.operation) == ("finish", "finish")
    assert last.arguments["parts"] == ["part-4", "part-10"]
    assert (last.arguments["completed"], last.arguments["failed"], last.arguments["expired"]) == (9, 1, False)
    done = Batch().next(RUN, HOOK, results | {"finish": {"finished": True}})
    assert done == Finish("done", "9 answered, 1 failed, of 10")


def test_a_batch_whose_time_is_over_goes_to_its_finish() -> None:
    results = {"lines-0": lines(4, 4), "lines-4": {"next": 4, "completed": 0, "failed": 0, "expired": True}}
    last = step(results)
    assert (last.name, last.arguments["expired"], last.arguments["parts"]) == ("finish", True, ["part-4"])


def test_what_hangs_on_nothing_does_not_count_and_a_step_always_moves() -> None:
    assert progress({"lines-7": lines(9, 2)}) == Progress()
    assert progress({"lines-0": lines(0, 0)}).next == 1
