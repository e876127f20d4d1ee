"""Sensors on fake boards: a tree with the files that a Raspberry Pi has, and trees without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from piclusterd.board import sensors

PI5 = {
    "sys/firmware/devicetree/base/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "sys/class/thermal/thermal_zone0/temp": "61250\n",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal\n",
    "sys/class/hwmon/hwmon1/name": "rpi_volt\n",
    "sys/class/hwmon/hwmon1/in0_lcrit_alarm": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
    "proc/meminfo": "MemTotal:        8256176 kB\nMemFree:  1 kB\nMemAvailable:    5000000 kB\n",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 atomics asimdhp cpuid asimdrdm asimddp\n",
}


def board(root: Path, **changes: str) -> Path:
    changed = {name.replace("__", "/"): text for name, text in changes.items()}
    for name, text in {**PI5, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_raspberry_pi_5_is_read_from_its_files(tmp_path: Path) -> None:
    readings = sensors.read(board(tmp_path), cpu_percent=52.0)
    assert readings.model == "Raspberry Pi 5 Model B Rev 1.0"
    assert (readings.memory_used, readings.memory_total) == (3256176 * 1024, 8256176 * 1024)
    assert (readings.temperature_c, readings.cpu_percent, readings.dotprod) == (61.25, 52.0, True)
    assert readings.flags == ()


def test_under_voltage_is_the_alarm_of_the_voltage_sensor(tmp_path: Path) -> None:
    root = board(tmp_path, sys__class__hwmon__hwmon1__in0_lcrit_alarm="1\n")
    assert sensors.read(root).flags == ("undervolt",)


def test_an_alarm_of_another_sensor_is_not_under_voltage(tmp_path: Path) -> None:
    root = board(tmp_path, sys__class__hwmon__hwmon1__name="nvme\n", sys__class__hwmon__hwmon1__in0_lcrit_alarm="1\n")
    assert sensors.read(root).flags == ()


@pytest.mark.parametrize(("load", "flags"), [(95.0, ("throttled",)), (10.0, ())])
def test_a_low_clock_is_throttling_only_under_load(tmp_path: Path, load: float, flags: tuple[str, ...]) -> None:
    root = board(tmp_path, sys__devices__system__cpu__cpu0__cpufreq__scaling_cur_freq="1500000\n")
    assert sensors.read(root, cpu_percent=load).flags == flags


@pytest.mark.parametrize(("millidegrees", "hot"), [("80000", False), ("80001", True), ("-5000", False)])
def test_above_the_soft_limit_is_hot(tmp_path: Path, millidegrees: str, hot: bool) -> None:
    readings = sensors.read(board(tmp_path, sys__class__thermal__thermal_zone0__temp=millidegrees))
    assert (readings.hot, readings.temperature_c) == (hot, int(millidegrees) / 1000)


def test_a_pi_4_has_no_dot_product(tmp_path: Path) -> None:
    root = board(tmp_path, proc__cpuinfo="Features\t: fp asimd evtstrm crc32 cpuid\n")
    assert not sensors.read(root).dotprod


def test_a_machine_without_any_of_the_files_still_reads(tmp_path: Path) -> None:
    readings = sensors.read(tmp_path)
    assert readings.model
    assert readings.memory_total > readings.memory_used > 0
    assert (readings.temperature_c, readings.flags, readings.dotprod) == (None, (), False)


def test_a_pc_is_named_by_its_firmware(tmp_path: Path) -> None:
    (tmp_path / "sys/class/dmi/id").mkdir(parents=True)
    (tmp_path / "sys/class/dmi/id/product_name").write_text("NUC12\n")
    assert sensors.read(tmp_path).model == "NUC12"


def test_junk_in_a_sensor_reads_as_nothing(tmp_path: Path) -> None:
    root = board(tmp_path, sys__class__thermal__thermal_zone0__temp="n/a", proc__meminfo="MemTotal: junk\n")
    assert sensors.read(root).temperature_c is None
    assert sensors.read(root).memory_total > 0


def test_this_machine_can_be_read() -> None:
    readings = sensors.read()
    assert readings.cores == len(os.sched_getaffinity(0))
    assert 0.0 <= readings.cpu_percent <= 100.0
