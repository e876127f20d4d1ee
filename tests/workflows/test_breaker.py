"""A service that failed in a row is left alone, then asked by one call."""

from __future__ import annotations

from random import Random

from piclusterd.workflows.breaker import FAILURES_MAX, PAUSE_FIRST_S, PAUSE_MAX_S, PROBE_S, QUEUE_S, Breaker


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker("linear", Random(1))
    for _ in range(FAILURES_MAX):
        breaker.failed("503", None, now)
    return breaker


def test_it_opens_at_the_last_of_many_failures_in_a_row_and_not_before() -> None:
    breaker = Breaker("linear", Random(1))
    for _ in range(FAILURES_MAX - 1):
        breaker.failed("503", None, 0.0)
    assert breaker.wait_s(0.0) == 0.0
    breaker.succeeded()
    for _ in range(FAILURES_MAX - 1):
        breaker.failed("503", None, 0.0)
    assert breaker.wait_s(0.0) == 0.0, "a success in between"
    breaker.failed("502", None, 0.0)
    assert PAUSE_FIRST_S / 2 <= breaker.wait_s(0.0) <= PAUSE_FIRST_S
    assert breaker.view(0.0).why == "502"


def test_after_its_pause_one_call_goes() -> None:
    breaker = opened()
    later = breaker.wait_s(0.0)
    assert breaker.wait_s(later) == 0.0
    assert breaker.wait_s(later) == QUEUE_S
    breaker.succeeded()
    assert [breaker.wait_s(later) for _ in range(3)] == [0.0] * 3


def test_a_probe_that_is_lost_makes_room_for_another() -> None:
    breaker = opened()
    later = breaker.wait_s(0.0)
    assert breaker.wait_s(later) == 0.0
    assert breaker.wait_s(later + PROBE_S - 1) == QUEUE_S
    assert breaker.wait_s(later + PROBE_S) == 0.0


def test_pauses_double_up_to_their_longest() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(12):
        now += breaker.wait_s(now)
        assert breaker.wait_s(now) == 0.0
        breaker.failed("503", None, now)
        pauses.append(breaker.wait_s(now))
    assert pauses[0] > PAUSE_FIRST_S
    assert PAUSE_MAX_S / 2 <= pauses[-1] <= PAUSE_MAX_S


def test_what_the_service_asked_for_is_waited_for() -> None:
    breaker = opened()
    breaker.failed("429", 3600.0, 10.0)
    assert breaker.wait_s(10.0) == 3600.0
