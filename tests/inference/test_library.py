"""Pulls over real sockets: cut off, lied to, stopped and gone on with; and what becomes of a model afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from piclusterd.demo.doubles import Fault
from piclusterd.demo.huggingface_double import COMMIT
from piclusterd.errors import NotFound, PiclusterError, Unavailable, UserError
from piclusterd.inference import catalogue, fetching
from piclusterd.inference.store import HEADROOM_BYTES, NoSpace, NotAsPromised

from .hub_rig import BODY, FILE, NAME, REPO, SHA256, hub_with_cdn, library_of, pulled
from .rig import DEMO, GREEDY, collected


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE_MAX_S", 0.01)


async def test_a_pulled_model_answers(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        steps = await pulled(library, f"{REPO}:Q4_K_M")
        assert steps[0].status == "resolving"
        assert (steps[-1].status, steps[-1].completed, steps[-1].digest) == ("done", len(BODY), SHA256)
        kept = library.show(NAME).model
        assert (kept.revision, kept.source) == (COMMIT, f"hf:{REPO}/{FILE}")
        text, _done = await collected(library._pool.generate(NAME, GREEDY))
        assert text
        assert [(one.name, one.state, one.sha256) for one in library.loaded()] == [(NAME, "ready", SHA256)]
        assert hub.served_bytes == len(BODY)
        await pulled(library, f"{REPO}:Q4_K_M", "mine")
        assert hub.served_bytes == len(BODY)  # the blob was there already
        assert [entry.model.name for entry in library.list()] == [NAME, "mine"]


async def test_a_download_that_breaks_off_is_gone_on_with_and_hashed_whole(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.cuts[FILE] = [1000, 0, 0, 500_000]
        await pulled(library, REPO)
        assert library.store.blob(SHA256).read_bytes() == BODY
        assert hub.served_bytes == len(BODY)


async def test_a_node_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _):
        async with library_of(tmp_path, hub.url) as library:
            library.store.partial(SHA256).write_bytes(BODY[:1_000_000])  # as a power cut leaves it
            await pulled(library, REPO)
        assert hub.served_bytes == len(BODY) - 1_000_000


async def test_a_spoilt_beginning_costs_one_more_download_and_nothing_else(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        library.store.partial(SHA256).write_bytes(bytes(1_000_000))  # zeros, as a file system may leave them
        await pulled(library, REPO)
        assert library.store.blob(SHA256).read_bytes() == BODY
        assert hub.served_bytes == 2 * len(BODY) - 1_000_000


async def test_other_bytes_of_the_same_length_are_refused(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.corrupt.add(FILE)
        with pytest.raises(NotAsPromised, match="SHA-256"):
            await pulled(library, REPO)
        assert not library.list()
        assert not list((tmp_path / "partial").iterdir())
        assert hub.served_bytes == len(BODY)


@pytest.mark.parametrize("lie", [-1000, 1000])
async def test_a_size_that_is_not_so_is_refused(tmp_path: Path, lie: int) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.lies[FILE] = len(BODY) + lie
        with pytest.raises(PiclusterError, match=r"more than it promised|416|cut off|another part"):
            await pulled(library, REPO)
        assert not library.list()


async def test_a_server_that_does_not_resume_is_read_from_the_start(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.resumes = False
        hub.cuts[FILE] = [1000]
        await pulled(library, REPO)
        assert library.store.blob(SHA256).read_bytes() == BODY


async def test_a_hub_that_stays_away_ends_the_pull_and_what_came_is_kept(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.cuts[FILE] = [1000] + [0] * 20
        with pytest.raises(Unavailable, match="cut off"):
            await pulled(library, REPO)
        assert library.store.partial(SHA256).stat().st_size == 1000
        hub.cuts.clear()
        hub.faults.append(Fault("ratelimited", 240))
        with pytest.raises(Unavailable, match="240 s"):
            await pulled(library, REPO)
        await pulled(library, REPO)
        assert library.store.blob(SHA256).read_bytes() == BODY


async def test_who_leaves_stops_a_pull_that_nobody_else_watches(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, cdn), library_of(tmp_path, hub.url) as library:
        library.store.partial(SHA256).write_bytes(BODY[:1000])
        cdn.faults.append(Fault("hang"))
        one, two = library.pull(REPO), library.pull(REPO)
        async with asyncio.timeout(20):
            async for step in one:
                if step.completed == 1000:
                    break
            await anext(two)
            await one.aclose()
            assert library._pulls
            await two.aclose()
        assert not library._pulls
        cdn.faults.clear()
        await pulled(library, REPO)
        assert hub.served_bytes == len(BODY) - 1000


async def test_two_who_ask_for_one_model_fetch_it_once(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        asked = (pulled(library, REPO), pulled(library, REPO), pulled(library, f"{REPO}:Q4_K_M", "mine"))
        ends = await asyncio.gather(*asked)
        assert [steps[-1].status for steps in ends] == ["done", "done", "done"]
        assert hub.served_bytes == len(BODY)
        assert [entry.model.name for entry in library.list()] == [NAME, "mine"]


async def test_no_room_on_the_disk_is_told_before_a_byte_is_fetched(tmp_path: Path) -> None:
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url, free=HEADROOM_BYTES) as library:
        with pytest.raises(NoSpace, match="2 MiB"):
            await pulled(library, REPO)
        assert hub.served_bytes == 0


async def test_a_disk_that_fills_up_on_the_way_ends_the_pull_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SYNC_BYTES", 1)
    monkeypatch.setattr(fetching, "WRITE_BYTES", 64 * 1024)
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        frees = iter([2**40, 2**40, HEADROOM_BYTES])
        library.store._free = lambda _: next(frees)
        with pytest.raises(NoSpace, match="stay free for the ledger"):
            await pulled(library, REPO)
        assert not library.list()
        kept, before = library.store.partial(SHA256).stat().st_size, hub.served_bytes
        library.store._free = lambda _: 2**40
        await pulled(library, REPO)
        assert 0 < kept == len(BODY) - (hub.served_bytes - before)


async def test_names_of_the_catalogue_are_pulled_by_their_file(tmp_path: Path) -> None:
    known = catalogue.catalogue()[0]
    async with hub_with_cdn() as (hub, _), library_of(tmp_path, hub.url) as library:
        hub.files[known.repo] = {known.file: BODY}
        await pulled(library, known.name)
        assert library.show(known.name).model.source == f"hf:{known.repo}/{known.file}"
        with pytest.raises(NotFound, match=known.name):
            await pulled(library, "gpt-9")


async def test_a_file_of_this_machine_and_one_that_is_sent_become_models(tmp_path: Path) -> None:
    async with library_of(tmp_path) as library:
        assert (await library.take_file(DEMO)).name == "triage-demo"

        async def sent(body: bytes) -> None:
            async def chunks() -> AsyncGenerator[bytes, None]:
                yield body

            await library.take_stream(chunks(), len(BODY), "sent")

        await sent(BODY)
        assert library.show("sent").model.sha256 == SHA256
        for body in (BODY[:-1], BODY + b"x", b"x" * len(BODY)):
            with pytest.raises(PiclusterError):
                await sent(body)
        assert not list((tmp_path / "partial").iterdir())
        assert (await library.about("sent"))["architecture"] == "llama"


async def test_a_new_file_under_an_old_name_takes_its_place_in_memory(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(BODY + b"\0")
    async with library_of(tmp_path / "models") as library:
        await library.take_file(DEMO, "m")
        await library.pin("m", True)
        await library.load("m")
        put = await library.take_file(other, "m")
        assert put.pinned
        assert not library.loaded()
        await collected(library._pool.generate("m", GREEDY))
        assert library.loaded()[0].sha256 == put.sha256 != SHA256


async def test_removing_a_model_unloads_it_and_frees_the_disk(tmp_path: Path) -> None:
    async with library_of(tmp_path) as library:
        await library.take_file(DEMO, "m")
        await library.load("m")
        assert await library.remove("m") == len(BODY)
        assert not library.loaded()
        with pytest.raises(NotFound):
            await library.load("m")
        with pytest.raises(NotFound):
            await library.unload("m")


async def test_a_model_of_the_configuration_is_not_unloaded_by_hand(tmp_path: Path) -> None:
    from .rig import spec

    async with library_of(tmp_path) as library:
        await library._pool.start([spec(name="fixed")])
        assert await library._pool.settled("fixed") == "ready"
        with pytest.raises(UserError, match="configuration"):
            await library.unload("fixed")
        assert library.loaded()[0].expires_s is None
