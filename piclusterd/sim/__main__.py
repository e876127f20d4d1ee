"""`python -m piclusterd.sim`: play one seed row by row, or many and tell which fail.

--seed 7 --minutes 10          one row an event; ends with the trace's digest or the violation
--seeds 300 --first 0          many, quietly; exit status 1 and the replay command where one fails
--without NAME                 an ablation: a safety rule switched off (see `ablations`)
--ablations                    all of them, one row each; exit status 1 where one is not caught in its budget
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import click

from ..cluster.timings import PRESETS
from .ablations import ABLATIONS, ablated, play, table
from .checks import Violation
from .storm import THEMES
from .world import Plan


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="play this one seed and print every event")
@click.option("--seeds", type=int, default=300, show_default=True, help="how many seeds to play quietly")
@click.option("--first", type=int, default=0, show_default=True, help="the first of them")
@click.option("--minutes", type=float, default=3.0, show_default=True, help="virtual minutes each")
@click.option("--voters", type=int, default=3, show_default=True)
@click.option("--learners", type=int, default=1, show_default=True)
@click.option("--preset", type=click.Choice(tuple(PRESETS)), default=None, help="timings; drawn where not given")
@click.option("--theme", type=click.Choice(THEMES), default=None, help="kind of storm; drawn where not given")
@click.option("--without", type=click.Choice(tuple(ABLATIONS)), help="switch one safety rule off")
@click.option("--ablations", is_flag=True, help="switch each safety rule off in turn and show who catches it")
@click.option("--quiet", is_flag=True, help="with --seed: only the digest")
def main(
    seed: int | None,
    seeds: int,
    first: int,
    minutes: float,
    voters: int,
    learners: int,
    preset: str | None,
    theme: str | None,
    without: str | None,
    ablations: bool,
    quiet: bool,
) -> None:
    """Play the cluster in a seeded world and check its invariants after every step."""
    plan = ablated(Plan(seed or 0, minutes, voters, learners, theme=theme or "", preset=preset or ""), without)
    if ablations:
        _ablations(minutes)
    elif seed is not None:
        _one(plan, rows=not quiet)
    else:
        _many(plan, range(first, first + seeds))


def _ablations(minutes: float) -> None:
    missed = False
    for row in table(minutes):
        print(row, flush=True)
        missed |= row.endswith("NOT CAUGHT")
    sys.exit(1 if missed else 0)


def _one(plan: Plan, rows: bool) -> None:
    try:
        digest, events = play(plan, print if rows else None)
    except Violation as violation:
        print(f"seed {plan.seed}: VIOLATION {violation}")
        sys.exit(1)
    print(f"seed {plan.seed}: clean, {events} events, trace {digest}")


def _many(plan: Plan, seeds: range) -> None:
    began = time.monotonic()
    events = 0
    failed = []
    for seed in seeds:
        try:
            events += play(replace(plan, seed=seed))[1]
        except Violation as violation:
            failed.append(seed)
            print(f"seed {seed}: VIOLATION {violation}")
            print(f"  replay: {_command(replace(plan, seed=seed))}", flush=True)
    took = time.monotonic() - began
    virtual = len(seeds) * plan.minutes * 60
    print(
        f"{len(seeds)} seeds, {virtual / 3600:.1f} virtual hours, {events} events in {took:.1f} s "
        f"({virtual / took:.0f} x real time, {events / took:.0f} events/s): {len(failed)} failed"
    )
    sys.exit(1 if failed else 0)


def _command(plan: Plan) -> str:
    """What plays `plan` again, row by row."""
    usual = Plan(0)
    words = [f"--seed {plan.seed}", f"--minutes {plan.minutes:g}"]
    words += [f"--voters {plan.voters}"] if plan.voters != usual.voters else []
    words += [f"--learners {plan.learners}"] if plan.learners != usual.learners else []
    words += [f"--theme {plan.theme}"] if plan.theme else []
    words += [f"--preset {plan.preset}"] if plan.preset else []
    return f"python -m piclusterd.sim {' '.join(words)}"


if __name__ == "__main__":
    main()
