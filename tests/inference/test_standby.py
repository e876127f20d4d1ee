"""One provider's budget and breaker, by the clock."""

from __future__ import annotations

from piclusterd.inference.standby import DAY_S, FAILURES_MAX, PAUSE_FIRST_S, PAUSE_MAX_S, Budget, Standby, Used

NOON = 20_000 * DAY_S + DAY_S / 2
MIDNIGHT = 20_001 * DAY_S


def test_a_provider_is_asked_at_once_and_tells_what_it_was_used_for() -> None:
    standby = Standby(Budget())
    assert standby.wait_s(NOON) == 0
    standby.asked(NOON)
    standby.answered(120, 1.25, NOON)
    today = {"requests": 1, "tokens": 120, "neurons": 1.2}
    assert standby.told(NOON) == {"state": "ready", "why": "", "waits_s": 0, "today": today}


def test_a_rate_limit_is_waited_for_and_a_shorter_one_does_not_shorten_it() -> None:
    standby = Standby(Budget())
    standby.limited(30, "too many", NOON)
    standby.limited(5, "too many", NOON)
    assert standby.wait_s(NOON + 1) == 29
    assert standby.told(NOON)["state"] == "waits"
    assert standby.wait_s(NOON + 30) == 0


def test_a_used_up_quota_is_left_until_midnight_whatever_else_is_said() -> None:
    standby = Standby(Budget())
    standby.spent("neurons are spent", NOON)
    standby.limited(5, "too many", NOON)
    assert standby.wait_s(NOON) == MIDNIGHT - NOON
    assert standby.wait_s(MIDNIGHT) == 0
    spent = Standby(Budget())
    spent.spent("x", NOON)
    assert spent.told(MIDNIGHT + 1)["why"] == "", "the new day knows nothing of it"


def test_each_budget_of_the_day_ends_it() -> None:
    for budget in (Budget(requests=2), Budget(tokens=200), Budget(neurons=3)):
        standby = Standby(budget)
        for _ in range(2):
            assert standby.wait_s(NOON) == 0
            standby.asked(NOON)
            standby.answered(100, 1.5, NOON)
        assert standby.wait_s(NOON) == MIDNIGHT - NOON
        assert standby.told(NOON)["state"] == "spent"
        standby.asked(MIDNIGHT)
        assert standby.wait_s(MIDNIGHT) == 0


def test_a_failure_counts_as_a_request_of_the_day() -> None:
    standby = Standby(Budget(requests=1))
    standby.asked(NOON)
    standby.failed("broken", NOON)
    assert standby.wait_s(NOON) > 0


def test_failures_in_a_row_leave_it_alone_for_longer_each_time() -> None:
    standby, now = Standby(Budget()), NOON
    for _ in range(FAILURES_MAX - 1):
        standby.asked(now)
        standby.failed("broken", now)
        assert standby.wait_s(now) == 0
    pauses = []
    for _ in range(8):
        standby.asked(now)
        standby.failed("broken", now)
        pauses.append(standby.wait_s(now))
        assert standby.told(now)["state"] == "left alone"
        now += pauses[-1]
    assert pauses[:2] == [PAUSE_FIRST_S, 2 * PAUSE_FIRST_S]
    assert pauses[-1] == PAUSE_MAX_S


def test_one_request_finds_out_whether_it_is_well_again() -> None:
    standby = Standby(Budget())
    for _ in range(FAILURES_MAX):
        standby.asked(NOON)
        standby.failed("broken", NOON)
    later = NOON + PAUSE_FIRST_S
    assert standby.wait_s(later) == 0
    standby.asked(later)
    assert standby.wait_s(later) > 0, "the others wait for it"
    standby.answered(1, 0, later)
    assert standby.wait_s(later) == 0


def test_a_days_use_goes_on_after_a_restart_and_another_days_does_not() -> None:
    for used in (Used(20_000, 2, 90, 1.0), Used(20_000, 1, 100, 0.0), Used(20_000, 0, 0, 3.0)):
        standby = Standby(Budget(requests=2, tokens=100, neurons=3))
        standby.resume(used, NOON)
        assert standby.wait_s(NOON) == MIDNIGHT - NOON
        assert standby.wait_s(MIDNIGHT) == 0
        late = Standby(Budget(requests=2, tokens=100, neurons=3))
        late.resume(used, MIDNIGHT)
        assert late.wait_s(MIDNIGHT) == 0
        assert late.told(MIDNIGHT)["today"] == {"requests": 0, "tokens": 0, "neurons": 0.0}
