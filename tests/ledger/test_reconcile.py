"""Who lacks what: the need against brute force, and two real ledgers that exchange until they are equal."""

from __future__ import annotations

import itertools
import sqlite3
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piclusterd.events import (
    Appended,
    DeadlineReached,
    EntriesRead,
    Event,
    Fact,
    LedgerAlarm,
    LedgerGrew,
    LinkDown,
    LinkUp,
    Output,
    Read,
    Received,
    Record,
    Send,
    Store,
    Stored,
)
from piclusterd.ids import LogId, NodeId
from piclusterd.ledger import store
from piclusterd.ledger.entry import digest
from piclusterd.ledger.reconcile import READS_MAX, SPANS_MAX, WANT_TIMEOUT_S, Reconcile, lacking
from piclusterd.sim.keys import SimKey, verify
from piclusterd.wire import Ack, Batch, Dropped, Head, Held, Nack, Ping, Span, Want

SYNC_S = 1.0
LOGS = [LogId(NodeId(letter * 16), epoch) for letter in "abc" for epoch in (1, 2)]
HELD = st.dictionaries(st.sampled_from(LOGS), st.integers(1, 9), max_size=6)
PEER, OTHER = NodeId("1" * 16), NodeId("2" * 16)


def heads(held: dict[LogId, int]) -> tuple[Head, ...]:
    return tuple(Head(log.origin, log.epoch, seq) for log, seq in sorted(held.items()))


def entries_of(held: dict[LogId, int]) -> set[tuple[LogId, int]]:
    return {(log, seq) for log, last in held.items() for seq in range(1, last + 1)}


def grown(held: dict[LogId, int], *others: dict[LogId, int]) -> dict[LogId, int]:
    """What a reconcile that began with `held` holds after it stored up to the heads of `others`."""
    one = Reconcile(heads(held), SYNC_S, itertools.count(1))
    for other in others:
        one.handle(Stored(0, (), heads(other)), 0.0, 1)
    return one.held


# the need --------------------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(HELD, HELD)
def test_the_need_is_exactly_the_difference(mine: dict[LogId, int], theirs: dict[LogId, int]) -> None:
    spans = lacking(mine, heads(theirs))
    asked = [(span.log, seq) for span in spans for seq in range(span.first, span.last + 1)]
    assert len(asked) == len(set(asked))
    assert set(asked) == entries_of(theirs) - entries_of(mine)
    assert list(spans) == sorted(spans)


@settings(deadline=None)
@given(HELD, HELD, HELD)
def test_heads_merge_in_any_order_and_any_number_of_times(
    one: dict[LogId, int], two: dict[LogId, int], three: dict[LogId, int]
) -> None:
    assert grown(one, one) == one
    assert grown(one, two) == grown(two, one)
    assert grown(grown(one, two), three) == grown(one, grown(two, three)) == grown(one, three, two, three)


@settings(deadline=None)
@given(HELD, HELD)
def test_equal_digests_mean_equal_heads(one: dict[LogId, int], two: dict[LogId, int]) -> None:
    assert (digest(heads(one)) == digest(heads(two))) == (one == two)


def test_a_log_is_closed_once_its_origin_writes_another() -> None:
    A, B = NodeId("a" * 16), NodeId("b" * 16)
    one = Reconcile((Head(A, 1, 7), Head(A, 2, 1), Head(B, 1, 3)), SYNC_S, itertools.count(1))
    assert one.is_closed(LogId(A, 1))
    assert not one.is_closed(LogId(A, 2))
    assert not one.is_closed(LogId(B, 1))


@settings(deadline=None)
@given(HELD, HELD)
def test_heads_never_shrink(held: dict[LogId, int], told: dict[LogId, int]) -> None:
    after = grown(held, told)
    assert all(after[log] >= seq for log, seq in held.items())


# one machine -----------------------------------------------------------------------------------------------------
def linked(held: dict[LogId, int] | None = None, peer: NodeId = PEER) -> Reconcile:
    one = Reconcile(heads(held or {}), SYNC_S, itertools.count(1))
    one.handle(LinkUp(peer), 0.0, 1)
    return one


def told(one: Reconcile, held: dict[LogId, int], now: float = 0.0, peer: NodeId = PEER) -> list[Output]:
    theirs = heads(held)
    return one.handle(Received(peer, Held(1, digest(theirs), theirs)), now, 1)


def fact(log: LogId, seq: int) -> Fact:
    return Fact(log, seq, 1, "note", {})


def wants(out: list[Output]) -> list[tuple[Span, ...]]:
    return [o.message.spans for o in out if isinstance(o, Send) and isinstance(o.message, Want)]


