"""A webhook becomes durable, or its sender is told to try again.

Owns the callers that wait for an event to be durable. Only the active coordinator appends; any other node forwards to
it, one hop. It answers "taken" only when W voters hold the entry, and an event that is already in the ledger is not
appended again: its sender waits for W copies of the entry that stands. Where that cannot be told, as it stands in a
closed log only (one whose disk was put back, whose branches heads do not tell apart), it is appended once more. An
answer to a forwarded event names it, so one to an earlier life's ticket is never taken for another event's.

    hub, /hooks ──HookArrived──▶ coordinator ──Append(hook)──▶ Appended … Durable ──▶ Answer(HookTaken)
                    other node ──ForwardHook──▶ coordinator … ──HookStored──▶ Answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import Broken, Overloaded, PiclusterError, Unavailable
from ..events import (
    Answer,
    Append,
    AppendFailed,
    DeadlineReached,
    Deposed,
    Durable,
    Event,
    HookArrived,
    HookTaken,
    LinkDown,
    Note,
    Output,
    Received,
    Send,
    Ticket,
    Token,
)
from ..ids import LogId, NodeId, Term
from ..wire import ForwardHook, Hook, HookStored, PeerMessage
from .journal import Journal, hook_record
from .workflow import Workflow, wanted_by

FORWARD_TIMEOUT_S = 10.0
"""A forwarded event not answered by then is refused; its sender comes again."""
WAITING_MAX = 1024
"""Events on their way to durability; more are refused with 429."""
RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits: a local ticket, or a peer's. `key`: what for."""

    peer: NodeId | None
    ticket: Ticket
    key: str


@dataclass(slots=True)
class Forwarded:
    caller: Caller
    to: NodeId
    due: float


