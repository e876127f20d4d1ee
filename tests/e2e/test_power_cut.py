"""Power cuts: an ext4 file system on a loop device is shut down without flushing anything, while the ledger is written.

EXT4_IOC_SHUTDOWN drops what was not synced, as a power cut does (xfstests use it for that); a SIGKILL would not: the
page cache survives it. Needs root and loop devices. The last test shows that this rig does see rows that are lost.

What was acknowledged before the ioctl must be there. What is acknowledged after it need not: no process outlives a real
power cut, but here it does, and an fsync that is under way may then report success for what was never written. (The
aborted journal ends its transaction without writing it, and jbd2_complete_transaction takes one that is neither running
nor committing for a committed one. A C program of twenty lines that appends and fdatasyncs sees it in one cut of ten on
Linux 6.18: always the one record that was being synced, always an fdatasync that returned after the ioctl began.)
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import Broken
from piclusterd.events import Record
from piclusterd.ids import LogId
from piclusterd.ledger.writer import LedgerWriter

from ..ledger.keys import Key, verify

pytestmark = [pytest.mark.e2e]

CUTS = int(os.environ.get("POWER_CUTS", "50"))
IMAGE_BYTES = 48 * 1024 * 1024
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: not even the journal is written."""
CALLERS = 4
PER_CUT = 1_000_000
"""Numbers that one life of the ledger may use."""
LIMIT_S = 120.0 + CUTS
KILLED = 9
KILLED_UNSYNCED = f"""
import os, sys
from piclusterd.events import Record
from piclusterd.ledger import store
from tests.ledger.keys import Key
key = Key()
conn = store.open_database(sys.argv[1])
log = store.open_log(conn, key, "pi", 7, 1000)
conn.execute("PRAGMA synchronous=OFF")
for number in range(50):
    store.append(conn, log, [Record("note", {{"n": number}})], key, 1000)
os._exit({KILLED})
"""
EAGER = config.Ledger(commit_delay_s=0.001)


