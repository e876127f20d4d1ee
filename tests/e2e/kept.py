"""Nodes as an owner has them: releases side by side, each daemon kept by something that stands for systemd.

wheel(version) ─▶ source/ with SHA256SUMS        KeptCluster: base release ─▶ keeper ─▶ daemon, sockets held
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from piclusterd import __version__
from piclusterd.demo.cluster import READY_S, Cluster, Member
from piclusterd.upgrade_build import build, site_packages
from piclusterd.upgrade_source import Release, find

ROOT = Path(__file__).parents[2]


def wheel(source: Path, scratch: Path, version: str, spoil: Callable[[Path], None] = lambda tree: None) -> Release:
    """A wheel of this tree under another version, put at `source`; `spoil` changes the tree before."""
    tree = scratch / f"tree-{version}"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv", ".git", "tests", "__pycache__", ".*_cache"))
    init, project = tree / "piclusterd" / "__init__.py", tree / "pyproject.toml"
    init.write_text(init.read_text().replace(f'"{__version__}"', f'"{version}"'))
    project.write_text(project.read_text().replace(f'version = "{__version__}"', f'version = "{version}"', 1))
    spoil(tree)
    source.mkdir(exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source)],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    shutil.rmtree(tree)
    publish(source)
    return find(str(source), version)


def publish(source: Path) -> None:
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(source.glob("*.whl"))]
    (source / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def install(prefix: Path, source: Path, release: Release) -> None:
    """As systemd/install would: an environment with what is required, and the release in use."""
    base = prefix / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base)], check=True)
    required = next(path for path in sys.path if path.endswith("site-packages"))
    (site_packages(base) / "required.pth").write_text(f"{required}\n")
    made = build(prefix / "releases", base, source / release.file, release)
    for link in ("current", "good"):
        (prefix / link).symlink_to(made)


@dataclass(slots=True)
class KeptCluster(Cluster):
    source: Path = field(default_factory=Path)
    release: Release = field(default_factory=lambda: Release("", "", ""))

    async def start(self, member: Member) -> None:
        prefix = member.home / "opt"
        if not prefix.exists():
            prefix.mkdir()
            await asyncio.to_thread(install, prefix, self.source, self.release)
        with (member.home / "keeper.log").open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "piclusterd.demo.keeper", str(prefix), str(member.config), str(member.state),
                member.api_host, str(member.api_port), str(member.state / "api.sock"),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        await self.until(lambda: self._answers(member), f"{member.name} answers", READY_S)
