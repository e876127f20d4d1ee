"""Do the deciders' own tests walk every branch of them? One line a decider; exit status 1 below 100 %.

    pyproject ──import contract──▶ deciders ──own test files──▶ coverage run, a process for each set of them ──▶ %

A decider's own tests are `tests/<room>/test_<name>.py` and `test_<name>_*.py`; of what is a part of
another one TESTED_BY says whose tests are its. What other tests happen to walk does not count.
Words on the command line choose: `python -m bench.deciders ledger.replicate budget`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .report import ROOT

WHOLE = 100.0
CONTRACT = "Deciders neither act nor look at the clock"
MEMBERSHIP = ("tests/cluster/test_membership.py", "tests/cluster/test_membership_lists.py")
RUN = ("tests/workflows/test_run.py",)
PARTS_OF_MEMBERSHIP = ("belief", "roster", "exchange", "probing", "suspicion", "broadcast", "own_facts", "timings")
TRIAGE = (
    *(f"tests/workflows/test_{name}.py" for name in ("triage", "triage_rules", "cases")),
    "tests/integrations/test_triage_linear.py",
)
PARTS_OF_TRIAGE = ("prompt", "ask", "decide", "write", "comment", "issue", "commands", "watch")
VALUES = ("events", "record", "rules", "setup", "views", "wishes")
"""What a node is told, tells and is made with: whoever tests nodes tests these."""
TESTED_BY = {
    **dict.fromkeys([f"cluster.{part}" for part in PARTS_OF_MEMBERSHIP], MEMBERSHIP),
    "cluster.voter_config": ("tests/cluster/test_reconfigure.py",),
    "errors": ("tests/test_config_file.py", "tests/test_node.py"),
    "ledger.checkpoint": ("tests/ledger/test_prune.py",),
    "inference.routing": ("tests/inference/test_placement.py",),
    **dict.fromkeys(("workflows.workflow", "workflows.flight"), RUN),
    **dict.fromkeys([f"workflows.triage_{part}" for part in PARTS_OF_TRIAGE], TRIAGE),
    "workflows.neutral": TRIAGE,
    "workflows.triage_policy": ("tests/workflows/test_triage_policy.py", *TRIAGE),
    "workflows.vectors": ("tests/workflows/test_cases.py",),
    "workflows.spec_prompt": ("tests/workflows/test_spec.py",),
    "workflows.moderation_prompt": ("tests/workflows/test_moderation.py",),
    "workflows.notifying": ("tests/workflows/test_notice.py",),
    **dict.fromkeys(VALUES, ("tests/test_node.py",)),
}


def deciders() -> list[str]:
    """Their names without the package's."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (modules,) = (contract["source_modules"] for contract in contracts if contract["name"] == CONTRACT)
    return [name.removeprefix("piclusterd.") for name in modules]


def tests_of(decider: str) -> tuple[str, ...]:
    if decider in TESTED_BY:
        return TESTED_BY[decider]
    *room, name = decider.split(".")
    directory = ROOT.joinpath("tests", *room)
    found = sorted({*directory.glob(f"test_{name}.py"), *directory.glob(f"test_{name}_*.py")})
    return tuple(str(path.relative_to(ROOT)) for path in found)


def measured(files: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """Decider → what these test files leave out of it, in words; "" where that is nothing."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "COVERAGE_FILE": f"{directory}/data"}
        include = ",".join(str(_path(name)) for name in names)
        run = ["run", "--branch", f"--include={include}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        ran = subprocess.run(_coverage(*run), cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            return dict.fromkeys(names, f"its tests fail: {ran.stdout[-500:]}")
        told = Path(directory, "told.json")
        subprocess.run(_coverage("json", "-q", "-o", str(told)), cwd=ROOT, env=environment, check=True)
        seen = {str(ROOT / path): facts for path, facts in json.loads(told.read_text())["files"].items()}
        return {name: _left_out(seen.get(str(_path(name)))) for name in names}


def _left_out(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "never imported"
    percent = facts["summary"]["percent_covered"]
    gaps = f"lines {facts['missing_lines']}, branches {facts.get('missing_branches', [])}"
    return "" if percent >= WHOLE else f"{percent:.1f} %, {gaps}"


def _path(decider: str) -> Path:
    return ROOT.joinpath("piclusterd", *decider.split(".")).with_suffix(".py")


def _coverage(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "coverage", *arguments]


def main(words: list[str]) -> int:
    names = [name for name in deciders() if not words or any(word in name for word in words)]
    sets: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        sets.setdefault(tests_of(name), []).append(name)
    untested = dict.fromkeys(sets.pop((), []), "no tests of its own")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = untested | {k: v for part in pool.map(measured, sets, sets.values()) for k, v in part.items()}
    for name in names:
        print(f"{name:<32}{found[name] or '100 %'}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
