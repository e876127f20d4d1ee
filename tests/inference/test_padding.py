from __future__ import annotations

from piclusterd.inference.padding import WINDOW, pack


def test_nothing_waits() -> None:
    assert pack([], 4, 100) == []


def test_the_oldest_goes_first_with_those_nearest_to_it_in_length() -> None:
    assert pack([10, 500, 12, 9, 480, 11], 3, 10_000) == [0, 3, 5]


def test_padding_counts_as_work() -> None:
    assert pack([10, 10, 30], 8, 40) == [0, 1], "three rows of 30 would be 90"
    assert pack([30, 10], 8, 60) == [0, 1], "the short one is filled up to 30"
    assert pack([30, 10], 8, 59) == [0]


def test_one_that_is_too_long_goes_alone() -> None:
    assert pack([500, 1], 8, 100) == [0]


def test_all_go_together_where_they_are_alike() -> None:
    assert pack([7] * 5, 4, 100) == [0, 1, 2, 3]


def test_only_the_oldest_are_looked_at() -> None:
    lengths = [5] + [50] * (WINDOW - 1) + [5]
    assert WINDOW not in pack(lengths, 2, 1000)
