"""The batch and its rows, on the demo model: what fills a group must not be seen."""

from __future__ import annotations

import numpy as np
import pytest

from piclusterd.inference.llama import GROUP, Context, KvFull, Weights, likeliest, missing

from .rig import DEMO

ROUNDING = 0.05


def test_groups_are_filled_where_it_pays() -> None:
    filled = [rows + missing(rows) for rows in range(1, 17)]
    assert filled == [1, 2, 3, 4, 5, 8, 8, 8, 9, 12, 12, 12, 13, 16, 16, 16]
    assert GROUP == 4


def test_a_tile_is_filled_where_attention_is_long_and_rows_are_cheap() -> None:
    weights = Weights(str(DEMO))
    assert [weights.fills_tile(rows, 400) for rows in (8, 27, 40, 63, 64)] == [False, False, True, True, False]
    assert not weights.fills_tile(63, 127)
    weights.parameters, weights.heads = 494_000_000, 336
    assert [weights.fills_tile(rows, 400) for rows in (48, 56)] == [False, True]
    weights.close()


def test_rows_that_fill_a_tile_are_not_seen() -> None:
    weights = Weights(str(DEMO))
    context = Context(weights, 1024, 2, 1, 1)
    tokens = weights.tokenise_plain("Title: The editor crashes when saving. " * 40)[:240]
    found = []
    for chunk in (200, 120):  # the rest in one batch: 40 rows over 200, filled, and 120 rows
        context.clear()
        for begin, end in ((0, chunk), (chunk, 240)):
            context.clear_batch()
            rows = [context.add(tokens[at], at, (0,), at == end - 1) for at in range(begin, end)]
            context.decode()
        found.append(np.array(context.logits(rows[-1])))
    assert weights.fills_tile(40, 220)
    assert np.abs(found[0] - found[1]).max() < 4 * ROUNDING
    context.close()
    weights.close()


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_that_fill_a_group_leave_nothing_behind(grouped: bool) -> None:
    weights = Weights(str(DEMO))
    weights.grouped = grouped
    context = Context(weights, 256, 8, 1, 1)
    tokens = weights.tokenise_plain("Title: The editor crashes")[:7]
    alone = _logits(context, tokens, (0,))
    for _ in range(256):  # each round would take a cell
        beside = _logits(context, tokens, (0,))
    assert np.abs(beside - alone).max() < ROUNDING
    context.close()
    weights.close()


def test_a_full_memory_has_room_for_what_fits_without_the_filling() -> None:
    weights = Weights(str(DEMO))
    weights.grouped = True
    context = Context(weights, 256, 2, 1, 1)
    for count in (248, 6):
        context.clear_batch()
        for at in range(count):
            context.add(5, at + 248 * (count == 6), (0,), at == count - 1)
        context.decode()
    context.clear_batch()
    for at in range(3):
        context.add(5, 254 + at, (0,), at == 2)
    with pytest.raises(KvFull):
        context.decode()
    context.close()
    weights.close()


def test_the_likeliest_come_best_first() -> None:
    assert likeliest(np.array([0.1, 3.0, -1.0, 2.0], np.float32), 2) == [1, 3]
    assert likeliest(np.array([0.1], np.float32), 0) == []


def _logits(context: Context, tokens: list[int], sequences: tuple[int, ...]) -> np.ndarray:
    context.clear_batch()
    rows = [context.add(token, at, sequences, True) for at, token in enumerate(tokens)]
    context.decode()
    found = np.array(context.logits(rows[-1]))
    context.keep(sequences[0], 0)
    return found
