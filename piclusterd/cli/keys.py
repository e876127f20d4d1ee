"""`picluster keys`: who may use the API of this node, how much of it, and until when.

    keys create NAME ──▶ a key, shown once ──▶ its digest in [api] keys_file ──▶ the daemon, within two seconds

Works on the file alone, so it needs no daemon. The file may be copied to the other nodes: it holds digests only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from ..errors import UserError
from .setup import UNITS, load_config
from .terminal import ago, columns, console

HEADER = "# Keys of the API: their digests and what each may do. Made by `picluster keys`."


def _file_option(command: Callable[..., None]) -> Callable[..., None]:
    at = click.option("--file", "path", type=click.Path(path_type=Path), help="Default: [api] keys_file as configured.")
    config = click.option("--config", "config_path", type=click.Path(), help="The daemon's configuration file.")
    return at(config(command))


@click.group()
def keys() -> None:
    """Keys of the API: one for each client, with the models and rates that are its."""


@keys.command()
@click.argument("name")
@click.option("--model", "models", multiple=True, help="A model it may use, `*` for any letters; default: all.")
@click.option("--rpm", default=0, type=click.IntRange(0), help="Requests a minute; default: any number.")
@click.option("--tpm", default=0, type=click.IntRange(0), help="Tokens a minute; default: any number.")
@click.option("--expires", help="A day as 2027-01-31, or a time from now as 90d; default: never.")
@_file_option
def create(
    name: str,
    models: tuple[str, ...],
    rpm: int,
    tpm: int,
    expires: str | None,
    path: Path | None,
    config_path: str | None,
) -> None:
    """Make a key called NAME and show it, once."""
    from ..web.key_file import Grant, added, digest_of, mint, models_of

    key = mint()
    grant = Grant(digest_of(key.encode()), name, models_of(models), rpm, tpm, _expiry(expires))
    with _editing(path, config_path) as file:
        file.lines = added(file.lines or [HEADER], grant)
    click.echo(key)
    click.echo(f"This is the key of {name}; it is not shown again. Nodes with this file take it at once.", err=True)


@keys.command()
@_file_option
def ls(path: Path | None, config_path: str | None) -> None:
    """The keys there are: names and limits."""
    from ..web.key_file import read

    grants, faults = read(_lines(_where(path, config_path)))
    rows = [
        [
            grant.name,
            ", ".join(grant.models) or "all",
            str(grant.requests_per_minute or "-"),
            str(grant.tokens_per_minute or "-"),
            _left(grant.expires),
        ]
        for grant in grants
    ]
    columns(console(), ["KEY", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "EXPIRES"], rows)
    for fault in faults:
        click.echo(f"not valid: {fault}", err=True)


@keys.command()
@click.argument("name")
@_file_option
def revoke(name: str, path: Path | None, config_path: str | None) -> None:
    """Take the key NAME back. What it asked already is answered."""
    from ..web.key_file import removed

    with _editing(path, config_path) as file:
        file.lines = removed(file.lines, name) or [HEADER]
    click.echo(f"The key {name} is not valid any more.")


def _expiry(text: str | None) -> float:
    from ..web.key_file import moment

    if not text:
        return 0.0
    if text[:-1].isdigit() and text[-1] in UNITS:
        return time.time() + int(text[:-1]) * UNITS[text[-1]]
    return moment(text)


def _left(expires: float) -> str:
    if not expires:
        return "never"
    left = expires - time.time()
    return f"in {ago(left)}" if left > 0 else "expired"


# the file --------------------------------------------------------------------------------------------------------
class _File:
    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, _lines(path)


def _where(path: Path | None, config_path: str | None) -> Path:
    found = path or Path(load_config(config_path).api.keys_file)
    if found == Path():
        raise UserError(
            "this node asks for no keys",
            "[api] keys_file is empty.",
            'Set it, for example to "keys" beside the configuration, or name a file with --file.',
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{path} cannot be read", f"{fault}.") from None


@contextlib.contextmanager
def _editing(path: Path | None, config_path: str | None) -> Iterator[_File]:
    """The file, written back whole when the block ends well. One editor at a time."""
    where = _where(path, config_path)
    try:
        directory = os.open(where.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as fault:
        raise UserError(f"{where.parent} cannot be opened", f"{fault.strerror}.") from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        file = _File(where)
        yield file
        _write(where, file.lines)
    except PermissionError as fault:
        raise UserError(f"{where} cannot be written", f"{fault.strerror}.", "Run it with sudo.") from None
    finally:
        os.close(directory)


def _write(path: Path, lines: Sequence[str]) -> None:
    """As its owner's and group's file still: the daemon must be able to read what root wrote."""
    from ..board.private import write_private

    before = path.stat() if path.exists() else path.parent.stat()
    mode = before.st_mode & 0o777 if path.exists() else 0o600
    write_private(path, "".join(f"{line}\n" for line in lines).encode())
    if os.geteuid() == 0:
        os.chown(path, before.st_uid, before.st_gid)
    path.chmod(mode)
