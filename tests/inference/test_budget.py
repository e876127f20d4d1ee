from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.inference.budget import (
    FORKS,
    HEADROOM_MIN,
    MIB,
    QUANTS,
    Need,
    Room,
    Shape,
    need,
    refusal,
    sequences,
    smaller_quant,
)
from piclusterd.inference.gguf import read_shape

from .rig import DEMO

GIB = 1024 * MIB
THREE_B = Shape(layers=28, width=3072, kv_width=2 * 8 * 128, vocabulary=128_256, file_type=7)
"""Llama 3.2 3B, in Q8_0: 3.4 GB."""
WEIGHTS = 3422 * MIB


def test_the_need_counts_weights_kv_buffers_and_swapped_answers() -> None:
    asked = need(THREE_B, WEIGHTS, context=4096, rows=24)
    assert asked.weights == WEIGHTS
    assert asked.kv == 448 * MIB  # 112 KiB a token
    assert asked.swap == 256 * MIB
    assert asked.compute > 4 * 24 * 128_256
    assert asked.total == asked.weights + asked.kv + asked.compute + asked.swap


def test_what_fits_is_not_refused() -> None:
    asked = need(THREE_B, WEIGHTS, 4096, 24)
    assert refusal(THREE_B, asked, Room(16 * GIB, 15 * GIB)) == ("", "")


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_and_the_quant_that_would() -> None:
    asked = need(THREE_B, WEIGHTS, 4096, 24)
    why, fix = refusal(THREE_B, asked, Room(4 * GIB, 3800 * MIB))
    assert "weights 3,422 MiB" in why
    assert "3,800 MiB available" in why
    assert fix == "Its Q5_K_M would fit."
    smaller = need(replace(THREE_B, file_type=17), int(WEIGHTS * 5.69 / 8.5), 4096, 24)
    assert refusal(replace(THREE_B, file_type=17), smaller, Room(4 * GIB, 3800 * MIB)) == ("", "")


def test_the_weights_of_other_models_are_not_room() -> None:
    asked = need(THREE_B, WEIGHTS, 4096, 24)
    assert refusal(THREE_B, asked, Room(8 * GIB, 7 * GIB))[0] == ""
    why, _ = refusal(THREE_B, asked, Room(8 * GIB, 7 * GIB, others=3 * GIB))
    assert "3,072 MiB of them other models'" in why


def test_where_no_quant_fits_less_context_or_a_smaller_model_is_advised() -> None:
    asked = Need(weights=100 * MIB, kv=800 * MIB, compute=50 * MIB, swap=100 * MIB)
    assert refusal(replace(THREE_B, file_type=10), asked, Room(GIB, 650 * MIB + HEADROOM_MIN))[1].startswith(
        "It would fit"
    )
    assert refusal(THREE_B, asked, Room(GIB, 200 * MIB))[1].startswith("Take a smaller model")


def test_headroom_grows_with_the_board_and_room_is_never_negative() -> None:
    assert Room(GIB, GIB).free == GIB - HEADROOM_MIN
    assert Room(16 * GIB, 16 * GIB).free == 16 * GIB - int(1.6 * GIB)
    assert Room(GIB, 100).free == 0


def test_an_unknown_quant_offers_none() -> None:
    assert smaller_quant(replace(THREE_B, file_type=99), Need(GIB, 0, 0, 0), Room(GIB, GIB)) == ""
    assert [bits for _, _, bits in QUANTS] == sorted((bits for _, _, bits in QUANTS), reverse=True)


def test_the_shape_is_read_from_the_file() -> None:
    shape = read_shape(DEMO)
    assert shape.layers > 0
    assert shape.width > 0
    assert 0 < shape.kv_width <= 2 * shape.width
    assert shape.vocabulary > 256


@pytest.mark.parametrize("cut", [0, 10, 30, 100, 300, 700])
def test_a_file_that_cannot_be_read_has_no_shape(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(DEMO.read_bytes()[:cut])
    assert read_shape(path) == Shape()
    path.write_bytes(DEMO.read_bytes()[:24] + b"\xff" * 100)
    assert read_shape(path) == Shape()
    assert read_shape(tmp_path / "missing.gguf") == Shape()


def test_as_many_beginnings_are_remembered_as_answers_are_under_way() -> None:
    assert sequences(4) == 2 * 4 + FORKS


def test_what_is_on_other_boards_is_not_needed_here() -> None:
    whole = Need(weights=100, kv=40, compute=10, swap=5)
    assert whole.without(0) == whole
    assert whole.without(60) == Need(40, 40, 10, 5)
    assert whole.without(120) == Need(0, 20, 10, 5)
