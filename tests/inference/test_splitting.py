"""Which boards hold which layers. Ten layers of 100 MiB, 10 MiB of KV memory each, 40 MiB of the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piclusterd.inference.budget import MIB, Need
from piclusterd.inference.splitting import (
    BANDWIDTH,
    DISK_BYTES_S,
    FLOAT_BYTES,
    HOP_S,
    LINK_BYTES_S,
    READ_PART,
    START_S,
    TRIPS,
    Board,
    Layers,
    Plan,
    Refusal,
    plan,
)

WIDTH = 4096
LAYERS = Layers((100 * MIB,) * 10, 40 * MIB)
ASKED = Need(weights=1040 * MIB, kv=100 * MIB, compute=50 * MIB, swap=60 * MIB)
LAYER = 110 * MIB
OWN = (40 + 50 + 60) * MIB
"""What the head takes beside layers."""


def board(name: str, layers: float, beside: int = 50 * MIB, bandwidth: float = 8e9, rtt_s: float = 0.001) -> Board:
    """With room for so many layers."""
    return Board(f"id-{name}", name, int(layers * LAYER) + beside, bandwidth, rtt_s)


def head(layers: float) -> Board:
    return replace(board("pi-1", layers, OWN), rtt_s=0.0)


def planned(first: Board, *others: Board) -> Plan:
    found = plan("big", LAYERS, WIDTH, ASKED, first, others)
    assert isinstance(found, Plan), found
    return found


def refused(first: Board, *others: Board) -> Refusal:
    found = plan("big", LAYERS, WIDTH, ASKED, first, others)
    assert isinstance(found, Refusal), found
    return found


def test_the_head_keeps_what_fits_it_and_the_next_board_the_rest() -> None:
    found = planned(head(6.5), board("pi-2", 8))
    assert [(share.name, share.layers) for share in found.shares] == [("pi-1", 6), ("pi-2", 4)]
    assert [share.bytes for share in found.shares] == [6 * LAYER + OWN, 4 * LAYER + 50 * MIB]
    assert found.apart == 4 * LAYER


def test_faster_boards_come_first_and_no_more_than_are_needed() -> None:
    slow, near, fast = board("pi-2", 5, bandwidth=4e9), board("pi-3", 5, rtt_s=0.0001), board("pi-4", 2, bandwidth=9e9)
    found = planned(head(3), slow, board("pi-5", 5, rtt_s=0.01), near, fast)
    assert [(share.name, share.layers) for share in found.shares] == [("pi-1", 3), ("pi-4", 2), ("pi-3", 5)]


def test_a_board_too_small_for_any_layer_is_left_out() -> None:
    found = planned(head(3), board("pi-2", 0.5, bandwidth=9e9), board("pi-3", 7))
    assert [share.name for share in found.shares] == ["pi-1", "pi-3"]


def test_a_head_without_a_layer_still_has_the_rest() -> None:
    found = planned(head(0), board("pi-2", 10))
    assert [(share.name, share.layers) for share in found.shares] == [("pi-1", 0), ("pi-2", 10)]


def test_the_prediction_counts_reading_trips_and_bytes() -> None:
    found = planned(head(6), board("pi-2", 4, bandwidth=4e9, rtt_s=0.003))
    here = 640 * MIB / (READ_PART * 8e9)
    there = 400 * MIB / (READ_PART * 4e9) + TRIPS * (0.003 + HOP_S) + 2 * FLOAT_BYTES * WIDTH / LINK_BYTES_S
    assert [share.seconds for share in found.shares] == [pytest.approx(here), pytest.approx(there)]
    assert found.tokens_s == round(1 / (here + there), 2)
    assert found.load_s == round(START_S + 1040 * MIB / DISK_BYTES_S + 440 * MIB / LINK_BYTES_S, 1)
    assert found.guessed == ()


def test_an_unmeasured_board_is_taken_for_a_slow_one_and_said_to_be_guessed() -> None:
    guessed = planned(head(6), board("pi-2", 4, bandwidth=0.0))
    assert guessed.tokens_s == planned(head(6), board("pi-2", 4, bandwidth=BANDWIDTH)).tokens_s
    assert guessed.guessed == ("pi-2",)


def test_one_board_that_suffices_is_better() -> None:
    here = refused(head(10), board("pi-2", 10))
    assert (here.what, here.fix) == ("big fits one board", "Run `picluster load big`.")
    assert here.why == "It needs 1,250 MiB, and pi-1 has 1,250 MiB. Split, it would be slower."
    there = refused(head(3), board("pi-2", 3), board("pi-3", 12))
    assert (there.what, there.fix) == ("big fits one board", "Run `picluster load big --node pi-3`.")
    assert "pi-3 has 1,370 MiB" in there.why


def test_without_another_board_there_is_nothing_to_divide() -> None:
    found = refused(head(3))
    assert found.what == "big fits no board"
    assert found.why == "It needs 1,250 MiB, and pi-1 has 480 MiB; no other board offers any."
    assert "[inference] split = true" in found.fix


def test_what_does_not_fit_all_is_refused_with_the_numbers() -> None:
    found = refused(head(3), board("pi-2", 4), board("pi-3", 1))
    assert found.what == "big does not fit all boards together"
    assert "free are: pi-1 480 MiB, pi-2 490 MiB, pi-3 160 MiB. 2 of its 10 layers find no place." in found.why


def test_a_head_that_cannot_hold_its_own_part_says_so() -> None:
    found = refused(replace(head(0), free=OWN - 1), board("pi-2", 10))
    assert found.what == "big cannot be split from here"
    assert "Whoever asks holds embeddings, output and buffers, 150 MiB; pi-1 has 150 MiB free." in found.why
    assert "--node" in found.fix
