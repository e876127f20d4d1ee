"""Golden traces: what every node hears and does in four stories. `--rewrite` writes them; say why each row moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from piclusterd.sim.stories import STORIES, tell

TRACES = Path(__file__).parents[1] / "traces"


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_told_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    rows, file = tell(name), TRACES / f"{name}.txt"
    if request.config.getoption("--rewrite"):
        file.write_text(rows)
    assert rows == file.read_text()


def test_every_trace_belongs_to_a_story() -> None:
    assert {file.stem for file in TRACES.glob("*.txt")} == set(STORIES)
