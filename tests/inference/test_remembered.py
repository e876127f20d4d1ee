"""What was answered before, at given times."""

from __future__ import annotations

from piclusterd.inference.remembered import ITEM_BYTES, PART_BYTES, Remembered

ONE = ITEM_BYTES + PART_BYTES + 4
"""What a value of one part of four bytes weighs."""


def test_what_is_kept_is_found_and_what_is_not_is_none() -> None:
    kept = Remembered(ONE, 60.0)
    kept.keep("a", (b"aaaa",), 0.0)
    assert (kept.find("a", 1.0), kept.find("b", 1.0), kept.size) == ((b"aaaa",), None, ONE)


def test_the_least_recently_used_goes_where_bytes_are_short() -> None:
    kept = Remembered(2 * ONE, 60.0)
    kept.keep("a", (b"aaaa",), 0.0)
    kept.keep("b", (b"bbbb",), 1.0)
    kept.find("a", 2.0)
    kept.keep("c", (b"cccc",), 3.0)
    assert [kept.find(key, 4.0) is not None for key in "abc"] == [True, False, True]
    assert kept.size == 2 * ONE


def test_nothing_is_told_that_is_as_old_as_it_may_get() -> None:
    kept = Remembered(ONE, 60.0)
    kept.keep("a", (b"aaaa",), 0.0)
    assert kept.find("a", 59.9) is not None
    assert kept.find("a", 60.0) is None
    assert kept.size == 0


def test_what_is_larger_than_all_there_is_is_not_kept_and_drives_nothing_out() -> None:
    kept = Remembered(ONE, 60.0)
    kept.keep("a", (b"aaaa",), 0.0)
    kept.keep("b", (b"bbbbb",), 0.0)
    assert (kept.find("a", 0.0), kept.find("b", 0.0)) == ((b"aaaa",), None)


def test_what_is_kept_anew_weighs_once() -> None:
    kept = Remembered(2 * ONE, 60.0)
    kept.keep("a", (b"aaaa",), 0.0)
    kept.keep("a", (b"AAAA",), 1.0)
    assert (kept.find("a", 1.0), kept.size) == ((b"AAAA",), ONE)
