"""The same question asked of the demo model by many, with a real child."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

import msgspec
import pytest

from piclusterd.errors import UserError
from piclusterd.inference.child import Child
from piclusterd.inference.echoes import Echoes, deterministic
from piclusterd.inference.protocol import Delta, Done, GenerateRequest, Told
from piclusterd.inference.turns import Asked

from .rig import GREEDY, NAME, Changes, collected, pool_of, rest, spec

LONG = msgspec.structs.replace(GREEDY, max_tokens=400, json_schema='{"type": "string", "minLength": 900}')
BYTES = 1 << 20


def by(tenant: str, request: GenerateRequest = GREEDY, **changes: object) -> GenerateRequest:
    return msgspec.structs.replace(request, tenant=tenant, **changes)


def test_one_answer_only_is_what_may_be_shared() -> None:
    sampled = msgspec.structs.replace(GREEDY, temperature=0.8)
    assert deterministic(GREEDY)
    assert deterministic(msgspec.structs.replace(sampled, seed=7))
    assert not deterministic(sampled)
    assert not deterministic(msgspec.structs.replace(GREEDY, told=Told((5,), 1)))


async def test_sixteen_that_ask_the_same_at_once_are_answered_once() -> None:
    async with pool_of([spec()]) as pool:
        echoes = Echoes(pool)
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(collected(echoes.generate(NAME, by("a", id=str(n))))) for n in range(16)]
        answers = [one.result() for one in asked]
        assert len({text for text, _ in answers}) == 1
        assert sorted(done.cache for _, done in answers) == ["joined"] * 15 + ["miss"]
        assert answers[0][0] == (await collected(pool.generate(NAME, GREEDY)))[0]
        assert dict(echoes.told) == {"miss": 1, "joined": 15}


async def test_keys_are_apart_unless_they_are_to_share() -> None:
    async with pool_of([spec()]) as pool:
        for shared, second in ((False, "miss"), (True, "hit")):
            echoes = Echoes(pool, BYTES, shared=shared)
            assert (await collected(echoes.generate(NAME, by("a"))))[1].cache == "miss"
            assert (await collected(echoes.generate(NAME, by("b"))))[1].cache == second
            assert (await collected(echoes.generate(NAME, by("a"))))[1].cache == "hit"
            assert (await collected(echoes.generate(NAME, by("a", max_tokens=3))))[1].cache == "miss"


async def test_who_leaves_takes_nobody_along_and_the_last_one_cancels() -> None:
    changes = Changes()
    async with pool_of([spec(slots=1)], changes=changes) as pool:
        echoes = Echoes(pool)
        first, second = echoes.generate(NAME, LONG), echoes.generate(NAME, LONG)
        opening = [await anext(first), await anext(second)]
        assert opening[0] == opening[1]
        await first.aclose()
        assert isinstance(await anext(second), Delta)
        assert pool.facts()[0].busy == 1
        await second.aclose()
        assert pool.facts()[0].busy == 0
        assert (await collected(echoes.generate(NAME, GREEDY)))[1].cache == "miss"


async def test_an_urgent_request_does_not_join_one_that_may_wait() -> None:
    async with pool_of([spec()]) as pool:
        echoes = Echoes(pool)
        async with aclosing(echoes.generate(NAME, by("a", LONG, priority="batch"))) as batch:
            await anext(batch)
            async with aclosing(echoes.generate(NAME, by("a", LONG))) as urgent:
                await anext(urgent)
                assert pool.facts()[0].busy == 2
                async with aclosing(echoes.generate(NAME, by("a", LONG, priority="batch"))) as follower:
                    await anext(follower)
        assert dict(echoes.told) == {"miss": 2, "joined": 1}


async def test_a_failure_reaches_all_and_is_not_remembered() -> None:
    async with pool_of([spec()]) as pool:
        echoes = Echoes(pool, BYTES)
        wrong = msgspec.structs.replace(GREEDY, json_schema="{")
        told = await asyncio.gather(*(rest(echoes.generate(NAME, wrong)) for _ in range(3)), return_exceptions=True)
        assert [type(one) for one in told] == [UserError] * 3
        with pytest.raises(UserError):
            await rest(echoes.generate(NAME, wrong))
        assert dict(echoes.told) == {"miss": 2, "joined": 2}


async def test_an_answer_is_forgotten_with_its_age_and_with_its_child() -> None:
    changes, now = Changes(), [0.0]
    async with pool_of([spec()], changes=changes) as pool:
        echoes = Echoes(pool, BYTES, age_s=60.0, now=lambda: now[0])

        async def cache() -> str:
            return (await collected(echoes.generate(NAME, GREEDY)))[1].cache

        assert [await cache(), await cache()] == ["miss", "hit"]
        now[0] = 60.0
        assert [await cache(), await cache()] == ["miss", "hit"]
        old = pool.being(NAME)
        assert isinstance(old, Child)
        assert old.pid is not None
        os.kill(old.pid, signal.SIGKILL)
        await changes.until(lambda: pool.being(NAME) not in (None, old))
        assert await cache() == "miss"


async def test_what_is_sampled_freely_is_asked_each_time() -> None:
    async with pool_of([spec()]) as pool:
        echoes = Echoes(pool, BYTES)
        free = msgspec.structs.replace(GREEDY, temperature=0.8)
        for _ in range(2):
            done: Done = (await collected(echoes.generate(NAME, free)))[1]
            assert done.cache == ""
        assert not echoes.told


async def test_of_a_batch_only_the_texts_that_are_not_known_are_embedded() -> None:
    async with pool_of([spec()]) as pool:
        echoes, asked = Echoes(pool, BYTES), Asked("a")
        alone = await echoes.embed(NAME, ("one",), asked)
        both = await echoes.embed(NAME, ("two", "one", "two"), asked)
        again = await echoes.embed(NAME, ("one", "two"), asked)
        assert [alone.cache, both.cache, again.cache] == ["miss", "miss", "hit"]
        assert both.vectors == (both.vectors[2], alone.vectors[0], both.vectors[0])
        assert (await echoes.embed(NAME, ("one",), Asked("b"))).cache == "miss"
        only = await pool.embed(NAME, ("two",))
        assert both.vectors[0] == only.vectors[0]
        assert again.tokens == alone.tokens + only.tokens