def offers(out: list[Output]) -> list[NodeId]:
    return [o.to for o in out if isinstance(o, Send) and isinstance(o.message, Held)]


def test_a_new_link_is_offered_the_heads_with_the_term() -> None:
    one = Reconcile(heads({LOGS[0]: 3}), SYNC_S, itertools.count(1))
    assert one.handle(LinkUp(PEER), 0.0, 7) == [Send(PEER, Held(7, one.digest, heads({LOGS[0]: 3})))]


@pytest.mark.parametrize("kind", [Ping, Ack])
def test_heads_are_offered_when_digests_differ_and_not_more_often_than_allowed(kind: type[Ping] | type[Ack]) -> None:
    one = linked()
    assert one.handle(Received(PEER, kind(1, one.digest)), 5.0, 1) == []
    assert offers(one.handle(Received(PEER, kind(1, b"other")), 5.0, 1)) == [PEER]
    assert one.handle(Received(PEER, kind(1, b"other")), 5.0 + SYNC_S / 2, 1) == []
    assert offers(one.handle(Received(PEER, kind(1, b"other")), 5.0 + SYNC_S, 1)) == [PEER]


def test_who_lacks_something_asks_for_it_once() -> None:
    one = linked({LOGS[0]: 2})
    assert wants(told(one, {LOGS[0]: 5, LOGS[1]: 1})) == [(Span(*LOGS[0], 3, 5), Span(*LOGS[1], 1, 1))]
    assert wants(told(one, {LOGS[0]: 6})) == [], "one request under way a peer"


def test_who_holds_more_offers_it_and_does_not_push() -> None:
    one = linked({LOGS[0]: 5})
    out = told(one, {LOGS[0]: 2}, now=10.0)
    assert offers(out) == [PEER]
    assert len(out) == 1


def test_a_want_that_is_not_answered_is_asked_again_of_who_is_there() -> None:
    one = linked()
    told(one, {LOGS[0]: 5})
    assert one.deadline() == WANT_TIMEOUT_S
    assert one.handle(DeadlineReached(), WANT_TIMEOUT_S - 0.1, 1) == []
    assert offers(one.handle(DeadlineReached(), WANT_TIMEOUT_S, 1)) == [PEER]
    assert wants(told(one, {LOGS[0]: 5}, now=WANT_TIMEOUT_S)) == [(Span(*LOGS[0], 1, 5),)]


def test_a_peer_that_is_gone_is_not_waited_for() -> None:
    one = linked()
    told(one, {LOGS[0]: 5})
    one.handle(LinkDown(PEER), 1.0, 1)
    assert one.deadline() == float("inf")
    assert one.handle(DeadlineReached(), 100.0, 1) == []
    assert wants(told(one, {LOGS[0]: 5}, peer=OTHER)) == [(Span(*LOGS[0], 1, 5),)]


def test_it_waits_for_as_many_peers_as_owe_an_answer() -> None:
    one = linked()
    one.handle(LinkUp(OTHER), 0.0, 1)
    for peer, log in ((PEER, LOGS[0]), (OTHER, LOGS[1]), (OTHER, LOGS[2])):
        told(one, {log: 5}, peer=peer)
    assert one.waiting == 2
    one.handle(LinkDown(PEER), 0.0, 1)
    assert one.waiting == 1
    (order,) = one.handle(Received(OTHER, Batch(())), 0.0, 1)
    assert isinstance(order, Store)
    one.handle(Stored(order.token, (), ()), 0.0, 1)
    assert one.waiting == 0


def test_a_want_names_a_limited_number_of_spans() -> None:
    many = {LogId(NodeId(f"{i:016x}"), 1): 1 for i in range(SPANS_MAX + 5)}
    assert [len(spans) for spans in wants(told(linked(), many))] == [SPANS_MAX]
    one = linked()
    spans = tuple(Span(*log, 1, 1) for log in many)
    (read,) = one.handle(Received(PEER, Want(spans)), 0.0, 1)
    assert isinstance(read, Read)
    assert len(read.spans) == SPANS_MAX


def test_reads_for_greedy_peers_are_limited() -> None:
    one = linked()
    want = Received(PEER, Want((Span(*LOGS[0], 1, 1),)))
    reads = [o for _ in range(READS_MAX + 3) for o in one.handle(want, 0.0, 1)]
    assert len(reads) == READS_MAX
    (first, *_) = reads
    assert isinstance(first, Read)
    assert one.handle(EntriesRead(first.token, ()), 0.0, 1) == [Send(PEER, Batch(()))]
    assert len(one.handle(want, 0.0, 1)) == 1


def test_what_others_read_is_not_ours_to_send() -> None:
    assert linked().handle(EntriesRead(999, ()), 0.0, 1) == []


