"""`picluster init`, `join`, `token` and `config`: what is done to a node's files, with or without its daemon.

    init ──▶ identity.create_cluster ──▶ <state_dir>/identity/ ──▶ a first join token
    join TOKEN ──mDNS or --server──▶ join.join ──▶ <state_dir>/identity/
    token create | ls | revoke ──▶ tokens.Tokens on the same files (locked; the daemon reads them anew each time)

Run as root on a state directory that belongs to another user, these commands become that user first, for the daemon
must be able to read what they write. An mDNS answer is a hint only: the token's pin decides whom we speak to.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..config import Config
from ..errors import NotFound, Refused, Unavailable, UserError
from .terminal import ago, clean, columns, console, plural

if TYPE_CHECKING:
    from ..cluster.identity import Identity
    from ..cluster.join import Joined
    from ..cluster.tokens import Tokens

FIND_S = 15.0
"""How long mDNS may take to name a node that admits us: Wi-Fi loses multicast, answers are repeated after seconds."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_Command = TypeVar("_Command", bound=Callable[..., Any])


def state_options(command: _Command) -> _Command:
    """`--state-dir` and `--config`, which between them say where the node's files are."""
    where = click.option("--state-dir", envvar="PICLUSTER_STATE_DIR", help="The node's files; default: as configured.")
    return where(_config_option(command))


def _config_option(command: _Command) -> _Command:
    return click.option("--config", "config_path", type=click.Path(), help="The daemon's configuration file.")(command)


def load_config(config_path: str | None, *, files: bool = False) -> Config:
    """From the named file, else the installed one where this user may read it, else the defaults.

    `files`: look whether the files it names are there, too. What is done here needs none of them.
    """
    from ..config_file import DEFAULT_PATH, load

    if config_path is not None:
        return load(Path(config_path), os.environ, files=files)
    return load(DEFAULT_PATH if os.access(DEFAULT_PATH, os.R_OK) else None, os.environ, files=files)


# init and join ---------------------------------------------------------------------------------------------------
@click.command()
@click.option("--cluster", required=True, help="The cluster's name.")
@click.option("--name", help="This node's name; default: as configured, else the host's.")
@click.option("--expect", default=3, show_default=True, help="Workers that make up the first voters, this one too.")
@state_options
def init(cluster: str, name: str | None, expect: int, state_dir: str | None, config_path: str | None) -> None:
    """Found a cluster: make its CA and this node, and print how others join."""
    from ..cluster.identity import create_cluster

    config = load_config(config_path)
    directory = _enter(state_dir, config)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = create_cluster(directory, cluster, name or _own_name(config), expect)
    click.echo(f"Cluster {made.cluster} is founded; this node is {made.name} ({made.node}).")
    if expect == 1:
        click.echo("It votes alone. Start the daemon: sudo systemctl enable --now piclusterd")
        return
    click.echo(f"It opens when {plural(expect - 1, 'more worker')} joined (--expect 1 founds a single node).")
    click.echo("Start the daemon here: sudo systemctl enable --now piclusterd")
    _print_token(_tokens(made).create(uses=expect - 1), "1 h", expect - 1)


@click.command()
@click.argument("token")
@click.option("--server", help="host:port of the node where `init` ran; default: found over mDNS.")
@click.option("--name", help="This node's name; default: as configured, else the host's.")
@click.option("--role", type=click.Choice(["worker", "relay"]), help="Default: as configured.")
@state_options
def join(
    token: str, server: str | None, name: str | None, role: Any, state_dir: str | None, config_path: str | None
) -> None:
    """Make this node a member with TOKEN (from `picluster token create`)."""
    from ..cluster import tokens

    config = load_config(config_path)
    pin = tokens.parse(token).ca_pin
    directory = _enter(state_dir, config)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    joined = asyncio.run(_join(token, server, directory, name or _own_name(config), role or config.node.role, config))
    click.echo(f"Joined {joined.identity.cluster} as {joined.identity.name} ({joined.identity.node}).")
    click.echo(f"The cluster's CA is the one the token names: sha256 {pin.hex()}")
    click.echo("Start the daemon: sudo systemctl enable --now piclusterd")


async def _join(token: str, server: str | None, state_dir: Path, name: str, role: Any, config: Config) -> Joined:
    from ..cluster.join import join as ask

    addresses = [server] if server is not None else await _find(token, config)
    faults = []
    for address in addresses:
        try:
            # A Pi that never met a time server has a clock in the past; the CA's pin is what proves the other side.
            return await ask(token, address, state_dir, name, role, check_time=False)
        except (NotFound, Unavailable) as fault:
            if server is not None:
                raise
            faults.append(str(fault))
    why = f"tried: {'; '.join(faults)}" if faults else f"nobody of its cluster answered within {FIND_S:.0f} s"
    raise Unavailable("no node that admits us was found over mDNS", why, "Name it: --server HOST:7946")


