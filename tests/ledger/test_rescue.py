"""A ledger file that is damaged, torn, put back, or gone: the node starts, says so, and gets back what others hold."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from piclusterd import config
from piclusterd.errors import Broken, Refused, UserError
from piclusterd.events import Record
from piclusterd.ids import LogId
from piclusterd.ledger import database, rescue, store
from piclusterd.ledger.frontier import Meaning
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.upkeep import ledger_flags
from piclusterd.wire import Span

from .keys import Key, verify

EAGER = config.Ledger(commit_delay_s=0.0)
TEXTS = [f"{number} " + "x" * 900 for number in range(60)]


@asynccontextmanager
async def opened(path: Path, ran_before: bool = False, seed: int = 1) -> AsyncIterator[LedgerWriter]:
    ledger = await LedgerWriter.start(path, Key(seed), verify, "pi", lambda: 1000, EAGER, ran_before=ran_before)
    try:
        yield ledger
    finally:
        await ledger.close()


async def append(ledger: LedgerWriter, texts: list[str]) -> None:
    for text in texts:
        await ledger.append([Record("note", {"text": text})])


async def notes(ledger: LedgerWriter) -> list[str]:
    return sorted(str(fact.body["text"]) for fact in await ledger.replay() if fact.kind == "note")


async def fetch(taker: LedgerWriter, giver: LedgerWriter) -> None:
    """Everything `giver` holds, batch by batch, as `reconcile` asks for it."""
    for _ in range(100):
        known = {head.log: head.seq for head in await taker.heads()}
        spans = [
            Span(*h.log, known.get(h.log, 0) + 1, h.seq) for h in await giver.heads() if h.seq > known.get(h.log, 0)
        ]
        if not spans:
            return
        await taker.apply(await giver.read(spans), resets=True)
    raise AssertionError("the exchange does not end")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
async def peer(tmp_path: Path, path: Path) -> AsyncIterator[LedgerWriter]:
    """Holds all that the ledger at `path` (closed) holds: its opening and `TEXTS`."""
    async with opened(tmp_path / "peer.db", seed=2) as other:
        async with opened(path) as ledger:
            await append(ledger, TEXTS)
            await fetch(other, ledger)
        yield other


def marked(path: Path) -> int:
    mark = rescue.load_mark(path)
    assert mark is not None
    return mark.seq


async def test_a_stop_marks_how_far_the_log_was_and_nothing_is_lost_by_a_restart(path: Path) -> None:
    async with opened(path) as ledger:
        assert marked(path) == 1
        await append(ledger, ["a"])
    assert marked(path) == 2
    async with opened(path, ran_before=True) as ledger:
        assert (ledger.lost, await notes(ledger)) == ("", ["a"])


async def test_one_ledger_has_one_writer(path: Path) -> None:
    async with opened(path):
        with pytest.raises(Refused, match="in use"):
            await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000)
    async with opened(path):
        pass


async def test_a_torn_page_is_found_after_a_power_cut_and_what_is_readable_is_taken_over(
    path: Path, peer: LedgerWriter
) -> None:
    tear(path, 12)
    async with opened(path) as ledger:
        assert "damaged" in ledger.lost
        assert ledger_flags(ledger, "a restore") == ("ledger-lost", "votes-lost")
        assert rescue.beside(path, "damaged").exists()
        assert ledger.log.epoch != (await peer.heads())[0].epoch
        assert 5 < len(await notes(ledger)) < len(TEXTS), "the front of the log was salvaged"
        await fetch(ledger, peer)
        assert await notes(ledger) == sorted(TEXTS)
        assert (await ledger.verify()).faults == ()
        await ledger.recovered()
        assert ledger_flags(ledger, "") == ("ledger-mended",)
    async with opened(path) as ledger:
        assert ledger.lost == ""


class PowerCut(BaseException):
    """Ends a start in the middle, as nothing in it expects."""


async def start_cut_short(path: Path, after: int) -> None:
    """A start that ends while it takes entries over: at the `after`-th signature."""
    left = iter(range(after))

    def verify_until(key: bytes, signature: bytes, data: bytes) -> bool:
        if next(left, None) is None:
            raise PowerCut
        return verify(key, signature, data)

    with pytest.raises(PowerCut):
        rescue.open_checked(path, verify_until, ran_before=True)


def tear(path: Path, page: int) -> None:
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)


async def test_a_page_torn_anywhere_while_the_node_was_off_keeps_it_neither_down_nor_short(
    path: Path, peer: LedgerWriter
) -> None:
    shutil.copy(path, path.with_name("sound"))
    with closing(store.open_database(path)) as conn:
        pages = database.pragma(conn, "page_count")
    for page in (*range(9), pages // 2, pages - 1):  # all that hold structure, and leaves: first, middle, last
        shutil.copy(path.with_name("sound"), path)
        tear(path, page)
        async with opened(path) as ledger:
            await fetch(ledger, peer)
            assert await notes(ledger) == sorted(TEXTS), f"page {page}"
            assert (await ledger.verify()).faults == (), f"page {page}"
            await ledger.recovered()


async def test_a_rescue_cut_short_is_gone_on_with(path: Path, peer: LedgerWriter) -> None:
    tear(path, 12)
    for after in (3, 0):
        await start_cut_short(path, after)
    async with opened(path) as ledger:
        assert "damaged" in ledger.lost
        assert 5 < len(await notes(ledger)) < len(TEXTS), "the front of the log was salvaged all the same"
        await fetch(ledger, peer)
        assert await notes(ledger) == sorted(TEXTS)
        await append(ledger, ["later"])
    async with opened(path) as ledger:
        assert "later" in await notes(ledger), "the rescue ended once"


async def test_a_rescue_cut_short_between_two_renames_keeps_what_only_the_wal_holds(path: Path, tmp_path: Path) -> None:
    async with opened(path) as ledger:
        await append(ledger, ["in the database"])
        assert await ledger.checkpoint()
        await append(ledger, TEXTS)
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", tmp_path / f"image{suffix}")
    for suffix in ("", "-wal"):
        (tmp_path / f"image{suffix}").rename(f"{path}{suffix}")
    await asyncio.to_thread(rescue.beside(path, "rescuing").write_text, "torn")
    path.with_name("ledger.db-wal").rename(path.with_name("ledger.db.damaged-wal"))
    async with opened(path) as ledger:
        assert await notes(ledger) == sorted(["in the database", *TEXTS])
        assert "torn" in ledger.lost


async def test_taking_over_into_a_full_disk_is_an_error_and_no_short_ledger(
    path: Path, peer: LedgerWriter, tmp_path: Path
) -> None:
    with closing(store.open_database(tmp_path / "small.db")) as small:
        small.execute("PRAGMA max_page_count=12")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            rescue.salvage(path, small, verify)


@pytest.mark.parametrize("left", [b"", b"\0" * 40_000, b"not a database" * 1000])
async def test_a_file_that_is_no_database_any_more_is_moved_aside(path: Path, peer: LedgerWriter, left: bytes) -> None:
    await asyncio.to_thread(path.write_bytes, left)
    async with opened(path) as ledger:
        assert ledger.lost
        await fetch(ledger, peer)
        assert await notes(ledger) == sorted(TEXTS)


@pytest.mark.parametrize("forgets_mark", [False, True])
async def test_a_file_that_is_gone_is_begun_anew_and_fetched(
    path: Path, peer: LedgerWriter, forgets_mark: bool
) -> None:
    for file in path.parent.glob("ledger.db*"):
        if forgets_mark or not file.name.endswith("mark"):
            file.unlink()
    async with opened(path, ran_before=True) as ledger:
        assert "gone" in ledger.lost
        await fetch(ledger, peer)
        assert await notes(ledger) == sorted(TEXTS)


async def test_a_first_start_has_lost_nothing(path: Path) -> None:
    async with opened(path) as ledger:
        assert ledger.lost == ""


async def test_an_older_file_that_was_put_back_is_noticed_at_start(path: Path, tmp_path: Path) -> None:
    async with opened(path) as ledger:
        await append(ledger, ["old"])
    shutil.copy(path, tmp_path / "image")
    async with opened(path) as ledger:
        old = ledger.log
        await append(ledger, ["new"])
    shutil.copy(tmp_path / "image", path)
    async with opened(path) as ledger:
        assert "older state" in ledger.lost
        assert ledger.log != old
        new = ledger.log
    async with opened(path) as ledger:
        assert (ledger.log, bool(ledger.lost)) == (new, True), "until the others' heads say that nothing is missing"


async def test_a_restore_begins_a_new_log_once(path: Path) -> None:
    async with opened(path) as ledger:
        old = ledger.log
    rescue.want_new_epoch(path)
    async with opened(path) as ledger:
        new = ledger.log
        assert new != old
    async with opened(path) as ledger:
        assert ledger.log == new


@pytest.mark.parametrize("column", ["header", "payload", "signature"])
async def test_a_flipped_bit_is_found_told_and_mended(path: Path, peer: LedgerWriter, column: str) -> None:
    with closing(store.open_database(path)) as conn:
        (place, data) = conn.execute(f"SELECT id, {column} FROM entries WHERE id & 1023 = 30").fetchone()
        flipped = bytes([*data[:20], data[20] ^ 1, *data[21:]])
        conn.execute(f"UPDATE entries SET {column} = ? WHERE id = ?", (flipped, place))
    async with opened(path) as ledger:
        assert len(await notes(ledger)) <= len(TEXTS), "rot does not keep a node from starting"
        while (await ledger.scrub_slice()).cursor:
            pass
        assert [(span.first, span.last) for span in ledger.damaged] == [(30, 30)]
        assert ledger_flags(ledger, "") == ("ledger-rot",)
        applied = await ledger.apply(await peer.read(ledger.damaged), resets=True)
        assert (len(applied.facts), ledger.damaged) == (1, ())
        assert ledger_flags(ledger, "") == ("ledger-mended",)
        assert await notes(ledger) == sorted(TEXTS)


async def test_a_rotten_end_is_not_extended(path: Path, peer: LedgerWriter) -> None:
    with closing(store.open_database(path)) as conn:
        conn.execute("UPDATE entries SET header = zeroblob(80) WHERE id = (SELECT max(id) FROM entries)")
    async with opened(path) as ledger:
        assert ledger.log.epoch not in {head.epoch for head in await peer.heads()}
        await append(ledger, ["later"])
        await ledger.apply(await peer.read(ledger.damaged), resets=True)
        assert (ledger.lost, await notes(ledger)) == ("", sorted([*TEXTS, "later"]))
        assert (await ledger.verify()).faults == ()


async def test_a_fork_closes_the_log_and_a_new_one_goes_on(path: Path, tmp_path: Path) -> None:
    async with opened(path) as ledger:
        pass
    shutil.copy(path, tmp_path / "twin.db")
    async with opened(path) as ledger, opened(tmp_path / "twin.db") as twin:
        await append(ledger, ["a"])
        await append(twin, ["b"])
        applied = await ledger.apply(await twin.read([Span(*twin.log, 1, 2)]))
        assert applied.dropped[0].reason.startswith("fork")
        with pytest.raises(Exception, match="closed"):
            await append(ledger, ["c"])
        await ledger.new_epoch()
        await append(ledger, ["d"])
        assert await notes(ledger) == ["a", "b", "d"]
    async with opened(tmp_path / "twin.db") as twin, opened(path) as ledger:
        await twin.apply(await ledger.read([Span(*head.log, 1, head.seq) for head in await ledger.heads()]))
        old = twin.log
    async with opened(tmp_path / "twin.db") as twin:
        assert twin.log != old, "a start does not extend a forked log either"


async def test_another_programs_file_is_never_moved(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE photos (id)")
    with pytest.raises(Broken, match="another program"):
        await LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000)
    assert not rescue.beside(path, "damaged").exists()


async def test_a_ledger_of_the_first_schema_is_brought_up_to_date(path: Path) -> None:
    async with opened(path) as ledger:
        await append(ledger, ["a"])
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for statement in ("DROP TABLE damaged", "DROP TABLE branches", "DROP TABLE pruned", "PRAGMA user_version=1"):
            conn.execute(statement)
    async with opened(path) as ledger:
        assert await notes(ledger) == ["a"]
    with closing(store.open_database(path)) as conn:
        assert database.pragma(conn, "user_version") == database.SCHEMA_VERSION
        assert conn.execute("SELECT count(*) FROM branches").fetchone() == (0,)


async def test_two_starts_at_once_let_one_in(path: Path) -> None:
    starts = [LedgerWriter.start(path, Key(), verify, "pi", lambda: 1000) for _ in range(2)]
    results = await asyncio.gather(*starts, return_exceptions=True)
    assert sorted(isinstance(result, Refused) for result in results) == [False, True]
    for result in results:
        if isinstance(result, LedgerWriter):
            await result.close()


async def test_a_checkpoint_and_its_pruning_go_through_the_writer(path: Path, peer: LedgerWriter) -> None:
    async with opened(path) as ledger:
        keep_2 = Meaning(
            lambda f: None if f.seq == 2 else "", lambda f: False, lambda f: False, lambda f: False, lambda f: None
        )
        (head,) = await ledger.heads()
        with pytest.raises(UserError, match="another log"):
            await ledger.add_checkpoint(LogId(head.origin, 7), head.seq, 0, keep_2)
        _, (fact,) = await ledger.add_checkpoint(ledger.log, head.seq, 2, keep_2)
        while await ledger.forget(ledger.log, fact.seq, "rows"):
            pass
        assert await notes(ledger) == TEXTS[:1]
        await append(ledger, ["later"])
        await fetch(peer, ledger)
        assert set(await notes(peer)) == {*TEXTS, "later"}, "who holds what was before keeps it until it prunes too"
    async with opened(path) as ledger:
        assert (ledger.lost, await notes(ledger)) == ("", [TEXTS[0], "later"])
        assert (await ledger.verify()).faults == ()
