"""Forks: a disk put back to an older image goes on, and nothing that either branch holds is lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from piclusterd.errors import Unavailable
from piclusterd.ledger import branches, prune, rows, store
from piclusterd.ledger.entry import digest
from piclusterd.ledger.frontier import Plan
from piclusterd.wire import Head, Span

from .keys import verify
from .rig import KEY, LOG, add, everything, fresh, give, image, reasons, texts


@pytest.fixture
def ours() -> Iterator[sqlite3.Connection]:
    with closing(fresh(KEY)) as conn:
        yield conn


@pytest.fixture
def theirs() -> Iterator[sqlite3.Connection]:
    with closing(fresh()) as conn:
        yield conn


@pytest.fixture
def rewound(ours: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """The image: the log's opening and one entry. What `ours` appends from now on it does not have."""
    add(ours, "old")
    with closing(image(ours)) as conn:
        yield conn


def test_a_fork_keeps_both_branches_and_closes_the_log(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    add(ours, "a", "b")
    add(rewound, "x", "y", "z")
    give(ours, theirs)
    applied = give(rewound, theirs)
    assert reasons(applied) == ["fork"]
    assert [fact.body["text"] for fact in applied.facts] == ["x", "y", "z"]
    assert applied.heads == (Head(*LOG, 5),), "the end of the longest branch"
    assert texts(theirs) == ["a", "b", "old", "x", "y", "z"]
    assert branches.frozen(theirs) == (LOG,)
    assert applied.forks == (Span(*LOG, 3, 4),), "what the other side should be given"


def test_a_fork_is_told_once_and_both_sides_end_with_the_union(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    add(ours, "a", "b")
    add(rewound, "x")
    give(ours, theirs)
    found = give(rewound, theirs)
    answered = give(theirs, rewound, *found.forks)
    assert reasons(answered) == ["fork"]
    again = give(rewound, theirs, *answered.forks)
    assert (again.facts, again.forks) == ((), ()), "nothing new: the exchange ends"
    assert again.heads == store.heads(theirs)
    assert texts(theirs) == texts(rewound) == ["a", "b", "old", "x"]
    assert digest(store.heads(theirs)) == digest(store.heads(rewound))


def test_what_comes_to_a_closed_log_is_kept_as_a_branch(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    add(ours, "a")
    add(rewound, "x")
    give(ours, theirs)
    give(rewound, theirs)
    end = rows.tip(theirs, rows.logs(theirs)[LOG])
    for disk, text in ((ours, "later"), (rewound, "later too")):
        add(disk, text)
        assert [fact.body["text"] for fact in give(disk, theirs).facts] == [text]
    assert rows.tip(theirs, rows.logs(theirs)[LOG]) == end
    assert store.verify_all(theirs, verify).faults == ()


def test_a_piece_that_hangs_on_nothing_yet_is_kept_and_the_rest_is_asked_for(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    add(ours, "a")
    give(ours, theirs)
    add(rewound, "x")
    late = add(rewound, "y")
    applied = store.apply(theirs, late, verify)
    assert (reasons(applied), [fact.body["text"] for fact in applied.facts]) == (["fork"], ["y"])
    assert applied.heads == (Head(*LOG, 3),), "a floating piece promises nothing"
    assert applied.missing == (Span(*LOG, 1, 3),)
    mended = give(rewound, theirs, *applied.missing)
    assert [fact.body["text"] for fact in mended.facts] == ["x"]
    assert (mended.heads, mended.missing) == ((Head(*LOG, 4),), ())
    assert texts(theirs) == ["a", "old", "x", "y"]


def test_a_third_node_gets_every_branch_from_one_that_has_them(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    add(ours, "a")
    add(rewound, "x", "y")
    give(ours, theirs)
    give(rewound, theirs)
    with closing(fresh()) as third:
        for _ in range(2):
            give(theirs, third)
        assert texts(third) == texts(theirs)
        assert store.heads(third) == store.heads(theirs)


def test_both_branches_in_one_batch_are_kept(ours: sqlite3.Connection, rewound: sqlite3.Connection) -> None:
    add(ours, "a")
    add(rewound, "x")
    with closing(fresh()) as third:
        applied = store.apply(third, [*everything(ours), *everything(rewound)], verify)
        assert reasons(applied) == ["fork"]
        assert texts(third) == ["a", "old", "x"]


def test_branches_of_one_log_are_bounded(
    ours: sqlite3.Connection,
    theirs: sqlite3.Connection,
    rewound: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(branches, "BRANCH_ENTRIES_MAX", 3)
    add(ours, "a")
    add(rewound, *range(10))
    give(ours, theirs)
    assert len(give(rewound, theirs).facts) == 3


def test_a_closed_log_is_not_extended_by_its_origin(ours: sqlite3.Connection, rewound: sqlite3.Connection) -> None:
    add(ours, "a")
    add(rewound, "x")
    give(ours, rewound)
    with pytest.raises(Unavailable, match="two branches"):
        add(rewound, "y")


def test_a_branch_whose_root_a_checkpoint_has_replaced_hangs_on_the_beginning(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    """Nobody could show what is before it: to ask for that would never end."""
    add(ours, "a")
    (entry,), _ = prune.add_checkpoint(ours, LOG, Plan(3, (), (), 3), KEY, "pi", 9000)
    assert store.apply(theirs, [entry], verify, resets=True).heads == (Head(*LOG, 4),)
    add(rewound, "x", "y")
    late = add(rewound, "z")
    applied = store.apply(theirs, [*store.read(rewound, [Span(*LOG, 4, 4)], 9, 99_999), *late], verify)
    assert reasons(applied) == ["fork"]
    assert applied.heads == (Head(*LOG, 5),)
    assert applied.missing == ()


def test_a_branch_that_a_checkpoint_ends_is_asked_for_from_there_on(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    """What is before the checkpoint is on no disk any more."""
    add(ours, "a")
    give(ours, theirs)
    _, second = add(rewound, "x", "y")
    made, _ = prune.add_checkpoint(rewound, LOG, Plan(4, (), (), 4), KEY, "pi", 9000)
    applied = store.apply(theirs, [second, *made, *add(rewound, "z")], verify)
    assert (applied.heads, applied.missing) == ((Head(*LOG, 6),), ())


def test_the_middle_of_a_commit_is_vouched_for_by_what_hangs_on_it(
    ours: sqlite3.Connection, theirs: sqlite3.Connection, rewound: sqlite3.Connection
) -> None:
    """A signature stands on the last entry of a commit alone, and it came with the piece that floats."""
    add(ours, "a")
    give(ours, theirs)
    first, second, third = add(rewound, "x", "y", "z")
    assert not first.signature
    assert store.apply(theirs, [second, third], verify).missing == (Span(*LOG, 1, 3),)
    assert store.apply(theirs, [first], verify).missing == ()
    assert texts(theirs) == ["a", "old", "x", "y", "z"]
