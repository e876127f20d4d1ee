"""npm packages for tests and the demo, outside the tree: a binary of workerd, the providers' SDKs.

    install("@scope/name", "1.2.3") ──► <cache>/@scope+name@1.2.3/node_modules/...      or None and a reason

The cache is `$XDG_CACHE_HOME/piclusterd/npm` (else `~/.cache/...`). Each package at each version has its own directory,
filled beside and then renamed, so two processes that install at once do not meet. The ordinary npm client does the work
with the user's own registry settings: no download host is written anywhere in this project. Install scripts do not run.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSTALL_TIMEOUT_S = 180  # workerd is 160 MB; on a slow line that takes a minute or two


@dataclass(frozen=True, slots=True)
class Found:
    """A path, or None and why not."""

    path: Path | None
    why: str = ""


def cache_dir() -> Path:
    """Where packages are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "piclusterd" / "npm"


def install(package: str, version: str) -> Found:
    """The directory whose `node_modules` holds `package` at exactly `version`; installed on first use."""
    home = cache_dir() / f"{package.replace('/', '+')}@{version}"
    if (home / "node_modules" / package).is_dir():
        return Found(home)
    npm = shutil.which("npm")
    if npm is None:
        return Found(None, "npm is not installed")
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".installing-", dir=home.parent))
    try:
        return _fill(npm, f"{package}@{version}", scratch, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(npm: str, spec: str, scratch: Path, home: Path) -> Found:
    flags = [
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--no-package-lock",
        "--fetch-retries=1",
        "--loglevel=error",
    ]
    command = [npm, "install", "--prefix", str(scratch), *flags, spec]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Found(None, f"npm install {spec} took longer than {INSTALL_TIMEOUT_S} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Found(None, f"npm install {spec} failed: {last}")
    try:
        scratch.rename(home)
    except OSError:
        if not home.is_dir():  # else another process was faster, with the same content
            raise
    return Found(home)
