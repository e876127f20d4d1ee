"""`picluster ca rotate`: the cluster's CA is replaced while it runs, on the node that holds its key.

ca rotate ─▶ POST /admin/ca ─▶ all trust both ─▶ all are re-issued ─▶ the old one is dropped
"""

from __future__ import annotations

import asyncio
import json

import click

from .client import Target, connect
from .main import Options
from .terminal import clean

ROTATE_S = 30.0
STAGES = {
    "announced": "The next CA is being made known; both will be trusted.",
    "issuing": "Every member trusts both CAs; certificates are being issued by the next one.",
    "over": "The CA is changed; the old one is trusted no more. Tokens made before are void.",
}


@click.group()
def ca() -> None:
    """The cluster's certificate authority, on the node where `init` ran."""


@ca.command()
@click.option("--finish", is_flag=True, help="Do not wait for members that are missing: they must join anew.")
@click.pass_obj
def rotate(options: Options, finish: bool) -> None:
    """Begin to change the CA, or tell how far that is. It goes on by itself."""
    asyncio.run(_rotate(options.target, finish))


async def _rotate(where: Target, finish: bool) -> None:
    async with connect(where) as client:
        status = json.loads(await client.get("/status.json"))
        told = json.loads(await client.post("/admin/ca", {"finish": finish}, ROTATE_S))
    names = {member["node"]: member["facts"]["name"] for member in status["members"]}
    click.echo(STAGES.get(told["stage"], clean(told["stage"])))
    if told["waiting"]:
        click.echo(f"Waiting for {', '.join(clean(names.get(node) or node) for node in told['waiting'])}.")
