"""A ledger on a real file that is ended, pruned and filled again: it verifies, serves and does not grow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

from piclusterd import config
from piclusterd.events import Fact, Record
from piclusterd.folding import MEANING, fold
from piclusterd.ids import run_id
from piclusterd.ledger.database import open_reader, pragma
from piclusterd.ledger.writer import WAL_BYTES_MAX, LedgerWriter
from piclusterd.wire import Head, Hook, Span
from piclusterd.workflows.journal import Journal, hook_record

from .keys import Key, verify

RUNS = 5_000
"""Of four entries each: a year of a quiet house."""
RUNS_A_BATCH = 100
BODY = b"x" * 2_000
OPEN = 3


@asynccontextmanager
async def opened(path: Path, key: Key) -> AsyncIterator[LedgerWriter]:
    ledger = await LedgerWriter.start(path, key, verify, "pi", lambda: 1000, config.Ledger(commit_delay_s=0.0))
    try:
        yield ledger
    finally:
        await ledger.close()


def run_of(number: int, done: bool = True) -> list[Record]:
    hook = Hook("linear", f"hook-{number}", "update", BODY)
    run = run_id("triage", hook.key)
    records = [hook_record(hook, "triage", "title", 1), Record("run.intent", {"run": run, "step": "s"}, 1)]
    records.append(Record("run.result", {"run": run, "step": "s", "value": {"n": number}}, 1))
    return [*records, Record("run.done", {"run": run, "outcome": "done"}, 1)] if done else records


async def work(ledger: LedgerWriter, first: int) -> None:
    """`RUNS` runs that are done, and `OPEN` that are not."""
    for start in range(first, first + RUNS, RUNS_A_BATCH):
        await ledger.append([record for n in range(start, start + RUNS_A_BATCH) for record in run_of(n)])
    await ledger.append([record for n in range(first + RUNS, first + RUNS + OPEN) for record in run_of(n, done=False)])


async def end(ledger: LedgerWriter) -> Fact:
    (head,) = [head for head in await ledger.heads() if head.log == ledger.log]
    _, (checkpoint,) = await ledger.add_checkpoint(ledger.log, head.seq, RUNS, MEANING)
    while await ledger.forget(ledger.log, checkpoint.seq, "rows"):
        assert ledger.wal_bytes <= 2 * WAL_BYTES_MAX
    return checkpoint


def journal(facts: list[Fact]) -> Journal:
    told = Journal()
    fold(told, facts)
    return told


async def test_twenty_thousand_entries_are_pruned_and_their_pages_used_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "pi.db", Key(1)) as ledger, opened(tmp_path / "new.db", Key(2)) as follower:
        await work(ledger, 0)
        full = size(tmp_path / "pi.db")
        checkpoint = await end(ledger)
        await ledger.append([Record("note", {"text": "goes on"})])
        pruned = size(tmp_path / "pi.db")
        assert pruned < full / 10, f"{full} bytes before, {pruned} after"
        verdict = await ledger.verify()
        assert (verdict.faults, verdict.entries) == ((), 2), "the checkpoint and its tail"

        heads = await ledger.heads()
        while follower_lacks(await follower.heads(), heads[0]):
            held = {head.log: head.seq for head in await follower.heads()}
            lacking = Span(*ledger.log, held.get(ledger.log, 0) + 1, heads[0].seq)
            await follower.apply(await ledger.read([lacking]), resets=True)
        assert (await follower.verify()).faults == ()
        ours, theirs = journal(await ledger.replay()), journal(await follower.replay())
        assert len(ours.open_runs()) == OPEN
        assert theirs.open_runs() == ours.open_runs()
        assert theirs.known("hook-17") == ours.known("hook-17") is not None
        assert heads[0].seq == checkpoint.seq + 1

        await work(ledger, 100_000)
        await end(ledger)
        await ledger.checkpoint()
        assert size(tmp_path / "pi.db") < full / 5
        assert (tmp_path / "pi.db").stat().st_size < full / 5, "given back to the file system"
    async with opened(tmp_path / "pi.db", Key(1)) as ledger:
        assert len(journal(await ledger.replay()).open_runs()) == 2 * OPEN
        assert ledger.lost == ""


def size(path: Path) -> int:
    """Of the database's pages, in bytes."""
    with closing(open_reader(path)) as conn:
        return pragma(conn, "page_count") * pragma(conn, "page_size")


def follower_lacks(heads: tuple[Head, ...], head: Head) -> bool:
    return head not in heads
