"""`picluster upgrade`: another release on every node, one after another, and back again.

    --check            what each node runs, and what the source has                     GET  /admin/upgrade
    --rolling [VER]    drain, switch, gate, next; the coordinator last                  POST /admin/upgrade → a run
    --rollback         each node that runs the newest goes back to its release before   POST /admin/upgrade → a run

It is a run like any other: this command only begins and follows it, and may be ended without ending the upgrade. The
node it speaks to restarts like the others; meanwhile the command waits.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import click

from ..errors import PiclusterError, Unavailable
from .client import Target, connect
from .terminal import Unreachable, clean, columns, console

FOLLOW_S = 4 * 3600.0
"""A cluster of many boards that compile; then the command ends and the run goes on."""
LOOK_S = 0.5


@click.command()
@click.option("--check", "what", flag_value="check", default=True, help="Only look (default).")
@click.option("--rolling", "what", flag_value="install", help="Upgrade all nodes to VERSION, or to the newest.")
@click.option("--rollback", "what", flag_value="rollback", help="Go back to the release before.")
@click.argument("version", required=False, default="")
@click.pass_obj
def upgrade(options: Any, what: str, version: str) -> None:
    """Upgrade the cluster's nodes, one at a time, each taken back by itself where it is not well."""
    if what == "check":
        asyncio.run(_check(options.target))
    else:
        asyncio.run(_roll(options.target, what, version))


async def _check(where: Target) -> None:
    async with connect(where) as client:
        seen = json.loads(await client.get("/admin/upgrade"))
    rows = [
        (clean(one["name"]), clean(one["release"]), "" if one["release"] == seen["version"] else "behind")
        for one in seen["nodes"]
    ]
    columns(console(), ("NODE", "RELEASE", ""), rows)
    for name in seen["away"]:
        click.echo(f"{clean(name)} is away.")
    click.echo(f"The source has {clean(seen['version'])} (sha256 {seen['sha256'][:16]}…).")


async def _roll(where: Target, action: str, version: str) -> None:
    async with connect(where) as client:
        begun = json.loads(await client.post("/admin/upgrade", {"action": action, "version": version}, 30.0))
    click.echo(f"run {begun['run'][:8]}; `picluster jobs show {begun['run'][:8]}` tells it too")
    end = await _follow(where, begun["run"])
    if end["state"] != "done":
        raise PiclusterError(f"the upgrade {end['state']}", clean(end["detail"]), "Then run --rolling again.")
    click.echo(clean(end["detail"]))


async def _follow(where: Target, run: str) -> dict[str, Any]:
    """Its lines as they come, over restarts of the node that tells them; its end."""
    told, ends = 0, time.monotonic() + FOLLOW_S
    while time.monotonic() < ends:
        try:
            async with connect(where) as client:
                shown = json.loads(await client.get(f"/admin/jobs/{run}"))
        except (Unreachable, PiclusterError):
            await asyncio.sleep(LOOK_S)
            continue
        lines = [line for line in shown["lines"] if line["kind"] == "run.result"]
        for line in lines[told:]:
            click.echo(clean(f"  {line['step']}: {line['text']}")[:200])
        told, view = max(told, len(lines)), shown["view"]
        if view is not None and view["state"] != "open":
            end: dict[str, Any] = view
            return end
        await asyncio.sleep(LOOK_S)
    raise Unavailable("the upgrade still goes on", "", f"Follow it with `picluster jobs show {run[:8]}`.")
