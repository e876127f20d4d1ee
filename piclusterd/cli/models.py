"""`picluster pull|ls|ps|show|load|unload|rm|pin|unpin|alias`: the models on a node's disk and in its memory.

    command ─▶ POST /admin/models {what, name, node, …} ─▶ lines of JSON ─▶ a bar | a table | a sentence
    pull ./file.gguf ─▶ the daemon reads the file itself, or is sent it where it may not

`--node` acts on another node, which this one asks over their link. A pull that is stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NotFound, PiclusterError, Unavailable, UserError
from .client import Client, Target, connect
from .terminal import clean, columns, console, size

if TYPE_CHECKING:
    from rich.progress import Progress

SEND_S = 4 * 3600.0
"""A large file to a slow card."""
PLAIN_STEP = 10
"""Percent between two lines of a pull that is not on a terminal."""
Wish = dict[str, Any]

on_node = click.option("--node", default="", metavar="NAME", help="On this node instead of the one that is asked.")
as_json_too = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


# pull --------------------------------------------------------------------------------------------------------------
@click.command()
@click.argument("model", required=False)
@click.option("--name", default="", help="What to call it; default: the catalogue's name, or the file's.")
@click.option("--link", is_flag=True, help="For a file of this machine: share it instead of copying it.")
@on_node
@click.pass_obj
def pull(options: Any, model: str | None, name: str, link: bool, node: str) -> None:
    """Fetch a model: a name of the catalogue, owner/repo[:QUANT], hf:owner/repo/file.gguf, or a GGUF file.

    Without MODEL: what suits the board.
    """
    if model is None:
        asyncio.run(_propose(options.target, node))
    elif _is_file(model):
        asyncio.run(_import(options.target, _file(model), name, link, node))
    else:
        asyncio.run(_pull(options.target, model, name, node))


def _is_file(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or (model.endswith(".gguf") and Path(model).is_file())


def _file(model: str) -> Path:
    path = Path(model).expanduser().resolve()
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    return path


async def _propose(where: Target, node: str) -> None:
    told = await _one(where, {"what": "propose", "node": node})
    click.echo(f"This board has {size(told['memory_total'])} of memory. It runs, best first:")
    rows = [
        (one["name"], f"{one['params_b']:g}B", one["quant"], size(one["bytes"]), one["does"], one["about"])
        for one in told["models"]
    ]
    columns(console(), ("NAME", "PARAMETERS", "QUANT", "SIZE", "DOES", ""), rows)
    if rows:
        click.echo(f"Fetch one with: picluster pull {clean(rows[0][0])}")


async def _import(where: Target, path: Path, name: str, link: bool, node: str) -> None:
    wish = {"what": "import", "name": str(path), "to": name, "hard_link": link}
    try:
        if node:
            raise UserError(
                "a file is not sent to another node", "", "Pull it here, then there: it comes over the LAN."
            )
        model = (await _one(where, wish))["model"]
    except UserError as fault:
        if node or "cannot read" not in fault.what:
            raise
        model = await _send(where, path, name)
    click.echo(f"{clean(model['name'])}: {size(model['size'])}, sha256 {model['sha256'][:16]}…")


async def _send(where: Target, path: Path, name: str) -> dict[str, Any]:
    """For files that only the caller may read."""
    from urllib.parse import quote

    async with connect(where) as client:
        called = quote(name or path.stem.lower(), safe="")
        answer = await client.post_file(f"/admin/models/file?name={called}", path, SEND_S)
    model: dict[str, Any] = json.loads(answer)["model"]
    return model


async def _pull(where: Target, model: str, name: str, node: str) -> None:
    wish = {"what": "pull", "name": model, "to": name, "node": node}
    async with connect(where) as client, aclosing(_lines(client, wish)) as lines:
        await (_draw(lines, model) if console().is_terminal else _tell(lines))
    click.echo(f"{clean(name or model)} is in the store{f' of {clean(node)}' if node else ''}. See `picluster ls`.")


async def _draw(lines: AsyncGenerator[dict[str, Any], None], model: str) -> None:
    with _bar() as bar:
        task = bar.add_task(clean(model), total=None, status="resolving")
        async for line in lines:
            bar.update(task, total=line["total"] or None, completed=line["completed"], status=clean(line["status"]))


def _bar() -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[status]}", markup=False),
    )  # fmt: skip


async def _tell(lines: AsyncGenerator[dict[str, Any], None]) -> None:
    said: tuple[str, int] | None = None
    async for line in lines:
        percent = 100 * line["completed"] // line["total"] if line["total"] else 0
        if said != (now := (line["status"], percent // PLAIN_STEP)):
            said = now
            click.echo(
                clean(f"{line['status']} {percent}% of {size(line['total'])}" if line["total"] else line["status"])
            )


# looking -----------------------------------------------------------------------------------------------------------
@click.command()
@on_node
@as_json_too
@click.pass_obj
def ls(options: Any, node: str, as_json: bool) -> None:
    """The models on the node's disk."""
    told = asyncio.run(_one(options.target, {"what": "list", "node": node}))["models"]
    if as_json:
        print(json.dumps(told))
        return
    rows = []
    for entry in told:
        model = entry["model"]
        kept = "pinned" if model["pinned"] else ""
        names = ",".join(model["aliases"])
        rows.append((model["name"], size(model["size"]), entry["state"] or "on disk", kept, names, model["source"]))
    if rows:
        columns(console(), ("NAME", "SIZE", "STATE", "PINNED", "ALIASES", "FROM"), rows)
    else:
        click.echo("No models here. `picluster pull` proposes some.")


