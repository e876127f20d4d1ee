"""`picluster backup` and `picluster recover`: a node in one file, and the way out when a majority is gone for good.

    backup create FILE ──▶ identity, vote record, a consistent copy of the ledger: 0600, checksummed
    backup restore FILE ─▶ the same node again: it opens a new log, fetches what it lacks, and does not vote
    recover --force ─────▶ a new set of voters, written past the majority that no longer exists

A vote record is never restored to vote by: the node may have voted since, and two votes in one term elect two leaders
(Raft, Ongaro 2014, §3.8). `recover` is the one command that can lose acknowledged work and split a cluster in two, so
it says so at length, names what it will do, and wants --force.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from .. import __version__
from ..errors import Broken, NotFound, Refused, UserError
from .setup import _enter, load_config, state_options
from .terminal import ago, clean, plural

if TYPE_CHECKING:
    from ..events import HardState
    from ..ids import NodeId

VERSION_STEP = 1000
"""Added to the voters' version by `recover`: should the old majority turn up after all, having changed its voters a few
times meanwhile, the record that a person forced is still the newer one."""
LOUD = """\
This writes a new set of voters past the majority of the old one. Do it only if that majority is gone for ever:

  * If it still runs somewhere, there will be two coordinators, and both will act.
  * What only the lost nodes held is lost, even where it was acknowledged.
  * The lost nodes must never start again with their old state: reset them and join them anew.
  * Run it on ONE node, the one with the longest ledger (`picluster ledger head` on each tells).
"""


@click.group()
def backup() -> None:
    """A node in one file: identity, vote record, ledger."""


@backup.command("create")
@click.argument("file", type=click.Path(path_type=Path))
@state_options
def backup_create(file: Path, state_dir: str | None, config_path: str | None) -> None:
    """Write this node to FILE, which must not exist. It holds the node's private key: keep it as one."""
    from ..cluster.identity import load
    from ..ledger.archive import create

    with _new_file(file) as out:  # before the user changes: the file belongs to whoever runs this
        try:
            directory = _enter(state_dir, load_config(config_path))
            me = load(directory)
            if me is None:
                raise NotFound(f"no node lives in {directory}", "", "Name it: --state-dir DIR")
            made = create(directory, out, me.node, me.cluster, __version__, time.time())
        except BaseException:
            file.unlink(missing_ok=True)
            raise
    size = sum(member.size for member in made.files.values())
    click.echo(f"{file}: node {clean(me.name)} ({me.node}) of {clean(me.cluster)}, {size:,} bytes before compression.")


@backup.command("restore")
@click.argument("file", type=click.File("rb"))
@click.option("--force", is_flag=True, help="Set a node that is there already aside (*.replaced).")
@state_options
def backup_restore(file: BinaryIO, force: bool, state_dir: str | None, config_path: str | None) -> None:
    """Make this machine the node in FILE. Never while another machine still is that node."""
    from ..ledger.archive import restore

    made = restore(file, _enter(state_dir, load_config(config_path)), force)
    click.echo(
        f"Restored node {clean(made.node)} of {clean(made.cluster)}, as it was {ago(time.time() - made.made)} ago."
    )
    click.echo("It opens a new log and fetches from the others what it lacks.")
    click.echo("It does not vote, for it may have voted since: make it a voter again once it is current.")


def _new_file(path: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
    except FileExistsError:
        raise UserError(f"{path} exists", "a backup never replaces a file", "Choose another name.") from None
    except OSError as fault:
        raise UserError(f"{path} cannot be written", str(fault), "Choose another place.") from None


# recover ---------------------------------------------------------------------------------------------------------
@click.command()
@click.option("--force", is_flag=True, help="Do it. Without it, what would be done is explained.")
@click.option("--voter", "voters", multiple=True, help="Node id of another survivor that votes; may be repeated.")
@state_options
def recover(force: bool, voters: tuple[str, ...], state_dir: str | None, config_path: str | None) -> None:
    """Found the cluster's votes anew on this node, when most voters are lost for good."""
    from ..cluster.identity import load
    from ..ids import NodeId, is_node_id

    directory = _enter(state_dir, load_config(config_path))
    me = load(directory)
    if me is None:
        raise NotFound(f"no node lives in {directory}", "", "Name it: --state-dir DIR")
    if bad := [voter for voter in voters if not is_node_id(voter)]:
        raise UserError(f"{clean(bad[0])} is not a node id", "", "`picluster ledger head` lists them.")
    survivors = tuple(sorted({me.node, *map(NodeId, voters)}))
    click.echo(LOUD)
    click.echo(f"The voters will be: {', '.join(survivors)} (this node is {me.node}).")
    if not force:
        raise Refused("nothing was changed", "this cannot be taken back", "Add --force to do it.")
    state = _recover(directory, survivors)
    click.echo(f"Done: voters, version {state.voters.version}, term {state.term}. Start the daemon here first.")
    if len(survivors) > 1:
        click.echo(f"It leads once {plural(len(survivors) // 2 + 1, 'voter')} of these run.")


def _recover(directory: Path, survivors: tuple[NodeId, ...]) -> HardState:
    """The new vote record, durable; what kept this node from voting is removed last."""
    from ..cluster import hardstate
    from ..events import HardState
    from ..ledger import archive, rescue
    from ..wire import Voters

    lock = rescue.lock(directory / archive.LEDGER)
    try:
        known = _known(directory / "votes") or _known(directory / archive.VOTES_ASIDE) or HardState()
        term = max(known.term, _ledger_term(directory / archive.LEDGER)) + 1
        voters = Voters(known.voters.version + VERSION_STEP, term, survivors)
        state = HardState(term, None, voters, known.incarnation + 1)
        _set_lost_votes_aside(directory / "votes")
        hardstate.save(directory / "votes", state)
        (directory / archive.VOTES_LOST).unlink(missing_ok=True)
        rescue.set_recovered(directory / archive.LEDGER)
    finally:
        os.close(lock)
    return state


def _known(votes: Path) -> HardState | None:
    from ..cluster import hardstate

    try:
        return hardstate.load(votes)
    except Broken:
        return None


def _set_lost_votes_aside(votes: Path) -> None:
    """A record that cannot be read would make every later start refuse; the new one is written in its place."""
    if _known(votes) is None and votes.exists():
        for path in votes.glob("vote.*"):
            path.rename(path.with_name(f"lost-{path.name}"))


def _ledger_term(path: Path) -> int:
    """The highest term of any entry: no coordinator that wrote one may be met again in the same term."""
    import sqlite3

    from ..ledger import store
    from ..ledger.database import broken, open_reader

    if not path.exists():
        return 0
    try:
        with closing(open_reader(path)) as conn:
            return max((fact.term for fact in store.facts(conn)), default=0)
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault
