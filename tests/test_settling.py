"""A young node does not yet say that nobody serves a model."""

from __future__ import annotations

import pytest

from piclusterd.errors import NotFound, Unavailable
from piclusterd.settling import SETTLING_S, Settling


class Clock:
    """Five seconds later at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 5.0
        return self.now


async def test_a_young_node_asks_again_and_an_older_one_says_what_it_knows() -> None:
    faults = [NotFound("no model"), Unavailable("no link")]

    async def question() -> str:
        if faults:
            raise faults.pop(0)
        return "pi-2"

    assert await Settling(Clock()).ask(question) == "pi-2"
    faults += [NotFound("no model")] * int(SETTLING_S)
    with pytest.raises(NotFound):
        await Settling(Clock()).ask(question)
    assert len(faults) == SETTLING_S - 3


async def test_other_faults_are_not_waited_for() -> None:
    async def question() -> str:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await Settling(Clock()).ask(question)
