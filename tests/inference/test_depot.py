"""Beginnings on disk: written when asked for again, there for the next child, and never believed unless whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from piclusterd.inference.depot import DAILY, DAY_S, DISK, Depot, Head, name_of, read, write
from piclusterd.inference.pool import Pool, Served
from piclusterd.inference.protocol import ChatMessage, Done, GenerateRequest

from .rig import NAME, collected, pool_of, spec

PLENTY = 2**28
SLOW_TPS = 5.0
"""Such a board would rather load; the demo model is read faster than a disk gives."""
KEY = bytes(32)


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def told(topic: str, end: str) -> GenerateRequest:
    text = f"Title: {topic}\n\n" + "".join(f"The {topic} crashes when file {n} is saved. " for n in range(40)) + end
    return GenerateRequest(NAME, messages=(ChatMessage("user", text),), max_tokens=16, temperature=0.0)


FIRST, SECOND, THIRD = (told("editor", end) for end in ("Why?", "Since when?", "So?"))


class Node:
    """A child, and the depot that its pool has. `key`: whose states they are."""

    def __init__(self, pool: Pool, directory: Path, bytes_max: int = PLENTY, key: bytes | None = KEY) -> None:
        self.pool, self.now = pool, 0.0
        self.depot = Depot(pool, directory, bytes_max, lambda _: key, lambda: self.now)

    @property
    def served(self) -> Served:
        served = self.pool.served(NAME)
        assert served is not None
        return served

    async def ask(self, request: GenerateRequest) -> tuple[str, Done]:
        self.served.prefill.value = SLOW_TPS
        answer = await collected(self.pool.generate(NAME, request))
        async with asyncio.timeout(60):
            await self.depot.settled()
        return answer


@asynccontextmanager
async def node(directory: Path, bytes_max: int = PLENTY, key: bytes | None = KEY) -> AsyncIterator[Node]:
    async with pool_of([spec()]) as pool:
        yield Node(pool, directory, bytes_max, key)


async def filled(directory: Path) -> str:
    """A beginning is asked for twice, and the child ends; what THIRD is answered to then, without any disk."""
    async with node(directory) as one:
        await one.ask(FIRST)
        assert one.depot.told == {}
        await one.ask(SECOND)
        assert one.depot.told == {"saved": 1}
        return (await one.ask(THIRD))[0]


async def test_what_is_asked_for_again_outlives_the_child_and_changes_no_answer(tmp_path: Path) -> None:
    computed = await filled(tmp_path / "prefixes")
    async with node(tmp_path / "prefixes") as one:
        text, done = await one.ask(THIRD)
        assert text == computed
        assert done.shipped is not None
        assert done.shipped.peer == DISK
        assert done.cached_tokens >= done.prompt_tokens - 16
        assert one.depot.told == {"loaded": 1}
        again = (await one.ask(FIRST))[1]
        assert again.shipped is None, "the child has it"
        assert again.cached_tokens > 0


async def test_what_begins_alike_and_goes_on_otherwise_has_its_part_of_it(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        for end in ("Since when has it?", "Since when is it?"):
            await one.ask(told("editor", end))
        computed = (await one.ask(SECOND))[0]
    async with node(tmp_path) as one:
        done = (await one.ask(told("editor", "Why?")))[1]
        assert done.shipped is not None
        assert done.cached_tokens > 300
        assert (await one.ask(SECOND))[0] == computed


async def test_once_is_not_enough_to_be_written(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        await one.ask(FIRST)
        await one.ask(told("printer", "Why?"))
    assert files(tmp_path) == []


async def test_it_is_written_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        for request in (FIRST, SECOND, THIRD, SECOND, FIRST):
            await one.ask(request)
        assert one.depot.told["saved"] == 1
        assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("at", [3, 60, -1000, None])
async def test_what_is_damaged_is_read_instead_and_deleted(tmp_path: Path, at: int | None) -> None:
    computed = await filled(tmp_path)
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    if at is None:
        del data[-1:]
    else:
        data[at] ^= 255
    file.write_bytes(data)
    async with node(tmp_path) as one:
        text, done = await one.ask(THIRD)
        assert text == computed
        assert done.shipped is None
    assert not file.exists()


@pytest.mark.parametrize("state", [b"what was writteN", b"what was writte", b"what was written."])
def test_a_state_that_is_not_what_was_written_never_reaches_a_child(tmp_path: Path, state: bytes) -> None:
    """The child looks too; but it is the one to be spared."""
    whole = b"what was written"
    head = Head(KEY, (1, 1024), bytes(8), len(whole), hashlib.sha256(whole).digest())
    path = tmp_path / name_of(head)
    write(path, head, whole)
    assert read(path) == (head, whole)
    write(path, head, state)
    with pytest.raises(ValueError, match="damaged"):
        read(path)


@pytest.mark.parametrize("key", [b"\1" * 32, None])
async def test_states_of_another_model_or_build_are_left_alone(tmp_path: Path, key: bytes | None) -> None:
    await filled(tmp_path)
    async with node(tmp_path, key=key) as one:
        assert (await one.ask(THIRD))[1].shipped is None
    assert len(files(tmp_path)) == 1


async def test_the_least_recently_used_go_first_when_it_is_full(tmp_path: Path) -> None:
    await filled(tmp_path)
    (file,) = files(tmp_path)
    room = file.stat().st_size * 3 // 2
    async with node(tmp_path, bytes_max=room) as one:
        assert (await one.ask(told("printer", "Why?")))[1].shipped is None
        await one.ask(told("printer", "Since when?"))
        assert one.depot.told["saved"] == 1
    (left,) = files(tmp_path)
    assert left != file
    assert left.stat().st_size <= room


async def test_a_days_writes_are_bounded_and_the_next_day_has_its_own(tmp_path: Path) -> None:
    async with node(tmp_path) as one:
        one.depot._written = DAILY * PLENTY
        for end in ("Why?", "Since when?"):
            await one.ask(told("editor", end))
        assert one.depot.told == {}
        one.now = DAY_S
        await one.ask(THIRD)
        assert one.depot.told == {"saved": 1}


async def test_nothing_is_kept_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    async with node(tmp_path / "none", bytes_max=0) as one:
        await one.ask(FIRST)
        await one.ask(SECOND)
    assert not (tmp_path / "none").exists()


async def test_a_file_is_only_its_owners_to_read(tmp_path: Path) -> None:
    await filled(tmp_path / "prefixes")
    (file,) = files(tmp_path / "prefixes")
    assert file.stat().st_mode & 0o77 == 0
    assert file.parent.stat().st_mode & 0o77 == 0
    head, state = read(file)
    assert (head.key, head.size) == (KEY, len(state))
