"""Hypothesis as a second driver: short scenarios of crashes, cuts and webhooks, shrunk where one fails."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from piclusterd.sim.world import Actor, Plan, World
from piclusterd.wire import Hook

NODES = 4
REST_S = 30.0
"""Thirty election timeouts of the preset: enough for whatever a scenario broke."""

which = st.integers(0, NODES - 1)


class Scenario(RuleBasedStateMachine):
    """Calm weather in which only what Hypothesis chooses goes wrong; the world checks itself after every step."""

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed: int) -> None:
        self.world = World(Plan(seed, preset="lan"))
        self.world.calm()
        self.world.open()
        self.world.every(1.0, self.world.hands.pump_hub)
        self.world.play(3.0)
        self.sent = 0

    def actor(self, number: int) -> Actor:
        return self.world.actors[number]

    @rule(number=which, silently=st.booleans())
    def crash(self, number: int, silently: bool) -> None:
        self.world.crash(self.actor(number), silently)

    @rule(number=which)
    def restart(self, number: int) -> None:
        self.world.boot(self.actor(number))

    @rule(one=which, other=which)
    def cut(self, one: int, other: int) -> None:
        if one != other:
            self.world.network.cut(self.actor(one).disk.node, self.actor(other).disk.node)

    @rule()
    def heal(self) -> None:
        self.world.network.heal()

    @rule(number=which, seconds=st.sampled_from((0.3, 2.0)))
    def pause(self, number: int, seconds: float) -> None:
        if self.actor(number).node is not None:
            self.world.pause(self.actor(number), seconds)

    @rule(number=which, run=st.booleans())
    def webhook(self, number: int, run: bool) -> None:
        self.sent += 1
        hook = Hook("sim", f"hook-{self.sent}", "create" if run else "update", b"{}")
        self.world.hub.accept(hook)
        self.world.hands.give(self.actor(number), hook)

    @rule(seconds=st.sampled_from((0.02, 0.5, 2.0)))
    def wait(self, seconds: float) -> None:
        self.world.play(self.world.now + seconds)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.calm()
            for actor in self.world.actors:
                self.world.boot(actor)
            self.world.settle(REST_S)
            self.world.checks.at_rest()
        finally:
            self.world.close()


TestScenarios = Scenario.TestCase
TestScenarios.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
