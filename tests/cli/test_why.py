from __future__ import annotations

from piclusterd.cli.why import described
from piclusterd.inference.decisions import Decisions
from piclusterd.inference.protocol import Done
from piclusterd.wire import Shipped


def lines(shipped: Shipped | None) -> str:
    decisions = Decisions(wall=lambda: 0.0)
    with decisions.noted("r1", "generate", "qwen", "interactive") as decision:
        decision.done = Done(0, "stop", 1010, 4, cached_tokens=1000, shipped=shipped)
    return "\n".join(described(decisions.of("r1")[0].told() | {"node": "pi-1"}))


def test_a_beginning_that_came_from_another_node_is_told_with_who_gave_it_and_what_it_took() -> None:
    told = lines(Shipped("pi-2", 1000, 12 * 2**20, 268))
    assert "1000 tokens of it came from pi-2: 12.0 MiB in 268 ms" in told
    assert "came from" not in lines(None)
