"""What the KV memory is used for: beginnings read once, and answers that wait for room instead of failing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from piclusterd.inference.engine import Engine
from piclusterd.inference.llama import Context, Weights
from piclusterd.inference.protocol import Delta, Done, GenerateRequest, Load
from piclusterd.inference.residents import Residents, common, distinct

from .rig import DEMO

PREFIX = "0123456789 abcdefgh, " * 60
ENDLESS = '{"type": "string", "minLength": 700}'


def engine_of(context: int, slots: int) -> Engine:
    return Engine(Load(str(DEMO), context, slots, threads=1, batch_threads=1))


def drained(engine: Engine, between: Callable[[], None] = lambda: None) -> tuple[dict[int, str], dict[int, Done]]:
    texts: dict[int, str] = {}
    ends: dict[int, Done] = {}
    while engine.busy:
        for output in engine.step():
            if isinstance(output, Delta):
                texts[output.id] = texts.get(output.id, "") + output.text
            elif isinstance(output, Done):
                ends[output.id] = output
        between()
    return texts, ends


def prompt_of(engine: Engine, tokens: int, end: str = "") -> str:
    """A text of about `tokens` tokens, at most."""
    low = PREFIX * 4
    while len(engine.prompt_tokens(GenerateRequest(prompt=low + end))) > tokens:
        low = low[:-8]
    return low + end


@pytest.mark.parametrize("slots", [32, 8])
def test_a_prefix_of_a_thousand_tokens_is_read_once_for_32_requests(slots: int) -> None:
    engine = engine_of(8192, slots)
    shared = prompt_of(engine, 1000)
    ends = [f" {chr(97 + number % 26)}{number}" for number in range(32)]
    prefix = len(engine.prompt_tokens(GenerateRequest(prompt=shared)))
    rests = [len(engine.prompt_tokens(GenerateRequest(prompt=shared + end))) - prefix for end in ends]
    assert prefix >= 990
    for number, end in enumerate(ends):
        engine.submit(number, GenerateRequest(prompt=shared + end, max_tokens=3, seed=number))
    found = drained(engine)[1]
    assert len(found) == 32
    assert engine.counts.prompt_tokens <= prefix + sum(rests) + 2 * 32  # a token at the seam may be spelt anew
    assert sum(done.cached_tokens for done in found.values()) >= 31 * (prefix - 2)
    engine.close()


def test_sharing_changes_no_answer() -> None:
    alone, together = engine_of(4096, 8), engine_of(4096, 8)
    shared = prompt_of(alone, 300)
    asked = [GenerateRequest(prompt=f"{shared} {number}", max_tokens=12, temperature=0.0) for number in range(8)]
    singly = []
    for number, request in enumerate(asked):
        alone.submit(number, request)
        singly.append(drained(alone)[0].get(number, ""))
    for number, request in enumerate(asked):
        together.submit(number, request)
    texts = drained(together)[0]
    assert [texts.get(number, "") for number in range(8)] == singly
    for engine in (alone, together):
        engine.close()


def test_a_prompt_that_is_being_read_is_not_read_twice_and_others_pass_by() -> None:
    engine = engine_of(4096, 4)
    shared = prompt_of(engine, 900)
    engine.submit(1, GenerateRequest(prompt=shared + "x", max_tokens=3, seed=1, json_schema=ENDLESS))
    engine.submit(2, GenerateRequest(prompt=shared + "y", max_tokens=2, seed=1))
    engine.submit(3, GenerateRequest(prompt="Something else", max_tokens=1, seed=1))
    order = []
    while engine.busy:
        order += [output.id for output in engine.step() if isinstance(output, Done)]
    assert order == [3, 1, 2]
    engine.close()


def test_when_memory_is_full_the_youngest_waits_with_its_state_and_goes_on() -> None:
    asked = [
        GenerateRequest(
            prompt=f"{chr(97 + number)} issue", max_tokens=150, seed=number, temperature=1.0, json_schema=ENDLESS
        )
        for number in range(6)
    ]
    roomy, tight = engine_of(2048, 6), engine_of(512, 6)
    for engine in (roomy, tight):
        for number, request in enumerate(asked):
            engine.submit(number, request)
    _, scarce = drained(roomy), drained(tight)
    assert roomy.counts.preempted == 0
    assert tight.counts.preempted > 0
    assert tight.counts.restored > 0
    assert {number: done.completion_tokens for number, done in scarce[1].items()} == dict.fromkeys(range(6), 150)
    assert tight.counts.prompt_tokens == roomy.counts.prompt_tokens  # nothing was read again
    for engine in (roomy, tight):
        engine.close()


def test_idle_ends_beyond_the_latest_go_and_what_is_shared_stays() -> None:
    engine = engine_of(8192, 16)
    shared = prompt_of(engine, 300, " shared")
    engine.submit(0, GenerateRequest(prompt=prompt_of(engine, 600), max_tokens=1))
    drained(engine)
    for number in range(20):
        engine.submit(1, GenerateRequest(prompt=f"{shared} {number} " + "x" * 60, max_tokens=1))
        drained(engine)
    assert distinct(seat.tokens for seat in engine._residents._seats) < 300 + 3 * 90
    engine.submit(2, GenerateRequest(prompt=shared, max_tokens=1))
    done = drained(engine)[1][2]
    assert done.cached_tokens >= done.prompt_tokens - 2
    engine.close()


def residents_of(*lists: list[int], idle_max: int, short: int) -> Iterator[Residents]:
    weights = Weights(str(DEMO))
    context = Context(weights, 2048, 8, 1, 1)
    residents = Residents(context, 8, weights)
    residents._idle_max, residents._short = idle_max, short
    for number, tokens in enumerate(lists):
        residents._seats[number].tokens = tokens
        residents.touch(residents._seats[number])
    yield residents
    context.close()
    weights.close()


def test_long_idle_ends_stay_and_short_ones_within_what_they_may_cost() -> None:
    for residents in residents_of([0] * 101, [1] * 60, [2] * 60, [3] * 30, [4] * 80, idle_max=100, short=100):
        residents.trim()
        assert [len(seat.tokens) for seat in residents._seats[:5]] == [101, 0, 60, 30, 80]


def test_the_last_of_those_that_share_a_long_beginning_stays() -> None:
    beginning = [7] * 300
    lists = [[*beginning, number] for number in range(3)]
    for residents in residents_of(*lists, [9] * 50, idle_max=0, short=100):
        residents.trim()
        assert [len(seat.tokens) for seat in residents._seats[:4]] == [0, 0, 301, 50]


def test_large_models_may_keep_more_idle_cells_and_read_less_again() -> None:
    weights = Weights(str(DEMO))
    context = Context(weights, 256, 1, 1, 1)
    small = Residents(context, 1, weights)
    weights.parameters, weights.heads = 494_000_000, 24 * 14
    large = Residents(context, 1, weights)
    assert small._idle_max < 64
    assert small._short > 10_000
    assert (large._idle_max, large._short) == (588, 259)
    context.close()
    weights.close()


def test_a_saved_state_gives_the_same_logits_to_the_bit() -> None:
    weights = Weights(str(DEMO))
    context = Context(weights, 256, 3, 1, 1)
    tokens = weights.tokenise_plain("Title: The editor crashes")
    after = []
    for sequence in (0, 2):
        context.clear_batch()
        if sequence == 0:
            for at, token in enumerate(tokens[:-1]):
                context.add(token, at, (0,), False)
            context.decode()
            state = context.save(0, 2**30)
            assert context.save(0, len(state) - 1) == b""
            context.clear_batch()
        else:
            context.clear()
            assert context.restore(2, state)
        row = context.add(tokens[-1], len(tokens) - 1, (sequence,), True)
        context.decode()
        after.append(context.logits(row).tobytes())
    assert after[0] == after[1]
    context.close()
    weights.close()


def test_a_preempted_one_can_be_cancelled_while_it_waits() -> None:
    engine = engine_of(256, 3)
    for number in range(3):
        engine.submit(number, GenerateRequest(prompt="word " * 6, max_tokens=150, seed=1, json_schema=ENDLESS))

    def cancel() -> None:
        if engine.counts.preempted == 1:
            engine.cancel(2)

    found = drained(engine, cancel)[1]
    assert {number: done.reason for number, done in found.items()} == {0: "length", 1: "length", 2: "cancelled"}
    engine.close()


def test_common_beginnings_are_found_and_counted_once() -> None:
    assert common([], [1]) == 0
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 3]) == 2
    assert common([2], [1]) == 0
    for length in range(40):
        assert common([7] * length + [1], [7] * length + [2, 3]) == length
    assert distinct([[1, 2, 3], [1, 2, 4], [5], [1, 2]]) == 5
    assert distinct([]) == 0


def test_a_seed_gives_the_same_answer_alone_and_in_company() -> None:
    engine = engine_of(2048, 4)
    asked = GenerateRequest(prompt="Title: a crash", max_tokens=30, seed=5, temperature=1.2)
    engine.submit(0, asked)
    alone = drained(engine)[0][0]
    for number in range(4):
        engine.submit(number, msgspec.structs.replace(asked, seed=5 + number % 2))
    texts = drained(engine)[0]
    assert texts[0] == texts[2] == alone
    assert texts[1] == texts[3] != alone
    engine.close()
