"""`picluster`: the commands, the global options, and how faults end a command.

    picluster [--host URL --key-file F | --socket PATH] COMMAND …
        exit code 0 done · 1 failed (`status`: degraded) · 2 no quorum (`status` only) · 3 daemon unreachable
                  64 wrong usage · 130 Ctrl-C

Heavy libraries (aiohttp, rich, cryptography) are imported by the command that needs them, so that help is quick.
A fault is told as what, why and fix; a traceback only with --debug.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import PiclusterError
from .client import Target, target
from .terminal import Unreachable, clean, show_fault

FAILED, UNREACHABLE, USAGE, INTERRUPTED = 1, 3, 64, 130
"""64 is EX_USAGE of sysexits.h: 2 would read as `no quorum`."""

COMMANDS = {
    "init": "setup", "join": "setup", "token": "setup", "config": "setup",
    "status": "status", "models": "status", "events": "status", "why": "why", "chat": "chat",
    "pull": "models", "ls": "models", "ps": "models", "show": "models", "load": "models", "unload": "models",
    "rm": "models", "pin": "models", "unpin": "models", "alias": "models",
    "node": "node", "voter": "voter", "ca": "ca", "coordinator": "coordinator", "jobs": "jobs", "keys": "keys",
    "triage": "triage",
    "batch": "batch",
    "ledger": "ledger", "backup": "backup", "recover": "backup",
    "doctor": "doctor", "hub": "hub", "selftest": "selftest", "upgrade": "upgrade",
}  # fmt: skip
"""Command → the module of this room that has it."""


@dataclass
class Options:
    """The global options; `target` is made of them when a command first needs the daemon."""

    host: str | None = None
    socket: str | None = None
    key_file: str | None = None
    debug: bool = False
    environ: Any = field(default_factory=lambda: os.environ)

    @cached_property
    def target(self) -> Target:
        return target(self.host, self.socket, self.key_file, self.environ)


class Commands(click.Group):
    """Imports a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        command = getattr(import_module(f".{COMMANDS[cmd_name]}", __package__), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", envvar="PICLUSTER_HOST", metavar="URL", help="A node's URL; default: the local daemon.")
@click.option("--key-file", envvar="PICLUSTER_KEY_FILE", metavar="FILE", help="File with the bearer key for --host.")
@click.option("--socket", envvar="PICLUSTER_SOCKET", metavar="PATH", help="The local daemon's unix socket.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_obj
def cli(options: Options, host: str | None, key_file: str | None, socket: str | None, debug: bool) -> None:
    """Private AI on a home cluster of Raspberry Pis."""
    options.host, options.key_file, options.socket, options.debug = host, key_file, socket, debug


@cli.command()
def version() -> None:
    """The version of this client."""
    click.echo(f"picluster {__version__}")


def main(args: list[str] | None = None) -> NoReturn:
    """Runs one command and exits."""
    options = Options()
    try:
        result = cli.main(args=args, prog_name="picluster", standalone_mode=False, obj=options)
        sys.stdout.flush()
    except click.ClickException as fault:
        fault.show()
        sys.exit(USAGE if isinstance(fault, click.UsageError) else fault.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as fault:
        if options.debug:
            raise
        sys.exit(_fail(fault))
    sys.exit(result if isinstance(result, int) else 0)


def _fail(fault: Exception) -> int:
    if isinstance(fault, PiclusterError):
        show_fault(fault)
        return UNREACHABLE if isinstance(fault, Unreachable) else FAILED
    what = f"{type(fault).__name__}: {clean(fault)}"
    show_fault(PiclusterError("this is a fault of picluster itself", what, "Run it again with --debug and report it."))
    return FAILED


if __name__ == "__main__":
    main()