async def _find(token: str, config: Config) -> list[str]:
    """Addresses that mDNS names for the token's cluster, those that say they admit first."""
    from ..cluster.discovery import find
    from ..cluster.tokens import parse

    click.echo("Looking for the cluster over mDNS …")
    cluster_id = parse(token).cluster_id
    seen = await find(FIND_S, cluster_id, config.discovery.interfaces, enough=lambda sighting: sighting.admits)
    return [address for sighting in sorted(seen, key=lambda s: not s.admits) for address in sighting.addresses]


def _enter(state_dir: str | None, config: Config) -> Path:
    """The state directory; from here on this process is its owner."""
    directory = Path(state_dir).absolute() if state_dir else config.state_dir
    try:
        owner = directory.stat()
    except FileNotFoundError:
        return directory
    except PermissionError:
        raise Refused(f"{directory} is closed to this user", "", "Run the same command with sudo.") from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        for room in ("identity", "tokens", "join", "discovery"):
            import_module(f"..cluster.{room}", __package__)  # now: the owner may not be able to read the program
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    elif not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"{directory} may not be written by this user", "", "Run the same command with sudo.")
    return directory


def _own_name(config: Config) -> str:
    """As configured, else the host's first label with what a name cannot hold replaced."""
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname().split(".")[0]).strip("-")
    return config.node.name or host[:63].strip("-") or "node"


# tokens ----------------------------------------------------------------------------------------------------------
@click.group()
def token() -> None:
    """Join tokens, on the node where `init` ran."""


@token.command("create")
@click.option("--ttl", default="1h", show_default=True, help="How long it is good for: 30m, 1h, 2d.")
@click.option("--uses", default=1, show_default=True, help="How many nodes it lets in.")
@click.option("--role", type=click.Choice(["worker", "relay"]), default=None, help="Admit this kind of node only.")
@state_options
def token_create(ttl: str, uses: int, role: str | None, state_dir: str | None, config_path: str | None) -> None:
    """Make a token and print the command that uses it. The secret is shown this once."""
    seconds = _seconds(ttl)
    _print_token(_own_tokens(state_dir, config_path).create(seconds, uses, role or ""), ttl, uses)


@token.command("ls")
@state_options
def token_ls(state_dir: str | None, config_path: str | None) -> None:
    """Tokens on file, without their secrets."""
    import time

    listed = _own_tokens(state_dir, config_path).list()
    now = time.time()
    rows = [
        (
            info.id,
            info.state,
            info.role or "any",
            str(info.uses_left),
            ago(info.expires - now) if info.expires > now else "",
        )
        for info in listed
    ]
    columns(console(), ("ID", "STATE", "ROLE", "USES LEFT", "EXPIRES IN"), rows)


@token.command("revoke")
@click.argument("token_id")
@state_options
def token_revoke(token_id: str, state_dir: str | None, config_path: str | None) -> None:
    """Make a token useless from now on. Nodes that joined with it stay."""
    _own_tokens(state_dir, config_path).revoke(token_id)
    click.echo(f"Token {clean(token_id)} is revoked.")


def _own_tokens(state_dir: str | None, config_path: str | None) -> Tokens:
    from ..cluster.identity import load

    directory = _enter(state_dir, load_config(config_path))
    identity = load(directory)
    if identity is None:
        raise NotFound(f"no node lives in {directory}", "", "Run `picluster init` or `picluster join` first.")
    if not identity.can_issue:
        raise Refused("this node cannot admit others", "it does not hold the CA's key", "Ask where `init` ran.")
    return _tokens(identity)


def _tokens(identity: Identity) -> Tokens:
    from ..cluster.tokens import Tokens

    return Tokens(identity.directory, identity.ca_pin)


def _print_token(text: str, ttl: str, uses: int) -> None:
    click.echo(f"Join a node with (valid {ttl}, {plural(uses, 'use')}):")
    click.echo(f"  sudo picluster join {text}")
    click.echo("Where mDNS does not reach, add: --server ADDRESS_OF_THIS_NODE:7946")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise UserError(f"{text!r} is not a duration", "", "Write 30m, 1h or 2d.")
    return float(match.group(1)) * UNITS[match.group(2)]


# config ----------------------------------------------------------------------------------------------------------
@click.group()
def config() -> None:
    """The daemon's configuration, as it would read it now."""


@config.command("check")
@_config_option
@click.option("--no-files", is_flag=True, help="Do not look for secrets: credentials exist in the service only.")
def config_check(config_path: str | None, no_files: bool) -> None:
    """Report every fault at once, each with file and line; exit code 1 if there is any."""
    from ..services import load_policies

    config = load_config(config_path, files=not no_files)
    if not no_files or Path(config.triage.policy_file).is_file():
        load_policies(config)
    click.echo("The configuration is sound.")


@config.command("show")
@_config_option
@click.option("--default", "default", is_flag=True, help="The documented file with every key at its default.")
def config_show(config_path: str | None, default: bool) -> None:
    """Every key in force, as TOML; secrets are in files and only their names show."""
    from ..config_keys import render_default, render_values

    click.echo(render_default() if default else render_values(load_config(config_path)), nl=False)
