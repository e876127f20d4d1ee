"""The inbox: bounded, fair to the clock, and every ticket is answered or given back."""

from __future__ import annotations

import asyncio

import pytest

from piclusterd import mailbox
from piclusterd.errors import Overloaded, Refused, Unavailable
from piclusterd.events import DeadlineReached, LinkUp, LoopLagged, Snapshot
from piclusterd.ids import NodeId
from piclusterd.mailbox import Mailbox

FOREVER = float("inf")
ANY = LinkUp(NodeId("a" * 16))


def fresh() -> Mailbox:
    return Mailbox(asyncio.get_running_loop().time)


async def asked(box: Mailbox) -> Snapshot:
    event = await box.next(FOREVER)
    assert isinstance(event, Snapshot)
    return event


async def test_events_come_out_in_the_order_they_went_in() -> None:
    box = fresh()
    for seconds in (1.0, 2.0, 3.0):
        await box.post(LoopLagged(seconds))
    assert [await box.next(FOREVER) for _ in range(3)] == [LoopLagged(1.0), LoopLagged(2.0), LoopLagged(3.0)]


async def test_a_flood_of_events_does_not_silence_a_deadline() -> None:
    box = fresh()
    await box.post(ANY)
    past = asyncio.get_running_loop().time() - 1
    assert await box.next(past) == DeadlineReached()
    assert await box.next(FOREVER) == ANY


async def test_an_empty_inbox_wakes_at_the_deadline() -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + 0.01
    assert await fresh().next(until) == DeadlineReached()
    assert loop.time() >= until - 0.001


async def test_an_event_ends_the_wait_for_a_far_deadline() -> None:
    box = fresh()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(box.next(asyncio.get_running_loop().time() + 1000))
        await box.post(ANY)
    assert waiting.result() == ANY


async def test_a_caller_gets_the_answer_to_its_own_ticket() -> None:
    box = fresh()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first = group.create_task(box.ask(Snapshot, 5))
        second = group.create_task(box.ask(Snapshot, 5))
        one, two = await asked(box), await asked(box)
        box.answer(two.ticket, "second")
        box.answer(one.ticket, "first")
    assert (first.result(), second.result()) == ("first", "second")


async def test_an_error_for_an_answer_is_raised_in_the_caller() -> None:
    box = fresh()
    caller = asyncio.create_task(box.ask(Snapshot, 5))
    box.answer((await asked(box)).ticket, Refused("no"))
    with pytest.raises(Refused, match="no"):
        await caller


async def test_no_answer_in_time_is_unavailable_and_gives_the_ticket_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "TICKETS_MAX", 1)
    box = fresh()
    for _ in range(3):
        with pytest.raises(Unavailable, match="no answer in time"):
            await box.ask(Snapshot, 0.001)
    late = await asked(box)
    box.answer(late.ticket, "too late")
    box.answer(999, "nobody asked")


async def test_a_caller_that_goes_away_gives_its_ticket_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "TICKETS_MAX", 1)
    box = fresh()
    caller = asyncio.create_task(box.ask(Snapshot, 5))
    event = await asked(box)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    box.answer(event.ticket, "gone")
    with pytest.raises(Unavailable):
        await box.ask(Snapshot, 0.001)


async def test_the_first_answer_stands() -> None:
    box = fresh()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        caller = group.create_task(box.ask(Snapshot, 5))
        ticket = (await asked(box)).ticket
        box.answer(ticket, 1)
        box.answer(ticket, 2)
    assert caller.result() == 1


async def test_too_many_tickets_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "TICKETS_MAX", 1)
    box = fresh()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        caller = group.create_task(box.ask(Snapshot, 5))
        event = await asked(box)
        with pytest.raises(Overloaded):
            await box.ask(Snapshot, 5)
        box.answer(event.ticket, None)
    assert caller.result() is None


async def test_a_full_inbox_refuses_those_who_cannot_wait_and_holds_those_who_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailbox, "EVENTS_MAX", 2)
    box = fresh()
    assert box.post_now(LoopLagged(1))
    assert box.post_now(LoopLagged(2))
    assert not box.post_now(LoopLagged(3))
    with pytest.raises(Overloaded):
        await box.ask(Snapshot, 5)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        waiting = group.create_task(box.post(LoopLagged(4)))
        assert await box.next(FOREVER) == LoopLagged(1)
        await waiting
    assert [await box.next(FOREVER) for _ in range(2)] == [LoopLagged(2), LoopLagged(4)]
