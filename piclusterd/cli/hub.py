"""`picluster hub`: the outbox at the edge, looked at, helped and deployed. It speaks with the hub, not with a daemon.

    health                     depth, age, who is connected, quota          GET  /health
    dead · replay · purge      what could not be delivered                  GET  /dead, POST /dead/{seq}/replay, DELETE
    pause · resume             a source whose webhooks shall wait           POST /sources/{source}/pause
    deploy                     the Worker and its secrets to Cloudflare     integrations/cloudflare.py

Its address and token are those of the configuration ([hub] url and token_file). What a hub says comes from strangers
in part (delivery ids, reasons): nothing of it reaches the terminal unescaped.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config_file import read_secret
from ..errors import UserError
from .client import Client, Target, connect
from .setup import _config_option, load_config
from .terminal import ago, clean, columns, console, plural

if TYPE_CHECKING:
    from ..config import Config

SOURCES = click.Choice(["linear", "notion", "github", "selftest"])
SECRETS = {"LINEAR": "linear_secret_file", "GITHUB": "github_secret_file", "NOTION": "notion_secret_file"}
"""Prefix of a secret's name at the hub → its key in [webhooks]."""
PAGES_MAX = 100
"""Of 100 dead letters each: more than an outbox holds."""


def hub_target(config: Config) -> Target:
    """Where the hub is. Raises `UserError` where none is configured."""
    if not config.hub.url:
        raise UserError("no hub is configured", fix="Set [hub] url and token_file, or name the file with --config.")
    return Target(Path(), config.hub.url.rstrip("/"), read_secret(config.hub.token_file, os.environ)[0])


@click.group()
def hub() -> None:
    """The hub at the edge: health, dead letters, pauses, deploy."""


def _run(config_path: str | None, work: Any) -> None:
    async def connected() -> None:
        async with connect(hub_target(load_config(config_path))) as client:
            await work(client)

    asyncio.run(connected())


@hub.command()
@_config_option
def health(config_path: str | None) -> None:
    """What waits there, for how long, and what it has cost today."""
    _run(config_path, _health)


async def _health(client: Client) -> None:
    told = json.loads(await client.get("/health"))
    quota, last = told["quota"], told["last"]
    now = datetime.now(UTC).timestamp()
    oldest = "" if told["oldest_unacked_s"] is None else f", the oldest for {ago(told['oldest_unacked_s'])}"
    lines = {
        "waiting": f"{plural(told['depth'], 'webhook')}{oldest}",
        "connected": clean(told["connected"] or "nobody") + f" (term {told['term']})",
        "paused": (", ".join(map(clean, told["paused"])) or "no source") + f", {told['parked']} kept back",
        "dead": plural(told["dead"], "letter"),
        "last": ", ".join(f"{clean(source)} {ago(max(0.0, now - ms / 1000))} ago" for source, ms in last.items())
        or "-",
        "quota": f"{quota['requests']} of {quota['requests_max']} requests, "
        f"{quota['rows_written']} of {quota['rows_max']} rows on {clean(quota['day'])}",
    }
    for name, text in lines.items():
        click.echo(f"{name + ':':<11}{text}")


@hub.command()
@_config_option
def dead(config_path: str | None) -> None:
    """Dead letters: what 20 deliveries or 14 days did not bring to the cluster."""
    _run(config_path, _dead)


async def _dead(client: Client) -> None:
    rows = [
        (str(letter["seq"]), letter["source"], letter["delivery"], str(letter["bytes"]), str(letter["nacks"]),
         datetime.fromtimestamp(letter["dead_ms"] / 1000, UTC).isoformat(timespec="seconds"), letter["why"])
        for letter in await _letters(client)
    ]  # fmt: skip
    columns(console(), ("SEQ", "SOURCE", "DELIVERY", "BYTES", "TRIES", "SINCE", "WHY"), rows)


