"""Drafts: what repeats is guessed, whatever is guessed is checked, and no answer differs by it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest

from piclusterd.inference.drafts import FIRST, REST, Drafts, N, alone
from piclusterd.inference.engine import Engine
from piclusterd.inference.protocol import ChatMessage, Delta, Done, GenerateRequest, Load
from piclusterd.web.node_headers import end_headers

from .rig import DEMO, ISSUE, NAME, collected, pool_of, spec
from .test_engine_told import REQUESTS, SCHEMA

MOST = 7
FORMS: dict[str, dict[str, object]] = {
    **{name: changes for name, changes in REQUESTS.items() if "seed" not in changes},
    "long": {"max_tokens": 200},
    "stop": {"max_tokens": 200, "stop": ("e c",)},
}
"""Greedy ones: where a die is thrown over a flat distribution, the rounding of a batch of several rows shows."""
PROMPTS = [ISSUE, f"Repeat: {ISSUE} {ISSUE}", json.dumps(SCHEMA) * 2, "a b c d " * 20, "x"]


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    yield from engine(0)


@pytest.fixture(scope="module")
def drafting() -> Iterator[Engine]:
    yield from engine(MOST)


def engine(drafts: int) -> Iterator[Engine]:
    made = Engine(Load(str(DEMO), context=1024, slots=2, threads=1, batch_threads=1, drafts=drafts))
    yield made
    made.close()


def answered(engine: Engine, *requests: GenerateRequest) -> dict[int, list[Delta | Done]]:
    for number, request in enumerate(requests):
        engine.submit(number, request)
    out: dict[int, list[Delta | Done]] = {}
    while engine.busy:
        for frame in engine.step():
            assert isinstance(frame, Delta | Done)
            out.setdefault(frame.id, []).append(frame)
    return out


def tokens(frames: list[Delta | Done]) -> list[int]:
    return [token for frame in frames if isinstance(frame, Delta) for token in frame.ids]


def end(frames: list[Delta | Done]) -> Done:
    assert isinstance(frames[-1], Done)
    return frames[-1]


@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
@pytest.mark.parametrize("form", FORMS)
def test_a_drafted_greedy_answer_is_the_undrafted_one_token_by_token(
    plain: Engine, drafting: Engine, form: str, prompt: int
) -> None:
    asked = GenerateRequest(messages=(ChatMessage("user", PROMPTS[prompt]),), temperature=0.0, max_tokens=60)
    asked = msgspec.structs.replace(asked, **FORMS[form])
    one, other = answered(plain, asked)[0], answered(drafting, asked)[0]
    assert tokens(one) == tokens(other)
    assert [frame.text for frame in one if isinstance(frame, Delta)] == [
        frame.text for frame in other if isinstance(frame, Delta)
    ]
    assert (end(one).reason, end(one).completion_tokens) == (end(other).reason, end(other).completion_tokens)
    assert end(one).drafted == 0
    again = answered(drafting, asked)[0]
    assert tokens(again) == tokens(one), "what was guessed wrong has left nothing in the memory"


def test_what_repeats_is_guessed_and_takes_fewer_steps(plain: Engine, drafting: Engine) -> None:
    schema = json.dumps({"type": "array", "items": {"const": "abcdefgh"}, "minItems": 12, "maxItems": 12})
    asked = GenerateRequest(prompt="x", temperature=0.0, max_tokens=300, json_schema=schema, logprobs=True)
    steps = []
    for engine in (plain, drafting):
        before = engine.counts.steps
        done = end(answered(engine, asked)[0])
        steps.append(engine.counts.steps - before)
    assert done.accepted > done.completion_tokens / 2
    assert steps[1] < steps[0] / 2


def test_nothing_is_guessed_while_others_are_answered(drafting: Engine) -> None:
    schema = '{"type": "array", "items": {"const": "abcdefgh"}, "minItems": 12}'
    asked = GenerateRequest(prompt="x", temperature=0.0, max_tokens=40, json_schema=schema, logprobs=True)
    ends = [end(frames) for frames in answered(drafting, asked, asked).values()]
    assert [done.drafted for done in ends] == [0, 0]


@pytest.mark.parametrize(
    ("active", "waiting", "remaining", "answering", "may"),
    [(1, 0, 1, True, True), (2, 0, 1, True, False), (1, 1, 1, True, False), (1, 0, 2, True, False),
     (1, 0, 1, False, False)],
)  # fmt: skip
def test_only_an_answer_that_is_alone_is_guessed(
    active: int, waiting: int, remaining: int, answering: bool, may: bool
) -> None:
    assert alone(active, waiting, remaining, answering) is may


def test_what_followed_the_latest_time_is_guessed() -> None:
    seen = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 1, 2, 3]
    assert Drafts(8).guess(seen, 100) == [6, 7, 8]
    assert Drafts(2).guess(seen, 100) == [6, 7]
    assert Drafts(8).guess(seen, 1) == [6]
    assert Drafts(8).guess(seen[: N + 1], 100) == []
    assert Drafts(8).guess([], 100) == []


def test_right_guesses_grow_and_wrong_ones_are_paused_for() -> None:
    drafts = Drafts(10)
    seen = list(range(20)) * 2
    assert len(drafts.guess(seen, 100)) == FIRST
    drafts.judged(FIRST, FIRST, len(seen))
    assert len(drafts.guess(seen, 100)) == 2 * FIRST + 1
    drafts.judged(7, 7, len(seen))
    assert len(drafts.guess(seen, 100)) == 10
    drafts.judged(10, 4, len(seen))
    assert len(drafts.guess(seen, 100)) == FIRST
    drafts.judged(FIRST, 0, len(seen))
    assert drafts.guess(seen, 100) == []
    assert drafts.guess(seen + list(range(REST)), 100) != []


@pytest.mark.parametrize(("own", "pools", "guesses"), [(-1, 4, True), (0, 4, False), (4, 0, True), (-1, 0, False)])
async def test_a_models_own_setting_goes_before_the_pools(own: int, pools: int, guesses: bool) -> None:
    schema = '{"type": "array", "items": {"const": "abcdefgh"}, "minItems": 9}'
    asked = GenerateRequest(prompt="x", temperature=0.0, max_tokens=40, json_schema=schema, logprobs=True)
    async with pool_of([]) as pool:
        pool.drafts = pools
        pool.add(replace(spec(), drafts=own))
        await pool.settled(NAME)
        _, done = await collected(pool.generate(NAME, asked))
    assert (done.drafted > 0) is guesses
    assert pool.guessed == {"accepted": done.accepted, "rejected": done.drafted - done.accepted}
    assert ("X-Picluster-Drafts" in end_headers(done, 1.0)) is guesses
