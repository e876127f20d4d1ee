"""Models loaded at the first request, with real children and a memory that the test decides about."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from piclusterd.config import Store as Settings
from piclusterd.errors import NotFound, Overloaded, PiclusterError, Unavailable
from piclusterd.inference import loading
from piclusterd.inference.budget import MIB, need, sequences
from piclusterd.inference.gguf import read_shape
from piclusterd.inference.library import Library
from piclusterd.inference.protocol import GenerateRequest
from piclusterd.inference.store import NotAsPromised

from .hub_rig import BODY, SHA256, library_of
from .rig import DEMO, GREEDY, Changes, collected, spec

ENDLESS = GenerateRequest(prompt="x", max_tokens=0, json_schema='{"type": "string", "minLength": 400}')
ONE = need(read_shape(DEMO), len(BODY), 512, sequences(1)).total
"""What a model of these tests takes."""
HEADROOM = 256 * MIB
SHORT = Settings(hub_url="http://127.0.0.1:9", context=512, slots=1, keep_alive_minutes=1)


class Board:
    """A memory with room for so many models, and a clock."""

    def __init__(self, library: Library, models: float) -> None:
        self.library, self.bytes, self.now = library, int(models * ONE), 0.0
        library.loads._memory = self.memory

    def memory(self) -> tuple[int, int]:
        """What is taken shows in `available`; mapped weights count as available, as the kernel has it."""
        loaded = self.library.loads.residents()
        weights = sum(len(BODY) for _ in loaded)
        return HEADROOM, HEADROOM + self.bytes - sum(one.bytes for one in loaded) + weights


async def names_in_memory(library: Library) -> list[str]:
    return [one.name for one in library.loaded()]


async def two_models(library: Library) -> None:
    for name in ("one", "two"):
        await library.take_file(DEMO, name)


async def test_the_first_request_loads_the_model_and_gossip_tells_of_it_before(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "one")
        await library.alias("one", ("uno",))
        told = library._pool.facts()
        assert [(facts.name, facts.load_s > 0) for facts in told] == [("one", True), ("uno", True)]
        assert (await collected(library._pool.generate("uno", GREEDY)))[0]
        told = library._pool.facts()
        assert [(facts.name, facts.load_s) for facts in told] == [("one", 0.0), ("uno", 0.0)]
        assert (await library._pool.embed("one", ["text"])).vectors
        with pytest.raises(NotFound):
            await collected(library._pool.generate("other", GREEDY))


async def test_requests_that_come_together_load_it_once_and_all_are_answered(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "one")
        answers = await asyncio.gather(*(collected(library._pool.generate("one", GREEDY)) for _ in range(5)))
        assert len({text for text, _ in answers}) == 1
        assert len(library.loaded()) == 1


async def test_more_than_the_queue_may_hold_do_not_wait_for_a_load(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "one")
        ends = await asyncio.gather(
            *(collected(library._pool.generate("one", GREEDY)) for _ in range(10)), return_exceptions=True
        )
        refused = [end for end in ends if isinstance(end, Overloaded)]
        assert len(refused) == 2
        assert all(isinstance(end, tuple) for end in ends if end not in refused)


async def test_the_longest_unused_makes_room_and_the_pinned_stays(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        Board(library, 2.5)
        await two_models(library)
        await library.take_file(DEMO, "three")
        await library.load("one")
        await library.load("two")
        await collected(library._pool.generate("one", GREEDY))
        await library.load("three")
        assert await names_in_memory(library) == ["one", "three"]
        await library.pin("one", True)
        await library.load("two")
        assert await names_in_memory(library) == ["one", "two"]


async def test_a_model_in_flight_is_never_evicted(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        Board(library, 1.5)
        await two_models(library)
        async with aclosing(library._pool.generate("one", ENDLESS)) as answer:
            await anext(answer)
            with pytest.raises(Overloaded, match="one is answering") as caught:
                await collected(library._pool.generate("two", GREEDY))
            assert caught.value.retry_after_s > 0
            await anext(answer)
        assert (await collected(library._pool.generate("two", GREEDY)))[0]
        assert await names_in_memory(library) == ["two"]


async def test_a_model_that_never_fits_is_refused_with_numbers_and_what_would(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        Board(library, 0.9)
        await library.take_file(DEMO, "one")
        with pytest.raises(
            Unavailable, match=r"one does not fit this board. It needs \d+ MiB .*are free for it"
        ) as caught:
            await collected(library._pool.generate("one", GREEDY))
        assert not isinstance(caught.value, Overloaded)
        assert library.instead("other", len(BODY)) == "one of this node's store would fit."
        assert "picluster pull" in library.instead("one", 700_000_000)
        assert library.instead("one", 1) == ""
        assert not library.loaded()


async def test_an_idle_model_is_unloaded_and_a_kept_one_is_not(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await two_models(library)
        await library.load("one")
        await library.load("two", keep_alive_s=float("inf"))
        now = library.loads._clock()
        library.loads._clock = lambda: now + 50
        await library.loads.look()
        assert [one.expires_s is None for one in library.loaded()] == [False, True]
        library.loads._clock = lambda: now + 3600
        await library.loads.look()
        assert await names_in_memory(library) == ["two"]
        await library.load("two", keep_alive_s=0.0)
        await library.loads.look()
        assert not library.loaded()


async def test_pinned_models_are_loaded_when_the_node_starts(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await two_models(library)
        await library.pin("two", True)
    async with library_of(tmp_path, settings=SHORT) as library:
        library._pool.on_change = changes = Changes()
        running = asyncio.create_task(library.run())
        try:
            await changes.until(lambda: [one.state for one in library.loaded()] == ["ready"])
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert await names_in_memory(library) == ["two"]


async def test_a_file_that_was_changed_on_the_disk_is_never_loaded(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "one")
        blob = library.store.blob(SHA256)
        blob.chmod(0o644)
        blob.write_bytes(BODY[:-1] + b"x")
        with pytest.raises(NotAsPromised, match="not what it was"):
            await library.load("one")
        assert not library.loaded()


async def test_a_file_that_is_exchanged_while_it_is_loaded_is_not_served(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "one")
        verified = library.verified

        async def then_exchanged(name: str) -> object:
            found = await verified(name)
            blob = library.store.blob(SHA256)
            blob.unlink()
            blob.write_bytes(BODY)  # as good as the old one, but who knows
            return found

        library.verified = then_exchanged  # type: ignore[method-assign, assignment]
        with pytest.raises(Unavailable, match="exchanged while it was loaded"):
            await library.load("one")
        assert not library.loaded()


async def test_a_file_that_its_child_refuses_is_told_and_tried_again_by_hand_only(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(BODY[: len(BODY) // 2])
    async with library_of(tmp_path / "models", settings=SHORT) as library:
        await library.take_file(cut, "cut")
        with pytest.raises(Unavailable, match="cut cannot be loaded"):
            await collected(library._pool.generate("cut", GREEDY))
        assert library.show("cut").state == "failed"
        with pytest.raises(Unavailable, match="failed on this node"):
            await collected(library._pool.generate("cut", GREEDY))
        assert "cut" not in [facts.name for facts in library._pool.facts()]
        with pytest.raises(Unavailable, match="cut cannot be loaded"):
            await library.load("cut")


async def test_a_configured_model_is_left_to_the_pool(tmp_path: Path) -> None:
    async with library_of(tmp_path, settings=SHORT) as library:
        await library.take_file(DEMO, "fixed")
        await library._pool.start([spec(name="fixed")])
        with pytest.raises(Unavailable, match="loading"):
            await collected(library._pool.generate("fixed", GREEDY))
        assert (await library.load("fixed")).state == "ready"
        assert library._pool.facts()[0].context == 1024
        assert not library.loads.residents()


async def test_where_the_owner_does_not_want_it_nothing_is_loaded_on_demand(tmp_path: Path) -> None:
    settings = Settings(on_demand=False, context=512, slots=1)
    async with library_of(tmp_path, settings=settings) as library:
        await library.take_file(DEMO, "one")
        assert library._pool.facts() == ()
        with pytest.raises(PiclusterError, match="no model"):
            await collected(library._pool.generate("one", msgspec.structs.replace(GREEDY, max_tokens=1)))
        assert (await library.load("one")).state == "ready"


async def test_how_long_a_load_takes_is_learnt_from_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "MEASURED_BYTES", 1)
    async with library_of(tmp_path, settings=SHORT) as library:
        await two_models(library)
        assert library.loads.load_s(800_000_000) == 11.0
        await library.load("one")
        assert library.loads.load_s(800_000_000) > 11.0  # so small a file is all start
        assert [facts.load_s for facts in library.facts()] == [library.loads.load_s(len(BODY))]
