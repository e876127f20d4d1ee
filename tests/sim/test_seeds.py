"""Seeds: a slice of the campaign, what failed once, and proof that the checks would see a missing safety rule."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.sim.ablations import ABLATIONS, first_failure, hunt, table
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


@pytest.mark.parametrize("first", range(0, 20, CHUNK))
def test_every_invariant_holds(first: int) -> None:
    failure = first_failure(Plan(0, MINUTES), range(first, first + CHUNK))
    assert failure is None, f"replay: python -m piclusterd.sim --seed {failure[0]} --minutes {MINUTES:g}: {failure[1]}"


@pytest.mark.parametrize("theme", THEMES)
def test_every_theme_holds(theme: str) -> None:
    assert first_failure(Plan(0, MINUTES, theme=theme), range(100, 102)) is None


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


def test_the_table_of_ablations_tells_what_was_not_caught_and_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    easy, hard = ABLATIONS["ack-fsync"], replace(ABLATIONS["term-fencing"], seeds=0)
    monkeypatch.setattr("piclusterd.sim.ablations.ABLATIONS", {"easy": easy, "hard": hard})
    _, caught, missed, *not_yet = table(MINUTES)
    assert "I5" in caught
    assert missed.endswith("NOT CAUGHT")
    assert all("not yet" in row for row in not_yet)
