"""What the board says of itself: model, load, memory, heat and power. Needs no root and no vcgencmd.

    devicetree model | DMI | platform ──▶ model        thermal_zone0 ──▶ temperature ──▶ hot
    hwmon rpi_volt in0_lcrit_alarm ──▶ undervolt       scaling_cur_freq under load ──▶ throttled
    /proc/cpuinfo asimddp ──▶ dotprod                  pointer size ──▶ 64-bit userland
    /proc/pressure/memory ──▶ memory pressure          scaling_governor ──▶ governor

Whatever is absent or unreadable reads as None, 0 or False: sensors never stop a node. The old sysfs file
`soc:firmware/get_throttled` is not read, since reading it makes the kernel warn with a backtrace (jgyates/genmon 667);
under-voltage is what the firmware says *now*, history is the caller's. `throttled` is inferred: a busy processor that
runs well below its own maximum. Speed is never inferred from the model's name.
"""

from __future__ import annotations

import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path

import psutil

HOT_C = 80.0
"""Raspberry Pi firmware's soft limit: from here on it slows the processor (raspberrypi/documentation PR 1348)."""
BUSY_PERCENT = 80.0
"""Load from which a low clock means throttling; below it the governor lowers the clock on purpose."""
THROTTLED_SHARE = 0.9
"""Share of the highest clock; the firmware steps down from 2.4 to 1.5 GHz at once, governors dither by a few %."""
TEXT_BYTES_MAX = 64 * 1024
"""Of one pseudo-file: /proc/cpuinfo of a many-core machine is the longest, and its first processor is enough."""

DEVICETREE_MODEL = Path("sys/firmware/devicetree/base/model")
DMI_MODEL = Path("sys/class/dmi/id/product_name")
TEMPERATURE = Path("sys/class/thermal/thermal_zone0/temp")
HWMON = Path("sys/class/hwmon")
CPUFREQ = Path("sys/devices/system/cpu/cpu0/cpufreq")
MEMINFO = Path("proc/meminfo")
PRESSURE = Path("proc/pressure/memory")
CPUINFO = Path("proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Readings:
    """One look at the board. Bytes, percent of all cores together, degrees Celsius."""

    model: str
    cores: int
    cpu_percent: float
    """Since the last look; 0.0 at the first."""
    memory_used: int
    """Total less available: what is not to be had without swapping. Page cache does not count."""
    memory_total: int
    temperature_c: float | None
    undervolt: bool
    throttled: bool
    hot: bool
    userland_64bit: bool
    """False refuses inference: a 64-bit kernel may carry a 32-bit userland, so `uname -m` is no answer."""
    dotprod: bool
    """The processor has Arm's dot product instructions (Pi 5 yes, Pi 4 no)."""
    governor: str = ""
    """Of the clock; "" where the kernel does not say."""
    memory_pressure: float | None = None
    """Percent of the last 10 s in which something waited for memory; None where the kernel does not measure it."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The warnings, in the order in which the status table shows them."""
        states = (("undervolt", self.undervolt), ("throttled", self.throttled), ("hot", self.hot))
        return tuple(name for name, on in states if on)


def read(root: Path = Path("/"), cpu_percent: float | None = None) -> Readings:
    """Reads everything once; takes about a millisecond and never blocks on a measurement.

    `root` holds the `sys` and `proc` to read; `cpu_percent` replaces psutil's figure, which is always this machine's.
    """
    load = psutil.cpu_percent(interval=None) if cpu_percent is None else cpu_percent
    used, total = _memory(root)
    temperature = _temperature(root)
    return Readings(
        model=_model(root),
        cores=_cores(),
        cpu_percent=load,
        memory_used=used,
        memory_total=total,
        temperature_c=temperature,
        undervolt=_undervolt(root),
        throttled=load >= BUSY_PERCENT and _slow(root),
        hot=temperature is not None and temperature > HOT_C,
        userland_64bit=struct.calcsize("P") == 8,
        dotprod="asimddp" in text(root / CPUINFO).split(),
        governor=text(root / CPUFREQ / "scaling_governor"),
        memory_pressure=_pressure(root),
    )


def _cores() -> int:
    """Those this process may use, which affinity and cpusets make fewer than the board has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _model(root: Path) -> str:
    return text(root / DEVICETREE_MODEL) or text(root / DMI_MODEL) or f"{platform.system()} {platform.machine()}"


def _memory(root: Path) -> tuple[int, int]:
    """(used, total) in bytes; from psutil where the tree has no meminfo."""
    kilobytes = {}
    for line in text(root / MEMINFO).splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            kilobytes[name] = int(number[0])
    if "MemTotal" not in kilobytes or "MemAvailable" not in kilobytes:
        memory = psutil.virtual_memory()
        return memory.total - memory.available, memory.total
    return (kilobytes["MemTotal"] - kilobytes["MemAvailable"]) * 1024, kilobytes["MemTotal"] * 1024


def _pressure(root: Path) -> float | None:
    """`some avg10=0.00 avg60=…`: the first figure (kernel's Documentation/accounting/psi)."""
    words = text(root / PRESSURE).split()
    try:
        return float(words[1].removeprefix("avg10="))
    except (IndexError, ValueError):
        return None


def _temperature(root: Path) -> float | None:
    millidegrees = _number(root / TEMPERATURE)
    return None if millidegrees is None else millidegrees / 1000


def _undervolt(root: Path) -> bool:
    try:
        sensors = sorted((root / HWMON).iterdir())
    except OSError:
        return False
    return any(text(s / "name") == "rpi_volt" and _number(s / "in0_lcrit_alarm") == 1 for s in sensors)


def _slow(root: Path) -> bool:
    current, highest = _number(root / CPUFREQ / "scaling_cur_freq"), _number(root / CPUFREQ / "cpuinfo_max_freq")
    return current is not None and highest is not None and current < THROTTLED_SHARE * highest


def _number(path: Path) -> int | None:
    found = text(path)
    return int(found) if found.lstrip("-").isdecimal() else None


def text(path: Path) -> str:
    """Stripped of white space and of the NUL that ends device tree strings; empty where there is nothing to read."""
    try:
        with path.open("rb") as file:
            return file.read(TEXT_BYTES_MAX).decode(errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""
