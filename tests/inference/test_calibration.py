"""Measured once, known after every restart; a share of what memory gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from piclusterd.inference.bandwidth import measure
from piclusterd.inference.calibration import MODELS_MAX, Calibration, Rate
from piclusterd.inference.pool import Pool

from .rig import GREEDY, NAME, READY_S, collected, spec


def test_rates_outlive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    Calibration(path).measured(spec(), 100.0, 10.0)
    assert Calibration(path).of(spec()) == Rate(100.0, 10.0)
    assert Calibration(path).of(spec(name="other")) == Rate()
    assert Calibration(path).of(spec(slots=1)) == Rate(100.0, 10.0)


def test_the_card_is_written_only_where_a_rate_has_moved(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    known = Calibration(path)
    known.measured(spec(), 100.0, 10.0)
    before = path.stat().st_ino
    known.measured(spec(), 110.0, 9.0)
    known.measured(spec(), 0.0, 0.0)
    assert path.stat().st_ino == before
    known.measured(spec(), 110.0, 14.0)
    assert path.stat().st_ino != before
    assert Calibration(path).of(spec()) == Rate(110.0, 14.0)


@pytest.mark.parametrize("junk", [b"", b"nonsense", b"[]", b'{"bandwidth": "fast"}', b'{"models": {"x": 1}}'])
def test_a_file_that_cannot_be_read_is_measured_anew(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(junk)
    known = Calibration(path)
    assert known.bandwidth == 0
    known.measured_bandwidth(9e9)
    assert Calibration(path).bandwidth == 9e9


def test_a_card_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    known = Calibration(tmp_path / "not there" / "rates.json")
    known.measured_bandwidth(9e9)
    assert known.bandwidth == 9e9


def test_models_measured_long_ago_make_room() -> None:
    known = Calibration()
    for number in range(MODELS_MAX + 1):
        known.measured(spec(name=f"m{number}"), 1.0, 1.0)
    assert known.of(spec(name="m0")) == Rate()
    assert known.of(spec(name="m1")) == Rate(1.0, 1.0)


def test_the_roofline_is_weights_read_for_each_token_over_what_memory_gives() -> None:
    known, one = Calibration(), spec()
    assert known.roofline(one, 10.0) == 0
    known.measured_bandwidth(100.0 * one.size)
    known.measured_bandwidth(50.0 * one.size)
    assert known.roofline(one, 10.0) == pytest.approx(0.1), "the best measurement of memory counts"


def test_memory_is_read_at_some_speed() -> None:
    assert 1e8 < measure(1) < 1e12


async def test_a_pool_knows_its_rates_before_the_first_request_and_measures_memory_once(tmp_path: Path) -> None:
    path, rates = tmp_path / "rates.json", []
    for _ in range(2):
        pool = Pool(8, READY_S, calibration=Calibration(path))
        await pool.start([spec()])
        assert await pool.settled(NAME) == "ready"
        (before,) = pool.facts()
        assert pool.calibration.bandwidth > 0
        await collected(pool.generate(NAME, GREEDY))
        (after,) = pool.facts()
        child = pool.served(NAME)
        assert child is not None
        assert child.ready is not None
        rates.append((before.decode_tps, after.decode_tps, after.gb_s > 0, after.roofline > 0, child.ready.bandwidth))
        await pool.close()
    (nothing, first, *told, measured), (known, *_, again) = rates
    assert nothing == 0
    assert known == pytest.approx(first, abs=0.1)
    assert told == [True, True]
    assert measured > 0
    assert again == 0, "it was not measured a second time"
