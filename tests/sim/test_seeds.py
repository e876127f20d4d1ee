"""Seeds: a slice of the campaign, what failed once, and proof that the checks would see a missing safety rule."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.sim.ablations import ABLATIONS, first_failure, hunt, table
from piclusterd.sim.census import Census, lines
from piclusterd.sim.rest import Violation
from piclusterd.sim.storm import THEMES
from piclusterd.sim.world import Plan

MINUTES = 2.0
CHUNK = 5
"""Seeds a test, so that a failing one is found in seconds."""
REGRESSIONS = [
    (int(words[0]), float(words[1]), " ".join(words[2:]))
    for line in (Path(__file__).parent / "regressions.txt").read_text().splitlines()
    if (words := line.split()) and words[0] != "#"
]


FIRST = {"fork": 104}
"""Seeds in which cards did write apart, which not all of that theme come to."""
SLICE = [(first, "") for first in range(0, 20, CHUNK)]
SLICE += [(FIRST.get(theme, 100), theme) for theme in THEMES if theme != "minds"]
CENSUS = Census()
PLAYED: dict[int, None] = {}


@pytest.mark.parametrize("number", range(len(SLICE)))
def test_every_invariant_holds(number: int) -> None:
    first, theme = SLICE[number]
    for seed in range(first, first + (2 if theme else CHUNK)):
        try:
            CENSUS.take(Plan(seed, MINUTES, theme=theme))
        except Violation as violation:
            words = f"--seed {seed} --minutes {MINUTES:g}" + (f" --theme {theme}" if theme else "")
            pytest.fail(f"replay: python -m piclusterd.sim {words}: {violation}")
    PLAYED[number] = None


def test_nothing_is_left_unrehearsed() -> None:
    """No fault, effect, note or event that the simulator has a use for is at zero over the slice (and a few seeds)."""
    if len(PLAYED) < len(SLICE):
        pytest.skip("only a part of the slice was played")
    for seed in range(200, 220):
        if CENSUS.missing():
            CENSUS.take(Plan(seed, MINUTES, theme="swarm"))
    assert CENSUS.missing() == []


def test_what_was_not_rehearsed_is_told_with_its_reason() -> None:
    census = Census()
    census.take(Plan(1, 1.1, voters=1, learners=0))
    assert {"voter add", "Diverged"} <= set(census.missing())
    rows = "\n".join(lines(census))
    assert "told in the story" in rows


@pytest.mark.parametrize("seed", [1, 2])
def test_two_leaders_that_change_voters_in_turns_lose_nothing(seed: int) -> None:
    assert first_failure(Plan(seed, MINUTES, voters=4, theme="minds"), range(seed, seed + 1)) is None


@pytest.mark.parametrize(("voters", "learners"), [(1, 0), (2, 1), (5, 0)])
def test_clusters_of_other_sizes_hold_too(voters: int, learners: int) -> None:
    assert first_failure(Plan(0, MINUTES, voters, learners), range(2)) is None


@pytest.mark.parametrize(("seed", "minutes", "why"), REGRESSIONS)
def test_what_failed_once_holds(seed: int, minutes: float, why: str) -> None:
    assert first_failure(Plan(0, minutes), range(seed, seed + 1)) is None, why


def trace(hash_seed: int) -> str:
    command = [sys.executable, "-m", "piclusterd.sim", "--seed", "7", "--minutes", "1.5", "--quiet"]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_seed_is_one_story_whatever_the_hash_seed() -> None:
    """No decider iterates over a set, or over what a set has ordered."""
    one, two = trace(1), trace(2)
    assert one == two
    assert "clean" in one


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_missing_safety_rule_is_caught(name: str) -> None:
    """By the rule's own invariant, in a seed that is clean with the rule on."""
    assert hunt(ABLATIONS[name], MINUTES) is not None


def test_the_table_of_ablations_tells_what_was_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    easy, hard = ABLATIONS["ack-fsync"], replace(ABLATIONS["term-fencing"], seeds=0)
    monkeypatch.setattr("piclusterd.sim.ablations.ABLATIONS", {"easy": easy, "hard": hard})
    _, caught, missed = table(MINUTES)
    assert "I5" in caught
    assert missed.endswith("NOT CAUGHT")