class Card:
    """An SD card: a file with ext4 in it, mounted while there is power."""

    def __init__(self, folder: Path) -> None:
        self._image, self.path, self.kept = folder / "card.img", folder / "card", folder / "card.kept"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", str(self._image))

    def insert(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.path))

    def cut(self, acknowledged: Sequence[int]) -> list[int]:
        """What of `acknowledged` counts: all that was there when the power went."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            promised = list(acknowledged)
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(handle)
        return promised

    def remove(self) -> None:
        """The next `insert` mounts a copy; `kept` is for whoever looks into a failure.

        Where another mount namespace (any container's, made meanwhile) still holds this file system, the same image
        would be the same file system again, shut down as it is.
        """
        _run("umount", str(self.path))
        self._image.replace(self.kept)
        _run("cp", "--sparse=always", str(self.kept), str(self._image))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Card]:
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        pytest.skip("no mkfs.ext4 or no loop devices on this machine")
    try:
        made = Card(tmp_path)
        made.insert()
    except OSError as fault:
        pytest.skip(f"no loop device can be mounted here: {fault}")
    made.remove()
    yield made
    subprocess.run(("umount", "--lazy", "-q", str(made.path)), check=False)  # a test that failed holds it open


async def power_up(card: Card) -> LedgerWriter:
    await asyncio.to_thread(card.insert)
    return await LedgerWriter.start(card.path / "ledger.db", Key(), verify, "pi", lambda: 1000, EAGER)


async def write_until_cut(card: Card, ledger: LedgerWriter, first: int, after: int) -> list[int]:
    """Append from several callers; the power goes once `after` are acknowledged. The numbers that count."""
    acknowledged: list[int] = []
    numbers = iter(range(first, first + PER_CUT))
    enough = asyncio.Event()

    async def caller() -> None:
        while True:
            number = next(numbers)
            await ledger.append([Record("note", {"n": number, "pad": "x" * (number % 700)})])
            acknowledged.append(number)
            if len(acknowledged) >= after:
                enough.set()

    callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
    await enough.wait()
    promised = await asyncio.to_thread(card.cut, acknowledged)
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(result, Broken) for result in results), results
    await ledger.close()
    await asyncio.to_thread(card.remove)
    return promised


async def numbers_in(ledger: LedgerWriter) -> set[int]:
    return {fact.body["n"] for fact in await ledger.replay() if fact.kind == "note"}


def autopsy(card: Card, lost: set[int], promised: list[int], log: LogId | None) -> str:
    """Where entries are missing: all that may say why, of the card after the start that missed them."""
    files = sorted((file.name, file.stat().st_size) for file in card.path.iterdir() if file.is_file())
    with closing(sqlite3.connect(f"file:{card.path / 'ledger.db'}?mode=ro", uri=True)) as conn:
        check = conn.execute("PRAGMA integrity_check").fetchall()
        rows = conn.execute("SELECT id >> 40, count(*), max(id & ((1 << 40) - 1)) FROM entries GROUP BY 1").fetchall()
        damaged = conn.execute("SELECT count(*) FROM damaged").fetchone()
    notes = {name: (card.path / name).read_bytes()[:200] for name, _ in files if name.startswith("ledger.db.")}
    kernel = subprocess.run(("dmesg",), capture_output=True, text=True, check=False).stdout.splitlines()
    return "\n".join(
        (
            f"lost {sorted(lost)} of {len(promised)} acknowledged before the cut, the last {promised[-8:]}",
            f"the log was {log}; (log, entries, highest seq): {rows}; damaged: {damaged}; integrity: {check[:5]}",
            f"files: {files}; beside: {notes}",
            f"kernel: {[line for line in kernel if 'EXT4' in line or 'loop' in line or 'I/O' in line][-6:]}",
            f"the card as the cut left it: {card.kept}",
        )
    )


async def test_no_acknowledged_entry_is_lost_in_fifty_power_cuts(card: Card) -> None:
    dice = random.Random(5)
    acknowledged: set[int] = set()
    promised: list[int] = []
    log = None
    async with asyncio.timeout(LIMIT_S):
        for cut in range(CUTS + 1):
            ledger = await power_up(card)
            lost = acknowledged - await numbers_in(ledger)
            assert lost == set(), await asyncio.to_thread(autopsy, card, lost, promised, log)
            assert (await ledger.verify()).faults == ()
            assert ledger.lost == ""
            assert log in (None, ledger.log), "what is whole goes on in its log"
            log = ledger.log
            promised = await write_until_cut(card, ledger, cut * PER_CUT, dice.randrange(1, 40))
            acknowledged |= set(promised)
    assert len(acknowledged) >= CUTS


async def test_what_a_killed_daemon_had_not_synced_is_synced_before_it_is_told(card: Card) -> None:
    """A daemon dies between its write and its fsync; the next one reads the rows, tells them, and the power goes."""
    await asyncio.to_thread(card.insert)
    path = str(card.path / "ledger.db")
    killed = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED_UNSYNCED, path)
    assert await killed.wait() == KILLED
    ledger = await LedgerWriter.start(Path(path), Key(), verify, "pi", lambda: 1000, EAGER)
    told = await numbers_in(ledger)
    assert told
    await asyncio.to_thread(card.cut, ())
    await ledger.close()
    await asyncio.to_thread(card.remove)
    ledger = await power_up(card)
    kept = await numbers_in(ledger)
    await ledger.close()
    await asyncio.to_thread(card.remove)
    assert told - kept == set()


async def test_without_a_full_sync_the_same_cut_loses_acknowledged_entries(card: Card) -> None:
    async with asyncio.timeout(60):
        ledger = await power_up(card)
        await ledger._writing.run(lambda conn: conn.execute("PRAGMA synchronous=NORMAL").fetchone())
        acknowledged = await write_until_cut(card, ledger, 0, 100)
        ledger = await power_up(card)
        lost = set(acknowledged) - await numbers_in(ledger)
        await ledger.close()
        await asyncio.to_thread(card.remove)
    assert lost
