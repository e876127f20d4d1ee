from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from piclusterd.errors import Overloaded
from piclusterd.inference.protocol import EmbedRequest, GenerateRequest
from piclusterd.inference.turns import Asked, Turns, asked_by

from .rig import Changes

DEADLINE_S = 10


class Line:
    """Callers before `turns`, each of which keeps its place until it is told to leave."""

    def __init__(self, places: int, queue_max: int) -> None:
        self.changes = Changes()
        self.turns = Turns("demo", places, queue_max, self.changes)
        self.order: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}

    def come(self, tenant: str, cost: float = 10.0) -> asyncio.Task[None]:
        self._leave.setdefault(tenant, asyncio.Event())
        return asyncio.create_task(self._stay(tenant, cost))

    async def _stay(self, tenant: str, cost: float) -> None:
        async with self.turns.turn(Asked(tenant, cost=cost)):
            self.order.append(tenant)
            await self._leave[tenant].wait()

    async def until(self, busy: int, queued: int) -> None:
        await self.changes.until(lambda: (self.turns.busy, self.turns.queued) == (busy, queued))

    def leave(self, *tenants: str) -> None:
        for tenant in tenants:
            self._leave.setdefault(tenant, asyncio.Event()).set()


async def test_places_are_taken_at_once_and_the_rest_waits() -> None:
    line = Line(2, 8)
    tasks = [line.come(name) for name in "abc"]
    await line.until(2, 1)
    line.leave("a", "b", "c")
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*tasks)
    assert (line.order, line.turns.busy, line.turns.queued) == (["a", "b", "c"], 0, 0)


async def test_a_flood_does_not_keep_another_waiting() -> None:
    line = Line(1, 8)
    tasks = [line.come("flood") for _ in range(4)]
    await line.until(1, 3)
    tasks.append(line.come("modest"))
    await line.until(1, 4)
    line.leave("flood", "modest")
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*tasks)
    assert line.order.index("modest") <= 2


async def test_whoever_leaves_the_line_or_his_place_frees_it() -> None:
    line = Line(1, 8)
    first, second, third = (line.come(name) for name in "abc")
    await line.until(1, 2)
    second.cancel()
    await line.until(1, 1)
    first.cancel()
    await line.until(1, 0)
    third.cancel()
    await line.until(0, 0)
    await asyncio.gather(first, second, third, return_exceptions=True)
    assert "b" not in line.order


async def test_a_place_given_to_one_who_is_just_leaving_goes_to_the_next() -> None:
    line = Line(1, 8)
    tasks = [line.come(name) for name in "abc"]
    await line.until(1, 2)

    def cancel_the_second() -> None:
        if (line.turns.busy, line.turns.queued) == (1, 1):  # it has the place, and has not run yet
            tasks[1].cancel()

    line.changes.also = cancel_the_second
    line.leave("a", "b", "c")
    async with asyncio.timeout(DEADLINE_S):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(ended[1], asyncio.CancelledError)
    assert line.order == ["a", "c"]
    assert (line.turns.busy, line.turns.queued) == (0, 0)


async def test_a_full_queue_refuses_and_the_time_told_grows_with_what_waits() -> None:
    told = []
    for queue_max in (1, 20):
        async with AsyncExitStack() as stack:
            line = Line(1, queue_max)
            await stack.enter_async_context(line.turns.turn(Asked("a", cost=100.0)))
            tasks = [line.come(f"{number}", cost=100.0) for number in range(queue_max)]
            await line.until(1, queue_max)
            with pytest.raises(Overloaded, match=f"demo has {queue_max} requests waiting") as caught:
                async with line.turns.turn(Asked("late")):
                    pass
            told.append(caught.value.retry_after_s)
            for task in tasks:
                task.cancel()
            await line.until(1, 0)
    assert told[1] > 5 * told[0] >= 5


async def test_whose_request_gave_way_is_told() -> None:
    line = Line(1, 2)
    tasks = [line.come("flood") for _ in range(3)]
    await line.until(1, 2)
    tasks.append(line.come("modest"))
    (refused,), _ = await asyncio.wait(tasks, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
    assert refused is tasks[2]
    line.leave("flood", "modest")
    async with asyncio.timeout(DEADLINE_S):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in ended] == [type(None), type(None), Overloaded, type(None)]
    assert line.turns.busy == 0


def test_what_a_request_may_cost_is_guessed_from_what_it_says() -> None:
    short = asked_by(GenerateRequest(prompt="x" * 400, max_tokens=10, tenant="k", priority="batch"))
    assert (short.tenant, short.priority, short.cost) == ("k", "batch", 10 + 100 / 8)
    assert asked_by(GenerateRequest(prompt="x")).cost > short.cost
    assert asked_by(EmbedRequest("m", ("x" * 400,))).cost < short.cost + 10
