"""How fast the rehearsal room plays: virtual time over real time, and events a second, on one core.

Four nodes (three voters and a learner), webhooks, and every check after every step. The default mix is what `make sim`
plays: seeds of drawn length, theme and timings. The clock is this process's CPU time, so that what else runs does not
count, as far as it can be told.
"""

from __future__ import annotations

from bench.report import Report, main
from piclusterd.sim.campaign import outcomes
from piclusterd.sim.storm import THEMES
from piclusterd.sim.world import Plan

SEEDS = 60
SEEDS_QUICK = 20
FIRST = 1000
ROUNDS = 3
"""The best of these counts: a core that is shared is slower, never faster."""
DRAWN = 0.0
"""Minutes: each seed draws its length."""
FASTER_THAN_REAL = 1000.0
"""The budget of DESIGN §9, for the default mix."""


def measure(report: Report, quick: bool) -> None:
    seeds = range(FIRST, FIRST + (SEEDS_QUICK if quick else SEEDS))
    _row(report, "default mix", Plan(0, DRAWN), seeds, FASTER_THAN_REAL)
    for preset in ("pi", "lan"):
        _row(report, f"timings {preset}", Plan(0, DRAWN, preset=preset), seeds)
    for theme in THEMES:
        _row(report, f"theme {theme}", Plan(0, DRAWN, theme=theme), seeds[: len(seeds) // 2])


def _row(report: Report, name: str, plan: Plan, seeds: range, budget: float | None = None) -> None:
    over_real, events = max(_speeds(plan, seeds) for _ in range(ROUNDS))
    report.add(f"{name}: virtual over real time", over_real, "x", larger_is_better=True, at_least=budget)
    report.add(f"{name}: events", events, "events/s", larger_is_better=True)


def _speeds(plan: Plan, seeds: range) -> tuple[float, float]:
    """Virtual seconds and events per CPU second."""
    played = list(outcomes(plan, seeds))
    cpu = sum(outcome.cpu_s for outcome in played)
    return sum(outcome.virtual_s for outcome in played) / cpu, sum(outcome.events for outcome in played) / cpu


if __name__ == "__main__":
    main("sim", measure)
