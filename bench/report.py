"""What every bench prints and writes: one table for people, one JSON for machines, and an exit status.

    main("gossip", measure) ──▶ measure(report, quick) ──rows──▶ table, `--json FILE`, status 1 if one is not ok

A row is {"what", "value", "unit", "peer", "peer_value", "ratio", "budget", "ok"}. `ratio` is oriented so that larger is
better for us; `ok` is null where no budget stands. A peer that could not be run says why in `what`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
DIGITS = 4
"""Significant figures of a value; more would claim a precision that no bench here has."""
WIDTH = 150
"""Of the table where nobody says how wide the terminal is (a log)."""


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    budget: str | None = None
    ok: bool | None = None


@dataclass(slots=True)
class Report:
    name: str
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        peer: str | None = None,
        peer_value: float | None = None,
        larger_is_better: bool = False,
        at_most: float | None = None,
        at_least: float | None = None,
        ratio_at_least: float | None = None,
    ) -> Row:
        """One measurement, beside a peer's where there is one, against its budget where one stands."""
        ratio = _ratio(value, peer_value, larger_is_better)
        free = not larger_is_better and peer_value is not None and value <= 0
        held = free or (ratio is not None and ratio >= (ratio_at_least or 0))
        stands = [
            *([] if at_most is None else [(f"<= {at_most:g}", value <= at_most)]),
            *([] if at_least is None else [(f">= {at_least:g}", value >= at_least)]),
            *([] if ratio_at_least is None else [(f"ratio >= {ratio_at_least:g}", held)]),
        ]
        row = Row(
            what,
            _short(value),
            unit,
            peer,
            None if peer_value is None else _short(peer_value),
            None if ratio is None else _short(ratio),
            ", ".join(text for text, _ in stands) or None,
            all(held for _, held in stands) if stands else None,
        )
        self.rows.append(row)
        print(f"  {what}: {row.value:g} {unit}", file=sys.stderr, flush=True)
        return row

    @property
    def ok(self) -> bool:
        return all(row.ok is not False for row in self.rows)

    def as_json(self) -> str:
        facts = {"name": self.name, "machine": machine(), "commit": commit()}
        return json.dumps(facts | {"rows": [asdict(row) for row in self.rows]}, indent=1, ensure_ascii=False) + "\n"

    def table(self) -> Table:
        table = Table(title=f"{self.name}  ({machine()}, {commit()})", title_justify="left")
        for title in ("what", "value", "unit", "peer", "its value", "ratio", "budget", "ok"):
            table.add_column(title, justify="left" if title in ("what", "unit", "peer") else "right")
        for row in self.rows:
            verdict = {None: "", True: "ok", False: "NOT OK"}[row.ok]
            table.add_row(
                row.what, f"{row.value:g}", row.unit, row.peer or "", _text(row.peer_value), _text(row.ratio),
                row.budget or "", verdict,
            )  # fmt: skip
        return table


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of `values` lies (nearest rank). `values` must not be empty."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(part * len(ranked)))]


def main(name: str, measure: Callable[..., None], *options: Callable[[Any], Any]) -> None:
    """The command line of a bench, with more `options` of its own, which `measure` gets after the report and `quick`.

    Leaves by `sys.exit`: 1 where a row is not ok.
    """

    @click.command(name, help=f"Measure {name}.", context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--quick", is_flag=True, help="within two minutes, with fewer runs")
    @click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="also write the rows here")
    def command(quick: bool, path: Path | None, **more: Any) -> None:
        report = Report(name)
        measure(report, quick, **more)
        console = Console(width=None if sys.stdout.isatty() else WIDTH)
        console.print(report.table())
        if path is not None:
            path.write_text(report.as_json())
        sys.exit(0 if report.ok else 1)

    for option in options:
        command = option(command)
    command()


def machine() -> str:
    """CPU, cores and Python, in a few words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    cpu = named[-1] if named else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}"


def commit() -> str:
    """The short hash of what was measured, with a `+` where the tree differs from it; empty outside a checkout."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _ratio(value: float, peer_value: float | None, larger_is_better: bool) -> float | None:
    if peer_value is None or min(value, peer_value) <= 0:
        return None  # of an overhead below the noise, say: it costs nothing, and nothing is no multiple
    return value / peer_value if larger_is_better else peer_value / value


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
