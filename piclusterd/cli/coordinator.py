"""`picluster coordinator`: who leads, moved by hand.

coordinator move [NODE] ─▶ POST /admin/coordinator ─▶ coordinator: reachable? caught up? ─▶ heir campaigns ─▶ who leads
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from ..errors import Unavailable
from .client import Target, connect
from .terminal import clean
from .voter import chosen

MOVE_S = 30.0
"""An heir has two election timeouts to win, which are 12 s at most."""


@click.group()
def coordinator() -> None:
    """Who coordinates (by itself; by hand before work on a board, or to bring leadership back to one)."""


@coordinator.command()
@click.argument("node", required=False)
@click.pass_obj
def move(options: Any, node: str | None) -> None:
    """Let NODE (name or id) coordinate, or whichever other voter is fittest. It must be up and have caught up."""
    asyncio.run(_move(options.target, node))


async def _move(where: Target, node: str | None) -> None:
    async with connect(where) as client:
        status = json.loads(await client.get("/status.json"))
        names = {member["node"]: member["facts"]["name"] for member in status["members"]}
        wanted = chosen(names, node) if node is not None else None
        answer = json.loads(await client.post("/admin/coordinator", {"node": wanted}, MOVE_S))
    leader = clean(names.get(answer["leader"]) or answer["leader"])
    if wanted not in (None, answer["leader"]):
        raise Unavailable(f"{leader} coordinates now", "another voter won the election.", "Move it again.")
    click.echo(f"{leader} coordinates now (term {answer['term']}).")
