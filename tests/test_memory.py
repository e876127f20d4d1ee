"""The service `memory`: vectors by a model or by words, what is near, and how long quiet hours last."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from piclusterd.errors import Unavailable
from piclusterd.events import Choice, Fact
from piclusterd.ids import LogId, NodeId
from piclusterd.inference.protocol import Embedded, EmbedRequest
from piclusterd.integrations.outcome import CallFailed
from piclusterd.memory import Memory
from piclusterd.workflows.cases import Cases
from piclusterd.workflows.vectors import WORDS, of_words, quantised

ME = NodeId("a" * 16)


async def embed(request: EmbedRequest) -> tuple[Choice, Embedded]:
    import array

    vector = array.array("f", [1.0, -0.5, 0.25]).tobytes()
    return Choice(ME, "pi", request.model, "only one"), Embedded(0, (vector,), 3)


async def nobody(request: EmbedRequest) -> tuple[Choice, Embedded]:
    raise Unavailable("no node embeds now")


def cases() -> Cases:
    made = Cases()
    for number, text in enumerate(("the printer is blank", "login is slow", "dark mode")):
        told = {"identifier": f"LIN-{number}", "team": "LIN", "encoder": WORDS, "vector": of_words(text),
                "human.type": "bug"}  # fmt: skip
        made.grow(Fact(LogId(ME, 1), number + 1, 1, "case", {"issue": f"i-{number}", "set": told}, hlc=number))
    return made


SIMILAR = {"issue": "i-9", "team": "LIN", "encoder": WORDS, "text": "the printer is blank today"}


async def test_what_is_near_comes_with_what_people_made_of_it() -> None:
    found = await Memory(cases, nobody).perform("similar", SIMILAR, "")
    assert (found["encoder"], found["vector"]) == (WORDS, of_words(str(SIMILAR["text"])))
    assert found["near"][0]["identifier"] == "LIN-0"
    assert found["near"][0]["holds"] == {"type": "bug"}
    assert found["case"] == {}
    again = await Memory(cases, nobody).perform("similar", {**SIMILAR, "issue": "i-0"}, "")
    assert again["case"]["identifier"] == "LIN-0"
    assert all(near["identifier"] != "LIN-0" for near in again["near"])


async def test_a_models_vector_is_kept_as_bytes_and_compared_with_its_own_kind() -> None:
    found = await Memory(cases, embed).perform("similar", {**SIMILAR, "encoder": "minilm"}, "")
    assert (found["encoder"], found["vector"]) == ("minilm", quantised([1.0, -0.5, 0.25]))
    assert found["near"] == []


async def test_where_nobody_embeds_words_alone_tell() -> None:
    found = await Memory(cases, nobody).perform("similar", {**SIMILAR, "encoder": "minilm"}, "")
    assert found["encoder"] == WORDS
    assert found["near"][0]["identifier"] == "LIN-0"


async def test_a_case_is_found_or_missing() -> None:
    memory = Memory(cases, nobody)
    assert (await memory.perform("case", {"issue": "i-1"}, ""))["case"]["identifier"] == "LIN-1"
    assert await memory.perform("case", {"issue": "i-7"}, "") == {"missing": True, "busy": False}
    with pytest.raises(CallFailed):
        await memory.perform("forget", {}, "")


@pytest.mark.parametrize(
    ("now", "hours", "wait_s"),
    [
        ("23:00", "22:00-07:00", 8 * 3600),
        ("06:30", "22:00-07:00", 1800),
        ("07:00", "22:00-07:00", 0),
        ("12:00", "22:00-07:00", 0),
        ("12:00", "11:00-13:00", 3600),
        ("13:00", "11:00-13:00", 0),
        ("12:00", "noon", 0),
    ],
)
async def test_quiet_hours_end_when_they_end(now: str, hours: str, wait_s: float) -> None:
    def clock(zone: ZoneInfo) -> datetime:
        return datetime.fromisoformat(f"2026-05-05T{now}").replace(tzinfo=zone)

    memory = Memory(cases, nobody, clock=clock)
    assert await memory.perform("quiet", {"hours": hours, "timezone": "Europe/Berlin"}, "") == {"wait_s": wait_s}
