"""What a running node does unasked, on a real ledger: the watchdog's stroke, votes that vanished, rot."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from piclusterd import config, upkeep
from piclusterd.board.sd_notify import Notifier
from piclusterd.cluster import hardstate
from piclusterd.errors import Broken
from piclusterd.events import Damaged, HardState, Record
from piclusterd.ids import NodeId
from piclusterd.ledger.archive import VOTES_LOST
from piclusterd.ledger.connection import Work
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.mailbox import Mailbox
from piclusterd.upkeep import VOTES, losses, recall, stroke_watchdog
from tests.ledger.keys import Key, verify

PERIOD_US = 40_000
ME = NodeId("a" * 16)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


@asynccontextmanager
async def stroking(ledger: LedgerWriter, systemd: socket.socket) -> AsyncIterator[None]:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(PERIOD_US)})
    task = asyncio.create_task(stroke_watchdog(notifier, ledger))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def stroke(systemd: socket.socket) -> bytes:
    async with asyncio.timeout(10):
        return await asyncio.get_running_loop().sock_recv(systemd, 100)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerWriter]:
    key = Key()
    opened = await LedgerWriter.start(tmp_path / "ledger.db", key, verify, "pi-1", lambda: 0)
    yield opened
    await opened.close()


async def on_writing_thread(ledger: LedgerWriter, work: Work[None]) -> None:
    await ledger._run(work)


async def test_an_idle_node_strokes_again_and_again(ledger: LedgerWriter, systemd: socket.socket) -> None:
    async with stroking(ledger, systemd):
        assert [await stroke(systemd) for _ in range(3)] == [b"WATCHDOG=1"] * 3


async def test_a_writing_thread_that_hangs_holds_the_stroke_up(ledger: LedgerWriter, systemd: socket.socket) -> None:
    hangs, free = threading.Event(), threading.Event()

    def hang(_conn: object) -> None:
        hangs.set()
        free.wait(10)

    hanging = asyncio.create_task(on_writing_thread(ledger, hang))
    await asyncio.to_thread(hangs.wait, 10)
    async with stroking(ledger, systemd):
        for _ in range(3):  # the loop turns, the writer does not
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2 * PERIOD_US / 1e6):
                    await asyncio.get_running_loop().sock_recv(systemd, 100)
        free.set()
        assert await stroke(systemd) == b"WATCHDOG=1"
    await hanging


async def test_a_disk_that_refuses_is_an_answer_too(
    ledger: LedgerWriter, systemd: socket.socket, tmp_path: Path
) -> None:
    def forbid(conn: sqlite3.Connection) -> None:
        conn.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)

    await on_writing_thread(ledger, forbid)
    with pytest.raises(Broken):
        await ledger.apply(())
    async with stroking(ledger, systemd):
        assert await stroke(systemd) == b"WATCHDOG=1"


async def test_nothing_is_sent_where_systemd_does_not_watch(ledger: LedgerWriter, systemd: socket.socket) -> None:
    await stroke_watchdog(Notifier({"NOTIFY_SOCKET": systemd.getsockname()}), ledger)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


# the vote record -------------------------------------------------------------------------------------------------
def remembering(state: Path) -> HardState:
    """A node that has started once."""
    hard = HardState(term=4, voted_for=ME, incarnation=1)
    (state / "identity").mkdir()
    hardstate.save(state / VOTES, hard)
    hardstate.note_voted(state / "identity", ME)
    return hard


def test_a_fresh_node_has_lost_nothing(tmp_path: Path) -> None:
    assert recall(tmp_path, ME) == (None, "")
    assert not (tmp_path / VOTES_LOST).exists()


def test_a_node_that_remembers_its_vote_has_lost_nothing(tmp_path: Path) -> None:
    hard = remembering(tmp_path)
    assert recall(tmp_path, ME) == (hard, "")
    assert not (tmp_path / VOTES_LOST).exists()


@pytest.mark.parametrize("gone", ["copies", "folder"])
def test_a_vote_record_that_vanished_is_a_loss_until_the_owner_says_otherwise(tmp_path: Path, gone: str) -> None:
    remembering(tmp_path)
    for copy in (tmp_path / VOTES).iterdir():
        copy.unlink()
    if gone == "folder":
        (tmp_path / VOTES).rmdir()
    hard, why = recall(tmp_path, ME)
    assert hard is None
    assert "both copies are gone" in why
    (told,) = losses("pi-1", tmp_path, "", why)
    assert "picluster voter remove pi-1" in told
    hardstate.save(tmp_path / VOTES, HardState(incarnation=1))
    assert recall(tmp_path, ME) == (HardState(incarnation=1), why), "the next start must not vote by the new record"
    (tmp_path / VOTES_LOST).unlink()
    assert recall(tmp_path, ME) == (HardState(incarnation=1), "")


def test_another_identity_in_the_same_place_is_fresh(tmp_path: Path) -> None:
    remembering(tmp_path)
    for copy in (tmp_path / VOTES).iterdir():
        copy.unlink()
    assert recall(tmp_path, NodeId("b" * 16)) == (None, "")


# scrub ----------------------------------------------------------------------------------------------------
NOTES = [Record("note", {"text": f"{number} " + "x" * 900}) for number in range(60)]


async def written(path: Path) -> LedgerWriter:
    ledger = await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000, config.Ledger(commit_delay_s=0.0))
    await ledger.append(NOTES)
    assert await ledger.checkpoint()
    return ledger


async def test_rot_is_told_to_the_node(tmp_path: Path) -> None:
    ledger = await written(tmp_path / "ledger.db")
    mailbox = Mailbox(time.monotonic)
    await ledger._writing.run(lambda conn: conn.execute("UPDATE entries SET payload = x'00' WHERE id & 1023 = 30"))
    scrubbing = asyncio.create_task(upkeep.scrub(ledger, mailbox, every_s=0.0))
    async with asyncio.timeout(10):
        event = await mailbox.next(float("inf"))
    scrubbing.cancel()
    await ledger.close()
    assert isinstance(event, Damaged)
    assert [(span.first, span.last) for span in event.spans] == [(30, 30)]


async def test_a_page_that_cannot_be_read_ends_the_daemon_and_the_next_start_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = await written(path)
    await ledger._writing.run(lambda conn: conn.execute("PRAGMA cache_size=1").fetchone())
    with path.open("r+b") as file:
        file.seek(12 * 4096)
        file.write(b"\xff" * 4096)
    async with asyncio.timeout(10):
        with pytest.raises(Broken, match="malformed"):
            await upkeep.scrub(ledger, Mailbox(time.monotonic), every_s=0.0)
    await ledger.close()
    ledger = await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000)
    assert "damaged" in ledger.lost
    await ledger.close()
