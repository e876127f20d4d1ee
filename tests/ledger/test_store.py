"""The ledger's rows: two stores and a pretend wire."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.errors import Broken, UserError
from piclusterd.events import Record
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger import database, store
from piclusterd.ledger.entry import SEQ_MAX, Header, decode_header, digest
from piclusterd.wire import BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, HEADS_MAX, Entry, Head, Span

from .keys import Key, verify

KEY = Key()
LOG = KEY.log()
EVERYTHING = Span(LOG.origin, LOG.epoch, 1, SEQ_MAX)


def notes(*texts: object) -> list[Record]:
    return [Record("note", {"text": text}) for text in texts]


def fresh(key: Key | None = None) -> sqlite3.Connection:
    """An empty ledger in memory, with `key`'s log opened."""
    conn = store.open_database(":memory:")
    if key:
        store.open_log(conn, key, "pi", 1, 1000)
    return conn


def add(conn: sqlite3.Connection, *texts: object, key: Key = KEY) -> tuple[Entry, ...]:
    return store.append(conn, key.log(), notes(*texts), key, 1000)[0]


def everything(conn: sqlite3.Connection) -> tuple[Entry, ...]:
    spans = [Span(head.origin, head.epoch, 1, head.seq) for head in store.heads(conn)]
    return store.read(conn, spans, 2**30, 2**30)


def reasons(applied: store.Applied) -> list[str]:
    return [dropped.reason.split(":")[0] for dropped in applied.dropped]


@pytest.fixture
def ours() -> Iterator[sqlite3.Connection]:
    with closing(fresh(KEY)) as conn:
        yield conn


@pytest.fixture
def theirs() -> Iterator[sqlite3.Connection]:
    with closing(fresh()) as conn:
        yield conn


def test_what_is_appended_is_read_back_and_verifies(ours: sqlite3.Connection) -> None:
    entries, facts = store.append(ours, LOG, notes("a", "b"), KEY, 2000)
    assert [fact.body["text"] for fact in facts] == ["a", "b"]
    assert [fact.seq for fact in facts] == [2, 3]
    assert store.heads(ours) == (Head(LOG.origin, 1, 3),)
    assert store.read(ours, [EVERYTHING], 2**20, 100)[1:] == entries
    assert tuple(store.facts(ours))[1:] == facts
    assert tuple(store.facts(ours, store.heads(ours))) == ()
    assert store.verify_all(ours, verify) == store.Verdict(3, ())
    assert store.counts(ours)[:2] == (1, 3)


def test_the_hybrid_clock_goes_past_what_was_seen_of_others(ours: sqlite3.Connection) -> None:
    with closing(fresh(Key(2))) as peer:
        store.append(peer, Key(2).log(), notes("late"), Key(2), 9_000_000)
        store.apply(ours, everything(peer), verify)
    _, facts = store.append(ours, LOG, notes("answer"), KEY, 2000)
    assert facts[0].hlc == (9_000_000 << 16) + 1


def test_a_bad_record_changes_nothing(ours: sqlite3.Connection) -> None:
    with pytest.raises(UserError):
        store.append(ours, LOG, [*notes("a"), Record("note", {"x": object()})], KEY, 1000)
    assert store.heads(ours)[0].seq == 1


def test_a_transaction_that_fails_half_way_leaves_none_open(ours: sqlite3.Connection) -> None:
    class Lost(Key):
        def sign(self, data: bytes) -> bytes:
            raise OSError("the key is gone")

    with pytest.raises(OSError, match="the key is gone"):
        store.append(ours, LOG, notes("a"), Lost(), 1000)
    with pytest.raises(OSError, match="the key is gone"):
        store.open_log(ours, Lost(3), "pi", 1, 1000)
    assert not ours.in_transaction
    add(ours, "b")
    assert [fact.body["text"] for fact in store.facts(ours) if fact.kind == "note"] == ["b"]


def test_opening_a_log_again_changes_nothing(ours: sqlite3.Connection) -> None:
    assert store.open_log(ours, KEY, "pi", 1, 5000) == LOG
    assert store.counts(ours)[:2] == (1, 1)


