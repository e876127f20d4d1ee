"""`python -m piclusterd.sim`: play one seed row by row, or many and tell which fail.

--seed 7 --minutes 10          one row an event; ends with the trace's digest or the violation
--seeds 300 --first 0          many, quietly; exit status 1 and the replay command where one fails
--without term-fencing | recovery-barrier | vote-fsync        an ablation: a safety rule switched off
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import click

from ..events import Rules
from .checks import Violation
from .world import Plan, World

ABLATIONS = ("term-fencing", "recovery-barrier", "vote-fsync")


def ablated(plan: Plan, rule: str | None) -> Plan:
    """`plan` without one safety rule."""
    match rule:
        case "term-fencing":
            return replace(plan, rules=Rules(term_fencing=False))
        case "recovery-barrier":
            return replace(plan, rules=Rules(recovery_barrier=False))
        case "vote-fsync":
            return replace(plan, lying_disks=True)
        case _:
            return plan


def play(plan: Plan, rows: bool = False) -> tuple[str, int]:
    """The trace's digest and the number of events. Raises `Violation`."""
    world = World(plan, print if rows else None)
    try:
        return world.run(), world.events
    finally:
        world.close()


def first_failure(plan: Plan, seeds: range) -> tuple[int, Violation] | None:
    for seed in seeds:
        try:
            play(replace(plan, seed=seed))
        except Violation as violation:
            return seed, violation
    return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="play this one seed and print every event")
@click.option("--seeds", type=int, default=300, show_default=True, help="how many seeds to play quietly")
@click.option("--first", type=int, default=0, show_default=True, help="the first of them")
@click.option("--minutes", type=float, default=3.0, show_default=True, help="virtual minutes each")
@click.option("--voters", type=int, default=3, show_default=True)
@click.option("--learners", type=int, default=1, show_default=True)
@click.option("--without", type=click.Choice(ABLATIONS), help="switch one safety rule off")
@click.option("--quiet", is_flag=True, help="with --seed: only the digest")
def main(
    seed: int | None,
    seeds: int,
    first: int,
    minutes: float,
    voters: int,
    learners: int,
    without: str | None,
    quiet: bool,
) -> None:
    """Play the cluster in a seeded world and check its invariants after every step."""
    plan = ablated(Plan(seed or 0, minutes, voters, learners), without)
    if seed is not None:
        _one(plan, rows=not quiet)
    else:
        _many(plan, range(first, first + seeds))


def _one(plan: Plan, rows: bool) -> None:
    try:
        digest, events = play(plan, rows)
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
            print(f"  replay: python -m piclusterd.sim --seed {seed} --minutes {plan.minutes:g}")
    took = time.monotonic() - began
    virtual = len(seeds) * plan.minutes * 60
    print(
        f"{len(seeds)} seeds, {virtual / 3600:.1f} virtual hours, {events} events in {took:.1f} s "
        f"({virtual / took:.0f} x real time, {events / took:.0f} events/s): {len(failed)} failed"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