def test_own_appends_move_the_heads_and_are_noted() -> None:
    one = linked()
    before = one.digest
    facts = (fact(LOGS[0], 1), fact(LOGS[0], 2))
    assert one.handle(Appended(1, (), facts), 0.0, 1) == [LedgerGrew(facts)]
    assert one.held == {LOGS[0]: 2}
    assert one.digest != before


def test_the_rest_is_asked_for_batch_after_batch_without_a_new_offer() -> None:
    one = linked()
    told(one, {LOGS[0]: 9})
    (order,) = one.handle(Received(PEER, Batch(())), 0.0, 1)
    assert isinstance(order, Store)
    out = one.handle(Stored(order.token, (fact(LOGS[0], 4),), heads({LOGS[0]: 4})), 0.0, 1)
    assert wants(out) == [(Span(*LOGS[0], 5, 9),)]


def test_a_batch_that_brings_nothing_is_not_asked_for_again_at_once() -> None:
    """Else a peer whose entries do not verify would keep both busy for ever."""
    one = linked()
    told(one, {LOGS[0]: 9})
    (order,) = one.handle(Received(PEER, Batch(())), 0.0, 1)
    assert isinstance(order, Store)
    out = one.handle(Stored(order.token, (), (), (Dropped("forged: it"),)), 0.0, 1)
    assert out == [LedgerAlarm("forged: it")]
    assert one.deadline() == float("inf")


# what the coordinator pushes ------------------------------------------------------------------------------------
LEADER = LOGS[0].origin


def led(held: dict[LogId, int]) -> Reconcile:
    """Linked for long with the coordinator, whose log is LOGS[0], and with PEER."""
    one = Reconcile(heads(held), SYNC_S, itertools.count(1), leader=lambda: LEADER)
    for peer in (LEADER, PEER):
        one.handle(LinkUp(peer), 0.0, 1)
    return one


def test_what_the_coordinator_appends_is_not_asked_for_while_it_is_pushed() -> None:
    one = led({LOGS[0]: 2})
    assert wants(told(one, {LOGS[0]: 3}, now=10.0, peer=LEADER)) == []
    assert wants(told(one, {LOGS[0]: 3}, now=10.0 + SYNC_S / 2)) == [], "nor of another who has it already"
    one.handle(Stored(1, (fact(LOGS[0], 3),), heads({LOGS[0]: 3})), 10.9, 1)
    assert one.deadline() == 10.0 + SYNC_S
    assert one.handle(DeadlineReached(), 10.0 + SYNC_S, 1) == []
    assert one.deadline() == float("inf")


def test_a_push_that_is_lost_is_pulled() -> None:
    one = led({LOGS[0]: 2})
    told(one, {LOGS[0]: 3}, now=10.0)
    assert wants(one.handle(DeadlineReached(), one.deadline(), 1)) == [(Span(*LOGS[0], 3, 3),)]
    assert one.deadline() == 10.0 + SYNC_S + WANT_TIMEOUT_S
    one.handle(LinkDown(PEER), 11.0, 1)
    assert wants(told(one, {LOGS[0]: 3}, now=12.0, peer=LEADER)) == [(Span(*LOGS[0], 3, 3),)], "it was awaited"


def test_each_entry_that_stays_away_is_awaited_as_long() -> None:
    one = led({LOGS[0]: 2})
    told(one, {LOGS[0]: 3}, now=10.0)
    one.handle(Stored(1, (fact(LOGS[0], 3),), heads({LOGS[0]: 3})), 10.5, 1)
    assert wants(told(one, {LOGS[0]: 4}, now=10.5)) == []
    assert one.handle(DeadlineReached(), 10.0 + SYNC_S, 1) == []
    assert one.deadline() == 10.5 + SYNC_S
    assert wants(one.handle(DeadlineReached(), 10.5 + SYNC_S, 1)) == [(Span(*LOGS[0], 4, 4),)]


def test_what_nobody_pushes_is_asked_for_at_once() -> None:
    one = led({LOGS[0]: 2})
    assert wants(told(one, {LOGS[0]: 3, LOGS[4]: 1}, now=10.0)) == [(Span(*LOGS[4], 1, 1),)], "another's log"
    one = led({})
    one.handle(LinkUp(LEADER), 10.0, 1)
    assert wants(told(one, {LOGS[0]: 3}, now=10.1)) == [(Span(*LOGS[0], 1, 3),)], "appended while we were away"
    one.handle(LinkDown(LEADER), 20.0, 1)
    one.handle(LinkDown(PEER), 20.0, 1)
    assert wants(told(one, {LOGS[0]: 3}, now=20.1)) == [(Span(*LOGS[0], 1, 3),)], "no link, no push"


