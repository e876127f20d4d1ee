"""Membership at N = 4, 16, 100 and 1000, in the rehearsal room: how fast, how often wrong, how many bytes.

    convergence       a node changes its name: until everybody lists the new one
    detection         a node dies, its links closing (SIGKILL) or not (power cut): until everybody lists it as failed
    false positives   nobody dies, the network loses messages, some nodes stall: how often somebody is called failed
    bytes             sent by a node at rest; at N = 4 by whole nodes (election, ledger), elsewhere by membership alone

Times are virtual: what is measured is the protocol, not this machine. Traffic is the encoded message + 40 bytes each.
The peer is hashicorp/memberlist at its LAN defaults. Its detection is its published arithmetic: a first detection
after e/(e-1) probe periods of 1 s, then at best 4 max(1, log10 N) s of suspicion (and at worst six times that). Its
convergence is its rule (fan-out 3, retransmit 4 ceil(log10(N+1)), rounds of 0.2 s) as simulated for this project.
"""

from __future__ import annotations

import math
from random import Random

from bench.report import Report, main, quantile
from piclusterd.cluster.own_facts import GAP_PER_MEMBER_S
from piclusterd.cluster.suspicion import Guards
from piclusterd.cluster.timings import PRESETS
from piclusterd.events import Effect, FactsChanged, MemberDown, Send
from piclusterd.ids import NodeId
from piclusterd.sim.gossip import FRAME_BYTES, Crowd, Gathering, Person
from piclusterd.sim.hands import SimHands
from piclusterd.sim.world import Actor, Plan, World
from piclusterd.wire import Facts, encode

SIZES = (4, 16, 100, 1000)
MEMBERLIST = "memberlist LAN"
MEMBERLIST_ROUNDS = {(100, 0.0): 6.5, (1000, 0.0): 8, (1000, 0.1): 9, (1000, 0.3): 10}
"""(N, loss) → rounds of 0.2 s until everybody knows."""
IDLE_MAX = {4: 1000.0, 1000: 10_000.0}
"""Bytes a second and node (DESIGN §9)."""
PATIENCE_S = 200.0
"""A trial that takes longer has not converged."""
STALLED_PART = 4
"""One node in so many is starved."""
STALL_S = (2.0, 16.0)
AWAKE_S = (0.05, 2.0)
"""A starved board (Lifeguard, §V): it stalls, runs for a moment, and stalls again."""


def measure(report: Report, quick: bool) -> None:
    trials = {4: 20, 16: 10, 100: 2, 1000: 1} if quick else {4: 200, 16: 100, 100: 20, 1000: 4}
    for nodes in SIZES:
        for loss in (0.0, 0.1, 0.3):
            convergence(report, nodes, loss, trials[nodes])
    for nodes in SIZES:
        for links_close in (True, False):
            detection(report, nodes, links_close, trials[nodes])
    hours = {4: 2.0, 16: 0.1, 100: 0.01} if quick else {4: 100.0, 16: 20.0, 100: 2.0, 1000: 0.1}
    for nodes in hours:
        false_positives(report, nodes, hours[nodes])
    whole_nodes(report, minutes=10 if quick else 60)
    for nodes in SIZES:
        traffic(report, nodes, restless=False, seconds=60 if quick else 600)
    for nodes in (4, 100) if quick else SIZES:
        traffic(report, nodes, restless=True, seconds=60 if quick else 600)


def convergence(report: Report, nodes: int, loss: float, trials: int) -> None:
    times = [time for seed in range(trials) for time in _spread_of_a_name(Crowd(nodes, seed, loss=loss))]
    where = f"N={nodes}, {loss:.0%} loss: a change is known"
    rounds = MEMBERLIST_ROUNDS.get((nodes, loss))
    report.add(f"{where}, p50", quantile(times, 0.5), "s")
    report.add(f"{where}, p99", quantile(times, 0.99), "s")
    report.add(
        f"{where} by the last",
        max(times),
        "s",
        peer=MEMBERLIST if rounds else None,
        peer_value=rounds * 0.2 if rounds else None,
        at_most=PATIENCE_S,
    )


def _spread_of_a_name(crowd: Crowd) -> list[float]:
    """Seconds until each other node lists the new name of one; PATIENCE_S and more: never."""
    gathering = Gathering(crowd)
    gathering.run(1.0)
    teller = gathering.people[crowd.seed % crowd.nodes]
    began = gathering.now
    knows: dict[NodeId, float] = {teller.node: 0.0}
    waiting = [crowd.nodes - 1]

    def look(person: Person) -> None:
        line = None if person.node in knows else gathering.believes(person, teller.node)
        if line is not None and line.facts.name == "renamed":
            knows[person.node] = gathering.now - began
            waiting[0] -= 1

    gathering.watching = look
    gathering.deliver(teller, FactsChanged(Facts(name="renamed")))
    gathering.run(began + PATIENCE_S, stop=lambda: waiting[0] == 0)
    return [t for node, t in knows.items() if node != teller.node] + [2 * PATIENCE_S] * waiting[0]


