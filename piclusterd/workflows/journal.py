"""The fold of the ledger that workflows stand on: webhooks and runs, the same on every node from the same entries.

    hook      {source, key, event, body, workflow, title}   a verified event; `workflow` names the run it causes
    run.intent{run, step, attempt}                          before an act
    run.result{run, step, value}                            after it
    run.done  {run, outcome, detail, step?, marks?}         closes it; "failed" is a dead letter: it keeps its event
    run.retry {run, step}                                   opens a dead letter again, at the step that failed
    case, case.end                                          what triage learnt (`cases`)

A checkpoint (`log.checkpoint`, told by `folding`) takes out of the fold what it ended: the webhooks whose digest it has
seen, by which a redelivery is known again, and those too old for a digest before it in its log that it does not keep.
So the fold of a pruned ledger is that of the whole one, and a late copy of an old webhook opens nothing.

Entries may arrive in any order and more than once, so every field is chosen by rank, not by arrival. Where two results
of one step exist, the one with the higher (term, log, seq) wins: a coordinator only asks again for a result it does not
hold after its recovery barrier, so an older one was never on W ledgers and nothing was done with it. Of two ends
the one that is no failure wins: what was done, or cancelled by a person, is never opened again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..events import Fact, Record
from ..ids import LogId, NodeId, RunId, Term, run_id
from ..views import RunView
from ..wire import Hook
from .cases import CASE, CASE_END, Cases

Rank = tuple[Term, LogId, int]
NEVER: Rank = (-1, LogId(NodeId(""), 0), 0)
"""Below every rank."""

DETAIL_CHARS_MAX = 500
HLC_BITS = 16
"""Of an entry's hybrid clock below its milliseconds."""
SEEN_BYTES = 16
"""Of a webhook's digest (`ledger.checkpoint` says what it is good for)."""
SEEN_MAX = 65_536
"""Digests remembered of one log: twice what one checkpoint carries, so that two branches fit."""
TAKEN_FOR_GRANTED = ("term", "log.open", "log.checkpoint")
"""Kinds that mean nothing to this fold once they are old."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One place of an event. `run`: what its recorder began for it."""

    rank: Rank
    hlc: int
    run: RunId | None
    title: str = ""


@dataclass(slots=True)
class HookEntry:
    """Where the first copy of an event stands, or the checkpoint that ended it."""

    rank: Rank
    run: RunId | None
    hlc: int = 0
    copies: list[Copy] = field(default_factory=list)
    """All that were told: two coordinators, or two cards with one key, may record one event each."""


@dataclass(frozen=True, slots=True)
class End:
    """The latest checkpoint of a log. `kept`: seqs before it that still stand, with their clocks; `seen`: digests of
    what was let go.

    `aged`: digests of what is not newer (by its hybrid clock) are forgotten; there a number alone says that it ended. A
    newer webhook without a digest stands in another branch of the log, under a number that means something else here.
    """

    rank: Rank
    kept: Mapping[int, int]
    seen: frozenset[bytes]
    aged: int


@dataclass(slots=True)
class Run:
    run: RunId
    key: str = ""
    """The event's."""
    workflow: str = ""
    title: str = ""
    hook: Hook | None = None
    """The event; dropped when the run is done, to keep memory for open ones and dead letters."""
    hook_rank: Rank | None = None
    hlc: int = 0
    results: dict[str, tuple[Rank, Mapping[str, Any]]] = field(default_factory=dict)
    intents: dict[str, int] = field(default_factory=dict)
    """Step → highest attempt recorded."""
    asked: str = ""
    question: str = ""
    """What a person was asked last, and the step that did."""
    done: tuple[Rank, str, str] | None = None
    failed_at: str = ""
    """The step at which it was given up."""
    retried: Rank | None = None
    again: dict[str, Rank] = field(default_factory=dict)
    """Step → the retry before which its result does not count."""

    @property
    def final(self) -> bool:
        """Nothing opens it again."""
        return self.done is not None and self.done[1] != "failed"

    @property
    def state(self) -> str:
        """open, done, failed, ignored or cancelled."""
        if self.done is None or (not self.final and self.retried is not None and self.retried > self.done[0]):
            return "open"
        return self.done[1]

    @property
    def asks(self) -> str:
        """What it waits for a person to say; "" where it waits for nobody."""
        return self.question if self.open and self.question and self.asked not in self.results else ""

    @property
    def open(self) -> bool:
        return self.hook is not None and self.state == "open"

    def values(self) -> dict[str, Mapping[str, Any]]:
        return {step: value for step, (rank, value) in self.results.items() if rank > self.again.get(step, NEVER)}

    @property
    def newest(self) -> str:
        """The step whose result came last; "" where there is none."""
        return max(((rank, step) for step, (rank, _) in self.results.items()), default=(NEVER, ""))[1]

    def places(self) -> list[tuple[LogId, int]]:
        """Where its event and its results stand."""
        ranks = [rank for rank, _ in self.results.values()]
        return [rank[1:] for rank in (*ranks, *([self.hook_rank] if self.hook_rank else ()))]


