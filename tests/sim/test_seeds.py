"""Seeds: a slice of the campaign, and proof that the checks would see a missing safety rule."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from piclusterd.sim.__main__ import ablated, first_failure
from piclusterd.sim.world import Plan

MINUTES = 2.0
CHUNK = 5
"""Seeds a test, so that a failing one is found in seconds."""


@pytest.mark.parametrize("first", range(0, 20, CHUNK))
def test_every_invariant_holds(first: int) -> None:
    failure = first_failure(Plan(0, MINUTES), range(first, first + CHUNK))
    assert failure is None, f"replay: python -m piclusterd.sim --seed {failure[0]} --minutes {MINUTES:g}: {failure[1]}"


@pytest.mark.parametrize(("voters", "learners"), [(1, 0), (2, 1), (5, 0)])
def test_clusters_of_other_sizes_hold_too(voters: int, learners: int) -> None:
    assert first_failure(Plan(0, MINUTES, voters, learners), range(2)) is None


def trace(hash_seed: int) -> str:
    command = [sys.executable, "-m", "piclusterd.sim", "--seed", "7", "--minutes", "1.5", "--quiet"]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_seed_is_one_story_whatever_the_hash_seed() -> None:
    """No decider iterates over a set, or over what a set has ordered."""
    one, two = trace(1), trace(2)
    assert one == two
    assert "clean" in one


@pytest.mark.parametrize(
    ("rule", "seeds", "invariant"),
    [
        ("recovery-barrier", range(3, 6), "I6"),
        ("term-fencing", range(44, 47), "I3"),
        ("vote-fsync", range(71, 74), "I1"),
    ],
)
def test_a_missing_safety_rule_is_caught(rule: str, seeds: range, invariant: str) -> None:
    """Seeds in which nothing is wrong with the rule on, and the rule's own invariant breaks with it off."""
    assert first_failure(Plan(0, MINUTES), seeds) is None
    failure = first_failure(ablated(Plan(0, MINUTES), rule), seeds)
    assert failure is not None
    assert str(failure[1]).startswith(invariant)
