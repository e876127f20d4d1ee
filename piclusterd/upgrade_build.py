"""A release, made beside those that are there: the packages of the one in use, and another wheel of ours.

    current/site-packages ──hard links, without piclusterd──▶ releases/0.2.0-1a2b3c4d ◀── wheel, each file checked
                                                              bin/piclusterd, bin/picluster made anew

No index is asked as long as the wheel requires what the last one did; where that changed, pip is. Linking instead of
copying spares the card and takes a second. A wheel is an archive from elsewhere: it may only hold files of piclusterd,
no links, nothing outside its directory, and each with the digest that its RECORD tells.

Source: the binary distribution format of Python packages (RECORD, entry points).
"""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .errors import Broken, PiclusterError, Refused
from .upgrade_source import Release

BYTES_MAX = 256 * 1024 * 1024
"""Unpacked."""
FILES_MAX = 10_000
BUILD_S = 3600.0
"""Compiling llama.cpp takes that long on a Pi 3."""
SMOKE_S = 60.0
OURS = "piclusterd"
COMPLETE = ".complete"
"""Written last: a directory without it was cut short, and is made again."""


def build(releases: Path, current: Path, wheel: Path, release: Release) -> Path:
    """The directory of the new release, ready to be switched to. Raises `PiclusterError`; nothing in use is touched."""
    target = releases / f"{release.version}-{release.sha256[:8]}"
    if (target / COMPLETE).exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    try:
        _environment(current, target)
        site = site_packages(target)
        _link_all(site_packages(current), site)
        unpack(wheel, site, release.version)
        if _requires(site_packages(current)) != _requires(site):
            _install(target, wheel, "llama" if (site / "llama_cpp").exists() else "")
        _make_scripts(target, site)
        version = version_of(target)
        if version != release.version:
            raise Broken(f"the new release calls itself {version!r}, not {release.version}")
        (target / COMPLETE).touch()
    except (OSError, PiclusterError) as fault:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(fault, PiclusterError):
            raise
        raise Broken(f"{target.name} cannot be made", str(fault), "Is there room on the disk?") from fault
    return target


def site_packages(release: Path) -> Path:
    """Where its packages are. Raises `Broken`."""
    found = sorted((release / "lib").glob("python3*/site-packages"))
    if not found:
        raise Broken(f"{release} is no environment", "it has no site-packages")
    return found[-1]


def version_of(release: Path) -> str:
    """What its daemon calls itself; "" where it does not run."""
    told = _run([str(release / "bin" / "piclusterd"), "--version"], SMOKE_S)
    return told.stdout.strip().rsplit(" ", 1)[-1] if told.returncode == 0 else ""


def _environment(current: Path, target: Path) -> None:
    made = _run([str(current / "bin" / "python"), "-m", "venv", "--without-pip", str(target)], SMOKE_S)
    if made.returncode != 0:
        raise Broken("no new environment", (made.stderr or made.stdout)[-300:])


def _link_all(source: Path, target: Path) -> None:
    """All packages but ours. Files are linked: pip, too, replaces them and never writes into them."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copy2(one, other)

    for entry in source.iterdir():
        if entry.name == "__pycache__" or entry.name.startswith((OURS, f"__editable__.{OURS}", f"_{OURS}")):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=link, symlinks=True, dirs_exist_ok=True)
        elif not (target / entry.name).exists():
            link(str(entry), str(target / entry.name))


def unpack(wheel: Path, site: Path, version: str) -> None:
    """Its files, each checked, into `site`. Raises `Refused` before anything is written."""
    dist_info = f"{OURS}-{version}.dist-info"
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = archive.infolist()
            _check_names(infos, dist_info)
            digests = _record(archive.read(f"{dist_info}/RECORD"))
            for info in infos:
                if not info.is_dir():
                    _unpack_one(archive, info, site, digests, dist_info)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as fault:
        raise Refused(f"{wheel.name} is no wheel of ours", str(fault)) from fault


def _check_names(infos: list[zipfile.ZipInfo], dist_info: str) -> None:
    if len(infos) > FILES_MAX or sum(info.file_size for info in infos) > BYTES_MAX:
        raise Refused("the wheel is too large", f"over {FILES_MAX} files or {BYTES_MAX} bytes")
    for info in infos:
        path = PurePosixPath(info.filename)
        kind = stat.S_IFMT(info.external_attr >> 16)
        inside = path.parts[:1] in ((OURS,), (dist_info,)) and ".." not in path.parts and "\\" not in info.filename
        if not inside:
            raise Refused("the wheel holds what is not ours", f"{info.filename[:100]!r} is outside {OURS}")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refused("the wheel holds what is no plain file", repr(info.filename[:100]))


def _record(text: bytes) -> dict[str, str]:
    """File → its digest as RECORD writes it."""
    rows: Iterable[list[str]] = csv.reader(io.StringIO(text.decode("utf-8", "replace")))
    return {row[0]: row[1] for row in rows if len(row) == 3}


def _unpack_one(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, site: Path, digests: dict[str, str], dist_info: str
) -> None:
    body = archive.read(info)
    told = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()
    if info.filename != f"{dist_info}/RECORD" and digests.get(info.filename) != told:
        raise Refused("the wheel is not whole", f"{info.filename[:100]!r} is not what RECORD says")
    path = site / info.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def _requires(site: Path) -> list[str]:
    """What our distribution there requires; pins and extras and all."""
    for metadata in sorted(site.glob(f"{OURS}-*.dist-info/METADATA")):
        lines = metadata.read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
        return sorted(line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: "))
    return []


def _install(target: Path, wheel: Path, extras: str) -> None:
    wanted = f"{wheel}[{extras}]" if extras else str(wheel)
    done = _run([str(target / "bin" / "python"), "-m", "pip", "install", "-q", "--no-input", wanted], BUILD_S)
    if done.returncode != 0:
        raise Broken("what the new release requires cannot be installed", (done.stderr or done.stdout)[-300:])


def _make_scripts(target: Path, site: Path) -> None:
    for points in site.glob(f"{OURS}-*.dist-info/entry_points.txt"):
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.read(points)
        for name, where in parser["console_scripts"].items() if parser.has_section("console_scripts") else ():
            module, _, function = where.partition(":")
            if (
                not re.fullmatch(r"[a-z]+", name)
                or not re.fullmatch(r"[a-z_.]+", module)
                or not function.isidentifier()
            ):
                raise Refused("the wheel's command is no name", f"{name[:40]} = {where[:80]}")
            script = target / "bin" / name
            script.unlink(missing_ok=True)
            head = f"#!{target / 'bin' / 'python'}\n"
            script.write_text(f"{head}import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
            script.chmod(0o755)


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Without our own environment's variables, which would lead the new interpreter to the old packages."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        return subprocess.CompletedProcess(command, 1, "", str(fault))
