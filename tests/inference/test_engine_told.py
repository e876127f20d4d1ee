"""An answer begun by one child goes on in another as if nothing had happened, wherever it was cut.

Both read as slow boards do, in chunks below a tile of attention, and into an empty memory: then no sum depends on what
was in a batch, or in which order cells were filled. Otherwise logits move by some hundredths, and a die that falls on
an edge may show another token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

from piclusterd.errors import UserError
from piclusterd.inference import schedule
from piclusterd.inference.engine import Engine
from piclusterd.inference.protocol import Delta, Done, Field, GenerateRequest, Load, Told
from piclusterd.inference.sampler import die

from .rig import DEMO, GREEDY

SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["bug", "feature", "question"]},
        "reason": {"type": "string", "maxLength": 30},
        "parts": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["type", "reason", "parts"],
    "additionalProperties": False,
}
SEEDED: dict[str, object] = {"temperature": 0.9, "seed": 7}
REQUESTS: dict[str, dict[str, object]] = {
    "greedy": {},
    "seeded": SEEDED,
    "schema": {"json_schema": json.dumps(SCHEMA), "max_tokens": 80},
    "seeded schema": {"json_schema": json.dumps(SCHEMA), "max_tokens": 80, **SEEDED},
    "seeded schema with penalties": {"json_schema": json.dumps(SCHEMA), "repeat_penalty": 1.2, **SEEDED},
    "penalties": {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "max_tokens": 24},
    "log-probabilities": {"logprobs": True, "top_logprobs": 2, "max_tokens": 16},
    "bytes of characters": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3, "max_tokens": 30},
}


@pytest.fixture(scope="module", autouse=True)
def slow_board() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "READING_S", 0.0)
        yield


@pytest.fixture(scope="module")
def first() -> Iterator[Engine]:
    yield from engine()


@pytest.fixture(scope="module")
def second() -> Iterator[Engine]:
    yield from engine()


def engine() -> Iterator[Engine]:
    made = Engine(Load(str(DEMO), context=1024, slots=2, threads=1, batch_threads=1))
    yield made
    made.close()


def asked(**changes: object) -> GenerateRequest:
    return msgspec.structs.replace(GREEDY, **changes)


def answered(engine: Engine, request: GenerateRequest) -> list[Delta | Done]:
    engine._residents.clear()
    engine.submit(1, request)
    out: list[Delta | Done] = []
    while engine.busy:
        out += [output for output in engine.step() if isinstance(output, Delta | Done)]
    return out


def text(frames: list[Delta | Done]) -> str:
    return "".join(frame.text for frame in frames if isinstance(frame, Delta))


def told(frames: list[Delta | Done]) -> Told:
    deltas = [frame for frame in frames if isinstance(frame, Delta)]
    return Told(tuple(token for delta in deltas for token in delta.ids), len(text(frames)))


def meant(done: Delta | Done) -> tuple[str, int, int]:
    assert isinstance(done, Done)
    return done.reason, done.prompt_tokens, done.completion_tokens


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_answer_cut_anywhere_goes_on_as_it_would_have(first: Engine, second: Engine, kind: str) -> None:
    request = asked(**REQUESTS[kind])
    whole = answered(first, request)
    for cut in range(1, len(whole)):
        rest = answered(second, msgspec.structs.replace(request, told=told(whole[:cut])))
        assert text(whole[:cut]) + text(rest) == text(whole), f"cut after {cut} of {len(whole)}"
        assert meant(rest[-1]) == meant(whole[-1])
        begun = [part for frame in (*whole[:cut], *rest) if isinstance(frame, Delta) for part in frame.logprobs]
        both = [part for frame in whole if isinstance(frame, Delta) for part in frame.logprobs]
        assert [part.text for part in begun] == [part.text for part in both]


def test_a_stop_string_across_the_cut_is_seen(first: Engine, second: Engine) -> None:
    words = text(answered(first, asked(max_tokens=24)))
    stop = words[len(words) // 2 :][:6]
    request = asked(max_tokens=24, stop=(stop,))
    whole = answered(first, request)
    assert stop not in text(whole)
    for cut in range(1, len(whole)):
        rest = answered(second, msgspec.structs.replace(request, told=told(whole[:cut])))
        assert text(whole[:cut]) + text(rest) == text(whole)
        assert meant(rest[-1]) == meant(whole[-1])


def test_text_told_at_the_end_is_not_told_twice(first: Engine, second: Engine) -> None:
    """What was held back comes with the end, without a token: only its characters say that it is out."""
    request = asked(max_tokens=12)
    whole = text(answered(first, request))
    held = whole[-1] + "never comes"
    request = msgspec.structs.replace(request, stop=(held,))
    frames = answered(first, request)
    assert text(frames) == whole
    rest = answered(second, msgspec.structs.replace(request, told=told(frames[:-1])))
    assert [type(frame) for frame in rest] == [Done]


def test_what_was_chosen_and_told_is_not_told_twice(first: Engine, second: Engine) -> None:
    request = asked(choices=(Field("", ("bug", "feature")),))
    whole = answered(first, request)
    rest = answered(second, msgspec.structs.replace(request, told=told(whole[:-1])))
    assert text(whole) in ("bug", "feature")
    assert [type(frame) for frame in rest] == [Done]
    assert rest[-1].choices == whole[-1].choices  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [(10**6,), (3, 3, 3)])
def test_what_another_model_would_have_told_is_refused(second: Engine, tokens: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="cannot go on"):
        second.submit(1, asked(json_schema=json.dumps(SCHEMA), told=Told(tokens, 0)))
    assert not second.busy


def test_the_die_of_each_place_and_seed_is_another() -> None:
    dice = {die(seed, place) for seed in range(50) for place in range(50)}
    assert len(dice) == 2500
    assert all(0 <= thrown < 2**32 - 1 for thrown in dice)
