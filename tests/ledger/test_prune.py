"""Checkpoints: what is closed is forgotten, the chain still verifies, a node that was away for a month gets current."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.errors import UserError
from piclusterd.events import Fact, Record
from piclusterd.folding import MEANING
from piclusterd.folding import fold as fold_into
from piclusterd.ids import run_id
from piclusterd.ledger import prune, rescue, rows, scrub, store
from piclusterd.ledger.checkpoint import Seen, kept_facts, seen_digests
from piclusterd.ledger.entry import CHECKPOINT, draft
from piclusterd.ledger.frontier import Plan
from piclusterd.wire import Entry, Head, Hook, Span
from piclusterd.workflows.journal import Journal, hook_record, subject

from .keys import Key, verify
from .rig import KEY, LOG, add, everything, fresh, give, image, reasons, spoil

RUNS = 40


MEANS = replace(MEANING, subject=lambda fact: "" if fact.kind == "note" else subject(fact))


def work(conn: sqlite3.Connection, first: int, done: int) -> None:
    """Webhooks `first` … `first` + RUNS, each with a step; the first `done` of them closed."""
    for number in range(first, first + RUNS):
        hook = Hook("linear", f"hook-{number}", "update", b"x" * 200)
        run = run_id("triage", hook.key)
        records = [hook_record(hook, "triage", "title", 1), Record("run.intent", {"run": run, "step": "s"}, 1)]
        records += [Record("run.result", {"run": run, "step": "s", "value": {"n": number}}, 1)]
        if number < first + done:
            records.append(Record("run.done", {"run": run, "outcome": "done"}, 1))
        store.append(conn, LOG, records, KEY, 1000 + number)


def fold(conn: sqlite3.Connection) -> Journal:
    journal = Journal()
    fold_into(journal, store.facts(conn))
    return journal


def checkpoint(conn: sqlite3.Connection) -> int:
    """Add one to `LOG` that keeps what is open; its seq."""
    made = prune.make_plan(conn, LOG, store.heads(conn)[0].seq, 0, MEANS)
    _, (fact,) = prune.add_checkpoint(conn, LOG, made, KEY, "pi", 9000)
    return fact.seq


def prune_all(conn: sqlite3.Connection, seq: int, level: str) -> None:
    for _ in range(100):
        if not prune.prune(conn, LOG, seq, "rows" if level == "rows" else "bodies"):
            return
    raise AssertionError("the pruning does not end")


def open_work(conn: sqlite3.Connection) -> list[tuple[object, ...]]:
    journal = fold(conn)
    runs = [journal.runs[run] for run in journal.open_runs()]
    return [(r.run, r.hook, r.hook_rank, r.values(), r.intents, r.hlc) for r in runs]


@pytest.fixture
def ours() -> Iterator[sqlite3.Connection]:
    with closing(fresh(KEY)) as conn:
        work(conn, 0, RUNS - 3)
        yield conn


@pytest.mark.parametrize("level", ["bodies", "rows"])
def test_what_is_open_survives_and_the_chain_still_verifies(
    ours: sqlite3.Connection, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "ROWS_MAX", 50)
    before, size = open_work(ours), len(everything(ours))
    seq = checkpoint(ours)
    prune_all(ours, seq, level)
    assert len(before) == 3
    assert open_work(ours) == before
    assert len(fold(ours).runs) == 3, "what is closed is forgotten"
    verdict = store.verify_all(ours, verify)
    assert verdict == store.Verdict(1 if level == "rows" else size + 1, ())
    assert scrub.scrub(ours, 0, verify).damaged == ()
    assert store.heads(ours) == (Head(*LOG, seq),)
    add(ours, "goes on")
    assert store.verify_all(ours, verify).faults == ()


@pytest.mark.parametrize("level", ["bodies", "rows"])
def test_a_node_that_was_away_for_a_month_is_current_after_checkpoint_and_tail(
    ours: sqlite3.Connection, level: str
) -> None:
    with closing(image(ours)) as absent, closing(fresh()) as new:
        work(ours, 1000, RUNS - 2)
        seq = checkpoint(ours)
        prune_all(ours, seq, level)
        work(ours, 2000, RUNS - 1)
        for late in (absent, new):
            lacking = Span(*LOG, (store.heads(late) or (Head(*LOG, 0),))[0].seq + 1, store.heads(ours)[0].seq)
            applied = give(ours, late, lacking)
            assert applied.dropped == ()
            assert store.heads(late) == store.heads(ours)
            assert open_work(late) == open_work(ours)
            journal = Journal()
            fold_into(journal, applied.facts)
            assert journal.open_runs() == fold(ours).open_runs(), "what was applied tells it all"
            assert store.verify_all(late, verify).faults == ()
            assert scrub.scrub(late, 0, verify).damaged == ()
            assert len(open_work(late)) == 3 + 2 + 1


def test_pruning_that_is_cut_short_leaves_a_ledger_that_verifies(
    ours: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "ROWS_MAX", 30)
    before = open_work(ours)
    seq = checkpoint(ours)
    calls = 0
    while prune.prune(ours, LOG, seq, "rows"):
        calls += 1
        assert store.verify_all(ours, verify).faults == ()
        assert scrub.scrub(ours, 0, verify).damaged == ()
        assert open_work(ours) == before
        with closing(fresh()) as new:
            give(ours, new)
            assert open_work(new) == before
    assert calls > 5


def test_a_second_checkpoint_carries_on_what_the_first_one_kept(ours: sqlite3.Connection) -> None:
    before = open_work(ours)
    prune_all(ours, checkpoint(ours), "rows")
    work(ours, 1000, RUNS)
    prune_all(ours, checkpoint(ours), "rows")
    assert open_work(ours) == before
    assert store.counts(ours).entries == store.heads(ours)[0].seq


def test_a_checkpoint_does_not_jump_a_gap_unless_it_answers_a_request(ours: sqlite3.Connection) -> None:
    with closing(image(ours)) as late:
        add(ours, "missed")
        seq = checkpoint(ours)
        (entry,) = store.read(ours, [Span(*LOG, seq, seq)], 1, 1)
        assert reasons(store.apply(late, [entry], verify)) == ["gap"]
        assert store.apply(late, [entry], verify, resets=True).heads == (Head(*LOG, seq),)


def test_a_checkpoint_of_a_stranger_is_refused(ours: sqlite3.Connection) -> None:
    with closing(fresh(KEY)) as forger, closing(fresh()) as late:
        seq = checkpoint(forger)
        spoil(forger, seq, "signature")
        raw = [entry for _, entry in rows.entries(forger, rows.logs(forger)[LOG], seq)]
        assert reasons(store.apply(late, raw, verify, resets=True)) == ["forged"]
        assert store.heads(late) == ()


def test_only_a_checkpoint_is_pruned_at_and_never_a_forked_log(ours: sqlite3.Connection) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        prune.prune(ours, LOG, 2, "rows")
    with pytest.raises(UserError, match="no checkpoint"):
        prune.prune(ours, LOG, 10_000, "rows")
    with closing(image(ours)) as twin:
        seq = checkpoint(ours)
        add(twin, "x")
        give(twin, ours)
    with pytest.raises(UserError, match="branches"):
        prune.prune(ours, LOG, seq, "rows")


def test_what_must_be_kept_and_rotted_puts_the_checkpoint_off(ours: sqlite3.Connection) -> None:
    spoil(ours, 5, "payload")
    scrub.scrub(ours, 0, verify)
    with pytest.raises(UserError, match="damaged"):
        prune.add_checkpoint(ours, LOG, Plan(1000, (5,), (), 1), KEY, "pi", 9000)


def test_what_is_open_and_too_large_puts_the_checkpoint_off() -> None:
    with closing(fresh(KEY)) as conn:
        add(conn, "x" * 700_000)
        add(conn, "y" * 700_000)
        with pytest.raises(UserError, match="do not fit"):
            prune.add_checkpoint(conn, LOG, Plan(3, (2, 3), (), 1), KEY, "pi", 9000)


def test_nobody_appends_a_checkpoint_as_a_record() -> None:
    with pytest.raises(UserError):
        draft(Record(CHECKPOINT, {"keep": []}))


def test_junk_that_a_checkpoint_keeps_is_skipped() -> None:
    with closing(fresh(Key(2))) as other:
        stranger = everything(other)[0]
    for keep in (None, 7, [[1, 2]], [[b"x", b"y"]], [["a"]], [[stranger.header, stranger.payload]]):
        assert list(kept_facts(Fact(LOG, 9, 0, CHECKPOINT, {"keep": keep}))) == []
    assert isinstance(stranger, Entry)


def test_what_is_appended_after_the_plan_is_kept_as_it_is(ours: sqlite3.Connection) -> None:
    made = prune.make_plan(ours, LOG, store.heads(ours)[0].seq, 0, MEANS)
    work(ours, 1000, 0)
    after = open_work(ours)
    _, (fact,) = prune.add_checkpoint(ours, LOG, made, KEY, "pi", 9000)
    prune_all(ours, fact.seq, "rows")
    assert len(after) == 3 + RUNS
    assert open_work(ours) == after


def test_a_checkpoint_that_gains_little_is_not_made(ours: sqlite3.Connection) -> None:
    with pytest.raises(UserError, match="worth"):
        prune.make_plan(ours, LOG, store.heads(ours)[0].seq, 10_000, MEANS)


def test_junk_among_what_was_seen_is_skipped() -> None:
    for seen in (None, 7, [7], [[1]], [["a", b"x"]], [[1, "x"]], [[1, b"short"]]):
        assert list(seen_digests(Fact(LOG, 9, 0, CHECKPOINT, {"seen": seen}))) == []
    assert list(seen_digests(Fact(LOG, 9, 0, CHECKPOINT, {"seen": [[*Seen(1, b"a" * 16 + b"b" * 16)]]}))) == [
        b"a" * 16, b"b" * 16,
    ]  # fmt: skip


@pytest.mark.parametrize("level", ["bodies", "rows"])
def test_the_journal_of_a_pruned_ledger_is_that_of_a_node_that_never_restarted(
    ours: sqlite3.Connection, level: str
) -> None:
    """Two coordinators: webhooks in one log, the end of some of their runs in the other."""
    other = Key(2)
    store.open_log(ours, other, "other", 1, 1000)
    running = fold(ours)
    for run in running.open_runs()[:2]:
        store.append(ours, other.log(), [Record("run.done", {"run": run, "outcome": "done"}, 2)], other, 5000)
    running = fold(ours)
    seq = checkpoint(ours)
    fold_into(running, [fact for fact in store.facts(ours) if fact.seq == seq and fact.log == LOG])
    prune_all(ours, seq, level)
    restarted = fold(ours)
    assert restarted.open_runs() == running.open_runs()
    assert len(running.open_runs()) == 1
    assert restarted.views(1000) == running.views(1000)
    assert restarted.hooks == running.hooks
    keys = [f"hook-{number}" for number in range(RUNS)]
    assert [restarted.known(key) for key in keys] == [running.known(key) for key in keys]
    assert None not in [running.known(key) for key in keys], "a redelivery is known again"
    assert running.known("hook-new") is None


def test_a_damaged_file_that_was_half_pruned_is_taken_over_from_its_checkpoint_on(tmp_path: Path) -> None:
    with closing(store.open_database(tmp_path / "old.db")) as conn, closing(fresh()) as new:
        store.open_log(conn, KEY, "pi", 1, 1000)
        work(conn, 0, RUNS - 3)
        seq = checkpoint(conn)
        prune_all(conn, seq, "bodies")
        add(conn, "tail")
        rescue.salvage(tmp_path / "old.db", new, verify)
        assert store.heads(new) == (Head(*LOG, seq + 1),)
        assert open_work(new) == open_work(conn)
