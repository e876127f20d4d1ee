"""Membership at N = 4, 16, 100 and 1000, in the rehearsal room: how fast, how often wrong, how many bytes.

    convergence       a node changes its name: until everybody lists the new one
    detection         a node dies, its links closing (SIGKILL) or not (power cut): until everybody lists it as failed
    false positives   nobody dies, but some nodes are starved of CPU: how often a healthy one is called failed, with
                      Lifeguard and the loop-lag signal and without, over many seeds
    bytes             of a node, sent and heard, up to and with TLS: at N = 4 of whole nodes with the pulse of their
                      links, else of membership alone. TCP/IP headers are estimated, in rows of their own

Times are virtual: what is measured is the protocol, not this machine.
The peer is hashicorp/memberlist at its LAN defaults, run here on loopback where it can be built (`bench.memberlist`;
its bytes are what it hands to UDP and TCP, in clear). Elsewhere it is its published arithmetic: a first detection after
e/(e-1) probe periods of 1 s, then at best 4 max(1, log10 N) s of suspicion (and at worst six times that); its rule of
gossip (fan-out 3, retransmit 4 ceil(log10(N+1)), rounds of 0.2 s) as simulated for this project, as always where
messages are lost. The peer of the ablations is what the Lifeguard paper claims (arXiv 1707.00788).
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from random import Random
from statistics import stdev

from bench import memberlist
from bench.control_traffic import traffic, whole_nodes
from bench.memberlist import Measured
from bench.report import Report, main, quantile
from piclusterd.cluster.suspicion import Guards
from piclusterd.events import FactsChanged, MemberDown
from piclusterd.ids import NodeId
from piclusterd.sim.gossip import (
    Crowd,
    Gathering,
    Person,
)
from piclusterd.wire import Facts

SIZES = (4, 16, 100, 1000)
MEMBERLIST_ROUNDS = {(100, 0.0): 6.5, (1000, 0.0): 8, (1000, 0.1): 9, (1000, 0.3): 10}
"""(N, loss) → rounds of 0.2 s until everybody knows."""
PATIENCE_S = 200.0
"""A trial that takes longer has not converged."""
STALL_S = (2.0, 16.0)
AWAKE_S = (0.001, 2.0)
"""A starved board (Lifeguard, §V): it stalls, runs for a moment, often too short for an answer to come (drawn evenly on
a scale of logarithms), and stalls again."""
LIFEGUARD_CUT = 50.0
"""By so much Lifeguard cuts false positives, at least (arXiv 1707.00788, abstract)."""
ABLATIONS = {
    "": Guards(),
    ", without loop lag": Guards(loop_lag=False),
    ", without Lifeguard": Guards(lifeguard=False),
    ", without both": Guards(lifeguard=False, loop_lag=False),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything in one run of the bench."""

    trials: dict[int, int]
    """By N; one that is left out is not tried (a thousand nodes take minutes)."""
    kills: dict[int, int]
    """Of memberlist's nodes, in real time; of a size that is left out its published arithmetic is told."""
    starved: tuple[tuple[int, int, int, float], ...]
    """(N, starved nodes, seeds, virtual seconds a seed)."""
    seconds: dict[int, float]
    """Metered, by N."""


QUICK = Size(
    {4: 20, 16: 10, 100: 1},
    {4: 2, 16: 1},
    ((4, 1, 15, 60.0), (16, 4, 2, 30.0)),
    {4: 120.0, 16: 60.0, 100: 20.0},
)
WHOLE = Size(
    {4: 200, 16: 100, 100: 10, 1000: 2},
    {4: 12, 16: 8, 100: 5},
    ((4, 1, 30, 600.0), (4, 2, 30, 600.0), (16, 4, 30, 60.0), (100, 10, 4, 30.0)),
    {4: 3600.0, 16: 600.0, 100: 200.0, 1000: 200.0},
)


def measure(report: Report, quick: bool) -> None:
    size = QUICK if quick else WHOLE
    with closing(memberlist.start(size.kills)) as peer:
        whole_nodes(report, size.seconds[4], restless=False)
        whole_nodes(report, size.seconds[4], restless=True)
        for nodes, starved, seeds, seconds in size.starved:
            false_positives(report, nodes, starved, seeds, seconds)
        real = {nodes: peer.at(nodes) for nodes in SIZES}
    for nodes in size.trials:
        for loss in (0.0, 0.1, 0.3):
            convergence(report, nodes, loss, size.trials[nodes], real[nodes])
        for links_close in (True, False):
            detection(report, nodes, links_close, size.trials[nodes], real[nodes])
    for nodes, seconds in size.seconds.items():
        for restless in (False, True):
            traffic(report, nodes, restless, seconds, real[nodes])