# two machines, two ledgers ---------------------------------------------------------------------------------------
class Keeper:
    """A reconcile and a real store; disk and wire answer at once."""

    def __init__(self, number: int, stack: ExitStack) -> None:
        self.conn: sqlite3.Connection = stack.enter_context(closing(store.open_database(":memory:")))
        self.key = SimKey(number)
        self.log = store.open_log(self.conn, self.key, f"pi-{number}", 1, 0)
        self.me = self.log.origin
        self.machine = Reconcile(store.heads(self.conn), SYNC_S, itertools.count(1))
        self.batch_entries = 1000

    def write(self, count: int) -> None:
        records = [Record("note", {"n": n}) for n in range(count)]
        for record in records:  # a commit group each, so that a batch may end after any
            entries, facts = store.append(self.conn, self.log, [record], self.key, 0)
            self.machine.handle(Appended(0, entries, facts), 0.0, 1)

    def perform(self, out: Output) -> Event | None:
        match out:
            case Read(token, spans):
                return EntriesRead(token, store.read(self.conn, spans, 2**20, self.batch_entries))
            case Store(token, entries):
                applied = store.apply(self.conn, entries, verify)
                return Stored(token, applied.facts, applied.heads, applied.dropped)
            case _:
                return None

    @property
    def rows(self) -> list[Fact]:
        return sorted(store.facts(self.conn), key=lambda fact: (fact.log, fact.seq))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def meet(keepers: list[Keeper]) -> int:
    """Link them all and let them talk until nobody has anything to say; the number of messages."""
    by_id = {keeper.me: keeper for keeper in keepers}
    queue: deque[tuple[Keeper, Event]] = deque((k, LinkUp(o.me)) for k in keepers for o in keepers if k is not o)
    said = 0
    while queue:
        keeper, event = queue.popleft()
        for out in keeper.machine.handle(event, 0.0, 1):
            if isinstance(out, Send):
                said += 1
                assert said < 2000, "they talk without end"
                queue.append((by_id[out.to], Received(keeper.me, out.message)))
            elif (answer := keeper.perform(out)) is not None:
                queue.append((keeper, answer))
    return said


def same(keepers: list[Keeper]) -> bool:
    first = keepers[0]
    return all(k.rows == first.rows and k.machine.digest == first.machine.digest for k in keepers)


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (5, 0), (0, 5), (7, 9)])
def test_two_ledgers_that_meet_become_equal(stack: ExitStack, ours: int, theirs: int) -> None:
    one, two = Keeper(1, stack), Keeper(2, stack)
    one.write(ours)
    two.write(theirs)
    assert meet([one, two]) <= 6, "heads, want and batch each way: one round trip"
    assert same([one, two])
    assert len(one.rows) == ours + theirs + 2  # each log begins with its opening
    assert one.machine.held == {head.log: head.seq for head in store.heads(one.conn)}


def test_a_long_absence_is_made_up_in_small_batches(stack: ExitStack) -> None:
    one, two = Keeper(1, stack), Keeper(2, stack)
    one.write(50)
    one.batch_entries = 7
    meet([one, two])
    assert same([one, two])


def test_equal_ledgers_say_no_more_than_hello(stack: ExitStack) -> None:
    one, two = Keeper(1, stack), Keeper(2, stack)
    one.write(3)
    meet([one, two])
    assert meet([one, two]) == 2


def test_a_third_gets_from_either_what_it_lacks(stack: ExitStack) -> None:
    one, two, three = Keeper(1, stack), Keeper(2, stack), Keeper(3, stack)
    one.write(4)
    meet([one, two])
    two.write(4)
    meet([two, three])
    meet([one, two, three])
    assert same([one, two, three])


def test_who_asks_in_no_term_is_told_our_heads_though_they_are_the_same() -> None:
    """A node that may not vote must hear what each of the others holds (`ledger.care`)."""
    one = Reconcile(heads({LOGS[0]: 3}), SYNC_S, itertools.count(1))
    question = Received(PEER, Held(0, one.digest))
    assert one.handle(question, 0.0, 4) == [Send(PEER, Held(4, one.digest, one.heads()))]
    assert one.handle(question, 0.1, 4) == [], "told a moment ago"
    assert one.handle(Received(PEER, Held(4, one.digest)), 9.0, 4) == []


def test_what_comes_in_a_batch_may_replace_what_we_lack() -> None:
    one = Reconcile((), SYNC_S, itertools.count(1))
    assert one.handle(Received(PEER, Batch(())), 0.0, 1) == [Store(1, (), resets=True)]


def test_what_is_not_of_the_ledger_is_passed_over() -> None:
    assert Reconcile((), SYNC_S, itertools.count(1)).handle(Received(PEER, Nack(1)), 0.0, 1) == []
