"""Many seeds, on as many cores as wanted, each played in one process from beginning to end.

    seeds ──▶ K processes, one seed at a time each ──Outcome, as it ends──▶ whoever asked

Speed is virtual seconds per CPU second of the process that played: what one core does, however many play beside it and
whatever else the machine does meanwhile.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from .ablations import play
from .rest import Violation
from .world import Plan

COLLECT_EVERY = 100
"""Seeds between two collections of garbage: a world of four nodes leaves less than a megabyte that holds itself."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed's end. `cpu_s`: of one core; `violation`: what did not hold, "" where all did."""

    seed: int
    events: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    violation: str = ""


def outcomes(plan: Plan, seeds: range, jobs: int = 1) -> Iterator[Outcome]:
    """`plan` with each of `seeds`, in no order where `jobs` processes share them."""
    if jobs == 1:
        with _garbage_waits():
            yield from map(partial(_outcome, plan), seeds)
        return
    forks = multiprocessing.get_context("fork")
    with forks.Pool(jobs, _begin, (plan,)) as pool:
        yield from pool.imap_unordered(_of_the_plan, seeds)


def _outcome(plan: Plan, seed: int) -> Outcome:
    began = time.process_time()
    try:
        played = play(replace(plan, seed=seed))
    except Violation as violation:
        return Outcome(seed, cpu_s=time.process_time() - began, violation=str(violation))
    except Exception as fault:  # a bug of a decider or of the simulator: it costs one seed, not the campaign
        return Outcome(seed, cpu_s=time.process_time() - began, violation=f"broke: {fault!r}")
    if seed % COLLECT_EVERY == 0:
        gc.collect()
    return Outcome(seed, played.events, played.virtual_s, time.process_time() - began)


_plans: list[Plan] = []
"""In a process of a pool: what it plays. Inherited by the fork, since a compiled plan does not pickle."""


def _begin(plan: Plan) -> None:
    _plans.append(plan)
    _let_garbage_wait()


def _of_the_plan(seed: int) -> Outcome:
    return _outcome(_plans[0], seed)


def _let_garbage_wait() -> None:
    """What is there now stays for good, and cycles are looked for between seeds only."""
    gc.freeze()
    gc.disable()


@contextmanager
def _garbage_waits() -> Iterator[None]:
    _let_garbage_wait()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
