"""The unit files, checked by systemd itself, without installing them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[1] / "systemd"
PROGRAM = "/opt/piclusterd/current/bin/"
UPGRADER = "/opt/piclusterd/good/bin/python "
EXPOSURE_MAX = {"piclusterd.service": 15, "piclusterd-worker@.service": 5}
"""Tenths, as `--threshold` takes them: systemd's own services start at 1.5; 0.5 is for what parses strangers' files."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed on this machine")
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def units(tmp_path: Path) -> list[str]:
    """The units with a program that exists here; `verify` insists on one."""
    copies = []
    for unit in sorted([*UNITS.glob("*.service"), *UNITS.glob("*.socket"), *UNITS.glob("*.path")]):
        copy = tmp_path / unit.name
        text = (
            unit.read_text()
            .replace(f"{PROGRAM}piclusterd ", "/bin/true ")
            .replace(f"{PROGRAM}python ", "/bin/true ")
            .replace(UPGRADER, "/bin/true ")
        )
        copy.write_text(text)
        copies.append(str(copy).replace("@.", "@1."))
    shutil.copy(tmp_path / "piclusterd-worker@.service", tmp_path / "piclusterd-worker@1.service")
    return copies


def test_systemd_finds_no_fault_in_the_units(units: list[str]) -> None:
    result = run("systemd-analyze", "verify", *units)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(units) == 6


@pytest.mark.parametrize(("unit", "exposure"), EXPOSURE_MAX.items())
def test_the_units_expose_little(unit: str, exposure: int) -> None:
    result = run("systemd-analyze", "security", "--offline=true", f"--threshold={exposure}", str(UNITS / unit))
    assert result.returncode == 0, result.stdout


def test_a_worker_has_no_network_no_secrets_and_a_user_of_its_own() -> None:
    text = (UNITS / "piclusterd-worker@.service").read_text()
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string(text)
    service = unit["Service"]
    assert (service["PrivateNetwork"], service["RestrictAddressFamilies"]) == ("yes", "none")
    assert service["User"] == "piclusterd-worker"
    assert not any(line.startswith(("LoadCredential", "StateDirectory", "Environment")) for line in text.splitlines())


def test_the_users_can_be_made() -> None:
    result = run("systemd-sysusers", "--dry-run", str(UNITS / "piclusterd.sysusers"))
    assert result.returncode == 0, result.stderr


def test_tmpfiles_are_well_formed() -> None:
    for line in (UNITS / "piclusterd.tmpfiles").read_text().splitlines():
        if line and not line.startswith("#"):
            kind, path, mode, user, group, age = line.split()
            assert (kind, path[0], len(mode), age) == ("d", "/", 4, "-")
            assert {user, group} <= {"root", "piclusterd"}
