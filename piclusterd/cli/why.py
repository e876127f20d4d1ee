"""`picluster why REQUEST`: where a request went, and why; what was predicted, and what it took.

GET /why/{request}   the id is in the header `X-Request-Id` of every answer
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any

import click

from .client import Target, connect
from .terminal import clean


@click.command()
@click.argument("request")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def why(options: Any, request: str, as_json: bool) -> None:
    """Where a REQUEST (its X-Request-Id) was answered, and why there."""
    found = asyncio.run(_ask(options.target, request))
    if as_json:
        print(json.dumps(found))
        return
    for seen in found["seen"]:
        for line in described(seen):
            click.echo(clean(line))


async def _ask(where: Target, request: str) -> dict[str, Any]:
    async with connect(where) as client:
        found: dict[str, Any] = json.loads(await client.get(f"/why/{request}"))
    return found


def described(seen: dict[str, Any]) -> list[str]:
    """What one node remembers, a line for each thing."""
    at = datetime.fromtimestamp(seen["at"]).astimezone()
    came = f"answered for {seen['relayed_by']}" if seen["relayed_by"] else "asked"
    lines = [f"{seen['node']}: {came} at {at:%H:%M:%S}, {seen['task']} with {seen['model']}, {seen['priority'] or '-'}"]
    for hop in seen["hops"]:
        lines.append(f"  to {hop['node']}: {hop['why']}")
        if hop["fault"]:
            lines.append(f"    which failed: {hop['fault']}")
    if seen["waited_s"] is not None:
        prompt = f"prompt of {seen['prompt_tokens']} tokens, {seen['cached_tokens']} known"
        lines.append(f"  waited {seen['waited_s']:.2f} s; {prompt}; answer of {seen['completion_tokens']}")
    if shipped := seen.get("shipped"):
        size = f"{shipped['bytes'] / 2**20:.1f} MiB"
        lines.append(f"  {shipped['tokens']} tokens of it came from {shipped['peer']}: {size} in {shipped['ms']} ms")
    predicted = f", predicted {seen['hops'][-1]['predicted_s']:.2f} s" if seen["hops"] else ""
    return [*lines, f"  took {seen['took_s']:.2f} s{predicted}; ended: {seen['end'] or 'not yet'}"]
