"""Everything comes twice, and more often, in any order and by any way: each event is worked on once."""

from __future__ import annotations

from contextlib import closing

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piclusterd.sim.world import Plan, World
from piclusterd.wire import Hook

EVENTS = 5
COPIES = 3
"""One delivery and two redeliveries of each."""
HOW = st.tuples(st.sampled_from(("hub", 0, 1, 2)), st.sampled_from((0.0, 0.01, 0.3, 2.0)))
WAYS = st.lists(HOW, min_size=EVENTS * COPIES, max_size=EVENTS * COPIES)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(list(range(EVENTS)) * COPIES), WAYS,
       st.integers(0, EVENTS * COPIES), st.integers(0, 3))  # fmt: skip
def test_whatever_comes_again_in_whatever_order_has_one_effect(
    order: list[int], ways: list[tuple[str | int, float]], kill_at: int, seed: int
) -> None:
    with closing(World(Plan(seed, voters=3, learners=0, preset="lan"))) as world:
        world.calm()
        world.open()
        world.every(1.0, world.hands.pump_hub)
        world.play(5.0)
        for at, (number, (way, pause)) in enumerate(zip(order, ways, strict=True)):
            hook = Hook("sim", f"hook-{number}", "create", b"{}")
            if isinstance(way, int):
                world.hands.give(world.actors[way], hook)
            else:
                world.hub.accept(hook)
            if at == kill_at:
                leader = next(
                    (a for a in world.actors if a.node is not None and a.node.replicate.active), world.actors[0]
                )
                world.crash(leader)
                world.at(3.0, world.boot, leader)
            world.play(world.now + pause)
        world.settle(60.0)
        world.checks.at_rest()
        effects = world.service.effects()
        accepted = {f"hook-{number}" for number, (way, _) in zip(order, ways, strict=True) if way == "hub"}
        assert accepted <= set(world.checks.taken)
        assert list(effects.values()) == [1] * len(effects)
        assert len(accepted) <= len(effects) <= EVENTS
