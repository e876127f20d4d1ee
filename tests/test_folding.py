"""Where ledger and workflows meet: a checkpoint takes out of the fold what it ended, in whatever order it comes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.events import Fact
from piclusterd.folding import MEANING, fold
from piclusterd.ids import LogId, NodeId, run_id
from piclusterd.ledger.entry import CHECKPOINT
from piclusterd.wire import Hook
from piclusterd.workflows.journal import Journal, digest_of, hook_record

ONE, TWO = LogId(NodeId("a" * 16), 1), LogId(NodeId("b" * 16), 1)


def hook(seq: int, key: str, log: LogId = ONE, workflow: str = "triage") -> Fact:
    return Fact(
        log, seq, 1, "hook", hook_record(Hook("linear", key, "create", b"{}"), workflow, key, 1).body, seq << 16
    )


def step(kind: str, seq: int, key: str, log: LogId = ONE) -> Fact:
    body = {"run": run_id("triage", key), "step": "s", "value": {}, "outcome": "done"}
    return Fact(log, seq, 1, kind, body, seq << 16)


def checkpoint(seq: int, *keys: str, log: LogId = ONE) -> Fact:
    seen = b"".join(map(digest_of, keys))
    return Fact(log, seq, 0, CHECKPOINT, {"key": b"", "name": "pi", "keep": [], "seen": [[seq << 16, seen]]}, seq << 16)


def folded(*facts: Fact) -> Journal:
    journal = Journal()
    fold(journal, facts)
    return journal


def test_what_a_checkpoint_ended_is_gone_and_a_redelivery_is_known() -> None:
    journal = folded(hook(1, "k"), step("run.done", 2, "k"), hook(3, "plain", workflow=""), checkpoint(4, "k", "plain"))
    assert (journal.hooks, journal.runs, journal.views(9)) == ({}, {}, ())
    known = journal.known("k")
    assert known is not None
    assert (known.rank, known.run) == ((0, ONE, 4), None), "who redelivers waits for copies of the checkpoint"
    assert journal.known("other") is None


def test_a_late_copy_of_a_webhook_that_was_ended_opens_nothing() -> None:
    """A coordinator that was cut off comes back with its own copy, after the work was done elsewhere and ended."""
    journal = folded(checkpoint(4, "k"), hook(7, "k", TWO), step("run.intent", 8, "k", TWO))
    assert (journal.open_runs(), journal.views(9)) == ([], ())


def test_what_stands_before_a_checkpoint_that_no_longer_remembers_it_is_ended_too() -> None:
    journal = folded(hook(1, "k"), checkpoint(4), hook(6, "new"))
    assert journal.open_runs() == [run_id("triage", "new")]
    assert folded(checkpoint(4), hook(1, "k")).open_runs() == []


def test_an_older_checkpoint_that_comes_late_brings_nothing_back() -> None:
    journal = folded(checkpoint(9, "k"), checkpoint(4))
    assert journal.known("k") is not None


@st.composite
def histories(draw: st.DrawFn) -> list[Fact]:
    """Webhooks and ends in two logs; a checkpoint of one of them that has seen what was done by then in it."""
    facts: list[Fact] = []
    for seq in range(1, draw(st.integers(1, 10)) + 1):
        key, log = draw(st.sampled_from("klm")), draw(st.sampled_from([ONE, TWO]))
        facts.append(hook(seq, key, log) if draw(st.booleans()) else step("run.done", seq, key, log))
    ended = [str(f.body["key"]) for f in facts if f.log == ONE and f.kind == "hook"]
    return [*facts, checkpoint(11, *ended)]


@settings(deadline=None, max_examples=200)
@given(histories(), st.data())
def test_a_checkpoint_may_come_before_or_after_what_it_ends(facts: list[Fact], data: st.DataObject) -> None:
    shuffled = folded(*data.draw(st.permutations(facts)))
    straight = folded(*facts)
    assert shuffled.hooks == straight.hooks
    assert sorted(shuffled.views(99), key=str) == sorted(straight.views(99), key=str)
    assert shuffled.open_runs() == straight.open_runs()


def test_what_facts_mean_to_a_checkpoint() -> None:
    about = [MEANING.subject(f) for f in (
        hook(1, "k"), hook(1, "k", workflow=""), step("run.done", 2, "k"), step("run.later", 2, "k"),
        Fact(ONE, 1, 0, "log.open", {}), Fact(ONE, 1, 0, "term", {}), checkpoint(4), Fact(ONE, 1, 0, "usage", {}),
    )]  # fmt: skip
    run = run_id("triage", "k")
    assert about == [run, "", run, None, "", "", "", None], "None: of a newer release, kept"
    assert [MEANING.opens(f) for f in (hook(1, "k"), step("run.done", 2, "k"))] == [True, False]
    assert [MEANING.ends(f) for f in (hook(1, "k"), step("run.done", 2, "k"))] == [False, True]
    assert [MEANING.key(f) for f in (hook(1, "k"), step("run.done", 2, "k"))] == [digest_of("k"), None]
