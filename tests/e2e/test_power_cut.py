"""Power cuts: an ext4 file system on a loop device is shut down without flushing anything, while the ledger is written.

EXT4_IOC_SHUTDOWN drops what was not synced, as a power cut does (xfstests use it for that); a SIGKILL would not: the
page cache survives it. Needs root and loop devices. The second test shows that this rig does see rows that are lost.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import Broken
from piclusterd.events import Record
from piclusterd.ledger.writer import LedgerWriter

from ..ledger.keys import Key, verify

pytestmark = [pytest.mark.e2e]

CUTS = 50
IMAGE_BYTES = 48 * 1024 * 1024
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: not even the journal is written."""
CALLERS = 4
EAGER = config.Ledger(commit_delay_s=0.001)


class Card:
    """An SD card: a file with ext4 in it, mounted while there is power."""

    def __init__(self, folder: Path) -> None:
        self._image, self.path = folder / "card.img", folder / "card"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", str(self._image))

    def insert(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.path))

    def cut(self) -> None:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(handle)

    def remove(self) -> None:
        _run("umount", str(self.path))


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
    with suppress(OSError):
        made.remove()


async def power_up(card: Card) -> LedgerWriter:
    await asyncio.to_thread(card.insert)
    return await LedgerWriter.start(card.path / "ledger.db", Key(), verify, "pi", lambda: 1000, EAGER)


async def write_until_cut(card: Card, ledger: LedgerWriter, first: int, after: int) -> list[int]:
    """Append from several callers; the power goes once `after` are acknowledged. The numbers acknowledged."""
    acknowledged: list[int] = []
    numbers = iter(range(first, first + 1_000_000))
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
    await asyncio.to_thread(card.cut)
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(result, Broken) for result in results), results
    await ledger.close()
    await asyncio.to_thread(card.remove)
    return acknowledged


async def numbers_in(ledger: LedgerWriter) -> set[int]:
    return {fact.body["n"] for fact in await ledger.replay() if fact.kind == "note"}


async def test_no_acknowledged_entry_is_lost_in_fifty_power_cuts(card: Card) -> None:
    dice = random.Random(5)
    acknowledged: set[int] = set()
    first = 0
    log = None
    async with asyncio.timeout(120):
        for _ in range(CUTS):
            ledger = await power_up(card)
            assert acknowledged - await numbers_in(ledger) == set()
            assert (await ledger.verify()).faults == ()
            assert ledger.lost == ""
            assert log in (None, ledger.log), "what is whole goes on in its log"
            log = ledger.log
            acknowledged |= set(await write_until_cut(card, ledger, first, dice.randrange(1, 40)))
            first += 1_000_000
        ledger = await power_up(card)
        lost = acknowledged - await numbers_in(ledger)
        await ledger.close()
        await asyncio.to_thread(card.remove)
    assert lost == set()
    assert len(acknowledged) >= CUTS


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
