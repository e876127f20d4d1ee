"""The rehearsal room as machine code: the same files, compiled by mypyc in a copy beside it, for long campaigns.

    piclusterd/*.py ──copy──▶ build/compiled/<digest>/ ──mypyc──▶ *.so beside them ──▶ python -m piclusterd.sim

`python -m bench.compiled --seeds 50000 --jobs 2` builds (two minutes, once for each state of the sources) and plays:
every argument is the simulator's. What is compiled is what a rehearsal loads, the deciders and the ledger's functions
included; types that msgspec makes, and exceptions, stay as they are. It plays the very same traces (`bench/sim.py`
compares their digests), twice as fast; asserts stay, and annotations are checked besides. The daemon never runs it.
It needs a C compiler, Python's headers, and setuptools beside the `dev` extra's mypy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .report import ROOT

BUILDS = ROOT / "build" / "compiled"
INTERPRETED = {
    *(
        "piclusterd.wire",
        "piclusterd.events",
        "piclusterd.config",
        "piclusterd.inference.protocol",
    ),  # structs of msgspec: classes with a maker of theirs
    *("piclusterd.errors", "piclusterd.sim.rest"),  # exceptions
    *("piclusterd.sim.__main__", "piclusterd.sim.campaign", "piclusterd.sim.ablations", "piclusterd.sim.census"),
}
LOADED = "import sys, piclusterd.sim.__main__; print(*(n for n in sys.modules if n.split('.')[0] == 'piclusterd'))"
SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup
modules = mypycify(["--config-file=", "--ignore-missing-imports", *sys.argv[1:]], opt_level="2", debug_level="0")
setup(name="rehearsal", ext_modules=modules, script_args=["build_ext", "--inplace"])
"""
WORDS_OF_FAILURE = 2000
"""Characters of a failed build's output that are shown: its end says why."""


def play(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with `arguments`, where `piclusterd` is the one in `directory`; its output as text."""
    return subprocess.run(_command(*arguments), env=_environment(directory), capture_output=True, text=True, check=True)


def build() -> Path:
    """The directory of a compiled copy of today's sources; made where it is missing. SystemExit where that fails."""
    loaded = play(ROOT, "-c", LOADED).stdout.split()
    directory = BUILDS / _digest(loaded)
    if directory.exists():
        return directory
    print("  compiling the rehearsal room (two minutes, once)", file=sys.stderr, flush=True)
    half = directory.with_suffix(f".{os.getpid()}")  # two may build at once
    shutil.copytree(ROOT / "piclusterd", half / "piclusterd", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    paths = sorted(path for name in {*loaded} - INTERPRETED if (path := _file(half, name)).exists())
    made = subprocess.run(
        _command("-c", SETUP, *(str(path.relative_to(half)) for path in paths)),
        env=_environment(half), cwd=half, capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        sys.exit(f"the rehearsal room could not be compiled: {(made.stdout + made.stderr)[-WORDS_OF_FAILURE:]}")
    if not directory.exists():
        half.rename(directory)
    return directory


def _file(directory: Path, name: str) -> Path:
    """Of a module; one that does not exist for a package, which has nothing in it."""
    return directory / f"{name.replace('.', '/')}.py"


def _digest(loaded: list[str]) -> str:
    """Of all that a rehearsal loads, and for which Python."""
    known = hashlib.blake2b(f"{sys.version}{SETUP}{sorted(INTERPRETED)}".encode(), digest_size=8)
    for path in sorted(path for name in loaded if (path := _file(ROOT, name)).exists()):
        known.update(path.read_bytes())
    return known.hexdigest()


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", *arguments]  # -P: what is in the current directory must not be found first


def _environment(directory: Path) -> dict[str, str]:
    path = os.pathsep.join((str(directory), *filter(None, (os.environ.get("PYTHONPATH"),))))
    return {**os.environ, "PYTHONPATH": path}


if __name__ == "__main__":
    room = _environment(build())
    os.execve(sys.executable, _command("-m", "piclusterd.sim", *sys.argv[1:]), room)
