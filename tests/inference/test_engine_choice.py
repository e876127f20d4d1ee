"""`choices` against the plain way: each option written out alone after the prompt, scored from the full logits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from piclusterd.errors import UserError
from piclusterd.inference.budget import FORKS
from piclusterd.inference.demo_model.issues import draw_issues
from piclusterd.inference.demo_model.prompt import PRIORITIES, TYPES, prompt_messages
from piclusterd.inference.engine import Engine
from piclusterd.inference.llama import Context, Weights
from piclusterd.inference.protocol import ChatMessage, Delta, Done, Field, GenerateRequest, Load
from piclusterd.inference.sequence import log_probabilities

from .rig import DEMO, GREEDY

TRIAGE = (Field("type", tuple(TYPES)), Field("priority", tuple(PRIORITIES)))
ROUNDING = 0.03
"""llama.cpp rounds differently by the size of the batch: an option's sum moves by up to 0.08 on this model."""
ISSUES = draw_issues(20, 3, "held_out")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(Load(str(DEMO), context=4096, slots=8, threads=1, batch_threads=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def weights() -> Iterator[Weights]:
    made = Weights(str(DEMO))
    yield made
    made.close()


def asked(number: int, *fields: Field) -> GenerateRequest:
    issue = ISSUES[number]
    messages = tuple(ChatMessage(m["role"], m["content"]) for m in prompt_messages(issue.title, issue.body))  # type: ignore[arg-type]
    return GenerateRequest(messages=messages, choices=fields)


def answers(engine: Engine) -> dict[int, tuple[str, Done]]:
    texts: dict[int, str] = {}
    found: dict[int, tuple[str, Done]] = {}
    while engine.busy:
        for output in engine.step():
            if isinstance(output, Delta):
                texts[output.id] = texts.get(output.id, "") + output.text
            elif isinstance(output, Done):
                found[output.id] = texts[output.id], output
    return found


def plain_score(weights: Weights, prompt: list[int], path: list[int]) -> float:
    """log P(path | prompt), one option in a context of its own, all logits looked at."""
    context = Context(weights, 1024, 1, 1, 1)
    context.clear_batch()
    whole = prompt + path
    rows = [context.add(token, at, (0,), at >= len(prompt) - 1) for at, token in enumerate(whole)]
    context.decode()
    logs = [log_probabilities(np.array(context.logits(row))) for row in rows[len(prompt) - 1 : -1]]
    context.close()
    return float(sum(each[token] for each, token in zip(logs, path, strict=True)))


def softmax(scores: list[float]) -> list[float]:
    weights = np.exp(np.array(scores) - max(scores))
    return [float(weight) for weight in weights / weights.sum()]


def test_it_picks_what_the_full_logits_pick_with_the_same_probabilities(engine: Engine, weights: Weights) -> None:
    for number in range(len(ISSUES)):
        engine.submit(number, asked(number, *TRIAGE))
    found = answers(engine)
    assert len(found) == len(ISSUES)
    for number, (text, done) in found.items():
        prompt = engine.prompt_tokens(asked(number))
        chosen = json.loads(text)
        kinds = [f'{{"type": "{kind}' for kind in TYPES]
        ranks = [f'{{"type": "{chosen["type"]}", "priority": "{rank}' for rank in PRIORITIES]
        for options, names, key, told in ((kinds, TYPES, "type", 0), (ranks, PRIORITIES, "priority", 1)):
            expected = softmax([plain_score(weights, prompt, weights.tokenise_plain(each)) for each in options])
            assert done.choices[told] == pytest.approx(expected, abs=ROUNDING)
            if sorted(expected)[-1] - sorted(expected)[-2] > 2 * ROUNDING:  # rounding may settle a tie either way
                assert chosen[key] == names[expected.index(max(expected))]


def test_bare_options_end_where_the_answer_would(engine: Engine, weights: Weights) -> None:
    options = ("P1", "P10", "something else", "é")
    engine.submit(1, asked(0, Field("", options)))
    text, done = answers(engine)[1]
    prompt = engine.prompt_tokens(asked(0))
    paths = [[*weights.tokenise_plain(option), weights.end] for option in options]
    expected = softmax([plain_score(weights, prompt, path) for path in paths])
    assert done.choices[0] == pytest.approx(expected, abs=ROUNDING)
    assert text == options[expected.index(max(expected))]
    assert (done.reason, done.prompt_tokens) == ("stop", len(prompt))
    assert done.completion_tokens == len(paths[options.index(text)])


def test_options_of_one_token_are_told_from_the_prompt_alone(engine: Engine, weights: Weights) -> None:
    numbers = tuple(str(digit) for digit in range(4))
    engine.submit(1, asked(0, Field("", numbers)))
    text, done = answers(engine)[1]
    prompt = engine.prompt_tokens(asked(0))
    expected = softmax([plain_score(weights, prompt, weights.tokenise_plain(one)) for one in numbers])
    assert done.choices[0] == pytest.approx(expected, abs=ROUNDING)
    assert text == numbers[expected.index(max(expected))]


def test_two_fields_of_a_known_prompt_take_two_batches_and_read_no_prompt(engine: Engine) -> None:
    engine.submit(1, asked(1, *TRIAGE))
    first = answers(engine)[1]
    steps, read = engine.counts.steps, engine.counts.prompt_tokens
    engine.submit(1, asked(1, *TRIAGE))
    again = answers(engine)[1]
    assert again[0] == first[0]
    assert (engine.counts.steps - steps, engine.counts.prompt_tokens - read) == (2, 0)
    assert again[1].cached_tokens == again[1].prompt_tokens


def test_more_options_than_forks_give_the_same_answer(engine: Engine) -> None:
    options = (*(f"option number {number}" for number in range(2 * FORKS)), "bug")
    engine.submit(1, asked(2, Field("", options)))
    text, done = answers(engine)[1]
    assert text == options[done.choices[0].index(max(done.choices[0]))]
    assert len(done.choices[0]) == len(options)
    assert sum(done.choices[0]) == pytest.approx(1.0)


def test_it_goes_beside_answers_that_are_being_written(engine: Engine) -> None:
    engine.submit(1, GREEDY)
    alone = answers(engine)[1][0]
    engine.submit(1, msgspec.structs.replace(GREEDY, stop=("nothing ends with this",)))
    engine.submit(2, asked(3, *TRIAGE))
    found = answers(engine)
    assert found[1][0] == alone
    assert json.loads(found[2][0]).keys() == {"type", "priority"}


def test_one_option_is_the_answer_without_a_look(engine: Engine) -> None:
    steps = engine.counts.prompt_tokens
    engine.submit(1, asked(4, Field("", ("yes",))))
    text, done = answers(engine)[1]
    assert (text, done.choices, engine.counts.prompt_tokens) == ("yes", ((1.0,),), steps)


@pytest.mark.parametrize(
    "fields",
    [
        (Field("", ("a", "a")),),
        (Field("x", ("a", "b")), Field("x", ("c", "d"))),
        (Field("", ("a",)), Field("y", ("b",))),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(engine: Engine, fields: tuple[Field, ...]) -> None:
    with pytest.raises(UserError, match="must differ"):
        engine.submit(1, asked(5, *fields))
    assert not engine.busy


def test_options_that_do_not_fit_behind_the_prompt_are_refused(engine: Engine) -> None:
    long = msgspec.structs.replace(
        GREEDY, messages=(ChatMessage("user", "a" * 980),), choices=(Field("", ("b" * 128, "c")),)
    )
    with pytest.raises(UserError, match="at least"):
        engine.submit(1, long)
    assert not engine.busy


def test_a_choice_can_be_cancelled_in_the_middle(engine: Engine) -> None:
    engine.submit(1, asked(6, *TRIAGE))
    engine.step()
    engine.cancel(1)
    done = [output for output in engine.step() if isinstance(output, Done)]
    assert (done[0].reason, engine.busy) == ("cancelled", False)
