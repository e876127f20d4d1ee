"""A full disk, and a reader that stays: what the ledger gives up, and what it tells."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import Broken
from piclusterd.events import Record
from piclusterd.ledger import ballast, writer
from piclusterd.ledger.ballast import Ballast
from piclusterd.ledger.database import open_reader
from piclusterd.ledger.writer import LedgerWriter

from .keys import Key, verify

EAGER = config.Ledger(commit_delay_s=0.0)
SIZE = 2 * 1024 * 1024


@asynccontextmanager
async def opened(path: Path, size: int = SIZE) -> AsyncIterator[LedgerWriter]:
    ledger = await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000, EAGER, ballast_bytes=size)
    try:
        yield ledger
    finally:
        await ledger.close()


def note(size: int) -> Record:
    return Record("note", {"text": "x" * size})


async def outcome(ledger: LedgerWriter) -> Broken | None:
    """What an append of 100 kB meets."""
    try:
        await ledger.append([note(100_000)])
    except Broken as fault:
        return fault
    return None


def test_it_takes_its_space_and_gives_it_back(tmp_path: Path) -> None:
    held = Ballast(tmp_path / "ballast", SIZE)
    assert held.take()
    assert held.take(), "twice is once"
    assert (tmp_path / "ballast").stat().st_blocks * 512 >= SIZE
    assert held.release()
    assert not held.release()
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_made_where_there_is_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballast, "ROOM_FACTOR", 2**40)
    assert not Ballast(tmp_path / "ballast", SIZE).take()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_no_fault_of_the_ballasts(tmp_path: Path) -> None:
    held = Ballast(tmp_path / "none" / "ballast", SIZE)
    assert not held.take()
    assert not held.release()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_full_disk_gives_up_the_ballast_and_work_goes_on(small: Path) -> None:
    async with opened(small / "ledger.db") as ledger:
        before = len(list(await ledger.replay()))
        with (small / "someone else's").open("wb") as other, suppress(OSError):
            while True:
                other.write(b"x" * 65536)
                other.flush()
        refused = [fault for _ in range(100) if ledger.healthy and (fault := await outcome(ledger))]
        assert ["Free space" in str(fault) for fault in refused] == [True]
        assert not (small / "ledger.db.ballast").exists()
        await ledger.append([note(100_000)])
        assert ledger.healthy
        assert len(await ledger.replay()) > before
        assert (await ledger.verify()).faults == ()


async def test_a_full_disk_is_well_when_the_ballast_is_back(small: Path) -> None:
    async with opened(small / "ledger.db") as ledger:
        await ledger.probe()
        with (small / "someone else's").open("wb") as other, suppress(OSError):
            while True:
                other.write(b"x" * 65536)
                other.flush()
        while not await outcome(ledger):
            pass
        await ledger.append([note(1000)])
        with pytest.raises(Broken, match="the disk is full"):
            await ledger.probe()
        (small / "someone else's").unlink()
        await ledger.probe()
        assert (small / "ledger.db.ballast").exists()


async def test_without_a_ballast_there_must_be_some_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "ledger.db", 0) as ledger:
        await ledger.probe()
        monkeypatch.setattr(ballast, "FREE_BYTES_MIN", 2**63)
        with pytest.raises(Broken, match="Free space"):
            await ledger.probe()


async def test_the_ballast_is_there_while_the_ledger_is_open(tmp_path: Path) -> None:
    async with opened(tmp_path / "ledger.db"):
        assert (tmp_path / "ledger.db.ballast").exists()
    assert not (tmp_path / "ledger.db.ballast").exists()


async def test_a_reader_that_stays_open_is_told_and_the_wal_is_cut_once_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WAL_BYTES_MAX", 200_000)
    async with opened(tmp_path / "ledger.db", 0) as ledger:
        with closing(open_reader(tmp_path / "ledger.db")) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM entries").fetchone()
            for _ in range(12):
                await ledger.append([note(50_000)])
            assert ledger.wal_bytes > writer.WAL_BYTES_MAX
            assert ledger.healthy, "appends do not wait for readers"
        for _ in range(8):
            await ledger.append([note(50_000)])
        await ledger.apply(())  # comes after the truncation
        assert ledger.wal_bytes <= 2 * writer.WAL_BYTES_MAX
        wal = tmp_path / "ledger.db-wal"
        assert (await asyncio.to_thread(wal.stat)).st_size <= 2 * writer.WAL_BYTES_MAX