class Intake:
    def __init__(
        self,
        me: NodeId,
        journal: Journal,
        workflows: Mapping[str, Workflow],
        tokens: Iterator[Token],
        coordinator: Callable[[], tuple[NodeId | None, Term, bool]],
        is_durable: Callable[[LogId, int], bool],
        is_closed: Callable[[LogId], bool],
        last_forward: Ticket = 0,
    ) -> None:
        """`coordinator()` → (who leads, term, are we it and active). `is_durable(log, seq)` → W copies known.
        `is_closed(log)`: its origin writes another one now, so it may have branches, which heads do not tell apart.

        `last_forward`: higher than any ticket of this node's earlier lives, whose answers may still be under way.
        """
        self.me = me
        self._journal = journal
        self._workflows = workflows
        self._tokens = tokens
        self._coordinator = coordinator
        self._is_durable = is_durable
        self._is_closed = is_closed
        self._appending: dict[Token, tuple[str, list[Caller]]] = {}
        self._by_key: dict[str, Token] = {}
        self._confirming: list[tuple[str, Caller]] = []
        self._forwarded: dict[Ticket, Forwarded] = {}
        self._last_forward = last_forward

    def deadline(self) -> float:
        return min([f.due for f in self._forwarded.values()]) if self._forwarded else float("inf")

    @property
    def waiting(self) -> int:
        """Webhooks on their way to durability."""
        return len(self._appending) + len(self._confirming)

    def handle(self, event: Event, now: float) -> list[Output]:
        match event:
            case HookArrived(ticket, hook):
                return self._take(hook, Caller(None, ticket, hook.key), now)
            case Received(sender, message):
                return self._receive(sender, message, now)
            case AppendFailed(token, why) if token in self._appending:
                return self._refuse(token, Broken("the webhook was not stored", why, "See `picluster status`."))
            case DeadlineReached():
                return self._overdue(now)
            case LinkDown(peer):
                return self._lost(peer)
            case _:
                return self._confirm() if self._confirming else []

    def _receive(self, sender: NodeId, message: PeerMessage, now: float) -> list[Output]:
        match message:
            case ForwardHook(ticket, hook):
                return self._take(hook, Caller(sender, ticket, hook.key), now)
            case HookStored():
                return self._on_stored(sender, message)
            case _:
                return self._confirm() if self._confirming else []

    def note(self, note: Note) -> list[Output]:
        match note:
            case Durable(token) if token in self._appending:
                key, callers = self._appending.pop(token)
                del self._by_key[key]
                return [out for caller in callers for out in self._taken(caller, key, duplicate=False)]
            case Deposed():
                return self._fail_all()
            case _:
                return []

    # taking --------------------------------------------------------------------------------------------------
    def _take(self, hook: Hook, caller: Caller, now: float) -> list[Output]:
        leader, term, active = self._coordinator()
        if not active:
            return self._forward(hook, caller, leader, now)
        if self.waiting >= WAITING_MAX:
            return self._tell(caller, Overloaded("too many webhooks at once", retry_after_s=RETRY_AFTER_S))
        if hook.key in self._by_key:
            self._appending[self._by_key[hook.key]][1].append(caller)
            return []
        if self._places(hook.key):
            self._confirming.append((hook.key, caller))
            return self._confirm()
        name, title = wanted_by(self._workflows, hook)
        token = next(self._tokens)
        self._appending[token] = (hook.key, [caller])
        self._by_key[hook.key] = token
        return [Append(token, (hook_record(hook, name, title, term),))]

    def _confirm(self) -> list[Output]:
        """Answer the senders of events that already stand in the ledger, once W voters hold them."""
        out: list[Output] = []
        waiting, self._confirming = self._confirming, []
        for key, caller in waiting:
            ended, places = self._journal.known(key) is None, self._places(key)  # ended, and forgotten meanwhile
            if ended or any(self._is_durable(*place) for place in places):
                out += self._taken(caller, key, duplicate=True)
            elif not places:
                out += self._tell(
                    caller, _no_coordinator()
                )  # its log was closed meanwhile: appended when it comes again
            else:
                self._confirming.append((key, caller))
        return out

    def _places(self, key: str) -> list[tuple[LogId, int]]:
        """Where the event stands so that its copies can be counted by heads: all of them, not in a closed log."""
        entry = self._journal.known(key)
        if entry is None:
            return []
        if not entry.copies:
            return [entry.rank[1:]]  # let go by that checkpoint
        return [copy.rank[1:] for copy in entry.copies if not self._is_closed(copy.rank[1])]

    # forwarding ----------------------------------------------------------------------------------------------
    def _forward(self, hook: Hook, caller: Caller, leader: NodeId | None, now: float) -> list[Output]:
        if leader is None or leader == self.me or caller.peer is not None:
            return self._tell(caller, _no_coordinator())
        self._last_forward += 1
        self._forwarded[self._last_forward] = Forwarded(caller, leader, now + FORWARD_TIMEOUT_S)
        return [Send(leader, ForwardHook(self._last_forward, hook))]

    def _on_stored(self, sender: NodeId, stored: HookStored) -> list[Output]:
        forwarded = self._forwarded.get(stored.ticket)
        if forwarded is None or forwarded.to != sender or stored.key not in ("", forwarded.caller.key):
            return []  # "": of an older release
        del self._forwarded[stored.ticket]
        if stored.stored:
            return self._tell(forwarded.caller, HookTaken(stored.run, duplicate=False))
        return self._tell(forwarded.caller, Unavailable("the coordinator did not take it", stored.why))

    def _overdue(self, now: float) -> list[Output]:
        late = [ticket for ticket, forwarded in self._forwarded.items() if forwarded.due <= now]
        return [out for t in late for out in self._tell(self._forwarded.pop(t).caller, _no_coordinator())]

    def _lost(self, peer: NodeId) -> list[Output]:
        lost = [ticket for ticket, forwarded in self._forwarded.items() if forwarded.to == peer]
        return [out for t in lost for out in self._tell(self._forwarded.pop(t).caller, _no_coordinator())]

    # answering -----------------------------------------------------------------------------------------------
    def _taken(self, caller: Caller, key: str, duplicate: bool) -> list[Output]:
        entry = self._journal.known(key)
        return self._tell(caller, HookTaken(entry.run if entry else None, duplicate))

    def _tell(self, caller: Caller, value: HookTaken | PiclusterError) -> list[Output]:
        if caller.peer is None:
            return [Answer(caller.ticket, value)]
        if isinstance(value, HookTaken):
            return [Send(caller.peer, HookStored(caller.ticket, True, value.run, key=caller.key))]
        return [Send(caller.peer, HookStored(caller.ticket, False, why=str(value), key=caller.key))]

    def _refuse(self, token: Token, why: PiclusterError) -> list[Output]:
        key, callers = self._appending.pop(token)
        del self._by_key[key]
        return [out for caller in callers for out in self._tell(caller, why)]

    def _fail_all(self) -> list[Output]:
        out = [o for token in list(self._appending) for o in self._refuse(token, _no_coordinator())]
        confirming, self._confirming = self._confirming, []
        return out + [o for _, caller in confirming for o in self._tell(caller, _no_coordinator())]


def _no_coordinator() -> Unavailable:
    return Unavailable(
        "no coordinator can take this webhook now",
        "an election is open or a majority of the voters is away",
        "The sender should try again.",
        RETRY_AFTER_S,
    )
