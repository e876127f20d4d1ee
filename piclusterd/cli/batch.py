"""`picluster batch`: many requests in one file, answered by all nodes while nobody waits.

    submit FILE   POST /v1/files, POST /v1/batches       refused by its line where a line is wrong
    ls, show ID   GET  /v1/batches[/{id}]                how far they are, from any node
    cancel ID     POST /v1/batches/{id}/cancel           what was answered so far stays
    output ID     GET  /v1/files/{id}/content            the answers, in the order of the file; --errors: what failed

ID is a batch's, or as much of its beginning (with or without `batch_`) as names one of the newest.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from ..errors import NotFound, UserError
from .client import Client, Target, connect
from .terminal import ago, clean, columns, console, plural

PREFIX = "batch_"
UPLOAD_S = 600.0
"""100 MB over Wi-Fi, checked line by line and copied to the other nodes."""
CREATE_S = 60.0
"""A Pi reads the file of 100 MB once more."""
LINE_BYTES_MAX = 1024 * 1024
"""Of the first line, which is read for its url."""
SHOWN = ("status", "endpoint", "input_file_id", "output_file_id", "error_file_id")


@click.group()
def batch() -> None:
    """Batches: files of requests that nobody waits for (OpenAI's /v1/batches)."""


@batch.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def submit(options: Any, file: Path, as_json: bool) -> None:
    """Begin a batch with FILE: one JSON object {custom_id, method, url, body} a line."""
    made = asyncio.run(_submit(options.target, file))
    if as_json:
        print(json.dumps(made))
        return
    click.echo(f"{clean(made['id'])}: {plural(made['request_counts']['total'], 'request')}, within 24 hours.")
    click.echo(f"See `picluster batch show {clean(made['id'])}`.")


async def _submit(where: Target, file: Path) -> dict[str, Any]:
    endpoint = _endpoint(file)
    async with connect(where) as client:
        sent = json.loads(await client.upload("/v1/files", file, {"purpose": "batch"}, UPLOAD_S))
        wish = {"input_file_id": sent["id"], "endpoint": endpoint, "completion_window": "24h"}
        made: dict[str, Any] = json.loads(await client.post("/v1/batches", wish, CREATE_S))
    return made


def _endpoint(file: Path) -> str:
    """Where the first line goes; the node looks at all of them."""
    with file.open("rb") as lines:
        first = lines.readline(LINE_BYTES_MAX)
    try:
        return str(json.loads(first)["url"])
    except (ValueError, LookupError, TypeError):
        fix = 'A line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}}.'
        raise UserError(f"line 1 of {file} is no request", "it is no JSON object with a url", fix) from None


@batch.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_batches(options: Any, as_json: bool) -> None:
    """The newest batches and how far they are."""
    found = asyncio.run(_newest(options.target))
    if as_json:
        print(json.dumps(found))
        return
    now = time.time()
    rows = [
        (one["id"], one["status"], _counted(one), str(one["request_counts"]["failed"]), one["endpoint"],
         ago(now - one["created_at"]))
        for one in found
    ]  # fmt: skip
    if rows:
        columns(console(), ("BATCH", "STATUS", "DONE", "FAILED", "ENDPOINT", "AGE"), rows)
    else:
        click.echo("No batches.")


def _counted(one: dict[str, Any]) -> str:
    counts = one["request_counts"]
    return f"{counts['completed'] + counts['failed']}/{counts['total']}"


@batch.command()
@click.argument("id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(options: Any, id: str, as_json: bool) -> None:
    """One batch: its state, its counts, its files."""
    found = asyncio.run(_shown(options.target, id))
    if as_json:
        print(json.dumps(found))
        return
    counts = found["request_counts"]
    click.echo(f"{clean(found['id'])}  {_counted(found)} done, {counts['failed']} failed")
    for name in SHOWN:
        if found[name]:
            click.echo(f"{name:<15} {clean(found[name])}")
    for fault in (found["errors"] or {}).get("data", ()):
        click.echo(f"{'error':<15} {clean(fault['message'])}")


@batch.command()
@click.argument("id")
@click.pass_obj
def cancel(options: Any, id: str) -> None:
    """End a batch. What was answered so far stays, see `output`."""
    found = asyncio.run(_cancelled(options.target, id))
    click.echo(f"{clean(found['id'])} is {clean(found['status'])}, {_counted(found)} done.")


@batch.command()
@click.argument("id")
@click.option("--errors", is_flag=True, help="The lines that failed instead, and why.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="A file; default: stdout.")
@click.pass_obj
def output(options: Any, id: str, errors: bool, out: Path | None) -> None:
    """The answers of a batch that is over, a JSON object a line, in the order of its file."""
    asyncio.run(_output(options.target, id, errors, out))


async def _output(where: Target, id: str, errors: bool, out: Path | None) -> None:
    async with connect(where) as client:
        found = await _show(client, id)
        file = found["error_file_id" if errors else "output_file_id"]
        if file is None:
            what = "no line failed" if errors else "no line was answered"
            why = f"it is {found['status']}, {_counted(found)} done"
            raise NotFound(f"{found['id']} has no such file", f"{why}: {what}, so far.")
        path = f"/v1/files/{file}/content"
        if out is None:
            await client.download(path, sys.stdout.buffer)
        else:
            with out.open("wb") as sink:
                await client.download(path, sink)


async def _newest(where: Target) -> list[dict[str, Any]]:
    async with connect(where) as client:
        return await _listed(client)


async def _shown(where: Target, id: str) -> dict[str, Any]:
    async with connect(where) as client:
        return await _show(client, id)


async def _cancelled(where: Target, id: str) -> dict[str, Any]:
    async with connect(where) as client:
        chosen = (await _show(client, id))["id"]
        found: dict[str, Any] = json.loads(await client.post(f"/v1/batches/{chosen}/cancel", {}, CREATE_S))
    return found


async def _listed(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(await client.get("/v1/batches"))["data"]
    return found


async def _show(client: Client, id: str) -> dict[str, Any]:
    """The batch that `id`, or its beginning, means."""
    named = id if id.startswith(PREFIX) else PREFIX + id
    found = [one for one in await _listed(client) if one["id"].startswith(named)]
    if len(found) > 1:
        raise NotFound(f"which batch is {clean(id)[:40]}?", f"{len(found)} begin so", "Write more of its id.")
    if not found and not named.removeprefix(PREFIX).isalnum():
        raise UserError(f"{clean(id)[:40]!r} is not the id of a batch", "", "See `picluster batch ls`.")
    shown: dict[str, Any] = json.loads(await client.get(f"/v1/batches/{found[0]['id'] if found else named}"))
    return shown
