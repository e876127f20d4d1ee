"""`picluster doctor`: what is wrong with this board, this node and its neighbours, and what to mend.

    checkup.look ──▶ Survey ──▶ board.doctor.examine ──▶ findings        exit code 0 nothing wrong · 1 something is

Works without the daemon, without a cluster and without root; as root it sees more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .setup import load_config, state_options
from .terminal import STYLES, clean, console, plural

if TYPE_CHECKING:
    from ..board.doctor import Finding

FORMAT = 1
"""Of --json; fields are only ever added."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--section", metavar="NAME", help="Only what begins with NAME: power, mem, disk, net, clock, isa …")
@click.option("--root", type=click.Path(path_type=Path), default=Path("/"), hidden=True, help="Where proc and sys are.")
@state_options
@click.pass_obj
def doctor(
    options: Any, as_json: bool, section: str | None, root: Path, state_dir: str | None, config_path: str | None
) -> int:
    """What is wrong with this board, this node and its neighbours, and what to do about it.

    Exit code: 0 nothing (notes do not count), 1 faults or warnings.
    """
    from ..board.doctor import CHECKS, examine
    from .checkup import look

    config = load_config(config_path)
    state = Path(state_dir).absolute() if state_dir else config.state_dir
    found = examine(asyncio.run(look(options.target, config, state, root)))
    found = [finding for finding in found if finding.id.startswith(section or "")]
    if as_json:
        print(json.dumps({"format": FORMAT, "findings": [asdict(finding) for finding in found]}))
    else:
        _draw(found, len(CHECKS))
    return int(any(finding.severity != "note" for finding in found))


def _draw(found: Sequence[Finding], checks: int) -> None:
    out = console()
    for finding in found:
        head = f"{finding.severity:<8} {finding.id:<20} {finding.what}"
        out.print(clean(head), style=STYLES[finding.severity])
        for label, told in (("why", finding.why), ("fix", finding.fix)):
            out.print(clean(f"{'':<8} {label}: {told}"))
    out.print(f"{plural(len(found), 'finding')} of {plural(checks, 'check')}.")
