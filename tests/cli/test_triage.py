"""`picluster triage` against the real doors of a node, over a real ledger file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from piclusterd import config
from piclusterd.events import Record
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.lessons import Lessons
from piclusterd.web import triage
from piclusterd.web.app import make_app
from piclusterd.web.listener import serve
from tests.ledger.keys import Key, verify
from tests.web.house import Node

from .command import Result, picluster

MONDAY_MS = 1_767_571_200_000


def case(issue: str, **parts: Any) -> Record:
    return Record("case", {"issue": issue, "set": {name.replace("__", "."): value for name, value in parts.items()}})


CASES = [
    case(
        "i-1", identifier="LIN-1", title="Crash \x1b[2J", said__type=["bug", 0.93, 0.9], human__type="bug",
        said__priority=["P1", 0.9, 0.8], from__priority="similar issues", human__priority="P3", reason="it crashes",
        model="small", node="pi-1", why=["rule 1 ('crash')"], near=[["LIN-7", 0.8]], vector=b"123",
    ),
    *(case(f"i-{n}", identifier=f"LIN-{n}", said__type=["bug", 0.9, 0.9], human__type="bug") for n in range(2, 30)),
    case("i-50", identifier="LIN-50", said__type=["bug", 0.9, 0.9]),
    case("i-51", identifier="LIN-51"),
    Record("case.end", {"issue": "i-51"}),
]  # fmt: skip


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[str]:
    ledger = await LedgerWriter.start(tmp_path / "l.db", Key(), verify, "pi", lambda: MONDAY_MS, config.Ledger())
    await ledger.append(CASES)
    lessons = Lessons(tmp_path / "l.db")
    doors = Node().doors(extra_routes=triage.routes(lessons.report, lessons.why))
    listener = await serve(make_app(doors), "127.0.0.1", 0, tmp_path / "api.sock")
    yield str(tmp_path / "api.sock")
    await listener.close()
    await ledger.close()


async def ask(path: str, *words: str) -> Result:
    return await picluster("--socket", path, "triage", *words)


async def test_the_report_tells_agreement_calibration_and_what_could_be_automatic(path: str) -> None:
    told = await ask(path, "report")
    assert (told.code, told.err) == (0, "")
    assert "30 issues remembered, 29 of them judged by people" in told.out
    assert "type: people agreed with 29 of 29 (100%)" in told.out
    assert "from confidence 0.90 on 95 % stood: 100% of all could be set by it" in told.out
    assert "2026-W02" in told.out
    assert "priority: people agreed with 0 of 1" in told.out
    assert "leave this field to `suggest`" in told.out
    as_json = json.loads((await ask(path, "report", "--json")).out)
    assert [field["field"] for field in as_json["fields"]] == ["type", "priority", "label"]


async def test_why_says_how_a_verdict_came_about(path: str) -> None:
    told = await ask(path, "why", "lin-1")
    assert (told.code, told.err) == (0, "")
    lines = [line.strip() for line in told.out.splitlines()]
    assert lines[0].startswith("LIN-1")
    assert "\x1b" not in told.out
    assert "it crashes" in lines
    assert "type bug: 90% sure, 93% before calibration, by model; people agreed" in lines
    assert "priority P1: 80% sure, 90% before calibration, by similar issues; people made it P3" in lines
    assert "most similar: LIN-7 (80% alike)" in lines
    assert json.loads((await ask(path, "why", "LIN-1", "--json")).out)["told"]["identifier"] == "LIN-1"


@pytest.mark.parametrize("issue", ["LIN-51", "LIN-99"])
async def test_what_is_forgotten_or_never_was_is_told(path: str, issue: str) -> None:
    told = await ask(path, "why", issue)
    assert (told.code, "nothing is remembered" in told.err) == (1, True)


async def test_what_names_no_issue_is_not_sent(path: str) -> None:
    told = await ask(path, "why", "../admin/tokens")
    assert (told.code, "names no issue" in told.err) == (1, True)