class Journal:
    def __init__(self) -> None:
        self.hooks: dict[str, HookEntry] = {}
        self.runs: dict[RunId, Run] = {}
        """Also what was told of a run whose webhook is not: it has no `hook_rank` and is not shown."""
        self.marks: dict[str, int] = {}
        """Service → milliseconds of its clock up to which a reconciliation has seen all that it sent."""
        self.newest: dict[str, int] = {}
        """Source → when its newest event was sent, in milliseconds: by its own clock where it signs one."""
        self.scheduled: dict[str, int] = {}
        """Line of the schedule → the newest minute for which it ran."""
        self.cases = Cases()
        """What triage remembers of issues, kept by every checkpoint."""
        self._ends: dict[LogId, End] = {}

    def open_runs(self) -> list[RunId]:
        """Runs to be worked on, oldest event first."""
        rows = [(run.hlc, run.run) for run in self.runs.values() if run.open]
        return [run for _, run in sorted(rows)]

    def open_titles(self, workflows: Container[str]) -> list[str]:
        """Of open runs of these workflows."""
        return [run.title for run in self.runs.values() if run.open and run.workflow in workflows]

    def standing(self, run: RunId) -> Run | None:
        """The run, where its webhook is told and no checkpoint has ended it."""
        entry = self.runs.get(run)
        return None if entry is None or entry.hook_rank is None else entry

    def known(self, key: str) -> HookEntry | None:
        """Where an event stands that came before; None for a new one."""
        entry = self.hooks.get(key)
        if entry is None and self._ends:
            digest = digest_of(key)
            entry = next((HookEntry(end.rank, None) for end in self._ends.values() if digest in end.seen), None)
        return entry

    def close(self, checkpoint: Fact, kept: Mapping[int, int], seen: Iterable[bytes], aged: int = 0) -> None:
        """`checkpoint` keeps `kept` (seq → hybrid clock) and has seen the webhooks of these digests (see `End`)."""
        end, before = End(checkpoint.order, kept, frozenset(seen), aged), self._ends.get(checkpoint.log)
        self._ends[checkpoint.log] = end if before is None else _joined(before, end)
        ended = {key for key, entry in self.hooks.items() if self._ended(key, entry.rank, entry.hlc)}
        self.hooks = {key: entry for key, entry in self.hooks.items() if key not in ended}
        self.runs = {run: entry for run, entry in self.runs.items() if entry.key not in ended}
        for entry in self.hooks.values():
            if len(entry.copies) > 1:
                self._stand(entry)

    def _stand(self, entry: HookEntry) -> None:
        """At the first of its places that is still there, as whoever reads the ledger anew finds it."""
        by_rank = sorted(entry.copies, key=lambda copy: (self._gone(copy), copy.rank), reverse=True)
        for copy in by_rank:
            run = None if copy.run is None else self.runs.get(copy.run)
            if run is not None:
                run.hook_rank, run.hlc, run.title = copy.rank, copy.hlc, copy.title
        first = by_rank[-1]
        entry.rank, entry.run, entry.hlc = first.rank, first.run, first.hlc

    def _gone(self, copy: Copy) -> bool:
        """A checkpoint of its log stands in its place; what that kept there may be another branch's."""
        _, log, seq = copy.rank
        end = self._ends.get(log)
        return end is not None and seq < end.rank[2] and end.kept.get(seq) != copy.hlc

    def _ended(self, key: str, rank: Rank, hlc: int) -> bool:
        _, log, seq = rank
        end = self._ends.get(log)
        if end is not None and hlc <= end.aged and seq < end.rank[2] and seq not in end.kept:
            return True
        digest = digest_of(key)
        return any(digest in end.seen for end in self._ends.values())

    def grow(self, facts: Iterable[Fact]) -> None:
        for fact in facts:
            if fact.kind == "hook":
                self._hook(fact)
            elif fact.kind.startswith("run."):
                self._step(fact)
            elif fact.kind in (CASE, CASE_END):
                self.cases.grow(fact)

    def _hook(self, fact: Fact) -> None:
        hook = hook_of(fact.body)
        if self._ends and self._ended(hook.key, fact.order, fact.hlc):
            return
        workflow = str(fact.body.get("workflow", ""))
        run = run_id(workflow, hook.key) if workflow else None
        self.newest[hook.source] = max(sent_ms(hook) or fact.hlc >> HLC_BITS, self.newest.get(hook.source, 0))
        if hook.source == "schedule":
            _, line, minute = hook.key.split(":")
            self.scheduled[line] = max(int(minute), self.scheduled.get(line, 0))
        copy = Copy(fact.order, fact.hlc, run, str(fact.body.get("title", "")))
        entry = self.hooks.setdefault(hook.key, HookEntry(copy.rank, run, copy.hlc))
        if copy not in entry.copies:
            entry.copies = sorted([*entry.copies, copy], key=lambda copy: copy.rank)
        told = None if run is None else self._run(run)
        before = None if told is None else told.hook_rank
        if told is not None:
            told.key, told.workflow = hook.key, workflow
        self._stand(entry)
        if told is not None and told.hook_rank != before:
            told.hook = None if told.final else hook

    def _step(self, fact: Fact) -> None:
        body = fact.body
        run = self._run(RunId(str(body["run"])))
        step = str(body.get("step", ""))
        match fact.kind:
            case "run.intent":
                run.intents[step] = max(int(body.get("attempt", 1)), run.intents.get(step, 0))
                if "asks" in body:
                    run.asked, run.question = step, str(body["asks"])
            case "run.result":
                known = run.results.get(step)
                if known is None or fact.order > known[0]:
                    run.results[step] = (fact.order, body["value"])
            case "run.done":
                self._end(run, fact)
            case "run.retry":
                run.retried = max(fact.order, run.retried or NEVER)
                run.again[step] = max(fact.order, run.again.get(step, NEVER))
            case _:
                pass  # a newer release's kind: kept in the ledger, of no meaning here

    def _end(self, run: Run, fact: Fact) -> None:
        outcome, detail = str(fact.body["outcome"]), str(fact.body.get("detail", ""))
        if run.done is None or (outcome != "failed", fact.order) > (run.final, run.done[0]):
            run.done = (fact.order, outcome, detail)
            run.failed_at = str(fact.body.get("step", ""))
        if run.final:
            run.hook = None
        for service, ms in fact.body.get("marks", {}).items():
            self.marks[service] = max(ms, self.marks.get(service, 0))

    def _run(self, run: RunId) -> Run:
        return self.runs.setdefault(run, Run(run))

    def views(self, most: int) -> tuple[RunView, ...]:
        """The newest `most` runs, newest first."""
        told = [run for run in self.runs.values() if run.hook_rank is not None]
        rows = sorted(told, key=lambda run: (run.hlc, run.run), reverse=True)[:most]
        return tuple(view_of(run) for run in rows)


