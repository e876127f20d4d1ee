"""Many seeds: the same outcomes however many processes share them; a failure is told with what replays it."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
from click.testing import CliRunner

from piclusterd.sim.__main__ import main
from piclusterd.sim.ablations import ABLATIONS, play
from piclusterd.sim.campaign import Outcome, outcomes
from piclusterd.sim.world import LENGTHS, REST_S, Plan, World

DRAWN = Plan(0, 0.0)
SEEDS = range(40, 44)


def length_of(plan: Plan) -> tuple[float, float]:
    """Seconds of the whole, and of the calm at its end."""
    world = World(plan)
    world.close()
    return world.until, world.until - world.calm_from


def untimed(played: list[Outcome]) -> list[Outcome]:
    return sorted((replace(outcome, cpu_s=0.0) for outcome in played), key=lambda outcome: outcome.seed)


def test_two_processes_play_what_one_plays() -> None:
    alone, shared = list(outcomes(DRAWN, SEEDS)), list(outcomes(DRAWN, SEEDS, jobs=2))
    assert untimed(alone) == untimed(shared)
    assert [outcome.seed for outcome in alone] == list(SEEDS)
    assert all(outcome.events and outcome.virtual_s and outcome.cpu_s for outcome in alone)


def test_garbage_is_collected_again_after_a_campaign() -> None:
    assert len(list(outcomes(DRAWN, range(1)))) == 1
    assert gc.isenabled()


def test_each_length_is_drawn_and_a_given_one_is_kept() -> None:
    drawn = {length_of(Plan(seed, 0.0))[0] / 60 for seed in range(60)}
    assert drawn == set(LENGTHS)
    assert {length_of(Plan(seed, 2.5))[0] for seed in range(5)} == {150.0}


@pytest.mark.parametrize(("minutes", "calm_s"), [(0.5, 15.0), (1.0, 30.0), (2.0, REST_S), (4.0, REST_S)])
def test_half_of_a_short_seed_is_storm(minutes: float, calm_s: float) -> None:
    assert length_of(Plan(1, minutes)) == (60 * minutes, calm_s)


def test_a_drawn_length_changes_nothing_else_of_a_seed() -> None:
    seed = next(seed for seed in range(60) if length_of(Plan(seed, 0.0))[0] == 60.0)
    assert play(Plan(seed, 0.0)) == play(Plan(seed, 1.0))


def test_a_failing_seed_is_told_with_its_replay_command_and_the_summary_counts_it() -> None:
    budget = ABLATIONS["ack-fsync"].seeds
    run = CliRunner().invoke(main, ["--seeds", str(budget), "--minutes", "2", "--without", "ack-fsync", "--jobs", "2"])
    assert run.exit_code == 1
    assert "VIOLATION I5" in run.output
    assert "replay: python -m piclusterd.sim --seed " in run.output
    assert f"{budget} seeds" in run.output.splitlines()[-1]


def test_a_seed_of_drawn_length_is_replayed_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piclusterd.sim.__main__.TOLD_EVERY", 2)
    run = CliRunner().invoke(main, ["--seeds", "2"])
    assert run.exit_code == 0
    assert "0 failed" in run.stderr
    assert "0 failed" in run.stdout
