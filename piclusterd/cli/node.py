"""`picluster node remove`: a member leaves for good, whether it is up, lost or stolen.

node remove NODE ─▶ POST /admin/removals ─▶ its office and its vote go first ─▶ ledger: node.removed ─▶ all links end
"""

from __future__ import annotations

import asyncio
import json

import click

from .client import Target, connect
from .main import Options
from .terminal import clean
from .voter import CHANGE_S, chosen

REMOVE_S = 2 * CHANGE_S
"""A coordinator hands over first, then the vote is taken away, and each may wait for others."""


@click.group()
def node() -> None:
    """Members of the cluster (see them all: `picluster status`)."""


@node.command()
@click.argument("node")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def remove(options: Options, node: str, yes: bool) -> None:
    """Remove NODE (name or id) from the cluster for good.

    Its links end, its certificate is refused from now on, it leaves every list. What it wrote stays in the ledger.
    """
    asyncio.run(_remove(options.target, node, yes))


async def _remove(where: Target, node: str, yes: bool) -> None:
    async with connect(where) as client:
        status = json.loads(await client.get("/status.json"))
        names = {member["node"]: member["facts"]["name"] for member in status["members"]}
        member = chosen(names, node)
        called = clean(names.get(member) or member)
        if not yes:
            click.confirm(f"Remove {called} ({member}) for good? Its key will never be admitted again", abort=True)
        await client.post("/admin/removals", {"node": member}, REMOVE_S)
    click.echo(f"{called} ({member}) is removed. Its board joins again with an empty state directory and a new token.")
