"""How fast the rehearsal room plays: virtual time over real time, and events a second, on one core.

Four nodes (three voters and a learner), webhooks, and every check after every step. The default mix is what `make sim`
plays: seeds of drawn length, theme and timings. It is played twice: by the interpreter, and compiled as long campaigns
are (`compiled`); both must play the same traces. The rows by timings and theme are the interpreter's. The clock is the
playing process's CPU time, so that what else runs does not count, as far as it can be told.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.compiled import build, play
from bench.report import ROOT, Report, main
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
MIX = "default mix, 4 nodes, one core"
SPEED = re.compile(r"\((\d+) x real time and (\d+) events/s")
"""In the simulator's last line."""
DIGESTS = """
from piclusterd.sim.ablations import play
from piclusterd.sim.world import Plan
print(*(play(Plan(seed, {minutes})).digest for seed in range({first}, {end})))
"""


def measure(report: Report, quick: bool) -> None:
    seeds = range(FIRST, FIRST + (SEEDS_QUICK if quick else SEEDS))
    compiled = build()
    _compare(report, compiled, seeds)
    _add(report, f"{MIX}, compiled", max(_told(compiled, seeds) for _ in range(ROUNDS)), FASTER_THAN_REAL)
    _row(report, f"{MIX}, interpreted", Plan(0, DRAWN), seeds)
    for preset in ("pi", "lan"):
        _row(report, f"timings {preset}", Plan(0, DRAWN, preset=preset), seeds)
    for theme in THEMES:
        _row(report, f"theme {theme}", Plan(0, DRAWN, theme=theme), seeds[: len(seeds) // 2])


def _compare(report: Report, compiled: Path, seeds: range) -> None:
    """Do both play the same?"""
    script = DIGESTS.format(minutes=DRAWN, first=seeds.start, end=seeds.stop)
    one, other = (play(directory, "-c", script).stdout.split() for directory in (ROOT, compiled))
    same = sum(a == b for a, b in zip(one, other, strict=True))
    report.add(f"traces that are the same compiled, of {len(seeds)}", same, "seeds", at_least=len(seeds))


def _told(directory: Path, seeds: range) -> tuple[float, float]:
    """What a campaign in a process of its own says of its speed."""
    told = play(directory, "-m", "piclusterd.sim", "--seeds", str(len(seeds)), "--first", str(seeds.start)).stdout
    found = SPEED.search(told)
    assert found is not None, f"the simulator ends with its speed: {told!r}"
    return float(found[1]), float(found[2])


def _row(report: Report, name: str, plan: Plan, seeds: range) -> None:
    _add(report, name, max(_speeds(plan, seeds) for _ in range(ROUNDS)))


def _add(report: Report, name: str, speed: tuple[float, float], budget: float | None = None) -> None:
    report.add(f"{name}: virtual over real time", speed[0], "x", larger_is_better=True, at_least=budget)
    report.add(f"{name}: events", speed[1], "events/s", larger_is_better=True)


def _speeds(plan: Plan, seeds: range) -> tuple[float, float]:
    """Virtual seconds and events per CPU second."""
    played = list(outcomes(plan, seeds))
    cpu = sum(outcome.cpu_s for outcome in played)
    return sum(outcome.virtual_s for outcome in played) / cpu, sum(outcome.events for outcome in played) / cpu


if __name__ == "__main__":
    main("sim", measure)