def convergence(report: Report, nodes: int, loss: float, trials: int, real: Measured | None) -> None:
    times = [time for seed in range(trials) for time in _spread_of_a_name(Crowd(nodes, seed, loss=loss))]
    where = f"N={nodes}, {loss:.0%} loss: a change is known"
    rounds = MEMBERLIST_ROUNDS.get((nodes, loss))
    half, last = None, rounds * 0.2 if rounds else None
    name = "memberlist's rule, simulated" if rounds else None
    if real and not loss:
        half, last, name = quantile(real.change_s, 0.5), max(real.change_s), "memberlist, run here"
    report.add(f"{where}, p50", quantile(times, 0.5), "s", peer=name if half else None, peer_value=half)
    report.add(f"{where}, p99", quantile(times, 0.99), "s")
    report.add(f"{where} by the last", max(times), "s", peer=name, peer_value=last, at_most=PATIENCE_S)


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


def detection(report: Report, nodes: int, links_close: bool, trials: int, real: Measured | None) -> None:
    found = [_death(Crowd(nodes, seed, loss=0.01), links_close) for seed in range(trials)]
    doubted = [time for doubts, _ in found for time in doubts]
    failed = [time for _, fails in found for time in fails]
    where = f"N={nodes}, {'a killed process' if links_close else 'a power cut'}"
    report.add(f"{where}: suspected (out of routing), p50", quantile(doubted, 0.5), "s")
    report.add(f"{where}: suspected, p99", quantile(doubted, 0.99), "s")
    best = math.e / (math.e - 1) + 4 * max(1.0, math.log10(nodes))
    worst = best + 20 * max(1.0, math.log10(nodes))
    peers = {0.5: ("memberlist, at best", best), 0.99: ("memberlist, at worst", worst)}
    for part, at_most in ((0.5, 8.0), (0.99, 12.0)):
        name, value = peers[part]
        if real:
            name, value = "memberlist, run here", quantile(real.death_s, part)
        report.add(
            f"{where}: listed as failed, p{part * 100:.0f}",
            quantile(failed, part),
            "s",
            peer=name,
            peer_value=value,
            at_most=at_most if nodes == 4 else None,
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


def false_positives(report: Report, nodes: int, starved: int, seeds: int, seconds: float) -> None:
    where = f"N={nodes}, {starved} starved, 5 % loss, {seeds} seeds of {seconds / 60:g} min"
    healthy: dict[str, list[int]] = {}
    for name, guards in ABLATIONS.items():
        crowds = [Crowd(nodes, seed, loss=0.05, guards=guards, told_of_stalls=guards.loop_lag) for seed in range(seeds)]
        counted = [_mistakes(crowd, starved, seconds) for crowd in crowds]
        healthy[name] = [well for well, _ in counted]
        report.add(
            f"{where}{name}: healthy called failed, in all",
            sum(healthy[name]),
            f"± {_spread(healthy[name]):.2g}",
            at_most=None if name else 0.0,
        )
        report.add(f"{where}{name}: starved called failed", sum(slow for _, slow in counted), "notes")
    report.add(
        f"{where}: both guards cut false positives by a factor of at least",
        sum(healthy[", without both"]) / max(1, sum(healthy[""])),
        "x",
        peer="Lifeguard, as published",
        peer_value=LIFEGUARD_CUT,
        larger_is_better=True,
    )


def _spread(counts: list[int]) -> float:
    """Half the 95 % interval of the sum over as many seeds; of none seen, the rule of three."""
    return 1.96 * stdev(counts) * math.sqrt(len(counts)) if any(counts) else 3.0


def _mistakes(crowd: Crowd, starved: int, seconds: float) -> tuple[int, int]:
    """How often somebody noted that a node failed, of those that were well and of those that are starved."""
    gathering = Gathering(crowd)
    rng = Random(crowd.seed)
    slow = rng.sample(gathering.people, starved)
    shortest, longest = AWAKE_S

    def awake() -> float:
        return shortest * math.pow(longest / shortest, rng.random())

    def stall(person: Person) -> None:
        gathering.stall(person, rng.uniform(*STALL_S))
        gathering.at(person.asleep_until + awake(), lambda: stall(person))

    for person in slow:
        gathering.at(awake(), lambda p=person: stall(p))  # type: ignore[misc]
    gathering.run(seconds)
    names = {person.node for person in slow}
    failed = [whom for _, _, whom in gathering.failures()]
    return sum(whom not in names for whom in failed), sum(whom in names for whom in failed)


if __name__ == "__main__":
    main("gossip", measure)
