"""`picluster batch` against real doors, disks and a real model; the run is walked by the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from piclusterd import batches
from tests.test_batches import Bench, bench, chat

from .command import Result, picluster


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "shelf") as made:
        yield made


async def batch(at: Bench, *words: str) -> Result:
    return await picluster("--host", at.url, "batch", *words)


def written(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


async def test_a_batch_from_a_file_to_its_answers(at: Bench, tmp_path: Path) -> None:
    assert (await batch(at, "ls")).out == "No batches.\n"
    file = written(tmp_path / "in.jsonl", chat(0), chat(1, temperature=9), chat(2))
    begun = await batch(at, "submit", file)
    assert (begun.code, begun.err) == (0, "")
    id = begun.out.split(":")[0]
    assert begun.out.startswith(f"{id}: 3 requests, within 24 hours.")
    early = await batch(at, "output", id)
    assert (early.code, early.out) == (1, "")
    assert "it is in_progress, 0/3 done: no line was answered, so far." in early.err

    await at.ledger.walk(at.service, id)
    row = (await batch(at, "ls")).out.splitlines()[1].split()
    assert row[:5] == [id, "completed", "3/3", "1", "/v1/chat/completions"]
    shown = await batch(at, "show", id.removeprefix("batch_")[:6])
    assert shown.out.startswith(f"{id}  3/3 done, 1 failed\nstatus          completed\n")
    answers = (await batch(at, "output", id)).out.splitlines()
    assert [json.loads(line)["custom_id"] for line in answers] == ["line-0", "line-2"]
    assert (await batch(at, "output", id, "--errors", "-o", str(tmp_path / "bad"))).code == 0
    assert [json.loads(line)["custom_id"] for line in (tmp_path / "bad").read_text().splitlines()] == ["line-1"]


async def test_a_cancelled_batch_keeps_what_was_answered(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEP_LINES_MAX", 2)
    file = written(tmp_path / "in.jsonl", *(chat(number) for number in range(5)))
    id = json.loads((await batch(at, "submit", file, "--json")).out)["id"]
    await at.ledger.step(at.service, id)
    assert (await batch(at, "cancel", id)).out == f"{id} is cancelled, 2/5 done.\n"
    assert len((await batch(at, "output", id)).out.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello\n", "line 1 of"),
        ("[]\n", "line 1 of"),
        (json.dumps(chat(1)) + "\n{\n", "line 2 of the file is no request"),
        (json.dumps(chat(1)) + "\n" + json.dumps(chat(1)) + "\n", "is an earlier line's"),
        (json.dumps(chat(1, model="gone")) + "\n", "no node serves the model 'gone'"),
    ],
)
async def test_a_file_that_is_no_batch_is_refused_by_its_line(at: Bench, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    result = await batch(at, "submit", str(tmp_path / "in.jsonl"))
    assert (result.code, result.out) == (1, "")
    assert says in result.err


@pytest.mark.parametrize(("id", "says"), [("f00", "there is no batch"), ("../x", "is not the id of a batch")])
async def test_a_batch_that_is_not_there_is_told(at: Bench, id: str, says: str) -> None:
    result = await batch(at, "show", id)
    assert result.code == 1
    assert says in result.err
