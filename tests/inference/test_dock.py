"""Two engines of real models: what one has read, the other takes up as its own, and nothing else."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from piclusterd.errors import NotFound, UserError
from piclusterd.inference import dock, residents
from piclusterd.inference.dock import HEAD, holds, packed, unpacked
from piclusterd.inference.engine import Engine
from piclusterd.inference.protocol import ChatMessage, Delta, Done, GenerateRequest
from piclusterd.inference.states import Export, Exported, Import, Imported, Look, Looked, Part, Piece, Take

from .test_engine_memory import drained, engine_of

PLENTY = 2**30


@contextmanager
def engines(*contexts: int) -> Iterator[list[Engine]]:
    made = [engine_of(context, 2) for context in contexts]
    try:
        yield made
    finally:
        for engine in made:
            engine.close()


FILES = [f"The editor crashes when file {number} is saved. " for number in range(40)]
CLEAR = 1.0
"""By so much, in logarithms, the best token must be ahead of the second: else one more row in a batch may turn it."""


def asked(end: str = "", files: int = 20) -> GenerateRequest:
    text = "Title: Crash\n\n" + "".join(FILES[:files]) + end
    return GenerateRequest(
        messages=(ChatMessage("user", text),), max_tokens=16, temperature=0.0, logprobs=True, top_logprobs=2
    )


def answered(engine: Engine, request: GenerateRequest) -> tuple[str, int]:
    """Its text, which has no close call in it, and how many tokens of its prompt were known."""
    engine.submit(1, request)
    text, known = "", 0
    while engine.busy:
        for output in engine.step():
            if isinstance(output, Delta):
                text += output.text
                assert all(one.top[0][1] - one.top[1][1] > CLEAR for one in output.logprobs)
            elif isinstance(output, Done):
                known = output.cached_tokens
    assert len(text) > 20
    return text, known


def exported(engine: Engine, tokens: list[int], least: int = 1, bytes_max: int = PLENTY) -> tuple[Exported, bytes]:
    offer = engine.state(Export(7, packed(tokens), least, bytes_max))
    assert isinstance(offer, Exported)
    state = b""
    while len(state) < offer.size:
        piece = engine.state(Take(8, 7, len(state)))
        assert isinstance(piece, Piece)
        state += piece.data
    engine.cancel(7)
    return offer, state


def imported(engine: Engine, tokens: list[int], state: bytes, sha256: bytes | None = None, size: int = 0) -> None:
    for at in range(0, len(state), 100_000):
        assert engine.state(Part(9, size or len(state), state[at : at + 100_000])) is None
    told = engine.state(Import(9, packed(tokens), sha256 or hashlib.sha256(state).digest()))
    assert isinstance(told, Imported)


def test_what_one_has_read_another_answers_from_as_if_it_had_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dock, "PIECE_BYTES", 70_000)
    with engines(1024, 1024, 1024) as (there, here, alone):
        requests = [asked(end, 40) for end in ("Why?", "Since when?")]
        computed = [answered(alone, request)[0] for request in requests]
        assert [answered(there, request)[0] for request in requests] == computed
        looked = here.state(Look(3, requests[0]))
        assert isinstance(looked, Looked)
        tokens = unpacked(looked.tokens)
        assert (tokens, looked.held) == (here.prompt_tokens(requests[0]), 0)
        offer, state = exported(there, tokens)
        assert offer.tokens == len(tokens)
        imported(here, tokens[: offer.tokens], state)
        shipped = [answered(here, request) for request in requests]
        assert [text for text, _ in shipped] == computed
        assert min(known for _, known in shipped) > 450
        assert here.counts.prompt_tokens < 25
        assert alone.counts.prompt_tokens > 450


def test_only_the_common_beginning_leaves_and_what_was_there_stays_as_it_was() -> None:
    with engines(1024, 1024) as (there, here):
        first = answered(there, asked("Why?"))[0]
        tokens = there.prompt_tokens(asked("Since when?"))
        offer, state = exported(there, tokens)
        assert len(tokens) - 16 < offer.tokens < len(tokens)
        again = asked("Why?")
        assert answered(there, again) == (first, len(there.prompt_tokens(again)) - 1)
        imported(here, tokens[: offer.tokens], state)
        assert answered(here, asked("Since when?"))[1] == offer.tokens
        assert answered(here, again)[0] == first


def test_a_beginning_that_is_too_short_or_too_large_is_not_given() -> None:
    with engines(1024) as [there]:
        answered(there, asked())
        tokens = there.prompt_tokens(asked())
        with pytest.raises(NotFound):
            exported(there, [*tokens, 5], least=len(tokens) + 1)
        with pytest.raises(NotFound):
            exported(there, tokens, bytes_max=1000)
        with pytest.raises(NotFound):
            exported(there, [7, 7, 7])
        with pytest.raises(NotFound):
            there.state(Take(1, 99, 0))
        assert there._residents._swapped == 0


@pytest.fixture(scope="module")
def given() -> tuple[list[int], bytes]:
    """Tokens and their state, as the demo model has it."""
    with engines(1024) as [there]:
        answered(there, asked())
        offer, state = exported(there, there.prompt_tokens(asked()))
        return there.prompt_tokens(asked())[: offer.tokens], state


def cells_of(state: bytes) -> int:
    return int(HEAD.unpack_from(state)[3])


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "positions": lambda state: state[: HEAD.size] + b"\xff\xff\xff\x7f" + state[HEAD.size + 4 :],
    "magic": lambda state: b"\0" * 4 + state[4:],
    "cells": lambda state: state[:12] + struct.pack("<I", 2**31) + state[16:],
    "one token fewer": lambda state: state[:12] + struct.pack("<I", cells_of(state) - 1) + state[16:],
    "layers": lambda state: state[: (at := HEAD.size + 12 * cells_of(state) + 4)] + b"\xff\0\0\0" + state[at + 4 :],
    "cut": lambda state: state[: len(state) * 2 // 3],
    "with more behind": lambda state: state + b"more",
}
"""What has the hash that was announced. The last three only llama.cpp can find: its own words are not right."""


def refused_and_read(here: Engine, given: tuple[list[int], bytes], refused: Callable[[], None]) -> None:
    with pytest.raises(UserError):
        refused()
    assert here._residents._swapped == 0
    text, known = answered(here, asked())
    assert known == 0
    imported(here, *given)
    assert answered(here, asked())[0] == text


@pytest.mark.parametrize("what", list(SPOILT))
def test_a_state_that_is_not_of_these_tokens_or_of_this_memory_is_refused_and_the_prompt_is_read(
    given: tuple[list[int], bytes], what: str
) -> None:
    tokens, state = given
    with engines(1024) as [here]:
        refused_and_read(here, given, lambda: imported(here, tokens, SPOILT[what](state)))


def test_a_state_that_did_not_come_as_announced_is_refused_and_the_prompt_is_read(
    given: tuple[list[int], bytes],
) -> None:
    tokens, state = given
    right = hashlib.sha256(state).digest()
    with engines(1024) as [here]:
        refused_and_read(here, given, lambda: imported(here, tokens, state, b"\1" * 32))
    with engines(1024) as [here]:
        refused_and_read(here, given, lambda: imported(here, tokens, state[:-1], right, len(state)))
    with engines(1024) as [here]:
        refused_and_read(here, given, lambda: imported(here, tokens, state + b"x", right, len(state)))
    with engines(1024) as [here]:
        refused_and_read(here, given, lambda: never_came(here, tokens, right))


def never_came(here: Engine, tokens: list[int], sha256: bytes) -> None:
    here.state(Import(9, packed(tokens), sha256))


def test_states_share_the_memory_of_answers_that_wait(
    given: tuple[list[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, state = given
    monkeypatch.setattr(residents, "SWAP_BYTES_MAX", len(state) + 10)
    with engines(1024) as [here]:
        here.state(Part(1, len(state), state))
        with pytest.raises(UserError, match="no memory"):
            imported(here, tokens, state)
        here.cancel(1)
        imported(here, tokens, state)
        assert here._residents._swapped == 0


def test_where_answers_fill_the_memory_no_state_comes_in(given: tuple[list[int], bytes]) -> None:
    tokens, state = given
    with engines(256) as [here]:
        schema = '{"type": "string", "minLength": 1000}'
        here.submit(1, GenerateRequest(prompt="x", max_tokens=200, temperature=0.0, json_schema=schema))
        while here.counts.answer_tokens < 80:
            assert here.busy
            here.step()
        with pytest.raises(UserError, match="no room"):
            imported(here, tokens, state)
        assert drained(here)[1][1].completion_tokens > 80


def test_what_goes_by_the_name_of_a_state_is_looked_at_before_it_is_believed(given: tuple[list[int], bytes]) -> None:
    tokens, state = given
    assert holds(state, len(tokens))
    assert not holds(state, 0)
    assert not holds(b"", 0)
    assert not holds(state[:40], len(tokens))
    with pytest.raises(UserError):
        unpacked(b"abc")
