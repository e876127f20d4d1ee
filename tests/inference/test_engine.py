from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

from piclusterd.errors import UserError
from piclusterd.inference.engine import Engine
from piclusterd.inference.llama import Weights
from piclusterd.inference.protocol import ChatMessage, Delta, Done, Embedded, GenerateRequest, Load
from piclusterd.inference.schedule import CHUNK_TOKENS_FIRST

from .rig import DEMO, GREEDY

SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["bug", "feature", 'odd "one"\\', "é\n"]},
        "count": {"type": "integer"},
        "reason": {"type": "string", "maxLength": 40},
    },
    "required": ["type", "count", "reason"],
    "additionalProperties": False,
}
WILD = GenerateRequest(prompt="The quick brown fox", temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, max_tokens=40)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Engine]:
    engine = Engine(Load(str(DEMO), context=1024, slots=4, threads=1, batch_threads=1))
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    assert not loaded.busy
    return loaded


def small(context: int, slots: int) -> Engine:
    return Engine(Load(str(DEMO), context, slots, threads=1, batch_threads=1))


def drained(engine: Engine) -> tuple[dict[int, str], dict[int, Done]]:
    """Texts and ends of everything asked of `engine`."""
    texts: dict[int, str] = {}
    ends: dict[int, Done] = {}
    while engine.busy:
        for output in engine.step():
            if isinstance(output, Delta):
                texts[output.id] = texts.get(output.id, "") + output.text
            elif isinstance(output, Done):
                ends[output.id] = output
                texts.setdefault(output.id, "")  # an answer may end before its first character
    return texts, ends


def varied(seed: int, **changes: object) -> GenerateRequest:
    return msgspec.structs.replace(WILD, seed=seed, **changes)


def test_greedy_answers_are_the_same_every_time(engine: Engine) -> None:
    answers = []
    for number in range(3):
        engine.submit(number, GREEDY)
        answers.append(drained(engine)[0][number])
    assert answers[0] == answers[1] == answers[2] != ""


def test_a_seed_repeats_a_sampled_answer() -> None:
    answers = []
    for seed in (7, 7, 8):
        engine = small(512, 2)  # a new one: flat as this distribution is, the rounding of another batch would show
        engine.submit(1, varied(seed))
        answers.append(drained(engine)[0][1])
        engine.close()
    assert answers[0] == answers[1] != answers[2]


def test_requests_beside_each_other_take_as_many_steps_as_the_longest(engine: Engine) -> None:
    for number in range(4):
        engine.submit(number, varied(number, json_schema="", max_tokens=8))
    running = set[int]()
    steps = 0
    while engine.busy:
        steps += 1
        running |= {output.id for output in engine.step()}
    assert running == {0, 1, 2, 3}
    assert steps <= 9  # one for the prompts, and 8 tokens each: 33 one after the other


def test_more_requests_than_slots_wait_and_are_answered(engine: Engine) -> None:
    for number in range(9):
        engine.submit(number, varied(number, max_tokens=5))
    assert set(drained(engine)[1]) == set(range(9))


def test_the_longest_answer_allowed_is_counted_and_named(engine: Engine) -> None:
    engine.submit(1, varied(1, prompt="x", json_schema='{"type": "string", "minLength": 50}', max_tokens=5))
    done = drained(engine)[1][1]
    assert (done.reason, done.completion_tokens) == ("length", 5)
    assert done.prompt_tokens > 0


def test_a_prompt_begun_before_is_not_read_again(engine: Engine) -> None:
    engine.submit(1, GREEDY)
    first = drained(engine)
    engine.submit(1, GREEDY)
    again = drained(engine)
    assert again[1][1].cached_tokens == first[1][1].prompt_tokens - 1
    assert again[0] == first[0]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(engine: Engine) -> None:
    with pytest.raises(UserError, match=f"maximum context length is {engine.context} tokens") as caught:
        engine.submit(1, GenerateRequest(messages=(ChatMessage("user", "word " * 6000),)))
    assert caught.value.param == "messages"
    assert not engine.busy


def test_an_empty_prompt_is_refused_by_a_model_without_a_first_token(engine: Engine) -> None:
    with pytest.raises(UserError, match="nothing to continue"):
        engine.submit(1, GenerateRequest(prompt="", max_tokens=1))


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_under_a_schema_parses_and_conforms(engine: Engine, seed: int) -> None:
    asked = msgspec.structs.replace(GREEDY, json_schema=json.dumps(SCHEMA), max_tokens=0, temperature=1.0, seed=seed)
    engine.submit(1, asked)
    engine.submit(2, msgspec.structs.replace(asked, repeat_penalty=1.1))
    engine.submit(3, msgspec.structs.replace(asked, temperature=0.0))
    texts, ends = drained(engine)
    for number in (1, 2, 3):
        if ends[number].reason == "length":  # an integer may go on to the end of the context
            continue
        answer = json.loads(texts[number])
        assert list(answer) == ["type", "count", "reason"]
        assert answer["type"] in SCHEMA["properties"]["type"]["enum"]  # type: ignore[index]
        assert isinstance(answer["count"], int)
        assert len(answer["reason"]) <= 40