def test_the_current_log_is_the_one_opened_last_here(ours: sqlite3.Connection) -> None:
    assert store.current_log(ours, KEY.node) == LOG
    assert store.current_log(ours, Key(2).node) is None
    store.open_log(ours, KEY, "pi", 7, 1000)
    assert store.current_log(ours, KEY.node) == LogId(KEY.node, 7)
    store.open_log(ours, KEY, "pi", 1, 1000)
    assert store.current_log(ours, KEY.node) == LOG


def test_our_log_fetched_from_peers_is_not_one_to_extend(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    store.apply(theirs, everything(ours), verify)
    assert store.current_log(theirs, KEY.node) is None


def test_applying_gives_the_same_facts_and_heads(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    add(ours, "a", "b")
    applied = store.apply(theirs, everything(ours), verify)
    assert applied.facts == tuple(store.facts(ours))
    assert applied.heads == store.heads(ours) == store.heads(theirs)
    assert applied.dropped == ()
    assert everything(theirs) == everything(ours)
    assert store.verify_all(theirs, verify).faults == ()


def test_applying_again_gives_no_facts_and_the_heads(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    add(ours, "a")
    store.apply(theirs, everything(ours), verify)
    assert store.apply(theirs, everything(ours), verify) == store.Applied((), store.heads(ours), ())


def test_entries_apply_in_any_order_and_twice_in_one_batch(
    ours: sqlite3.Connection, theirs: sqlite3.Connection
) -> None:
    add(ours, "a", "b")
    add(ours, "c")
    mixed = list(everything(ours)) * 2
    random.Random(4).shuffle(mixed)
    applied = store.apply(theirs, mixed, verify)
    assert applied.dropped == ()
    assert store.heads(theirs) == store.heads(ours)
    assert len(applied.facts) == 4


def test_an_unsigned_tail_is_left_out_and_is_no_error(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    add(ours, "a", "b", "c")
    applied = store.apply(theirs, everything(ours)[:3], verify)
    assert (applied.heads, applied.dropped) == ((Head(LOG.origin, 1, 1),), ())
    assert store.apply(theirs, everything(ours), verify).heads[0].seq == 4


def test_a_gap_is_reported_and_what_is_before_it_is_kept(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    add(ours, "a")
    add(ours, "b")
    add(ours, "c")
    entries = everything(ours)
    applied = store.apply(theirs, [*entries[:2], entries[3]], verify)
    assert reasons(applied) == ["gap"]
    assert applied.heads[0].seq == 2


def test_an_unknown_log_must_begin_at_its_beginning(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    applied = store.apply(theirs, add(ours, "a"), verify)
    assert (reasons(applied), applied.heads) == (["gap"], ())
    assert store.counts(theirs).logs == 0


def test_nobody_but_the_origin_can_make_a_fork(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    liar = Key(2)
    add(ours, "a")
    store.apply(theirs, everything(ours), verify)
    held = everything(ours)[1]
    header = decode_header(held.header)
    assert isinstance(header, Header)
    other = msgpack.packb(header._replace(term=9))
    for signature in (b"", liar.sign(b"x"), held.signature):
        applied = store.apply(theirs, [Entry(other, held.payload, signature)], verify)
        assert reasons(applied) == ["forged"]
    assert everything(theirs) == everything(ours)


@pytest.mark.parametrize("victim", [2, 3])
def test_a_forged_entry_beside_the_true_ones_is_no_fork(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, victim: int
) -> None:
    add(ours, "a", "b", "c")
    entries = list(everything(ours))
    header = decode_header(entries[victim - 1].header)
    assert isinstance(header, Header)
    forged = Entry(msgpack.packb(header._replace(term=9)), entries[victim - 1].payload)
    for batch in ([*entries[: victim - 1], forged, *entries[victim:]], [entries[0], forged, *entries[1:]]):
        applied = store.apply(theirs, batch, verify)
        assert reasons(applied) in (["forged"], ["gap"])
        assert applied.heads[0].seq == 1
    assert store.apply(theirs, entries, verify).heads == store.heads(ours)


def test_a_signed_end_does_not_vouch_for_a_forged_entry_before_it(
    ours: sqlite3.Connection, theirs: sqlite3.Connection
) -> None:
    add(ours, "a")
    store.apply(theirs, everything(ours), verify)
    later = add(ours, "b")
    header = decode_header(later[0].header)
    assert isinstance(header, Header)
    forged = Entry(msgpack.packb(header._replace(prev=b"x" * 32)), later[0].payload)
    assert reasons(store.apply(theirs, [forged, *later], verify)) == ["forged"]
    assert store.apply(theirs, later, verify).heads == store.heads(ours)


def test_what_a_sound_signature_covers_is_kept_before_a_forged_one(
    ours: sqlite3.Connection, theirs: sqlite3.Connection
) -> None:
    add(ours, "a")
    add(ours, "b")
    add(ours, "c")
    entries = list(everything(ours))
    entries[2] = Entry(entries[2].header, entries[2].payload, bytes(64))
    applied = store.apply(theirs, entries, verify)
    assert (reasons(applied), applied.heads[0].seq) == (["forged"], 2)
    assert store.apply(theirs, everything(ours), verify).heads == store.heads(ours), "the true ones still fit"


def test_one_bad_log_does_not_spoil_another(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    with closing(fresh(Key(2))) as peer:
        add(ours, "a")
        add(peer, "b", key=Key(2))
        batch = [everything(ours)[1], Entry(b"junk", b"", b""), *everything(peer)]
        applied = store.apply(theirs, batch, verify)
        assert sorted(reasons(applied)) == ["gap", "junk"]
        assert applied.heads == store.heads(peer)


def test_logs_beyond_the_cap_are_refused(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> None:
    rows = [("f" * 16, epoch, b"k") for epoch in range(HEADS_MAX)]
    theirs.executemany("INSERT INTO logs (origin, epoch, key) VALUES (?, ?, ?)", rows)
    assert reasons(store.apply(theirs, everything(ours), verify)) == ["junk"]


ENTRIES = st.builds(Entry, st.binary(max_size=80), st.binary(max_size=40), st.binary(max_size=70))


@settings(deadline=None)
@given(st.lists(ENTRIES, max_size=8))
def test_junk_never_raises_and_changes_nothing(entries: list[Entry]) -> None:
    with closing(fresh()) as conn:
        applied = store.apply(conn, entries, verify)
        assert len(applied.dropped) == len(entries)
        assert store.heads(conn) == ()


@settings(deadline=None)
@given(st.integers(0, 3), st.sampled_from(["header", "payload", "signature"]), st.binary(max_size=90), st.integers(0))
def test_a_mangled_entry_never_raises_and_never_gets_in(victim: int, field: str, junk: bytes, place: int) -> None:
    with closing(fresh(KEY)) as ours, closing(fresh()) as theirs:
        add(ours, "a", "b", "c")
        entries = list(everything(ours))
        sound = getattr(entries[victim], field)
        cut = place % (len(sound) + 1)
        parts = {name: getattr(entries[victim], name) for name in ("header", "payload", "signature")}
        entries[victim] = Entry(**{**parts, field: sound[:cut] + junk + sound[cut + len(junk) :]})
        store.apply(theirs, entries, verify)
        held = everything(theirs)
        assert held == everything(ours)[: len(held)]
        assert store.verify_all(theirs, verify).faults == ()


def test_a_batch_always_ends_on_a_signed_entry(ours: sqlite3.Connection) -> None:
    for group in range(30):
        add(ours, *range(1 + group % 7))
    head = store.heads(ours)[0].seq
    for first in (1, 2, 9):
        for last in (first, first + 1, head):
            for entries_max in (1, 3, 1000):
                batch = store.read(ours, [Span(*LOG, first, last)], 2**20, entries_max)
                assert batch[-1].signature
                assert len(batch) <= max(entries_max, 1) + 7


def test_a_batch_stops_after_its_bytes_are_passed(ours: sqlite3.Connection) -> None:
    for _ in range(4):
        add(ours, "x" * 100_000)
    batch = store.read(ours, [EVERYTHING], BATCH_BYTES_MAX, BATCH_ENTRIES_MAX)
    assert len(batch) == 4, "the opening, and three that pass 256 KiB"


@pytest.mark.parametrize(
    "span",
    [
        Span(NodeId("nobody"), 1, 1, 5), Span(LOG.origin, 2**70, 1, 5), Span(*LOG, 2**70, 2**71), Span(*LOG, 5, 1),
        Span(*LOG, 9, 9), Span(*LOG, -5, -1),
    ],
)  # fmt: skip
def test_a_span_of_nothing_reads_nothing(ours: sqlite3.Connection, span: Span) -> None:
    assert store.read(ours, [span], 2**20, 100) == ()


def exchange(reader: sqlite3.Connection, writer: sqlite3.Connection, dice: random.Random) -> None:
    """One lossy batch from `reader` to `writer`, of what the heads say is missing."""
    known = {head.log: head.seq for head in store.heads(writer)}
    spans = [Span(*head.log, known.get(head.log, 0) + 1, head.seq) for head in store.heads(reader)]
    batch: Sequence[Entry] = store.read(reader, spans, 2000, 5)
    store.apply(writer, [entry for entry in batch if dice.random() < 0.9], verify)


def test_two_stores_exchange_until_their_heads_are_equal() -> None:
    dice, keys = random.Random(7), (Key(1), Key(2))
    with closing(fresh(keys[0])) as one, closing(fresh(keys[1])) as two:
        for round_number in range(400):
            if round_number < 40:
                add(one, *range(dice.randrange(1, 5)), key=keys[0])
                add(two, *range(dice.randrange(1, 5)), key=keys[1])
            exchange(one, two, dice)
            exchange(two, one, dice)
        assert digest(store.heads(one)) == digest(store.heads(two))
        assert set(everything(one)) == set(everything(two))
        assert store.verify_all(one, verify).faults == store.verify_all(two, verify).faults == ()


@pytest.mark.parametrize("column", ["header", "payload", "signature"])
def test_the_scrub_finds_rot(ours: sqlite3.Connection, column: str) -> None:
    add(ours, "a")
    add(ours, "b")
    ours.execute(f"UPDATE entries SET {column} = zeroblob(length({column})) WHERE id & ? = 2", (SEQ_MAX,))
    verdict = store.verify_all(ours, verify)
    assert verdict.entries == 1
    assert len(verdict.faults) == 1


def test_the_scrub_finds_a_lost_end(ours: sqlite3.Connection) -> None:
    add(ours, "a", "b")
    ours.execute("DELETE FROM entries WHERE id & ? = 3", (SEQ_MAX,))
    assert "not signed" in store.verify_all(ours, verify).faults[0]


def test_replay_of_rot_says_so(ours: sqlite3.Connection) -> None:
    ours.execute("UPDATE entries SET payload = x'c1'")
    with pytest.raises(Broken):
        list(store.facts(ours))


# the file --------------------------------------------------------------------------------------------------------
def test_the_file_is_set_up_for_flash_and_power_cuts(tmp_path: Path) -> None:
    with closing(store.open_database(tmp_path / "ledger.db")) as conn:
        assert database.pragma(conn, "auto_vacuum") == 2
        assert database.pragma(conn, "synchronous") == 2
        assert database.pragma(conn, "busy_timeout") == database.BUSY_TIMEOUT_MS
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    with closing(store.open_database(tmp_path / "ledger.db")) as conn:
        store.open_log(conn, KEY, "pi", 1, 1000)
        add(conn, "a")
    with closing(store.open_database(tmp_path / "ledger.db")) as conn:
        assert store.verify_all(conn, verify) == store.Verdict(2, ())


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(store.open_database(path)), closing(database.open_reader(path)) as reader:
        assert database.pragma(reader, "wal_autocheckpoint") == 0
        with pytest.raises(sqlite3.OperationalError):
            reader.execute("DELETE FROM logs")


@pytest.mark.parametrize(
    ("statement", "words"),
    [("PRAGMA user_version=99", "newer release"), ("PRAGMA application_id=7", "not a piclusterd ledger")],
)
def test_a_file_that_is_not_ours_to_open_is_refused(tmp_path: Path, statement: str, words: str) -> None:
    with closing(store.open_database(tmp_path / "ledger.db")) as conn:
        conn.execute(statement)
    with pytest.raises(Broken, match=words):
        store.open_database(tmp_path / "ledger.db")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database" * 100)
    with pytest.raises(Broken, match="Move the file away"):
        store.open_database(tmp_path / "ledger.db")


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Broken, match=r"no-such/ledger\.db"):
        store.open_database(tmp_path / "no-such" / "ledger.db")
