"""The coordinator is killed at every point of a run of triage, one point at a time: the run completes, and once.

A point is right after any effect that the coordinator performs (an append begun, an entry sent to a voter, a model or
Linear asked, an answer to the hub), right after any of its entries reached its disk, and right after Linear did what it
was asked, before its answer is heard. They are counted in a run without a kill, and then each is the one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from piclusterd import config
from piclusterd.events import Answer, Append, Ask, CallOut, Effect, Send
from piclusterd.ids import RunId
from piclusterd.sim.outside import Service
from piclusterd.sim.world import Actor, Plan, World
from piclusterd.upkeep import run_flags
from piclusterd.views import RunView
from piclusterd.wire import Facts, Hook, Push
from piclusterd.workflows.triage import Triage

ISSUE = "11111111-1111-4111-8111-111111111111"
DATA = {"id": ISSUE, "identifier": "LIN-1", "title": "The server is down", "priority": 0, "state": {"type": "triage"}}
EVENT = Hook("linear", "linear:create:Issue:1", "Issue",
             json.dumps({"action": "create", "type": "Issue", "data": DATA}).encode())  # fmt: skip
BACK_S = 4.0
"""A killed coordinator comes back after the others have elected another."""
END_S = 60.0


class Linear(Service):
    """One issue; `writes` are the changes that were really made to it, each kind of which may be made once."""

    reads = ("issue_context", "similar")

    def __init__(self, done: Callable[[], None]) -> None:
        super().__init__()
        self._tell = done
        self.workflows = {"triage": Triage(config.Triage(), "m", "")}
        self.priority = 0
        self.comments: dict[str, RunId] = {}
        self.writes: list[str] = []

    def says(self, priority: str) -> str:
        return json.dumps({"type": "bug", "priority": "P0", "reason": "It is down."})

    def perform(self, run: RunId, operation: str, key: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: dict[str, Any] = {}
        match operation:
            case "issue_context":
                answer = {"id": ISSUE, "title": DATA["title"], "state": "triage", "priority": self.priority}
            case "similar":
                return {"near": []}
            case "issue_update":
                changed = ["priority"] if self.priority == 0 else []
                self.priority = self.priority or arguments["priority"]
                self.writes += changed
                answer = {"changed": changed, "priority": self.priority, "label_ids": []}
            case _:
                repeated = arguments["id"] in self.comments
                if not repeated:
                    self.comments[arguments["id"]] = run
                    self.writes.append("comment")
                answer = {"comment": arguments["id"], "repeated": repeated}
        self._tell()
        return answer

    def effects(self) -> dict[str, int]:
        return {run: list(self.comments.values()).count(run) for run in self.comments.values()}


class Rehearsal:
    """Three voters in calm weather and one webhook at the hub; the `kill_at`-th point is the coordinator's last."""

    def __init__(self, seed: int, kill_at: int | None = None, relay: bool = False) -> None:
        self.points: list[str] = []
        self.killed: Actor | None = None
        self._kill_at = kill_at
        self.world = world = World(Plan(seed, voters=3, learners=int(relay), preset="lan"))
        self.linear = Linear(lambda: self._point("done at Linear", self.coordinator()))
        world.service = self.linear
        perform, landed = world.hands.perform, world.hands.landed

        def performing(actor: Actor, effect: Effect) -> None:
            perform(actor, effect)
            if isinstance(effect, Append | Ask | CallOut | Answer) or (
                isinstance(effect, Send) and isinstance(effect.message, Push)
            ):
                self._point(type(effect).__name__, actor)

        def landing(actor: Actor) -> None:
            kinds = [fact.kind for fact in actor.disk.landed]
            landed(actor)
            for kind in kinds:
                self._point(f"{kind} on disk", actor)

        world.hands.perform, world.hands.landed = performing, landing  # type: ignore[method-assign]
        world.calm()
        for actor in world.actors:
            actor.disk.steady()
        world.open(machines=3)
        if relay:
            world.boot(world.actors[3], Facts(name="vps", role="relay"))
        world.every(1.0, world.hands.pump_hub)
        world.play(5.0)
        self._counting = not relay

    _counting = False

    def coordinator(self) -> Actor | None:
        return next((a for a in self.world.actors if a.node is not None and a.node.replicate.active), None)

    def _point(self, what: str, actor: Actor | None) -> None:
        if not self._counting or self.killed or actor is None or actor is not self.coordinator():
            return
        self.points.append(what)
        if len(self.points) - 1 == self._kill_at:
            self.killed = actor
            self.world.crash(actor)
            self.world.at(BACK_S, self.world.boot, actor)

    def play(self) -> None:
        self.world.hub.accept(EVENT)
        self.world.play(END_S)
        self.world.settle(5.0)
        self.world.checks.at_rest()

    def run(self) -> RunView:
        node = self.world.actors[0].node
        assert node is not None
        (run,) = node.journal.views(100)
        return run


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_whose_coordinator_is_killed_at_any_point_completes_once(seed: int) -> None:
    whole = Rehearsal(seed)
    whole.play()
    whole.world.close()
    assert whole.linear.writes == ["priority", "comment"]
    kinds = set(whole.points)
    assert kinds >= {
        "Append", "Ask", "CallOut", "Answer", "Send", "done at Linear",
        "hook on disk", "run.intent on disk", "run.result on disk", "run.done on disk",
    }  # fmt: skip
    for kill_at, what in enumerate(whole.points):
        cut = Rehearsal(seed, kill_at)
        cut.play()
        cut.world.close()
        assert cut.killed is not None, (kill_at, what)
        assert cut.points[-1] == what, "the same way up to the kill"
        assert cut.linear.writes == ["priority", "comment"], (kill_at, what)
        assert cut.run().state == "done", (kill_at, what)


def test_an_urgent_run_ends_only_once_the_relay_holds_it() -> None:
    """P0 and P1 are copied outside the house; while the relay is away they stay open, and it is told."""
    rehearsal = Rehearsal(4, relay=True)
    world, relay = rehearsal.world, rehearsal.world.actors[3]
    world.crash(relay)
    world.hub.accept(EVENT)
    world.play(90.0)
    leader = rehearsal.coordinator()
    assert leader is not None
    assert leader.node is not None
    assert rehearsal.linear.writes == ["priority", "comment"], "what is urgent is not held up"
    assert rehearsal.run().state == "open"
    assert leader.node.view(world.now).copying == 1
    assert "copy-waits" in run_flags(leader.node, world.now)
    world.boot(relay, Facts(name="vps", role="relay"))
    world.play(world.now + 10.0)
    assert rehearsal.run().state == "done"
    world.close()
