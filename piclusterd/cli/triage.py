"""`picluster triage`: how triage does, and why it said what it said. From any node: each has the whole ledger.

report        GET /admin/triage            agreement with people by week, calibration, what could be automatic
why ISSUE     GET /admin/triage/{issue}    how one verdict came about
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from ..errors import UserError
from .client import Target, connect
from .terminal import clean, columns, console

WEEKS_SHOWN = 12
LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")


@click.group()
def triage() -> None:
    """How triage does, and why it said what it said."""


@triage.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def report(options: Any, as_json: bool) -> None:
    """Agreement with people, how far its confidence can be believed, and what could be left to it."""
    told = asyncio.run(_get(options.target, "/admin/triage"))
    if as_json:
        print(json.dumps(told))
        return
    click.echo(f"{told['cases']} issues remembered, {told['judged']} of them judged by people.")
    for field in told["fields"]:
        if field["judged"]:
            _show(field)


def _show(field: dict[str, Any]) -> None:
    judged, agreed = field["judged"], field["agreed"]
    click.echo(f"\n{field['field']}: people agreed with {agreed} of {judged} ({agreed / judged:.0%})")
    weeks = [(week, str(count), f"{right / count:.0%}") for week, count, right in field["weeks"][-WEEKS_SHOWN:]]
    columns(console(), ("WEEK", "JUDGED", "AGREED"), weeks)
    bins = [
        (f"{low:.0%} to {low + 0.1:.0%}", str(count), f"{mean:.0%}", f"{right / count:.0%}")
        for low, count, right, mean in field["bins"]
    ]
    columns(console(), ("CONFIDENCE", "JUDGED", "IT SAID", "RIGHT"), bins)
    click.echo(f"calibration error {field['error']:.2f}")
    if field["auto_from"] is None:
        click.echo("at no confidence 95 % of its verdicts stood: leave this field to `suggest`")
    else:
        share, least = field["auto_share"], field["auto_from"]
        click.echo(f"from confidence {least:.2f} on 95 % stood: {share:.0%} of all could be set by it (`auto`)")


@triage.command()
@click.argument("issue")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def why(options: Any, issue: str, as_json: bool) -> None:
    """How the verdict on ISSUE (as LIN-12) came about."""
    if not issue or len(issue) > 64 or not set(issue) <= LETTERS:
        raise UserError(f"{clean(issue)[:40]!r} names no issue", "", "Write it as LIN-12.")
    told = asyncio.run(_get(options.target, f"/admin/triage/{issue}"))
    if as_json:
        print(json.dumps(told))
        return
    click.echo(clean(f"{told['identifier']}  {told['title']}"))
    for line in told["lines"]:
        click.echo(f"  {clean(line)}")


async def _get(where: Target, path: str) -> Any:
    async with connect(where) as client:
        return json.loads(await client.get(path))
