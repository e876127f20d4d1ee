"""What may be forgotten: how far everybody holds each log, and which entries a checkpoint must carry on.

    heads of every node in the retention set ─min─▶ frontier      checkpoint at c prunable ⟺ frontier[log] >= c
    facts before the checkpoint ─▶ kept_seqs ─▶ those that still mean something

Safety. A checkpoint drops what is *closed*, and a closed subject (a run) only when none of its opening entries (the
webhook) outlives it: else a node that replays the ledger would meet the webhook without its `run.done` and do the work
once more. So a `done` in one log stays for as long as the webhook stands in another. Kinds that this release does not
know are always kept. The frontier holds back for every member that has not lapsed, however long it is away; whoever
comes back after that gets checkpoint and tail, and `closed_by` tells its folds what ended while it was away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..events import Fact
from ..ids import LogId, NodeId

Subject = Callable[[Fact], str | None]
"""What a fact is about: the id of a run; "" where it means nothing once it is old; None where its kind is not known."""


def frontier(heads: Mapping[NodeId, Mapping[LogId, int]], retention: Sequence[NodeId]) -> dict[LogId, int]:
    """Per log, how many entries every node of `retention` holds durably. Nothing where one has not said."""
    if not retention or any(node not in heads for node in retention):
        return {}
    first, *others = retention
    return {
        log: stable
        for log in sorted(heads[first])
        if (stable := min(heads[node].get(log, 0) for node in (first, *others))) > 0
    }


def kept_seqs(
    before: Iterable[Fact],
    beyond: Iterable[Fact],
    subject: Subject,
    opens: Callable[[Fact], bool],
    closed: Callable[[str], bool],
) -> tuple[int, ...]:
    """The seqs of `before` (one log's facts up to its checkpoint) that the checkpoint must keep.

    `beyond`: every other fact of the ledger. `opens`: does it begin its subject? `closed`: is the subject done, for
    longer than the retention time?
    """
    outlived = {subject(fact): None for fact in beyond if opens(fact)}
    kept = []
    for fact in before:
        about = subject(fact)
        if about is None or (about and (about in outlived or not closed(about))):
            kept.append(fact.seq)
    return tuple(kept)


def closed_by(
    checkpoint: Fact, kept: Iterable[Fact], opened: Mapping[str, tuple[LogId, int]], subject: Subject
) -> tuple[str, ...]:
    """The subjects of `opened` (each with where its opening entry stands) that `checkpoint` says are done.

    For a node that was away: it saw them begin, and their end is among what the checkpoint replaced. `kept`: the facts
    that the checkpoint carries on (`checkpoint.kept_facts`).
    """
    alive = {subject(fact): None for fact in kept}
    return tuple(
        about
        for about, (log, seq) in opened.items()
        if log == checkpoint.log and seq < checkpoint.seq and about not in alive
    )
