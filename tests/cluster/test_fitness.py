"""What speaks against leading: a disk that refuses or hangs, a board that stays flagged, and slow writes."""

from __future__ import annotations

import itertools

import pytest

from piclusterd.cluster.fitness import (
    BOARD_S,
    FSYNCS_PER_ELECTION,
    HALF_LIFE_S,
    PROBE_S,
    STRETCH_MAX,
    WHY_MAX,
    Fitness,
)
from piclusterd.cluster.timings import PRESETS
from piclusterd.events import (
    Append,
    Appended,
    AppendFailed,
    DeadlineReached,
    DiskProbed,
    Event,
    FactsChanged,
    HardState,
    HardStateSaved,
    LoopLagged,
    ProbeDisk,
    SaveHardState,
    Send,
    Stored,
)
from piclusterd.ids import NodeId
from piclusterd.wire import Facts, TimeoutNow

PI = PRESETS["pi"]
NEVER = float("inf")


def fit(preset: str = "pi") -> Fitness:
    return Fitness(PRESETS[preset], itertools.count(100), 0.0)


def append(board: Fitness, token: int, at: float, took: float) -> None:
    board.wrote([Append(token, ())], at)
    board.handle(Appended(token, (), ()), at + took)


def probe(board: Fitness, now: float) -> int:
    (effect,) = board.handle(DeadlineReached(), now)
    assert isinstance(effect, ProbeDisk)
    return effect.token


def ailing(event: Event | None = None) -> Fitness:
    board = fit()
    board.handle(event or AppendFailed(1, "disk full"), 10.0)
    return board


# how slow is it? -------------------------------------------------------------------------------------------------
def test_a_quick_disk_changes_no_timing() -> None:
    board = fit()
    append(board, 1, 10.0, 0.02)
    assert board.stretch(10.1) == 1.0
    assert board.slowest_s(10.02) == pytest.approx(0.02)


@pytest.mark.parametrize(("took", "stretch"), [(1.5, 1.0), (3.0, 2.0), (6.0, STRETCH_MAX), (7.45, STRETCH_MAX)])
def test_silences_are_stretched_by_the_slowest_write_up_to_a_bound(took: float, stretch: float) -> None:
    board = fit()
    append(board, 1, 10.0, took)
    assert FSYNCS_PER_ELECTION * 3.0 / PI.election_min_s == 2.0
    assert board.stretch(10.0 + took) == pytest.approx(stretch)


def test_votes_are_timed_too_and_numbered_apart_from_appends() -> None:
    board = fit()
    board.wrote([SaveHardState(1, HardState()), Append(1, ()), Send(NodeId("b" * 16), TimeoutNow(1))], 10.0)
    board.handle(Appended(1, (), ()), 10.1)
    assert board.slowest_s(10.1) == pytest.approx(0.1)
    board.handle(HardStateSaved(1), 13.0)
    assert board.slowest_s(13.0) == pytest.approx(3.0)


def test_a_stall_is_forgotten_by_halves() -> None:
    board = fit()
    append(board, 1, 0.0, 4.0)
    assert board.slowest_s(4.0 + HALF_LIFE_S) == pytest.approx(2.0)
    append(board, 2, 4.0 + HALF_LIFE_S, 0.01)
    assert board.slowest_s(4.0 + 2 * HALF_LIFE_S) == pytest.approx(1.0), "a quick write does not hide a slow one"
    append(board, 3, 4.0 + 2 * HALF_LIFE_S, 2.5)
    assert board.slowest_s(6.5 + 2 * HALF_LIFE_S) == pytest.approx(2.5), "a slower one does"


def test_an_answer_to_nothing_that_was_timed_measures_nothing() -> None:
    board = fit()
    board.handle(Appended(7, (), ()), 10.0)
    assert board.slowest_s(10.0) == 0.0


# disk trouble ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("event", [AppendFailed(1, "disk full"), Stored(1, (), (), refused="disk full")])
def test_a_write_that_the_disk_refuses_is_trouble(event: Event) -> None:
    board = ailing(event)
    assert board.trouble == "disk full"
    assert board.deadline() == 10.0 + PROBE_S


