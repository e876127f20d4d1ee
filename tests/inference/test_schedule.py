from __future__ import annotations

import pytest

from piclusterd.inference.schedule import (
    CHUNK_TOKENS_FIRST,
    CHUNK_TOKENS_MIN,
    OVERTAKEN_MAX,
    READING_S,
    TILE_ROWS,
    Pending,
    Share,
    Waiting,
    admit,
    chunk,
    plan,
)

ANSWER = Pending(1, True)


def test_a_chunk_is_what_can_be_read_in_the_time_allowed() -> None:
    assert chunk(100.0, room=512) == int(100 * READING_S)
    assert chunk(1.0, room=512) == CHUNK_TOKENS_MIN
    assert chunk(0.0, room=512) == CHUNK_TOKENS_FIRST
    assert chunk(1e6, room=500) == 500


def test_answers_go_first_and_prompts_share_what_is_left() -> None:
    pending = [Pending(700, False), ANSWER, Pending(40, False), ANSWER]
    assert plan(pending, 1e6, 512, 16) == [Share(1, 1), Share(3, 1), Share(0, 510)]
    assert plan(pending, 60.0, 512, 16) == [Share(1, 1), Share(3, 1), Share(0, 42)]
    assert plan(pending[1:], 1e6, 512, 16) == [Share(0, 1), Share(2, 1), Share(1, 40)]


def test_forced_tokens_of_an_answer_are_read_whatever_the_chunk_is() -> None:
    assert plan([Pending(60, True), Pending(500, False)], 20.0, 512, 16) == [Share(0, 60), Share(1, CHUNK_TOKENS_MIN)]


def test_an_answer_that_does_not_fit_any_more_waits_a_step() -> None:
    assert plan([Pending(300, True), Pending(300, True)], 1e6, 512, 16) == [Share(0, 300)]


def test_what_is_left_of_a_prompt_is_worth_a_step() -> None:
    assert plan([Pending(520, False)], 1e6, 512, 16) == [Share(0, 520 - TILE_ROWS)]
    assert plan([Pending(512 + TILE_ROWS, False)], 1e6, 512, 16) == [Share(0, 512)]
    assert plan([Pending(520, False, tree=9)], 1e6, 512, 16) == [Share(0, 520 - TILE_ROWS)]
    assert plan([Pending(100, False)], 100.0, 512, 16) == [Share(0, 70)]


def test_a_prompt_is_read_to_its_end_where_that_is_little_more() -> None:
    assert plan([Pending(93, False)], 100.0, 512, 16) == [Share(0, 93)]
    assert plan([Pending(94, False)], 100.0, 512, 16) == [Share(0, 70)]
    assert plan([Pending(94, False)], 100.0, 80, 16) == [Share(0, 70)]


def test_options_go_with_the_last_chunk_of_their_prompt() -> None:
    one = Pending(30, False, tree=12, forks=4)
    assert plan([one], 1e6, 512, 16) == [Share(0, 30, True)]
    assert plan([one], 28.0, 512, 16) == [Share(0, 19)]
    assert plan([one], 1e6, 41, 16) == [Share(0, 29)]  # the last is kept back: its logits are wanted with the options


def test_options_wait_for_forks_and_room_but_never_for_the_budget() -> None:
    ready = Pending(1, False, tree=40, forks=10)
    assert plan([ready, ready], 1.0, 512, 16) == [Share(0, 1, True)]
    assert plan([ready, ready], 1.0, 512, 20) == [Share(0, 1, True), Share(1, 1, True)]
    assert plan([ready], 1.0, 40, 16) == []
    second_field = Pending(30, True, tree=8, forks=4)
    assert plan([second_field], 1.0, 512, 16) == [Share(0, 30, True)]


def test_every_pending_sequence_gets_its_turn() -> None:
    """Whatever the speed: plans are carried out until nothing is left, and that takes a bounded number of steps."""
    for speed in (0.0, 1.0, 77.0, 1e6):
        left = [Pending(700, False), Pending(90, True), Pending(33, False, 60, 16), Pending(1, False, 300, 16)]
        for _ in range(200):
            for share in plan(left, speed, 512, 16):
                one = left[share.index]
                done = share.count == one.remaining
                left[share.index] = Pending(
                    one.remaining - share.count, one.answering, 0 if share.tree else one.tree, one.forks
                )
                assert share.tree <= done
        assert all(one.remaining == 0 and one.tree == 0 for one in left)


def test_who_fits_comes_in_in_order() -> None:
    queue = [Waiting(50, False, 0), Waiting(10, False, 0)]
    assert admit(queue, 1, 4, 40, 100) == 0
    assert admit(queue, 4, 4, 40, 100) is None
    assert admit([], 0, 4, 0, 100) is None


def test_a_smaller_one_may_overtake_but_not_for_ever() -> None:
    assert admit([Waiting(90, False, 0), Waiting(10, False, 0)], 1, 4, 40, 100) == 1
    assert admit([Waiting(90, False, OVERTAKEN_MAX), Waiting(10, False, 0)], 1, 4, 40, 100) is None
    assert admit([Waiting(90, False, 0), Waiting(70, False, 0)], 1, 4, 40, 100) is None


def test_one_alone_always_comes_in() -> None:
    assert admit([Waiting(1000, False, 0)], 0, 4, 0, 100) == 0


@pytest.mark.parametrize("overtaken", [0, OVERTAKEN_MAX])
def test_who_shares_a_beginning_that_is_being_read_waits_and_holds_nobody_up(overtaken: int) -> None:
    assert admit([Waiting(5, True, overtaken), Waiting(10, False, 0)], 1, 4, 40, 100) == 1
    assert admit([Waiting(5, True, overtaken)], 1, 4, 40, 100) is None
