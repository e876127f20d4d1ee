from __future__ import annotations

import asyncio
import os
import re
import signal
import struct
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from piclusterd.errors import NotFound, Overloaded, Unavailable, UserError
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import ChatMessage, Delta, GenerateRequest

from .rig import DEMO, GREEDY, NAME, READY_S, Changes, collected, pool_of, rest, spec

ENDLESS = GenerateRequest(prompt="x", max_tokens=0, json_schema='{"type": "string", "minLength": 900}')
"""Goes on until it is cancelled or the context is full."""


def corrupt(tmp_path: Path, kind: str) -> Path:
    whole = DEMO.read_bytes()
    path = tmp_path / f"{kind}.gguf"
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "cut in the keys": whole[:400],
            "random": whole[:24] + os.urandom(4096),
            "bad magic": b"GGML" + whole[4:],
            "header only": whole[:24],
        }[kind]
    )
    return path


async def test_a_model_loads_in_the_background_and_answers() -> None:
    pool = Pool(8, READY_S)
    await pool.start([spec()])
    try:
        assert pool.states() == {NAME: ("loading", "")}
        assert pool.facts() == ()
        with pytest.raises(Unavailable, match="loading"):
            await collected(pool.generate(NAME, GREEDY))
        assert await pool.settled(NAME) == "ready"
        text, done = await collected(pool.generate(NAME, GREEDY))
        assert text
        assert done.completion_tokens > 0
    finally:
        await pool.close()
    assert pool.states()[NAME][0] == "stopped"


async def test_no_model_library_ever_comes_into_the_daemons_process() -> None:
    libraries = {"llama_cpp", "torch", "transformers", "tokenizers", "safetensors", "numpy"}
    code = f"import sys, piclusterd.daemon; sys.exit(' '.join({libraries} & set(sys.modules)) or 0)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0


async def test_an_alias_is_the_same_model_and_is_gossiped_too() -> None:
    async with pool_of([spec(aliases=("gpt-4o-mini",))]) as pool:
        assert (await collected(pool.generate("gpt-4o-mini", GREEDY)))[0]
        assert [facts.name for facts in pool.facts()] == [NAME, "gpt-4o-mini"]
        with pytest.raises(NotFound, match=NAME):
            await collected(pool.generate("gpt-5", GREEDY))


async def test_facts_tell_what_was_measured_and_who_is_running() -> None:
    async with pool_of([spec()]) as pool:
        assert pool.facts()[0].decode_tps == 0
        async with aclosing(pool.generate(NAME, ENDLESS)) as answer:
            await anext(answer)
            assert pool.facts()[0].busy == 1
        await collected(pool.generate(NAME, GREEDY))
        facts = pool.facts()[0]
        assert (facts.busy, facts.queued, facts.context, facts.embeddings) == (0, 0, 1024, True)
        assert facts.decode_tps > 0


async def test_closing_an_answer_frees_its_slot() -> None:
    async with pool_of([spec(slots=1)]) as pool:
        for _ in range(3):
            async with aclosing(pool.generate(NAME, ENDLESS)) as answer:
                assert isinstance(await anext(answer), Delta)
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    changes = Changes()
    async with pool_of([spec(slots=1)], 1, changes) as pool, aclosing(pool.generate(NAME, ENDLESS)) as running:
        await anext(running)
        waiting = asyncio.create_task(collected(pool.generate(NAME, GREEDY)))
        await changes.until(lambda: pool.facts()[0].queued == 1)
        with pytest.raises(Overloaded) as caught:
            await collected(pool.generate(NAME, GREEDY))
        assert caught.value.retry_after_s >= 1
        await running.aclose()
        assert (await waiting)[0]


async def test_a_request_the_child_refuses_is_the_callers_error() -> None:
    async with pool_of([spec()]) as pool:
        with pytest.raises(UserError, match="context"):
            await collected(pool.generate(NAME, GenerateRequest(messages=(ChatMessage("user", "word " * 6000),))))
        bomb = msgspec.structs.replace(GREEDY, json_schema='{"type": "string", "maxLength": 1000000}')
        with pytest.raises(UserError, match="refused"):
            await collected(pool.generate(NAME, bomb))
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_long_lists_of_texts_are_embedded_in_order() -> None:
    async with pool_of([spec()]) as pool:
        texts = [f"issue number {number}" for number in range(70)]
        embedded = await pool.embed(NAME, texts)
        assert len(embedded.vectors) == 70
        alone = await pool.embed(NAME, texts[69:])
        last, same = (struct.unpack(f"<{len(v) // 4}f", v) for v in (embedded.vectors[69], alone.vectors[0]))
        assert last == pytest.approx(same, abs=0.01)  # batches of other sizes round differently