def detection(report: Report, nodes: int, links_close: bool, trials: int) -> None:
    found = [_death(Crowd(nodes, seed, loss=0.01), links_close) for seed in range(trials)]
    doubted = [time for doubts, _ in found for time in doubts]
    failed = [time for _, fails in found for time in fails]
    how = "a killed process" if links_close else "a power cut"
    best = math.e / (math.e - 1) + 4 * max(1.0, math.log10(nodes))
    report.add(f"N={nodes}, {how}: suspected (out of routing), p50", quantile(doubted, 0.5), "s")
    report.add(f"N={nodes}, {how}: suspected, p99", quantile(doubted, 0.99), "s")
    report.add(
        f"N={nodes}, {how}: listed as failed, p50",
        quantile(failed, 0.5),
        "s",
        peer=f"{MEMBERLIST}, at best",
        peer_value=best,
        at_most=8.0 if nodes == 4 else None,
    )
    report.add(
        f"N={nodes}, {how}: listed as failed, p99",
        quantile(failed, 0.99),
        "s",
        peer=f"{MEMBERLIST}, at worst",
        peer_value=best + 20 * max(1.0, math.log10(nodes)),
        at_most=12.0 if nodes == 4 else None,
    )


def _death(crowd: Crowd, links_close: bool) -> tuple[list[float], list[float]]:
    """Seconds until each survivor notes that the dead one is suspect, and that it failed."""
    gathering = Gathering(crowd)
    gathering.run(1.0 + Random(crowd.seed).uniform(0.0, 5.0))
    dead = gathering.people[crowd.seed % crowd.nodes]
    began = gathering.now
    gathering.kill(dead, links_close)
    times: dict[str, dict[NodeId, float]] = {"suspect": {}, "failed": {}}
    read = 0

    def over() -> bool:
        nonlocal read
        for time, by, note in gathering.notes[read:]:
            if isinstance(note, MemberDown) and note.node == dead.node and by != dead.node:
                times[note.state].setdefault(by, time - began)
        read = len(gathering.notes)
        return len(times["failed"]) == crowd.nodes - 1

    gathering.run(began + PATIENCE_S, stop=over)
    never = [PATIENCE_S] * (crowd.nodes - 1 - len(times["failed"]))
    return list(times["suspect"].values()), [*times["failed"].values(), *never]


def false_positives(report: Report, nodes: int, hours: float) -> None:
    wrong, _ = _mistakes(Crowd(nodes, loss=0.05), hours, stalls=False)
    report.add(f"N={nodes}, {hours:g} h at 5 % loss: called failed", wrong, "notes", at_most=0.0)
    ablations = {
        "": Guards(),
        ", without loop lag": Guards(loop_lag=False),
        ", without Lifeguard": Guards(lifeguard=False),
        ", without both": Guards(lifeguard=False, loop_lag=False),
    }
    for name, guards in ablations.items():
        crowd = Crowd(nodes, loss=0.05, guards=guards, told_of_stalls=guards.loop_lag)
        healthy, stalled = _mistakes(crowd, hours, stalls=True)
        what = f"N={nodes}, {hours:g} h, 1 in {STALLED_PART} starved, 5 % loss{name}"
        report.add(f"{what}: healthy called failed", healthy, "notes", at_most=None if name else 0.0)
        report.add(f"{what}: starved called failed", stalled, "notes")


def _mistakes(crowd: Crowd, hours: float, stalls: bool) -> tuple[int, int]:
    """How often somebody noted that a node failed, of those that were well and of those that are starved."""
    gathering = Gathering(crowd)
    rng = Random(crowd.seed)
    slow = gathering.people[::STALLED_PART] if stalls else []
    end = hours * 3600

    def stall(person: Person) -> None:
        gathering.stall(person, rng.uniform(*STALL_S))
        gathering.at(person.asleep_until + rng.uniform(*AWAKE_S), lambda: stall(person))

    for person in slow:
        gathering.at(rng.uniform(*AWAKE_S), lambda p=person: stall(p))  # type: ignore[misc]
    gathering.run(end)
    names = {person.node for person in slow}
    failed = [whom for _, _, whom in gathering.failures()]
    return sum(whom not in names for whom in failed), sum(whom in names for whom in failed)


def traffic(report: Report, nodes: int, restless: bool, seconds: float) -> None:
    gathering = Gathering(Crowd(nodes))
    gathering.read_boards(restless)
    gathering.run(2 * GAP_PER_MEMBER_S * nodes if restless else 20.0)  # past the first round of facts
    gathering.metering = True
    gathering.run(gathering.now + seconds)
    what = "every load changing every 5 s" if restless else "at rest"
    report.add(
        f"N={nodes}, {what}: membership sends",
        sum(person.bytes_sent for person in gathering.people) / nodes / seconds,
        "B/s a node",
        at_most=IDLE_MAX.get(nodes),
    )


class MeteredHands(SimHands):
    """The rehearsal room's hands, counting what they send."""

    sent = 0

    def perform(self, actor: Actor, effect: Effect) -> None:
        if isinstance(effect, Send):
            self.sent += len(encode(effect.message)) + FRAME_BYTES
        super().perform(actor, effect)


def whole_nodes(report: Report, minutes: float) -> None:
    """Three voters and a learner with ledgers, elected and at rest, at the timings of a Pi."""
    world = World(Plan(seed=1))
    try:
        hands = world.hands = MeteredHands(world, Random(1))
        world.timings = PRESETS["pi"]
        world.calm()
        world.open()
        world.play(60.0)
        hands.sent = 0
        world.play(60.0 + minutes * 60)
    finally:
        world.close()
    rate = hands.sent / len(world.actors) / (minutes * 60)
    report.add("N=4, at rest: a whole node sends", rate, "B/s a node", at_most=IDLE_MAX[4])


if __name__ == "__main__":
    main("gossip", measure)