def _joined(one: End, other: End) -> End:
    """The later end, having seen what both have: of two branches of a log neither checkpoint tells of the other's."""
    earlier, later = sorted((one, other), key=lambda end: end.rank[2])
    seen = later.seen | earlier.seen
    return End(later.rank, later.kept, seen if len(seen) <= SEEN_MAX else later.seen, later.aged)


def digest_of(key: str) -> bytes:
    """By what a checkpoint remembers an event."""
    return hashlib.blake2b(key.encode(), digest_size=SEEN_BYTES).digest()


def subject(fact: Fact) -> str | None:
    """What `fact` is about: the id of a run; "" where it means nothing once it is old; None where its kind is new."""
    if fact.kind == "hook":
        workflow = str(fact.body.get("workflow", ""))
        return run_id(workflow, str(fact.body["key"])) if workflow else ""
    if fact.kind in ("run.intent", "run.result", "run.done", "run.retry"):
        return str(fact.body["run"])
    if fact.kind in (CASE, CASE_END):
        return f"case:{fact.body.get('issue')}"
    return "" if fact.kind in TAKEN_FOR_GRANTED else None


def hook_record(hook: Hook, workflow: str, title: str, term: Term) -> Record:
    body = {
        "source": hook.source,
        "key": hook.key,
        "event": hook.event,
        "body": hook.body,
        "workflow": workflow,
        "title": title,
    }
    return Record("hook", body, term)


def hook_of(body: Mapping[str, Any]) -> Hook:
    return Hook(str(body["source"]), str(body["key"]), str(body["event"]), bytes(body["body"]))


class _Stamp(msgspec.Struct):
    webhookTimestamp: int = 0  # Linear's spelling


def sent_ms(hook: Hook) -> int:
    """When the provider sent `hook`, milliseconds by its clock and under its signature; 0 where it does not say."""
    if hook.source != "linear":
        return 0
    try:
        return msgspec.json.decode(hook.body, type=_Stamp).webhookTimestamp
    except (ValueError, RecursionError):
        return 0


def view_of(run: Run) -> RunView:
    state, ended = run.state, run.state != "open"
    step = "" if ended else next(reversed(run.intents), "")
    detail = run.done[2][:DETAIL_CHARS_MAX] if run.done and ended else ""
    tries, asks = max(run.intents.values(), default=0), run.asks[:DETAIL_CHARS_MAX]
    return RunView(run.run, run.workflow, run.title, state, step, tries, detail, run.hlc, asks)
