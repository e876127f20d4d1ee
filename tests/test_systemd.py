"""The unit files, checked by systemd itself, without installing them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[1] / "systemd"
EXPOSURE_MAX = 20
"""Tenths, as `--threshold` takes them: 2.0, where systemd's own services stand between 1.5 and 4.3."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed on this machine")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here; `verify` insists on one."""
    text = (UNITS / "piclusterd.service").read_text()
    copy = tmp_path / "piclusterd.service"
    copy.write_text(text.replace("ExecStart=/opt/piclusterd/bin/piclusterd", "ExecStart=/bin/true"))
    return copy


def test_systemd_finds_no_fault_in_the_unit(unit: Path) -> None:
    result = run("systemd-analyze", "verify", str(unit))
    assert (result.returncode, result.stderr) == (0, "")


def test_the_unit_exposes_little() -> None:
    unit = UNITS / "piclusterd.service"
    result = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", str(unit))
    assert result.returncode == 0, result.stdout


def test_the_user_can_be_made() -> None:
    result = run("systemd-sysusers", "--dry-run", str(UNITS / "piclusterd.sysusers"))
    assert result.returncode == 0, result.stderr


def test_tmpfiles_are_well_formed() -> None:
    for line in (UNITS / "piclusterd.tmpfiles").read_text().splitlines():
        if line and not line.startswith("#"):
            kind, path, mode, user, group, age = line.split()
            assert (kind, path[0], len(mode), age) == ("d", "/", 4, "-")
            assert {user, group} <= {"root", "piclusterd"}
