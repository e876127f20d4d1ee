"""`picluster voter`: who votes, changed one node at a time by whoever coordinates.

voter add NODE    ─▶ POST /admin/voters ─▶ coordinator: caught up? enough heard? ─▶ stored by a majority ─▶ answer
voter remove NODE ─▶ likewise; a coordinator that removes itself hands over afterwards
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from ..errors import NotFound
from .client import Target, connect
from .terminal import clean

PREFIX_MIN = 4
"""Digits of an id that may stand for it where they are one node's only."""
CHANGE_S = 80.0
"""A change waits up to a minute to become possible: for the node to catch up, or for voters to come back."""


@click.group()
def voter() -> None:
    """Who votes (by hand; a voter that failed 14 days ago is replaced without being asked)."""


@voter.command()
@click.argument("node")
@click.pass_obj
def add(options: Any, node: str) -> None:
    """Let NODE (name or id) vote. It must be up and have caught up with the ledger."""
    asyncio.run(_change(options.target, "add", node))


@voter.command()
@click.argument("node")
@click.pass_obj
def remove(options: Any, node: str) -> None:
    """Take NODE's vote away; it stays a member that learns and serves."""
    asyncio.run(_change(options.target, "remove", node))


async def _change(where: Target, what: str, node: str) -> None:
    async with connect(where) as client:
        status = json.loads(await client.get("/status.json"))
        names = {member["node"]: member["facts"]["name"] for member in status["members"]}
        member = chosen(names, node)
        answer = json.loads(await client.post("/admin/voters", {"what": what, "node": member}, CHANGE_S))
    voters = ", ".join(clean(names.get(one) or one) for one in answer["voters"])
    click.echo(f"Voters now: {voters} (version {answer['version']}, term {answer['term']}).")


def chosen(names: dict[str, str], node: str) -> str:
    """The id that `node`, a name, an id or the beginning of one, means. Raises `NotFound`."""
    if node in names:
        return node
    matches = [one for one, name in names.items() if name == node]
    matches = matches or [one for one in names if len(node) >= PREFIX_MIN and one.startswith(node)]
    if len(matches) == 1:
        return matches[0]
    why = f"{len(matches)} nodes are called so: {', '.join(matches)}" if matches else "no member has that name or id"
    raise NotFound(f"which node is {clean(node)}?", f"{why}.", "Use an id of `picluster status --json`.")
