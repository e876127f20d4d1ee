"""`picluster jobs`: the runs of workflows, from any node.

    ls                  GET  /status.json        the newest runs; dead letters and questions first
    show, logs RUN      GET  /admin/jobs/{run}   what the ledger says of one, in a few lines or whole
    retry, cancel, approve, reject RUN
                        POST /admin/jobs         recorded by the coordinator, wherever it is, before it is answered

RUN is an id, or as much of its beginning as names one run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from ..errors import NotFound, UserError
from .client import Client, Target, connect
from .terminal import ago, clean, columns, console

CHANGE_S = 20.0
SHORT = 10
"""Characters of a run's id that are shown; enough to name one of thousands."""
DONE = {"retry": "is open again", "cancel": "is cancelled", "approve": "goes on", "reject": "goes on without it"}
LINE_CHARACTERS_MAX = 160
FIRST = {"failed": 0, "open": 1}
"""States in the order a person wants them; the rest by age."""


@click.group()
def jobs() -> None:
    """The runs of workflows: what they did, what they wait for, what was given up."""


@jobs.command("ls")
@click.option("--state", help="Only these: open, done, failed, ignored or cancelled.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_jobs(options: Any, state: str | None, as_json: bool) -> None:
    """The newest runs. Failed ones (dead letters) stand first, then open ones."""
    runs = [run for run in asyncio.run(_runs(options.target)) if state in (None, run["state"])]
    if as_json:
        print(json.dumps(runs))
        return
    now = datetime.now(UTC).timestamp()
    rows = [
        (run["run"][:SHORT], run["workflow"], run["state"], _waits(run), run["title"], ago(now - _began_s(run)))
        for run in sorted(runs, key=lambda run: (FIRST.get(run["state"], 2), -run["hlc"]))
    ]  # fmt: skip
    if rows:
        columns(console(), ("RUN", "WORKFLOW", "STATE", "WHY", "TITLE", "AGE"), rows)
    else:
        click.echo("No runs.")


def _waits(run: dict[str, Any]) -> str:
    return str(run["asks"] or (run["detail"] if run["state"] != "open" else run["step"]))


def _began_s(run: dict[str, Any]) -> float:
    """Seconds since 1970; the hybrid clock may be ahead of ours, never by much."""
    return float(run["hlc"] >> 16) / 1000


@jobs.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(options: Any, run: str, as_json: bool) -> None:
    """One run: its state, and a line for each step."""
    asyncio.run(_show(options.target, run, as_json, LINE_CHARACTERS_MAX))


@jobs.command()
@click.argument("run")
@click.pass_obj
def logs(options: Any, run: str) -> None:
    """Everything the ledger says of one run, whole."""
    asyncio.run(_show(options.target, run, False, None))


async def _show(where: Target, run: str, as_json: bool, width: int | None) -> None:
    async with connect(where) as client:
        shown = json.loads(await client.get(f"/admin/jobs/{await _chosen(client, run)}"))
    if as_json:
        print(json.dumps(shown))
        return
    view = shown["view"]
    if view is not None:
        click.echo(clean(f"{shown['run']}  {view['workflow']}  {view['state']}  {view['title']}"))
        if view["asks"]:
            click.echo(clean(f"asks: {view['asks']} (picluster jobs approve|reject {shown['run'][:SHORT]})"))
    for line in shown["lines"]:
        at = datetime.fromtimestamp(line["at_ms"] / 1000).astimezone()
        text = clean(f"{line['kind']:<10} {line['step']:<12} {line['text']}")
        cut = text if width is None or len(text) <= width else text[: width - 1] + "…"
        click.echo(f"{at:%Y-%m-%d %H:%M:%S}  term {line['term']} on {clean(line['node'])}  {cut}")


async def _runs(where: Target) -> list[dict[str, Any]]:
    async with connect(where) as client:
        runs: list[dict[str, Any]] = json.loads(await client.get("/status.json"))["runs"]
    return runs


async def _chosen(client: Client, run: str) -> str:
    """The id that `run`, its beginning, means."""
    if not run or not all(digit in "0123456789abcdef" for digit in run) or len(run) > 32:
        raise UserError(f"{clean(run)[:40]!r} is not the id of a run", "", "See `picluster jobs ls`.")
    if len(run) == 32:
        return run
    runs = json.loads(await client.get("/status.json"))["runs"]
    found = [one["run"] for one in runs if one["run"].startswith(run)]
    if len(found) == 1:
        return str(found[0])
    why = f"{len(found)} runs begin so" if found else "none of the newest runs begins so"
    raise NotFound(f"which run is {run}?", why, "Write more of its id, or all of it.")


def _changer(what: str, says: str) -> Callable[..., None]:
    @click.argument("run")
    @click.pass_obj
    def change(options: Any, run: str) -> None:
        asyncio.run(_change(options.target, what, run))

    change.__doc__ = says
    return change


async def _change(where: Target, what: str, run: str) -> None:
    async with connect(where) as client:
        wish = {"what": what, "run": await _chosen(client, run)}
        changed = json.loads(await client.post("/admin/jobs", wish, CHANGE_S))
    click.echo(clean(f"{changed['run'][:SHORT]} {changed['title']}: {DONE[what]}."))


jobs.command("retry")(_changer("retry", "Try a failed run again, from the step that failed. What it did stays done."))
jobs.command("cancel")(_changer("cancel", "End a run for good. A call that is under way may still take effect."))
jobs.command("approve")(_changer("approve", "Say yes to what a run asks."))
jobs.command("reject")(_changer("reject", "Say no to what a run asks."))