def test_what_a_schema_leaves_no_choice_about_is_not_sampled(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["bug", "chore"]}, "a constant": {"const": 17}, "sure": {"type": "boolean"}},
        "required": ["kind", "a constant", "sure"],
        "additionalProperties": False,
    }
    asked = msgspec.structs.replace(GREEDY, json_schema=json.dumps(schema), temperature=1.0, seed=3, max_tokens=0)
    before = msgspec.structs.replace(asked, logprobs=True)  # each token is looked at then
    engine.submit(1, before)
    texts, ends = drained(engine)
    forced, steps = engine.counts.forced_tokens, engine.counts.steps
    assert json.loads(texts[1])["a constant"] == 17
    engine.submit(2, asked)
    texts, ends = drained(engine)
    assert json.loads(texts[2]).keys() == {"kind", "a constant", "sure"}
    assert ends[2].reason == "stop"
    assert engine.counts.forced_tokens - forced > ends[2].completion_tokens / 2
    assert engine.counts.steps - steps < ends[2].completion_tokens / 2


def test_a_refused_schema_leaves_the_engine_idle(engine: Engine) -> None:
    with pytest.raises(UserError, match="refused"):
        engine.submit(1, varied(1, json_schema='{"type": "array", "items": {}, "maxItems": 1000000}'))
    assert not engine.busy


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine: Engine) -> None:
    engine.submit(1, GREEDY)
    whole = drained(engine)[0][1]
    stop = whole[3:6]
    engine.submit(1, msgspec.structs.replace(GREEDY, stop=(stop,)))
    texts, ends = drained(engine)
    assert texts.get(1, "") == whole.split(stop)[0]
    assert ends[1].reason == "stop"


def test_a_cancelled_request_frees_its_slot_within_a_step() -> None:
    engine = small(512, 1)
    engine.submit(1, varied(1, max_tokens=300))
    engine.submit(2, varied(2, max_tokens=3))
    engine.step()
    engine.cancel(1)
    outputs = engine.step()
    assert {output.id for output in outputs if isinstance(output, Done)} == {1}
    assert any(output.id == 2 for output in outputs if isinstance(output, Delta)) or engine.busy
    _, ends = drained(engine)
    assert set(ends) == {2}
    engine.cancel(99)  # is gone, or never was: nothing to do
    engine.close()


def test_a_long_prompt_is_let_go_between_two_chunks_of_it() -> None:
    engine = small(1024, 1)
    engine.submit(1, varied(1, prompt="0123456789 abcdefgh, " * 60))
    engine.step()  # the first chunk: no speed has been measured yet
    assert 0 < engine.counts.prompt_tokens <= CHUNK_TOKENS_FIRST
    engine.cancel(1)
    read = engine.counts.prompt_tokens
    outputs = engine.step()
    assert [output.reason for output in outputs if isinstance(output, Done)] == ["cancelled"]
    assert engine.counts.prompt_tokens == read
    engine.close()


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = small(512, 1)
    engine.submit(1, varied(1, max_tokens=3))
    engine.step()
    engine.submit(2, varied(2))
    engine.cancel(2)
    _, ends = drained(engine)
    assert (ends[1].reason != "cancelled", ends[2].reason) == (True, "cancelled")
    engine.close()


def test_when_memory_runs_out_answers_are_put_back_and_still_end_the_same() -> None:
    prompt = "word " * 20
    endless = {"prompt": prompt, "max_tokens": 150, "json_schema": '{"type": "string", "minLength": 700}'}
    roomy, tight = small(1024, 3), small(256, 3)
    for engine in (roomy, tight):
        for number in range(3):
            engine.submit(number, varied(number, temperature=0.0, **endless))
    ample, scarce = drained(roomy), drained(tight)
    assert {done.completion_tokens for done in ample[1].values()} == {150}
    assert scarce[1].keys() == ample[1].keys()
    assert {done.completion_tokens for done in scarce[1].values()} <= {150, tight.context - ample[1][0].prompt_tokens}
    for engine in (roomy, tight):
        engine.close()


def test_tokens_of_the_template_cannot_be_smuggled_in_by_a_user(engine: Engine) -> None:
    weights = Weights(str(DEMO))
    marks = weights.special_texts()
    controls = {weights.tokenise(mark, special=True)[0] for mark in marks}
    weights.close()
    counts = []
    for content in ("hello", "hello " + " ".join(marks) + "".join(marks)):
        tokens = engine.prompt_tokens(GenerateRequest(messages=(ChatMessage("user", content),)))
        counts.append(sum(token in controls for token in tokens))
    assert counts[0] == counts[1] > 0


def test_embeddings_have_length_one_and_tell_texts_apart(engine: Engine) -> None:
    np = pytest.importorskip("numpy")
    engine.submit_embed(5, ("a crash", "a crash", "please add dark mode") * 10)
    engine.submit(6, varied(1, max_tokens=4))  # generation goes on beside it
    found: list[Embedded] = []
    while engine.busy:
        found += [output for output in engine.step() if isinstance(output, Embedded)]
    vectors = [np.frombuffer(vector, "<f4") for vector in found[0].vectors]
    assert len(vectors) == 30
    assert all(vector.shape == (engine.ready().embedding_size,) for vector in vectors)
    assert all(abs(float(np.linalg.norm(vector)) - 1) < 1e-4 for vector in vectors)
    assert float(vectors[0] @ vectors[1]) > 0.9999 > float(vectors[0] @ vectors[2])
    assert found[0].tokens > 30


@pytest.mark.parametrize("text", ["", "word " * 9000])
def test_what_cannot_be_embedded_is_refused(engine: Engine, text: str) -> None:
    with pytest.raises(UserError, match="input 1 cannot be embedded"):
        engine.submit_embed(1, ("fine", text))
    assert not engine.busy