@pytest.mark.parametrize("event", [AppendFailed(1, "too large", disk=False), Stored(1, (), ()), HardStateSaved(1)])
def test_what_is_not_the_disks_fault_is_no_trouble(event: Event) -> None:
    board = ailing(event)
    assert (board.trouble, board.deadline()) == ("", NEVER)


def test_a_long_reason_is_cut() -> None:
    assert len(ailing(AppendFailed(1, "x" * 1000)).trouble) == WHY_MAX


def test_trouble_ends_with_a_probe_that_lands_and_not_before() -> None:
    board = ailing()
    assert board.handle(DeadlineReached(), 10.0 + PROBE_S / 2) == []
    first = probe(board, 10.0 + PROBE_S)
    assert board.deadline() == NEVER, "one probe at a time"
    board.handle(DiskProbed(first + 50, ""), 12.5)
    assert board.trouble, "not an answer to our probe"
    board.handle(DiskProbed(first, "still full"), 13.0)
    assert (board.trouble, board.deadline()) == ("still full", 13.0 + PROBE_S)
    board.handle(DiskProbed(probe(board, 13.0 + PROBE_S), ""), 16.0)
    assert (board.trouble, board.deadline()) == ("", NEVER)


def test_more_refusals_do_not_put_the_probe_off() -> None:
    board = ailing()
    board.handle(AppendFailed(2, "read-only"), 11.0)
    assert (board.trouble, board.deadline()) == ("read-only", 10.0 + PROBE_S)


@pytest.mark.parametrize(("preset", "bound"), [("pi", 6.0), ("lan", 5.0)])
def test_a_write_that_hangs_is_trouble_after_a_bound(preset: str, bound: float) -> None:
    board = fit(preset)
    board.wrote([Append(1, ())], 0.1)
    board.wrote([SaveHardState(1, HardState())], 3.0)
    assert board.deadline() == 0.1 + bound
    board.handle(DeadlineReached(), 0.1 + bound - 0.01)
    assert not board.trouble
    board.handle(DeadlineReached(), board.deadline())
    assert "hung" in board.trouble


def test_a_hung_disk_is_well_when_it_owes_nothing_any_more() -> None:
    board = fit()
    board.wrote([Append(1, ())], 0.0)
    board.handle(DeadlineReached(), 6.0)
    board.handle(DiskProbed(probe(board, 8.0), ""), 8.1)
    assert board.trouble, "a probe landed, the write did not"
    board.handle(Appended(1, (), ()), 9.0)
    board.handle(DiskProbed(probe(board, 8.1 + PROBE_S), ""), 10.2)
    assert board.trouble == ""
    assert board.slowest_s(9.0) == pytest.approx(9.0)


def test_a_node_that_was_itself_away_does_not_blame_its_disk() -> None:
    board = fit()
    board.wrote([Append(1, ())], 0.0)
    board.handle(LoopLagged(20.0), 20.5)
    board.handle(DeadlineReached(), 20.6)
    assert not board.trouble
    board.handle(Appended(1, (), ()), 20.7)
    assert board.slowest_s(20.7) == pytest.approx(0.7)


# the board -------------------------------------------------------------------------------------------------------
def test_flags_that_stay_are_trouble_and_those_that_flicker_are_not() -> None:
    board = fit()
    flagged = FactsChanged(Facts(flags=("throttled", "hot", "disk")))
    for now in (0.0, 5.0, 10.0, 15.0):
        board.handle(flagged, now)
    assert board.board_trouble(BOARD_S - 0.1) == ""
    assert board.board_trouble(BOARD_S) == "the board is throttled, hot"
    board.handle(FactsChanged(Facts(flags=("disk",))), BOARD_S + 1)
    assert (board.flagged_since, board.board_trouble(99.0)) == (NEVER, "")
    board.handle(flagged, 100.0)
    assert board.board_trouble(100.0 + BOARD_S - 1) == ""
