"""The ledger's one writer: real files, real fsyncs, a real SIGKILL. Run as a program it is the child that is killed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import Broken, Overloaded, Unavailable, UserError
from piclusterd.events import Record
from piclusterd.ledger import store, writer
from piclusterd.ledger.database import BUSY_TIMEOUT_MS, open_reader, pragma
from piclusterd.ledger.queued import Appended
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.wire import BATCH_BYTES_MAX, Head, Span

from .keys import Key, SlowKey, verify

EAGER = config.Ledger(commit_delay_s=0.0)
UNLIMITED_PAGES = 2**30


def note(text: object) -> Record:
    return Record("note", {"text": text})


@asynccontextmanager
async def opened(path: Path, key: Key, limits: config.Ledger = EAGER) -> AsyncIterator[LedgerWriter]:
    ledger = await LedgerWriter.start(path, key, verify, "pi", lambda: 1000, limits)
    try:
        yield ledger
    finally:
        await ledger.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


async def on_writing_thread(ledger: LedgerWriter, work: Callable[[sqlite3.Connection], object]) -> object:
    return await ledger._writing.run(work)


async def own_texts(ledger: LedgerWriter) -> list[object]:
    return [fact.body["text"] for fact in await ledger.replay() if fact.kind == "note"]


async def test_what_is_acknowledged_is_there_after_a_restart(path: Path) -> None:
    async with opened(path, Key()) as ledger:
        log = ledger.log
        entries, facts = await ledger.append([note("a"), note("b")])
        assert [fact.body["text"] for fact in facts] == ["a", "b"]
        assert await ledger.read([Span(*log, 2, 3)]) == entries
        assert await ledger.heads() == (Head(*log, 3),)
    async with opened(path, Key()) as ledger:
        assert ledger.log == log, "a restart goes on with the same log"
        assert await own_texts(ledger) == ["a", "b"]
        assert await ledger.verify() == store.Verdict(3, ())
        assert sum(head.seq for head in await ledger.heads()) == 3


async def test_two_nodes_exchange_what_they_wrote(tmp_path: Path) -> None:
    async with opened(tmp_path / "1", Key(1)) as one, opened(tmp_path / "2", Key(2)) as two:
        await one.append([note("a")])
        entries = await one.read([Span(*one.log, 1, 2)])
        applied = await two.apply(entries)
        assert applied.heads == (Head(*one.log, 2),)
        assert (await two.apply(entries)).facts == ()
        assert set(await two.heads()) == {Head(*one.log, 2), Head(*two.log, 1)}


async def test_a_ledger_that_was_lost_begins_another_log(tmp_path: Path) -> None:
    async with opened(tmp_path / "1", Key()) as first, opened(tmp_path / "2", Key()) as again:
        assert first.log.origin == again.log.origin
        assert first.log.epoch != again.log.epoch


async def test_a_new_epoch_is_what_is_appended_to_from_then_on(path: Path) -> None:
    async with opened(path, Key()) as ledger:
        old = ledger.log
        _, (opening,) = await ledger.new_epoch()
        new = opening.log
        _, facts = await ledger.append([note("a")])
        assert facts[0].log == new == ledger.log != old
    async with opened(path, Key()) as ledger:
        assert ledger.log == new


# group commit ----------------------------------------------------------------------------------------------------
async def test_appends_that_wait_together_share_a_transaction(path: Path) -> None:
    key = Key()
    async with opened(path, key, config.Ledger(commit_entries_max=50, commit_delay_s=60.0)) as ledger:
        before = key.signatures
        answers = await asyncio.gather(*(ledger.append([note(n)]) for n in range(50)))
        assert key.signatures == before + 1
        assert [facts[0].body["text"] for _, facts in answers] == list(range(50))
        assert [facts[0].seq for _, facts in answers] == list(range(2, 52))
        assert ledger.last_commit_s > 0


async def test_each_caller_gets_its_own_slice(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_entries_max=6, commit_delay_s=60.0)) as ledger:
        sizes = [1, 3, 0, 2]
        answers = await asyncio.gather(*(ledger.append([note((n, k)) for k in range(n)]) for n in sizes))
        for size, (entries, facts) in zip(sizes, answers, strict=True):
            assert [fact.body["text"] for fact in facts] == [[size, k] for k in range(size)]
            assert len(entries) == size


async def test_a_group_is_cut_at_its_entries_and_its_bytes(path: Path) -> None:
    key = Key()
    async with opened(path, key, config.Ledger(commit_entries_max=4)) as ledger:
        before = key.signatures
        await asyncio.gather(*(ledger.append([note(n)]) for n in range(12)))
        assert key.signatures == before + 3
        await asyncio.gather(*(ledger.append([note(n)] * 3) for n in range(3)))
        assert key.signatures == before + 6, "an append that does not fit waits for the next group, whole"
        large = "x" * (BATCH_BYTES_MAX * 2 // 3)
        await asyncio.gather(*(ledger.append([note(large)]) for _ in range(3)))
        assert key.signatures == before + 9
        assert (await ledger.verify()).faults == ()


async def test_a_lone_append_does_not_wait_for_company(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_delay_s=600.0)) as ledger, asyncio.timeout(30):
        await ledger.append([note("alone")])
        await ledger.append([note("and again")])


async def test_after_a_crowd_an_append_waits_for_as_many(path: Path) -> None:
    key = Key()
    async with opened(path, key, config.Ledger(commit_delay_s=600.0)) as ledger, asyncio.timeout(30):
        await asyncio.gather(*(ledger.append([note(n)]) for n in range(3)))
        before = key.signatures
        early = asyncio.create_task(ledger.append([note("early")]))
        await ledger.heads()  # a round through the loop and back: enough for `early` to be taken
        await asyncio.gather(early, ledger.append([note("late")]), ledger.append([note("later")]))
        assert key.signatures == before + 1


async def test_a_crowd_that_does_not_come_again_is_not_waited_for_for_ever(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_delay_s=0.01)) as ledger, asyncio.timeout(30):
        await asyncio.gather(*(ledger.append([note(n)]) for n in range(3)))
        await ledger.append([note("alone")])


async def test_other_work_does_not_wait_for_company(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_delay_s=600.0)) as ledger, asyncio.timeout(30):
        await asyncio.gather(ledger.append([note("a")]), ledger.apply(()))


async def test_a_bad_record_spoils_only_its_own_append(path: Path) -> None:
    async with opened(path, Key()) as ledger:
        good = asyncio.create_task(ledger.append([note("good")]))
        with pytest.raises(UserError):
            await ledger.append([note(object())])
        await good
        assert await own_texts(ledger) == ["good"]


# cancellation ----------------------------------------------------------------------------------------------------
async def test_a_caller_cancelled_inside_its_transaction_leaves_it_whole(path: Path) -> None:
    key = SlowKey()
    async with opened(path, key) as ledger:
        key.signing.clear()
        key.go.clear()
        cancelled = asyncio.create_task(ledger.append([note("cancelled")]))
        await asyncio.to_thread(key.signing.wait, 30)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        following = asyncio.create_task(ledger.append([note("following")]))
        key.go.set()
        await following
        assert not await on_writing_thread(ledger, lambda conn: conn.in_transaction)
    async with opened(path, key) as ledger:
        assert await own_texts(ledger) == ["cancelled", "following"]
        assert (await ledger.verify()).faults == ()


async def test_one_of_a_group_cancelled_takes_nothing_from_the_others(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_entries_max=3, commit_delay_s=60.0)) as ledger:
        cancelled = asyncio.create_task(ledger.append([note(0)]))

        async def cancel_then_append() -> Appended:
            cancelled.cancel()
            return await ledger.append([note(2)])

        (_, one), (_, two) = await asyncio.gather(ledger.append([note(1)]), cancel_then_append())
        assert cancelled.cancelled()
        assert [fact.body["text"] for fact in one + two] == [1, 2]
        assert await own_texts(ledger) == [0, 1, 2]


async def test_closing_finishes_what_is_queued_and_refuses_the_rest(path: Path) -> None:
    async with opened(path, Key(), config.Ledger(commit_delay_s=600.0)) as ledger, asyncio.timeout(30):
        (_, facts), _, _ = await asyncio.gather(ledger.append([note("queued")]), ledger.close(), ledger.close())
        assert facts[0].body == {"text": "queued"}
        for refused in (ledger.append([note("late")]), ledger.heads(), ledger.apply(())):
            with pytest.raises(Unavailable):
                await refused


async def test_more_than_the_queue_holds_is_refused(path: Path) -> None:
    key = SlowKey()
    async with opened(path, key) as ledger:
        key.signing.clear()
        key.go.clear()
        first = asyncio.create_task(ledger.append([note("first")]))
        await asyncio.to_thread(key.signing.wait, 30)
        tasks = [asyncio.create_task(ledger.append([note(n)])) for n in range(writer.QUEUE_MAX + 1)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        key.go.set()
        assert [type(task.exception()) for task in done] == [Overloaded]
        await asyncio.gather(first, *(set(tasks) - done))


# the disk --------------------------------------------------------------------------------------------------------
async def test_a_full_disk_is_said_loses_nothing_and_heals(path: Path) -> None:
    async with opened(path, Key()) as ledger:
        await ledger.append([note("before")])
        await on_writing_thread(
            ledger, lambda conn: conn.execute(f"PRAGMA max_page_count={pragma(conn, 'page_count')}").fetchone()
        )
        big = "x" * 100_000
        for _ in range(2):
            with pytest.raises(Broken, match="Free space"):
                await ledger.append([note(big)])
        assert not ledger.healthy
        assert await own_texts(ledger) == ["before"]
        assert (await ledger.apply(())).dropped == ()
        assert not ledger.healthy, "what wrote nothing proves nothing"
        await on_writing_thread(
            ledger, lambda conn: conn.execute(f"PRAGMA max_page_count={UNLIMITED_PAGES}").fetchone()
        )
        await ledger.append([note(big)])
        assert ledger.fault is None
        assert await own_texts(ledger) == ["before", big]
        assert (await ledger.verify()).faults == ()


async def test_a_file_held_by_another_program_is_said(path: Path) -> None:
    async with opened(path, Key()) as ledger:
        await on_writing_thread(ledger, lambda conn: conn.execute("PRAGMA busy_timeout=1").fetchone())
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Broken, match="other program"):
                await ledger.append([note("a")])
        await ledger.append([note("b")])
        assert await own_texts(ledger) == ["b"]


async def test_a_ledger_that_cannot_be_opened_leaves_no_thread_and_no_lock(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE photos (id)")
    for _ in range(2):
        with pytest.raises(Broken, match="another program made it"):
            await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000)


async def test_a_checkpoint_empties_the_wal_unless_a_reader_is_in_the_way(path: Path) -> None:
    wal = path.with_name("ledger.db-wal")
    async with opened(path, Key()) as ledger:
        await ledger.append([note("a")])
        assert await ledger.checkpoint()
        assert wal.stat().st_size == 0
        await ledger.append([note("b")])
        with closing(open_reader(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM entries").fetchone()
            await ledger.append([note("c")])
            assert not await ledger.checkpoint()
        assert await ledger.checkpoint()
        timeout = await on_writing_thread(ledger, lambda conn: pragma(conn, "busy_timeout"))
        assert timeout == BUSY_TIMEOUT_MS
        assert await own_texts(ledger) == ["a", "b", "c"]


async def test_a_wal_past_its_limit_is_truncated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WAL_BYTES_MAX", 50_000)
    async with opened(path, Key()) as ledger:
        await ledger.append([note("x" * 100_000)])
        await ledger.apply(())  # comes after the truncation
        assert path.with_name("ledger.db-wal").stat().st_size == 0


# power and kill --------------------------------------------------------------------------------------------------
async def test_no_acknowledged_entry_is_lost_to_a_sigkill(path: Path) -> None:
    acknowledged = [0]
    for rounds in range(1, 5):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.ledger.test_writer", str(path), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        acknowledged += [int(await child.stdout.readline()) for _ in range(rounds * 37)]
        child.kill()
        acknowledged += [int(line) for line in (await child.stdout.read()).split(b"\n")[:-1]]
        await child.wait()
        async with opened(path, Key()) as ledger:
            (head,) = await ledger.heads()
            assert head.seq >= max(acknowledged)
            assert await ledger.verify() == store.Verdict(head.seq, ())
            assert await own_texts(ledger) == list(range(2, head.seq + 1))


async def append_for_ever(path: Path) -> None:
    """The child: four callers append at once; each acknowledged seq goes to stdout, each note says its own seq."""
    async with opened(path, Key()) as ledger:
        (head,) = await ledger.heads()
        seq = head.seq
        while True:
            following = range(seq + 1, seq + 5)
            for _, facts in await asyncio.gather(*(ledger.append([note(n)]) for n in following)):
                os.write(1, b"%d\n" % facts[0].seq)
            seq += 4


if __name__ == "__main__":
    asyncio.run(append_for_ever(Path(sys.argv[1])))