@pytest.mark.parametrize("kind", ["truncated", "cut in the keys", "random", "bad magic", "header only"])
async def test_a_corrupt_file_fails_with_a_reason_and_the_other_model_answers(tmp_path: Path, kind: str) -> None:
    async with pool_of([spec(corrupt(tmp_path, kind), name="broken"), spec()]) as pool:
        state, why = pool.states()["broken"]
        assert state == "failed"
        assert "broken" in why
        assert [facts.name for facts in pool.facts()] == [NAME]
        with pytest.raises(Unavailable, match="failed"):
            await collected(pool.generate("broken", GREEDY))
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_killed_child_fails_its_requests_and_is_started_again() -> None:
    changes = Changes()
    async with pool_of([spec()], changes=changes) as pool:
        first = pool.pid(NAME)
        assert first is not None
        async with aclosing(pool.generate(NAME, ENDLESS)) as answer:
            await anext(answer)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(Unavailable, match="SIGKILL"):
                await rest(answer)
        await changes.until(lambda: pool.states()[NAME][0] == "loading")
        assert await pool.settled(NAME) == "ready"
        assert pool.pid(NAME) != first
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_file_that_kills_two_children_is_quarantined() -> None:
    pool = Pool(8, load_timeout_s=0.001)  # shorter than any load: the child is killed each time
    await pool.start([spec(name="slow")])
    try:
        assert await pool.settled("slow") == "failed"
        assert "not tried again" in pool.states()["slow"][1]
    finally:
        await pool.close()


async def test_a_model_too_large_for_the_board_is_refused_with_the_numbers() -> None:
    vast = replace(spec(name="vast"), context=1_048_576 * 512)  # terabytes of KV memory
    async with pool_of([vast, spec()]) as pool:
        state, why = pool.states()["vast"]
        assert state == "failed"
        assert re.search(r"does not fit .* needs [0-9,]+ MiB .* available", why)
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_child_that_hangs_is_replaced_and_its_request_told() -> None:
    changes = Changes()
    async with pool_of([spec()], changes=changes, hang_s=3.0) as pool:
        first = pool.pid(NAME)
        assert first is not None
        async with aclosing(pool.generate(NAME, ENDLESS)) as answer:
            await anext(answer)
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="said nothing for 3 s"):
                await rest(answer)
        await changes.until(lambda: pool.states()[NAME][0] == "loading")
        assert await pool.settled(NAME) == "ready"
        assert (await collected(pool.generate(NAME, GREEDY)))[0]


async def test_a_model_that_dies_twice_and_finishes_nothing_is_quarantined() -> None:
    changes = Changes()
    async with pool_of([spec(), spec(name="other")], changes=changes) as pool:
        for state in ("loading", "failed"):
            assert await pool.settled(NAME) == "ready"
            pid = pool.pid(NAME)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await changes.until(lambda state=state: pool.states()[NAME][0] == state)  # type: ignore[misc]
        assert "quarantined" in pool.states()[NAME][1]
        with pytest.raises(Unavailable, match="quarantined"):
            await collected(pool.generate(NAME, GREEDY))
        assert (await collected(pool.generate("other", GREEDY)))[0]


async def test_a_model_that_finishes_something_between_its_deaths_is_started_each_time() -> None:
    changes = Changes()
    async with pool_of([spec()], changes=changes) as pool:
        for _ in range(3):
            assert await pool.settled(NAME) == "ready"
            assert (await collected(pool.generate(NAME, GREEDY)))[0]
            pid = pool.pid(NAME)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await changes.until(lambda: pool.states()[NAME][0] == "loading")


async def test_who_waits_for_a_child_that_dies_is_told_at_once() -> None:
    changes = Changes()
    async with pool_of([spec(slots=1)], changes=changes) as pool:
        running = asyncio.create_task(collected(pool.generate(NAME, ENDLESS)))
        await changes.until(lambda: pool.facts()[0].busy == 1)
        waiting = asyncio.create_task(collected(pool.generate(NAME, GREEDY)))
        await changes.until(lambda: pool.facts()[0].queued == 1)
        pid = pool.pid(NAME)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        for one in (running, waiting):
            with pytest.raises(Unavailable):
                await one


async def test_closing_the_pool_leaves_no_child_behind() -> None:
    me = psutil.Process()
    before = {child.pid for child in me.children()}
    changes = Changes()
    async with pool_of([spec(), spec(name="second")], changes=changes) as pool:
        children = {pool.pid(NAME), pool.pid("second")}
        assert children <= {child.pid for child in me.children()} - before
        running = asyncio.create_task(collected(pool.generate(NAME, ENDLESS)))
        await changes.until(lambda: pool.facts()[0].busy == 1)
    with pytest.raises(Unavailable):
        await running
    assert not children & {child.pid for child in me.children()}


@pytest.mark.parametrize("turns", [0, 1, 3, 9, 27])
async def test_a_pool_closed_while_it_loads_leaves_no_child_either(turns: int) -> None:
    pool = Pool(8, READY_S)
    before = set(psutil.Process().children())
    await pool.start([spec(), spec(name="second")])
    for _ in range(turns):  # a trip through a thread lets the loop get a little further with the loading
        await asyncio.to_thread(int)
    await pool.close()
    assert set(psutil.Process().children()) == before
    assert {state for state, _ in pool.states().values()} == {"stopped"}


async def test_the_childs_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICLUSTER_HUB_TOKEN", "secret")
    async with pool_of([spec()]) as pool:
        pid = pool.pid(NAME)
        assert pid is not None
        assert "PICLUSTER_HUB_TOKEN" not in psutil.Process(pid).environ()


async def test_a_killed_daemon_leaves_no_child_behind() -> None:
    daemon = f"""
import asyncio
from tests.inference.rig import pool_of, spec
async def main():
    async with pool_of([spec()]) as pool:
        print(pool.pid({NAME!r}), flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", daemon, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    child = psutil.Process(int(await process.stdout.readline()))
    process.kill()
    await process.communicate()
    await asyncio.to_thread(child.wait, READY_S)
    assert not child.is_running()
