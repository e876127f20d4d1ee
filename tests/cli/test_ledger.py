"""`picluster ledger` on a real file, with its writer running and without."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from piclusterd.cluster import identity
from piclusterd.events import Record
from piclusterd.folding import MEANING
from piclusterd.ledger.writer import LedgerWriter

from .command import picluster

NOTES = [Record("note", {"text": "plain"}), Record("note", {"text": "\x1b[2Jhostile", "raw": b"\0\xff"}, 7)]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "pi-1"


@pytest.fixture
async def running(state: Path) -> AsyncIterator[LedgerWriter]:
    me = identity.create_cluster(state, "home", "pi-1")
    ledger = await LedgerWriter.start(state / "ledger.db", me.signer, identity.verify, me.name, lambda: 5000)
    await ledger.append(NOTES)
    yield ledger
    await ledger.close()


async def test_heads_are_shown_while_the_daemon_writes(running: LedgerWriter, state: Path) -> None:
    result = await picluster("ledger", "head", "--state-dir", str(state))
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1].split() == [*map(str, running.log), "3", "sound"]


async def test_export_gives_every_entry_as_json(running: LedgerWriter, state: Path) -> None:
    await running.close()
    result = await picluster("ledger", "export", "--jsonl", "--state-dir", str(state))
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["seq"], row["kind"], row["term"]) for row in rows] == [
        (1, "log.open", 0), (2, "note", 0), (3, "note", 7),
    ]  # fmt: skip
    assert rows[2]["body"] == {"text": "\x1b[2Jhostile", "raw": {"base64": "AP8="}}


async def test_export_for_people_lets_nothing_harmful_through(running: LedgerWriter, state: Path) -> None:
    result = await picluster("ledger", "export", "--state-dir", str(state))
    assert result.code == 0
    assert "hostile" in result.out
    assert "\x1b" not in result.out


async def test_verify_says_what_is_wrong(running: LedgerWriter, state: Path) -> None:
    sound = await picluster("ledger", "verify", "--state-dir", str(state))
    assert (sound.code, sound.out) == (0, "3 entries verified, 0 faults.\n")
    await running.close()
    with closing(sqlite3.connect(state / "ledger.db", isolation_level=None)) as conn:
        conn.execute("UPDATE entries SET payload = zeroblob(length(payload)) WHERE id & 1023 = 2")
    rotten = await picluster("ledger", "verify", "--state-dir", str(state))
    assert rotten.code == 1
    assert "after seq 1" in rotten.out


async def test_a_node_without_a_ledger_is_told_so(tmp_path: Path) -> None:
    result = await picluster("ledger", "head", "--state-dir", str(tmp_path))
    assert result.code == 1
    assert "no ledger" in result.err
    assert await asyncio.to_thread(lambda: list(tmp_path.iterdir())) == []


async def test_a_pruned_ledger_is_shown_verified_and_exported_from_its_checkpoint_on(
    running: LedgerWriter, state: Path
) -> None:
    await running.append([Record("run.result", {"run": "r", "step": "s", "value": {}})] * 5)
    _, (checkpoint,) = await running.add_checkpoint(running.log, 8, 5, MEANING)
    while await running.forget(running.log, checkpoint.seq, "rows"):
        pass
    await running.append([Record("note", {"text": "goes on"})])
    head = await picluster("ledger", "head", "--state-dir", str(state))
    assert head.out.splitlines()[1].split() == [*map(str, running.log), "10", "sound"]
    verified = await picluster("ledger", "verify", "--state-dir", str(state))
    assert (verified.code, verified.out) == (0, "2 entries verified, 0 faults.\n")
    exported = await picluster("ledger", "export", "--jsonl", "--state-dir", str(state))
    rows = [json.loads(line) for line in exported.out.splitlines()]
    assert [row["seq"] for row in rows] == [9, 2, 3, 10], "what the checkpoint keeps (its kind is new) comes after it"
