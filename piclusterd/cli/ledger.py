"""`picluster ledger`: what is in this node's ledger, read from its file, with the daemon running or not.

    head     where each log ends, as the cluster compares it
    verify   every hash and signature again; exit code 1 where one is wrong
    export   one entry a line, for people or (--jsonl) for programs

It only reads (query_only), so it may look while the daemon writes: WAL readers and the writer never wait for each
other. What an entry says comes from other machines and from strangers: nothing of it reaches the terminal unescaped.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NotFound
from .setup import _enter, load_config, state_options
from .terminal import clean, columns, console, plural

if TYPE_CHECKING:
    from ..events import Fact

FAULTY = 1
"""Exit code of `verify` where it found something."""
BODY_CHARACTERS_MAX = 100
"""Of an entry's body on its line for people."""


@click.group()
def ledger() -> None:
    """This node's ledger, read from its file."""


@ledger.command("head")
@state_options
def ledger_head(state_dir: str | None, config_path: str | None) -> None:
    """Where each log ends; `forked` and `damaged` where the scrub or a peer found it so."""
    from ..ledger import branches, scrub, store

    with _reader(state_dir, config_path) as conn:
        frozen, damaged = branches.frozen(conn), scrub.damaged(conn)
        rows = []
        for head in store.heads(conn):
            rot = sum(span.last - span.first + 1 for span in damaged if span.log == head.log)
            state = "forked" if head.log in frozen else f"{rot} damaged" if rot else "sound"
            rows.append((head.origin, str(head.epoch), str(head.seq), state))
    columns(console(), ("ORIGIN", "LOG", "ENTRIES", "STATE"), rows)


@ledger.command("verify")
@state_options
def ledger_verify(state_dir: str | None, config_path: str | None) -> int:
    """Hash everything again and check every signature."""
    from ..cluster.identity import verify
    from ..ledger import store

    with _reader(state_dir, config_path) as conn:
        verdict = store.verify_all(conn, verify)
    for fault in verdict.faults:
        click.echo(f"FAULT {clean(fault)}")
    click.echo(f"{verdict.entries} entries verified, {plural(len(verdict.faults), 'fault')}.")
    return FAULTY if verdict.faults else 0


@ledger.command("export")
@click.option("--jsonl", is_flag=True, help="One JSON object a line; bytes as {'base64': …}.")
@state_options
def ledger_export(jsonl: bool, state_dir: str | None, config_path: str | None) -> None:
    """Every entry, log by log, in order. Bodies may hold what outsiders wrote, and private issue text."""
    from ..ledger import store

    with _reader(state_dir, config_path) as conn:
        for fact in store.facts(conn):
            click.echo(_json(fact) if jsonl else _line(fact))


@contextmanager
def _reader(state_dir: str | None, config_path: str | None) -> Iterator[sqlite3.Connection]:
    from ..ledger.database import broken, open_reader

    path = _enter(state_dir, load_config(config_path)) / "ledger.db"
    _must_exist(path)
    try:
        with closing(open_reader(path)) as conn:
            conn.execute("BEGIN")  # one moment's picture, while the daemon goes on
            yield conn
    except sqlite3.Error as fault:
        raise broken(fault, path) from fault


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise NotFound(f"there is no ledger at {path}", "the daemon has not run on it", "Name it: --state-dir DIR")


def _json(fact: Fact) -> str:
    row = {"origin": fact.log.origin, "log": fact.log.epoch, "seq": fact.seq, "term": fact.term, "kind": fact.kind}
    row |= {"unix_ms": fact.hlc >> 16, "body": dict(fact.body)}
    return json.dumps(row, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON lacks, of what msgpack has."""
    import base64

    assert isinstance(value, bytes), "bodies were decoded by our caps: no other type gets in"
    return {"base64": base64.b64encode(value).decode()}


def _line(fact: Fact) -> str:
    body = clean(json.dumps(dict(fact.body), default=_plain, ensure_ascii=False))
    shown = body if len(body) <= BODY_CHARACTERS_MAX else body[: BODY_CHARACTERS_MAX - 1] + "…"
    return f"{fact.log.origin}/{fact.log.epoch} {fact.seq} term {fact.term} {clean(fact.kind)} {shown}"
