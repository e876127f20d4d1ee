"""How fast the rehearsal room plays: virtual time over real time, and events a second, on one core.

Seeds of three virtual minutes with four nodes, webhooks, storms of any mix of faults (theme `swarm`), and every check
after every step. The clock is this process's CPU time, so that what else runs does not count, as far as it can be told.
"""

from __future__ import annotations

import time

from bench.report import Report, main
from piclusterd.sim.ablations import play
from piclusterd.sim.world import Plan

SEEDS = 20
SEEDS_QUICK = 8
MINUTES = 3.0
ROUNDS = 3
"""The best of these counts: a core that is shared is slower, never faster."""
FASTER_THAN_REAL = 1000.0
"""The budget of DESIGN §9, at the timings of a Pi."""


def measure(report: Report, quick: bool) -> None:
    seeds = range(SEEDS_QUICK if quick else SEEDS)
    for preset, name, budget in (
        ("pi", "timings of a Pi", FASTER_THAN_REAL),
        ("", "drawn timings, half of them LAN", None),
    ):
        took, events = min(_played(preset, seeds) for _ in range(ROUNDS))
        virtual = len(seeds) * MINUTES * 60
        report.add(f"{name}: virtual over real time", virtual / took, "x", larger_is_better=True, at_least=budget)
        report.add(f"{name}: events", events / took, "events/s", larger_is_better=True)


def _played(preset: str, seeds: range) -> tuple[float, int]:
    """CPU seconds, events."""
    began = time.process_time()
    events = sum(play(Plan(seed, MINUTES, preset=preset, theme="swarm"))[1] for seed in seeds)
    return time.process_time() - began, events


if __name__ == "__main__":
    main("sim", measure)
