"""One record is one line of JSON, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from piclusterd.board import logs


@pytest.fixture(autouse=True)
def leave_logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # else `setup` would close pytest's own
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_line_of_json() -> None:
    stream = io.StringIO()
    logs.setup("info", stream, {})
    logging.getLogger("piclusterd.node").warning("peer %s\nis slow", "pi-2", extra={"peer": "pi-2"})
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "piclusterd.node", "message": "peer pi-2\nis slow", "peer": "pi-2"}


def test_less_severe_records_are_not_written() -> None:
    stream = io.StringIO()
    logs.setup("warning", stream, {})
    logging.getLogger("x").info("hello")
    assert lines(stream) == []


def test_the_request_is_named() -> None:
    stream = io.StringIO()
    logs.setup("info", stream, {})
    token = logs.request_id.set("r-1")
    logging.getLogger("x").info("served")
    logs.request_id.reset(token)
    assert lines(stream)[0]["request_id"] == "r-1"


def test_terminal_escapes_are_escaped() -> None:
    stream = io.StringIO()
    logs.setup("info", stream, {})
    logging.getLogger("x").info("\x1b]0;owned\x07 \x9b31m")
    assert all(" " <= c < "\x7f" for c in stream.getvalue().rstrip("\n"))


def test_an_exception_is_part_of_its_line() -> None:
    stream = io.StringIO()
    logs.setup("info", stream, {})
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("failed")
    assert lines(stream)[0]["error"].endswith("ValueError: why")


def test_extras_cannot_replace_the_fields_of_the_line() -> None:
    stream = io.StringIO()
    logs.setup("info", stream, {})
    logging.getLogger("x").info("said", extra={"level": "none", "thing": {1, 2}.__class__})
    assert lines(stream)[0]["level"] == "info"


def test_under_journald_each_line_has_its_priority(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as stream:
        stat = os.fstat(stream.fileno())
        logs.setup("debug", stream, {"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"})
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger("x").log(level, "said")
    assert [line[:3] for line in (tmp_path / "journal").read_text().splitlines()] == ["<7>", "<6>", "<4>", "<3>"]


def test_a_redirected_stderr_is_not_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        logs.setup("info", stream, {"JOURNAL_STREAM": "1:2"})
        logging.getLogger("x").info("said")
    assert (tmp_path / "file").read_text().startswith("{")
