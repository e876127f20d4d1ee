"""The kill loop's judge: silent where all was kept, and it names what was not."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from piclusterd.cluster import identity
from piclusterd.demo.kill_audit import audit, finished
from piclusterd.demo.linear_double import LinearDouble
from piclusterd.events import Record
from piclusterd.ids import run_id
from piclusterd.ledger import database, store
from piclusterd.wire import Entry, Hook
from piclusterd.workflows.journal import hook_record
from tests.ledger.keys import Key

WALL_MS = 1_700_000_000_000


def triaged(issue: str, key: str = "k") -> list[Record]:
    return [hooked(issue, key), ended(key)]


def hooked(issue: str, key: str = "k") -> Record:
    body = json.dumps({"data": {"identifier": issue}}).encode()
    return hook_record(Hook("linear", key, "Issue", body), "triage", f"{issue} title", 1)


def ended(key: str = "k") -> Record:
    return Record("run.done", {"run": run_id("triage", key), "outcome": "done", "detail": ""}, 1)


class Files:
    """Ledgers of two nodes: what pi-1 wrote, and what of it reached pi-2."""

    def __init__(self, root: Path) -> None:
        self.paths = {name: root / f"{name}.db" for name in ("pi-1", "pi-2")}
        self._key = Key()

    def write(self, records: Sequence[Record], reached: bool = True) -> None:
        with closing(database.open_database(self.paths["pi-1"])) as conn:
            log = store.open_log(conn, self._key, "pi-1", 1, WALL_MS)
            store.append(conn, log, records, self._key, WALL_MS)
            entries = self._all(conn)
        with closing(database.open_database(self.paths["pi-2"])) as conn:
            if reached:
                store.apply(conn, entries, identity.verify)

    def _all(self, conn: sqlite3.Connection) -> list[Entry]:
        return [Entry(*row) for row in conn.execute("SELECT header, payload, signature FROM entries ORDER BY id")]


def linear_after(*comments: str) -> LinearDouble:
    """A workspace with one issue, its fields set, and a comment for each of `comments`."""
    linear = LinearDouble()
    issue = linear.create_issue("t")["data"]["id"]
    change(linear, "issueUpdate", id=issue, input={"priority": 1, "addedLabelIds": [next(iter(linear.labels))]})
    for body in comments:
        change(linear, "commentCreate", input={"issueId": issue, "body": body})
    return linear


def change(linear: LinearDouble, root: str, **arguments: Any) -> None:
    linear.roots()[root](None, **arguments)


def test_what_was_kept_has_no_faults(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(triaged("LIN-1"))
    found = audit(files.paths, ["LIN-1"], linear_after("only"))
    assert found.faults == ()
    assert found.entries == 3
    assert finished(files.paths["pi-1"], ["LIN-1"])


def test_a_webhook_that_one_ledger_lacks_is_lost(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(triaged("LIN-1"), reached=False)
    faults = audit(files.paths, ["LIN-1"], linear_after("only")).faults
    assert any(fault.startswith("pi-2: LIN-1") and "lost" in fault for fault in faults)
    assert "pi-2 and pi-1 end differently" in faults


def test_an_issue_with_two_runs_was_triaged_twice(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(triaged("LIN-1") + triaged("LIN-1", "other"))
    assert any("done', 'done" in fault for fault in audit(files.paths, ["LIN-1"], linear_after("only")).faults)


def test_a_second_comment_and_a_second_change_of_a_field_are_named(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(triaged("LIN-1"))
    linear = linear_after("one", "two")
    change(linear, "issueUpdate", id="LIN-1", input={"priority": 2})
    faults = audit(files.paths, ["LIN-1"], linear).faults
    assert set(faults) == {"LIN-1: priority was written 2 times", "LIN-1: body was written 2 times"}


def test_a_run_that_is_still_open_is_not_finished(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write([hooked("LIN-1")])
    assert not finished(files.paths["pi-1"], ["LIN-1"])
    assert any("open" in fault for fault in audit(files.paths, ["LIN-1"], linear_after("only")).faults)


def test_an_entry_that_was_tampered_with_breaks_the_chain(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write(triaged("LIN-1"))
    with closing(sqlite3.connect(files.paths["pi-2"], isolation_level=None)) as conn:
        row = "(SELECT max(id) FROM entries)"
        header = bytearray(conn.execute(f"SELECT header FROM entries WHERE id = {row}").fetchone()[0])
        header[-1] ^= 1
        conn.execute(f"UPDATE entries SET header = ? WHERE id = {row}", (bytes(header),))
    faults = audit(files.paths, ["LIN-1"], linear_after("only")).faults
    assert any(fault.startswith("pi-2:") and "LIN" not in fault for fault in faults)
