"""`python -m piclusterd.sim`: play one seed row by row, or many and tell which fail.

--seed 7 --minutes 10          one row an event; ends with the trace's digest or the violation
--seeds 300 --first 0          many, quietly; exit status 1 and the replay command where one fails
--seeds 50000 --jobs 2         a campaign: so many processes, progress on stderr
--seeds 50 --census            how often each fault, effect, note and event happened; exit status 1 where one never did
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
from .campaign import Outcome, outcomes
from .census import Census, lines
from .rest import Violation
from .storm import THEMES
from .world import Plan

ABLATION_MINUTES = 2.0
"""Budgets of ablations are stated for seeds of this length."""
TOLD_EVERY = 1000
"""Seeds between two lines of progress."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="play this one seed and print every event")
@click.option("--seeds", type=int, default=300, show_default=True, help="how many seeds to play quietly")
@click.option("--first", type=int, default=0, show_default=True, help="the first of them")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="processes that share the seeds")
@click.option("--minutes", type=float, default=0.0, help="virtual minutes each; drawn where not given")
@click.option("--voters", type=int, default=3, show_default=True)
@click.option("--learners", type=int, default=1, show_default=True)
@click.option("--preset", type=click.Choice(tuple(PRESETS)), default=None, help="timings; drawn where not given")
@click.option("--theme", type=click.Choice(THEMES), default=None, help="kind of storm; drawn where not given")
@click.option("--without", type=click.Choice(tuple(ABLATIONS)), help="switch one safety rule off")
@click.option("--ablations", is_flag=True, help="switch each safety rule off in turn and show who catches it")
@click.option("--census", is_flag=True, help="count what happened, by kind")
@click.option("--quiet", is_flag=True, help="with --seed: only the digest")
def main(
    seed: int | None,
    seeds: int,
    first: int,
    jobs: int,
    minutes: float,
    voters: int,
    learners: int,
    preset: str | None,
    theme: str | None,
    without: str | None,
    ablations: bool,
    census: bool,
    quiet: bool,
) -> None:
    """Play the cluster in a seeded world and check its invariants after every step."""
    plan = ablated(Plan(seed or 0, minutes, voters, learners, theme=theme or "", preset=preset or ""), without)
    if ablations:
        _ablations(minutes or ABLATION_MINUTES)
    elif census:
        _census(plan, range(first, first + seeds))
    elif seed is not None:
        _one(plan, rows=not quiet)
    else:
        _many(plan, range(first, first + seeds), jobs)


def _ablations(minutes: float) -> None:
    missed = False
    for row in table(minutes):
        print(row, flush=True)
        missed |= row.endswith("NOT CAUGHT")
    sys.exit(1 if missed else 0)


def _census(plan: Plan, seeds: range) -> None:
    census = Census()
    for seed in seeds:
        census.take(replace(plan, seed=seed))
    for line in lines(census):
        print(line)
    sys.exit(1 if census.missing() else 0)


def _one(plan: Plan, rows: bool) -> None:
    try:
        digest, events, _ = play(plan, print if rows else None)
    except Violation as violation:
        print(f"seed {plan.seed}: VIOLATION {violation}")
        sys.exit(1)
    print(f"seed {plan.seed}: clean, {events} events, trace {digest}")


def _many(plan: Plan, seeds: range, jobs: int) -> None:
    began = time.monotonic()
    played: list[Outcome] = []
    for outcome in outcomes(plan, seeds, jobs):
        played.append(outcome)
        if outcome.violation:
            print(f"seed {outcome.seed}: VIOLATION {outcome.violation}")
            print(f"  replay: {_command(replace(plan, seed=outcome.seed))}", flush=True)
        if len(played) % TOLD_EVERY == 0:
            print(_summary(played, time.monotonic() - began), file=sys.stderr, flush=True)
    print(_summary(played, time.monotonic() - began))
    sys.exit(any(outcome.violation for outcome in played))


def _summary(played: list[Outcome], took: float) -> str:
    """`took`: seconds on the wall; speeds are one core's."""
    clean = [outcome for outcome in played if not outcome.violation]
    failed = sum(bool(outcome.violation) for outcome in played)
    virtual, cpu = sum(o.virtual_s for o in clean), sum(o.cpu_s for o in clean) or 1e-9
    events = sum(outcome.events for outcome in clean)
    return (
        f"{len(clean) + failed} seeds, {virtual / 3600:.1f} virtual hours, {events} events in {took:.1f} s "
        f"({virtual / cpu:.0f} x real time and {events / cpu:.0f} events/s on one core): {failed} failed"
    )


def _command(plan: Plan) -> str:
    """What plays `plan` again, row by row."""
    usual = Plan(0)
    words = [f"--seed {plan.seed}"]
    words += [f"--minutes {plan.minutes:g}"] if plan.minutes else []
    words += [f"--voters {plan.voters}"] if plan.voters != usual.voters else []
    words += [f"--learners {plan.learners}"] if plan.learners != usual.learners else []
    words += [f"--theme {plan.theme}"] if plan.theme else []
    words += [f"--preset {plan.preset}"] if plan.preset else []
    return f"python -m piclusterd.sim {' '.join(words)}"


if __name__ == "__main__":
    main()
