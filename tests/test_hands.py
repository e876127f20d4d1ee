"""The hands at the ledger: a new log, a recovery, rot and forks are told to the node in its own words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from piclusterd import config
from piclusterd.events import (
    AddCheckpoint,
    Append,
    Appended,
    AppendFailed,
    Damaged,
    DiskProbed,
    Diverged,
    Effect,
    Event,
    Forget,
    Forgot,
    NewEpoch,
    ProbeDisk,
    Record,
    Recovered,
    Store,
    Stored,
)
from piclusterd.hands import Hands
from piclusterd.ledger import rescue, store
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.mailbox import Mailbox
from piclusterd.wire import Span

from .ledger.keys import Key, verify
from .ledger.rig import add, everything, fresh, spoil

UNUSED = cast(Any, None)


class Bench:
    """Hands on a real ledger and a mailbox; no links, models or services."""

    def __init__(self, ledger: LedgerWriter, directory: Path) -> None:
        self.ledger = ledger
        self.mailbox = Mailbox(asyncio.get_running_loop().time)
        self.hands = Hands(self.mailbox, UNUSED, ledger, UNUSED, {}, directory, None, lambda note: None, directory)

    async def on(self, effect: Effect, events: int = 1) -> list[Event]:
        self.hands.perform(effect)
        async with asyncio.timeout(10):
            return [await self.mailbox.next(float("inf")) for _ in range(events)]


@asynccontextmanager
async def bench(path: Path) -> AsyncIterator[Bench]:
    limits = config.Ledger(commit_delay_s=0.0)
    ledger = await LedgerWriter.start(path, Key(1), verify, "pi", lambda: 1000, limits)
    made = Bench(ledger, path.parent / "votes")
    try:
        yield made
    finally:
        await made.hands.close()
        await ledger.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)


async def test_a_new_log_is_opened_and_why_is_noted_until_it_is_whole_again(tmp_path: Path) -> None:
    async with bench(tmp_path / "ledger.db") as desk:
        before = desk.ledger.log
        (opened,) = await desk.on(NewEpoch(7, "put back"))
        assert isinstance(opened, Appended)
        assert (opened.token, opened.facts[0].kind) == (7, "log.open")
        assert opened.facts[0].log == desk.ledger.log != before
        assert rescue.convalescent(tmp_path / "ledger.db") == "put back"
        await desk.on(Recovered(), events=0)
        await until(lambda: desk.ledger.lost == "")
        assert rescue.convalescent(tmp_path / "ledger.db") == ""


async def test_rot_that_a_batch_mends_is_told_after_it_is_stored(tmp_path: Path) -> None:
    async with bench(tmp_path / "ledger.db") as desk:
        entries, _ = await desk.ledger.append([Record("note", {"text": "a"})])
        log = desk.ledger.log
        await desk.ledger._writing.run(lambda conn: spoil(conn, 2, "payload", log))
        await desk.ledger.scrub_slice()
        assert desk.ledger.damaged == (Span(*log, 2, 2),)
        stored, damaged = await desk.on(Store(3, entries, resets=True), events=2)
        assert isinstance(stored, Stored)
        assert damaged == Damaged(())


async def test_two_branches_of_a_log_are_told_after_they_are_stored(tmp_path: Path) -> None:
    one, two = fresh(Key(2)), fresh(Key(2))
    add(one, "a", key=Key(2))
    add(two, "b", key=Key(2))
    async with bench(tmp_path / "ledger.db") as desk:
        await desk.on(Store(1, everything(one)))
        stored, diverged = await desk.on(Store(2, everything(two)), events=2)
        assert isinstance(stored, Stored)
        assert diverged == Diverged((Span(*Key(2).log(), 2, 2),), ())
        assert store.heads(one)[0] in await desk.ledger.heads()
    one.close()
    two.close()


async def test_what_the_disk_refuses_is_told_as_its_fault_and_a_probe_says_when_it_is_well(tmp_path: Path) -> None:
    full, room = "PRAGMA max_page_count=1", "PRAGMA max_page_count=4294967294"
    big = Record("note", {"text": "x" * 100_000})
    other = fresh(Key(2))
    for _ in range(50):
        add(other, "x" * 10_000, key=Key(2))
    async with bench(tmp_path / "ledger.db") as desk:
        await desk.ledger._writing.run(lambda conn: conn.execute(full).fetchone())
        (failed,) = await desk.on(Append(1, (big,)))
        assert isinstance(failed, AppendFailed)
        assert failed.disk
        (stored,) = await desk.on(Store(2, everything(other)))
        assert isinstance(stored, Stored)
        assert "Free space" in stored.refused
        await desk.ledger._writing.run(lambda conn: conn.execute(room).fetchone())
        assert await desk.on(ProbeDisk(3)) == [DiskProbed(3, "")]
        assert desk.ledger.healthy
        (failed,) = await desk.on(Append(4, (Record("x" * 1000, {}),)))
        assert isinstance(failed, AppendFailed)
        assert not failed.disk, "a record that no node would take"
    other.close()


async def test_a_checkpoint_is_answered_as_an_append_and_forgetting_tells_what_is_left(tmp_path: Path) -> None:
    async with bench(tmp_path / "ledger.db") as desk:
        log = desk.ledger.log
        await desk.ledger.append([Record("run.result", {"run": "r", "step": "s", "value": {}})] * 5)
        (refused,) = await desk.on(AddCheckpoint(1, log, 6, 100))
        assert isinstance(refused, AppendFailed)
        assert not refused.disk, "not worth it"
        (added,) = await desk.on(AddCheckpoint(2, log, 6, 5))
        assert isinstance(added, Appended)
        assert (added.token, added.facts[0].kind, added.facts[0].seq) == (2, "log.checkpoint", 7)
        assert await desk.on(Forget(3, log, 7, "bodies")) == [Forgot(3, False)]
        assert await desk.on(Forget(4, log, 7, "rows")) == [Forgot(4, False)]
        assert [fact.seq for fact in await desk.ledger.replay()] == [7]
        (refused,) = await desk.on(Forget(5, log, 3, "rows"))
        assert isinstance(refused, Forgot)
        assert "no checkpoint" in refused.why
