from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from piclusterd.ids import NodeId
from piclusterd.inference.shipping import LINK_BYTES_S, MARGIN, Here, fetching, pays, plan, reading
from piclusterd.wire import Facts, Mark, ModelFacts

PI_2, PI_3 = NodeId("2" * 16), NodeId("3" * 16)
MARKS = (Mark(1, 1000), Mark(2, 4000), Mark(3, 5000))
PI_5_3B = Here(1250, MARKS, own=0, busy=0, prefill_tps=15.0, token_bytes=112 * 1024, bytes_max=2**28)
"""A prompt of 1,250 tokens, and a model of which a Pi 5 reads 15 tokens a second."""


def holding(*digests: int, name: str = "qwen", load_s: float = 0.0, busy: int = 0, node: str = "pi") -> Facts:
    prefixes = b"".join(struct.pack("<I", digest) for digest in digests)
    return Facts(name=node, models=(ModelFacts(name, prefixes=prefixes, load_s=load_s, busy=busy),))


def test_a_long_beginning_of_a_slow_model_is_fetched_from_who_has_read_most_of_it() -> None:
    found = plan(PI_5_3B, "qwen", [(PI_2, holding(1)), (PI_3, holding(1, 2))], {})
    assert found is not None
    assert (found.node, found.mark, found.tokens) == (PI_3, MARKS[1], 1000)
    assert found.read_s == 1000 / 15
    assert found.fetch_s < found.read_s / 4


def test_a_tiny_model_is_read_and_not_fetched() -> None:
    tiny = replace(PI_5_3B, prefill_tps=8000.0, token_bytes=1024)
    assert plan(tiny, "qwen", [(PI_2, holding(3))], {}) is None


def test_a_link_that_was_measured_to_be_slow_carries_nothing_that_is_read_sooner() -> None:
    pi_4 = replace(PI_5_3B, prefill_tps=60.0)
    assert plan(pi_4, "qwen", [(PI_2, holding(3))], {}) is None  # 140 MB: 14 s, for 21 s of reading
    found = plan(pi_4, "qwen", [(PI_2, holding(3)), (PI_3, holding(3))], {PI_2: LINK_BYTES_S, PI_3: 100e6})
    assert found is not None
    assert found.node == PI_3


def test_of_two_that_hold_the_same_the_idle_one_is_asked() -> None:
    found = plan(PI_5_3B, "qwen", [(PI_2, holding(3, busy=3)), (PI_3, holding(3))], {})
    assert found is not None
    assert found.node == PI_3


@pytest.mark.parametrize(
    ("here", "facts"),
    [
        (PI_5_3B, holding()),
        (PI_5_3B, holding(9)),
        (PI_5_3B, holding(3, name="llama")),
        (PI_5_3B, holding(3, load_s=4.0)),
        (replace(PI_5_3B, own=4000), holding(2)),
        (replace(PI_5_3B, marks=()), holding(3)),
        (replace(PI_5_3B, token_bytes=0), holding(3)),
        (replace(PI_5_3B, bytes_max=1000), holding(3)),
    ],
)
def test_nothing_is_fetched_that_nobody_has_or_that_is_here_or_that_may_not_travel(here: Here, facts: Facts) -> None:
    assert plan(here, "qwen", [(PI_2, facts)], {}) is None


def test_only_what_is_missing_counts_as_saved_though_the_whole_beginning_travels() -> None:
    whole = plan(PI_5_3B, "qwen", [(PI_2, holding(3))], {})
    rest = plan(replace(PI_5_3B, own=1000), "qwen", [(PI_2, holding(3))], {})
    assert whole is not None
    assert rest is not None
    assert rest.fetch_s == whole.fetch_s
    assert rest.read_s == whole.read_s * 0.8


def test_a_beginning_that_is_larger_than_may_travel_is_fetched_in_part() -> None:
    found = plan(replace(PI_5_3B, bytes_max=64 * 2**20), "qwen", [(PI_2, holding(3))], {})
    assert found is not None
    assert found.tokens == 64 * 2**20 // (112 * 1024)


def test_a_node_that_has_not_measured_itself_is_taken_for_a_pi() -> None:
    assert reading(100, 0.0) == reading(100, 50.0) == 2.0


def test_it_pays_only_by_a_margin_and_where_somebody_notices() -> None:
    assert pays(1.0, 1.0 * MARGIN)
    assert not pays(1.0, 1.0 * MARGIN - 0.01)
    assert not pays(0.01, 0.05)
    assert fetching(0, 0.0, 9) == fetching(0, 0.0, 2)
