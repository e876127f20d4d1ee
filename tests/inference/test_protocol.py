from __future__ import annotations

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piclusterd.errors import Broken, NotFound, Overloaded, PiclusterError, Unavailable, UserError
from piclusterd.inference.faults import failed, raised
from piclusterd.inference.protocol import (
    Answer,
    ChatMessage,
    Delta,
    Done,
    Embedded,
    Failed,
    Generate,
    GenerateRequest,
    ToChild,
    decode,
    encode,
)
from piclusterd.wire import Dropped

REQUEST = GenerateRequest("m", (ChatMessage("user", "hi"),), stop=("x",), json_schema="{}", seed=7)


@pytest.mark.parametrize(
    "frame", [Delta(1, "é", 2), Done(1, "stop", 3, 4), Embedded(1, (b"\0\0\0\0",), 1), Failed(1, 400, "what")]
)
def test_answers_survive_the_trip(frame: Answer) -> None:
    assert decode(encode(frame), Answer) == frame


def test_a_request_survives_the_trip_alone_and_in_a_frame() -> None:
    assert decode(encode(REQUEST), GenerateRequest) == REQUEST
    assert decode(encode(Generate(3, REQUEST)), ToChild) == Generate(3, REQUEST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", -1.0), ("top_p", 1.5),
        ("max_tokens", -1), ("seed", 2**32), ("stop", ("",)), ("stop", ("x",) * 17), ("repeat_penalty", 0.0),
    ],
)  # fmt: skip
def test_a_peers_request_out_of_range_is_dropped(field: str, value: object) -> None:
    request = msgspec.structs.replace(REQUEST, **{field: value})
    assert isinstance(decode(encode(request), GenerateRequest), Dropped)
    assert isinstance(decode(encode(Generate(1, request)), ToChild), Dropped)


@given(st.binary())
def test_junk_is_dropped(data: bytes) -> None:
    assert isinstance(decode(data, Answer), Dropped)


def test_a_bomb_is_dropped() -> None:
    assert isinstance(decode(msgpack.packb(["delta", 1, [[]] * 5000, 1]), Answer), Dropped)


@pytest.mark.parametrize(
    "fault",
    [
        UserError("a", "b", "c", param="stop"), NotFound("a", param="model"),
        Overloaded("a", retry_after_s=9.0), Unavailable("a", "b"), Broken("a"),
    ],
)  # fmt: skip
def test_an_error_arrives_as_what_it_was(fault: PiclusterError) -> None:
    frame = decode(encode(failed(1, fault)), Answer)
    assert isinstance(frame, Failed)
    there = raised(frame)
    assert type(there) is type(fault)
    assert vars(there) == vars(fault)
