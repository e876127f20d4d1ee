"""What happens to a node (events), what it wants done (effects), and what its deciders tell each other (notes).

    hands ──Event──▶ mailbox ──▶ node.handle(event, now) ──▶ [Effect] ──▶ hands
                                      │      ▲
                                      ▼ Note │        notes go round the deciders until none is left,
                                   deciders ─┘        and each once outward as `Noted` for logs and pages

Every slow thing is bracketed by two quick ones: an effect with a `token` out, an event with the same token back.
The two that there are most of are msgspec structs, which are made several times faster than frozen dataclasses.
Persist before you promise: an effect that says "done" only answers the event that says durable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from .ids import LogId, NodeId, RunId, Term
from .record import Fact as Fact
from .record import HardState as HardState
from .record import Record as Record
from .rules import Rules as Rules
from .views import Choice as Choice
from .views import HookTaken as HookTaken
from .wire import Dropped, Entry, Facts, Head, Hook, Mark, PeerMessage, Span, Voters
from .wishes import ChangeRun as ChangeRun
from .wishes import ClockTold as ClockTold

Token = int
"""Pairs an effect with the event that answers it; unique within one run of one node."""
Ticket = int
"""Pairs an event asked through the mailbox with its `Answer`."""


# events ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """`node.deadline()` has passed. Spurious ones are harmless."""


class Received(msgspec.Struct, frozen=True):
    sender: NodeId
    message: PeerMessage


@dataclass(frozen=True, slots=True)
class LinkUp:
    peer: NodeId


@dataclass(frozen=True, slots=True)
class LinkDown:
    peer: NodeId


@dataclass(frozen=True, slots=True)
class KeyShared:
    """Two machines use one key; `why` says which, as far as this one knows."""

    why: str


@dataclass(frozen=True, slots=True)
class HardStateSaved:
    token: Token


@dataclass(frozen=True, slots=True)
class Appended:
    """The records of `Append(token)` are durable in this node's log as `entries`; `facts` are the same, decoded."""

    token: Token
    entries: tuple[Entry, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class AppendFailed:
    """Nothing of `Append(token)` was kept. `disk`: for the disk's sake, not the records' or a full queue's."""

    token: Token
    why: str
    disk: bool = True


@dataclass(frozen=True, slots=True)
class Stored:
    """Entries of `Store(token)` that were new are durable, in order. `heads` are of the logs it touched.

    `refused`: why the disk took none of them; "" where it did its work.
    """

    token: Token
    facts: tuple[Fact, ...]
    heads: tuple[Head, ...]
    dropped: tuple[Dropped, ...] = ()
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Forgot:
    """One slice of `Forget(token)` is done; `more`: rows are left. `why`: it was refused, nothing changed."""

    token: Token
    more: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class EntriesRead:
    token: Token
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Damaged:
    """All that is in quarantine now, after a slice of the scrub or a repair."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Diverged:
    """What was just stored forks a log of ours at `forks`, or hangs on entries that are `missing` (`store.Applied`)."""

    forks: tuple[Span, ...]
    missing: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class HookArrived:
    """A verified webhook, from the hub, from `/hooks/{source}`, or from a peer that is not the coordinator."""

    ticket: Ticket
    hook: Hook


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The outcome of an `Ask` or `CallOut`. Exactly one of `value` and `error` is set."""

    token: Token
    value: Mapping[str, Any] | None = None
    error: str | None = None
    retryable: bool = True
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WhoServes:
    """Where should it be served? Answered by `Choice` or a fault. `exclude`: tried; `prefer`: a role to come first."""

    ticket: Ticket
    model: str
    task: str = "generate"
    prompt_tokens: int = 0
    exclude: tuple[NodeId, ...] = ()
    prefer: str = ""
    marks: tuple[Mark, ...] = ()
    answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FactsChanged:
    """What this node now says of itself; the node numbers it and gossips it."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class LoopLagged:
    """This node itself was stalled for `seconds`: what it did not hear in that time proves nothing about others."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Sealed:
    """The operator's node has fixed the first set of voters (or learnt of it at the join)."""

    voters: Voters


@dataclass(frozen=True, slots=True)
class ChangeVoters:
    """The owner adds or removes a voter. Answered with the new `Voters`, once stored, or with a `PiclusterError`."""

    ticket: Ticket
    what: Literal["add", "remove"]
    node: NodeId


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """The owner removes a member for good. Answered with its id once that is durable here, or a `PiclusterError`."""

    ticket: Ticket
    node: NodeId


@dataclass(frozen=True, slots=True)
class MoveLeadership:
    """The owner wants another voter to coordinate: `to`, or the best there is. Answered with the `LeaderChanged` that
    says who leads afterwards, or with a `PiclusterError`."""

    ticket: Ticket
    to: NodeId | None = None


@dataclass(frozen=True, slots=True)
class DiskProbed:
    """`why` the disk is not well; "" where there is room and a write landed."""

    token: Token
    why: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What does the node know? Answered by `View`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Hand over leadership, tell the others, stop. `Stopped` follows when nothing is left to say."""


Event = (
    DeadlineReached | Received | LinkUp | LinkDown | KeyShared | HardStateSaved | Appended | AppendFailed | Stored
    | EntriesRead | Forgot | Damaged | Diverged | HookArrived | StepFinished | ChangeRun | ClockTold | WhoServes
    | FactsChanged | LoopLagged | Sealed | ChangeVoters | MoveLeadership | RemoveNode | DiskProbed | Snapshot | Shutdown
)  # fmt: skip


# effects ---------------------------------------------------------------------------------------------------------
class Send(msgspec.Struct, frozen=True):
    """Best effort: lost where there is no link."""

    to: NodeId
    message: PeerMessage


@dataclass(frozen=True, slots=True)
class SaveHardState:
    token: Token
    state: HardState


@dataclass(frozen=True, slots=True)
class Append:
    token: Token
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Store:
    token: Token
    entries: tuple[Entry, ...]
    resets: bool = False
    """The answer to a Want: a checkpoint among them may replace what we lack before it."""


@dataclass(frozen=True, slots=True)
class Read:
    """Up to BATCH_BYTES_MAX of the spans' entries, in order."""

    token: Token
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class NewEpoch:
    """Open a new log; answered by `Appended` with its opening. `why` is kept on disk until `Recovered`."""

    token: Token
    why: str


@dataclass(frozen=True, slots=True)
class AddCheckpoint:
    """End what is closed of our `log` up to `upto`. Answered as `Append`; fails where less than `least` is let go."""

    token: Token
    log: LogId
    upto: int
    least: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Remove a slice of what the entry at seq `checkpoint` replaced; answered by `Forgot`."""

    token: Token
    log: LogId
    checkpoint: int
    level: Literal["bodies", "rows"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """Forget, durably, that this node forgot."""


@dataclass(frozen=True, slots=True)
class ProbeDisk:
    """Is there room, and does a write land? Behind whatever is being written. Answered by `DiskProbed`."""

    token: Token


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion by a local model. `request` is an OpenAI chat body; the daemon chooses the node."""

    token: Token
    run: RunId
    request: Mapping[str, Any]
    prefer: str = ""


@dataclass(frozen=True, slots=True)
class CallOut:
    """One attempt at a service of the outside world. `key` is the effect's idempotency key."""

    token: Token
    run: RunId
    service: str
    operation: str
    arguments: Mapping[str, Any]
    key: str
    term: Term


@dataclass(frozen=True, slots=True)
class OpenHub:
    """This node is the active coordinator of `term`: dial the hub and present the term."""

    term: Term


@dataclass(frozen=True, slots=True)
class CloseHub:
    pass


@dataclass(frozen=True, slots=True)
class Deny:
    """All that were ever removed: their links end now, and there are no others."""

    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Resolves a ticket. `value` is what the event's docstring says, or a `PiclusterError`."""

    ticket: Ticket
    value: object


@dataclass(frozen=True, slots=True)
class Noted:
    """A note on its way to logs, metrics and the event stream."""

    note: Note


@dataclass(frozen=True, slots=True)
class Stopped:
    pass


Effect = (
    Send | SaveHardState | Append | Store | Read | NewEpoch | AddCheckpoint | Forget | Recovered | ProbeDisk | Ask
    | CallOut | OpenHub | CloseHub | Deny | Answer | Noted | Stopped
)  # fmt: skip


# notes -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class MemberUp:
    node: NodeId
    name: str


@dataclass(frozen=True, slots=True)
class MemberDown:
    """`state` is suspect, failed or left; `why` is the probe history in words."""

    node: NodeId
    name: str
    state: str
    why: str


@dataclass(frozen=True, slots=True)
class LeaderChanged:
    """Who coordinates, as this node knows it; None while an election is open."""

    term: Term
    leader: NodeId | None


@dataclass(frozen=True, slots=True)
class Elected:
    """This node won `term` and must recover before it serves."""

    term: Term
    voters: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Deposed:
    """This node led `term` and no longer does."""

    term: Term
    why: str


@dataclass(frozen=True, slots=True)
class HandedOver:
    """This node led `term` and gave it up to `to`: by hand, or because of its disk or board."""

    term: Term
    to: NodeId
    why: str


@dataclass(frozen=True, slots=True)
class Activated:
    """Recovery is over: this node coordinates `term`."""

    term: Term


@dataclass(frozen=True, slots=True)
class LedgerGrew:
    """New entries are durable here, this node's own or others'."""

    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Durable:
    """What was appended with `token` is on W voters."""

    token: Token
    facts: tuple[Fact, ...]
    copies: int


@dataclass(frozen=True, slots=True)
class RunMoved:
    """A run of a workflow took a step: for pages and logs."""

    run: RunId
    workflow: str
    step: str
    outcome: str


@dataclass(frozen=True, slots=True)
class LedgerAlarm:
    """A peer sent entries that do not verify, or two branches of one log were seen."""

    text: str


Note = (
    MemberUp | MemberDown | LeaderChanged | Elected | Deposed | HandedOver | Activated
    | LedgerGrew | Durable | RunMoved | LedgerAlarm
)  # fmt: skip

Output = Effect | Note
"""What a decider returns: effects for the hands, notes for the other deciders."""