@click.command()
@on_node
@as_json_too
@click.pass_obj
def ps(options: Any, node: str, as_json: bool) -> None:
    """The models in the node's memory, and until when."""
    told = asyncio.run(_one(options.target, {"what": "loaded", "node": node}))["models"]
    if as_json:
        print(json.dumps(told))
        return
    rows = [
        (one["name"], size(one["size"]), one["state"], str(one["context"] or ""), str(one["busy"]), str(one["queued"]),
         "stays" if one["expires_s"] is None else f"{one['expires_s'] / 60:.0f}m", one["why"] or _layers(one["shares"]))
        for one in told
    ]  # fmt: skip
    if rows:
        columns(console(), ("NAME", "SIZE", "STATE", "CONTEXT", "BUSY", "QUEUED", "UNTIL", "WHY"), rows)
    else:
        click.echo("No model is loaded. One of the store is loaded when it is first asked for.")


def _layers(shares: list[str]) -> str:
    """Of a split model, who holds how many."""
    return f"layers: {', '.join(shares)}" if shares else ""


@click.command()
@click.argument("model")
@on_node
@as_json_too
@click.pass_obj
def show(options: Any, model: str, node: str, as_json: bool) -> None:
    """One model of the store: where it is from, and what its file says of it."""
    told = asyncio.run(_one(options.target, {"what": "show", "name": model, "node": node}))
    if as_json:
        print(json.dumps(told))
        return
    state = told["state"] or "on disk"
    for key, value in ({**told["model"], "state": state, "why": told["why"]} | told["about"]).items():
        if value not in ("", [], None) and key != "added":
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            click.echo(f"{key:<14} {clean(shown)}")


# changing ----------------------------------------------------------------------------------------------------------
def _changer(what: str, says: str, done: Callable[[dict[str, Any]], str]) -> Callable[..., None]:
    @click.argument("model")
    @on_node
    @click.pass_obj
    def change(options: Any, model: str, node: str) -> None:
        told = asyncio.run(_one(options.target, {"what": what, "name": model, "node": node}))
        click.echo(f"{clean(model)} {clean(done(told))}.")

    change.__doc__ = says
    return change


@click.command()
@click.argument("model")
@click.option("--split", is_flag=True, help="Divide it over several boards: for a model that fits none.")
@click.option("--yes", is_flag=True, help="Split it without asking first.")
@on_node
@click.pass_obj
def load(options: Any, model: str, split: bool, yes: bool, node: str) -> None:
    """Load a model now, instead of at its first request."""
    if split:
        _show_plan(asyncio.run(_one(options.target, {"what": "plan", "name": model, "node": node}))["plan"])
        if not yes:
            click.confirm("Load it so?", abort=True)
    what = "split" if split else "load"
    told = asyncio.run(_one(options.target, {"what": what, "name": model, "node": node}))
    click.echo(f"{clean(model)} is {clean(told['model']['state'])}.")


def _show_plan(plan: dict[str, Any]) -> None:
    rows = [
        (one["name"], str(one["layers"]), size(one["bytes"]), f"{1000 * one['seconds']:.0f} ms")
        for one in plan["shares"]
    ]
    columns(console(), ("NODE", "LAYERS", "MEMORY", "A TOKEN"), rows)
    click.echo(
        f"Predicted: {plan['tokens_s']:g} tokens/s, loaded in {plan['load_s']:.0f} s. Layers run one after the other,"
        " so it is no faster than one board would be; if any of these boards goes, the model is unloaded."
    )
    if plan["guessed"]:
        click.echo(f"Memory of {clean(', '.join(plan['guessed']))} was not measured yet: taken for a Pi 4's.")
    for one in plan["left_out"]:
        click.echo(f"Left out: {clean(one)}.")


unload = click.command(name="unload")(
    _changer(
        "unload", "Free a model's memory. Requests that run on it go to other nodes.",
        lambda told: "is unloaded" if told["unloaded"] else "was not loaded",
    )
)  # fmt: skip
rm = click.command(name="rm")(
    _changer("remove", "Remove a model from the disk.", lambda told: f"is gone: {size(told['freed'])} are free again")
)
pin = click.command(name="pin")(
    _changer("pin", "Keep a model in memory, and load it when the node starts.", lambda _: "stays once it is loaded")
)
unpin = click.command(name="unpin")(
    _changer("unpin", "Let a model be unloaded when it is idle.", lambda _: "may be unloaded")
)


@click.command()
@click.argument("model")
@click.argument("names", nargs=-1)
@on_node
@click.pass_obj
def alias(options: Any, model: str, names: tuple[str, ...], node: str) -> None:
    """Other names for a model, in place of those it has; none: it has none any more."""
    asyncio.run(_one(options.target, {"what": "alias", "name": model, "aliases": names, "node": node}))
    click.echo(clean(f"{model} is also {', '.join(names)}." if names else f"{model} has no other name."))


# asking ------------------------------------------------------------------------------------------------------------
async def _one(where: Target, wish: Wish) -> dict[str, Any]:
    async with connect(where) as client, aclosing(_lines(client, wish)) as lines:
        return await anext(lines)


async def _lines(client: Client, wish: Wish) -> AsyncGenerator[dict[str, Any], None]:
    """Raises what the daemon objected, whenever it did."""
    async with aclosing(client.lines("POST", "/admin/models", wish)) as lines:
        async for line in lines:
            told = json.loads(line)
            if "error" in told:
                fault = told["error"]
                kind: type[PiclusterError] = UserError if fault["status"] < 500 else Unavailable
                raise kind(fault["what"], fault["why"], fault["fix"])
            yield told