async def _letters(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for _ in range(PAGES_MAX):
        after = found[-1]["seq"] if found else 0
        page = json.loads(await client.get(f"/dead?after={after}"))["dead"]
        if not page:
            break
        found += page
    return found


def _chosen(seqs: tuple[int, ...], everything: bool) -> None:
    if everything == bool(seqs):
        raise click.UsageError("name dead letters by their SEQ, or say --all")


async def _seqs(client: Client, seqs: tuple[int, ...]) -> tuple[int, ...]:
    return seqs or tuple(letter["seq"] for letter in await _letters(client))


@hub.command()
@click.argument("seqs", nargs=-1, type=click.IntRange(min=1), metavar="[SEQ]...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@_config_option
def replay(seqs: tuple[int, ...], everything: bool, config_path: str | None) -> None:
    """Send dead letters again, under new numbers."""
    _chosen(seqs, everything)

    async def work(client: Client) -> None:
        for seq in await _seqs(client, seqs):
            told = json.loads(await client.post(f"/dead/{seq}/replay", {}, 15.0))
            click.echo(f"{seq} goes out again as {told['seq']}.")

    _run(config_path, work)


@hub.command()
@click.argument("seqs", nargs=-1, type=click.IntRange(min=1), metavar="[SEQ]...")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_config_option
def purge(seqs: tuple[int, ...], everything: bool, yes: bool, config_path: str | None) -> None:
    """Throw dead letters away. They cannot be brought back."""
    _chosen(seqs, everything)

    async def work(client: Client) -> None:
        chosen = await _seqs(client, seqs)
        if not yes:
            click.confirm(f"Throw away {plural(len(chosen), 'dead letter')}?", abort=True)
        for seq in chosen:
            await client.delete(f"/dead/{seq}")
        click.echo(f"{plural(len(chosen), 'dead letter')} thrown away.")

    _run(config_path, work)


@hub.command()
@click.argument("source", type=SOURCES)
@_config_option
def pause(source: str, config_path: str | None) -> None:
    """Take webhooks of SOURCE and keep them at the hub."""
    _run(config_path, _switch(source, "pause"))


@hub.command()
@click.argument("source", type=SOURCES)
@_config_option
def resume(source: str, config_path: str | None) -> None:
    """Let webhooks of SOURCE come again, those that were kept first."""
    _run(config_path, _switch(source, "resume"))


def _switch(source: str, verb: str) -> Any:
    async def work(client: Client) -> None:
        told = json.loads(await client.post(f"/sources/{source}/{verb}", {}, 15.0))
        state = "paused" if told["paused"] else "no longer paused"
        click.echo(f"{source} is {state}; {plural(told['moved'], 'webhook')} moved.")

    return work


# deploy ----------------------------------------------------------------------------------------------------------
@hub.command()
@click.option("--account", envvar="CLOUDFLARE_ACCOUNT_ID", required=True, help="Account id, 32 hex digits.")
@click.option("--token-file", help="File with an API token (Workers Scripts: Edit); else $CLOUDFLARE_API_TOKEN.")
@click.option("--name", default="piclusterd-hub", show_default=True, help="Of the Worker.")
@click.option("--ai-model", default="", help="Workers AI model for hints after long outages; none: off.")
@click.option(
    "--secrets", "with_secrets", is_flag=True, help="Also set HUB_TOKEN and the webhook secrets configured here."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--api-url", envvar="PICLUSTER_CLOUDFLARE_URL", hidden=True)
@_config_option
def deploy(
    account: str, token_file: str | None, name: str, ai_model: str, with_secrets: bool, dry_run: bool,
    api_url: str | None, config_path: str | None,
) -> None:  # fmt: skip
    """Put the hub's Worker at Cloudflare. What is there already and unchanged is left alone."""
    token = read_secret(Path(token_file).absolute(), os.environ)[0] if token_file else _token_of_environment()
    secrets = _secrets_of(load_config(config_path)) if with_secrets else {}
    asyncio.run(
        _deploy(account, token, name, {"HUB_AI_MODEL": ai_model} if ai_model else {}, secrets, dry_run, api_url)
    )


def _token_of_environment() -> str:
    token = os.environ.get("CLOUDFLARE_API_TOKEN", "").strip()
    if not token:
        raise UserError("no Cloudflare API token", fix="Set CLOUDFLARE_API_TOKEN, or name a file with --token-file.")
    return token


def _secrets_of(config: Config) -> dict[str, str]:
    """Name at the hub → secret. A second line of a file is the next secret of a rotation."""
    files = {"HUB_TOKEN": config.hub.token_file}
    files |= {f"{prefix}_SECRET": getattr(config.webhooks, key) for prefix, key in SECRETS.items()}
    found: dict[str, str] = {}
    for secret, file in files.items():
        for suffix, line in zip(("", "_NEXT"), read_secret(file, os.environ) if file else (), strict=False):
            found[secret + suffix] = line
    if not found:
        raise UserError(
            "no secrets are configured here", fix="Set [hub] token_file and [webhooks], or leave --secrets."
        )
    return found


async def _deploy(
    account: str, token: str, name: str, more: Mapping[str, str], secrets: Mapping[str, str], dry_run: bool,
    api_url: str | None,
) -> None:  # fmt: skip
    import aiohttp

    from ..integrations.cloudflare import API_URL, VARIABLES, Cloudflare, worker_source

    source, variables = worker_source(), {**VARIABLES, **more}
    would = "would be " if dry_run else ""
    async with aiohttp.ClientSession(trust_env=True) as http:
        api = Cloudflare(http, account, token, api_url or API_URL)
        plan = await api.plan(source, variables, name)
        if not plan.upload:
            click.echo(f"{name}: unchanged (build {plan.build[:12]}), not uploaded")
        else:
            await _unless(dry_run, api.upload(plan, source, variables))
            made = ", its storage class made" if plan.migrate else ""
            click.echo(f"{name}: {would}uploaded (build {plan.build[:12]}, {len(source)} bytes{made})")
        for secret, text in secrets.items():
            await _unless(dry_run, api.set_secret(name, secret, text))
            click.echo(f"{name}: secret {secret} {would}set")
        if not dry_run:
            click.echo(f'[hub] url = "{await api.address(name)}"')


async def _unless(dry_run: bool, work: Coroutine[Any, Any, None]) -> None:
    if dry_run:
        work.close()
    else:
        await work
