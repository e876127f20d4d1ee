"""`picluster pull`, `ls`, `ps` and their kin against a real store behind the real doors of a node."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from piclusterd.cli.client import Target
from piclusterd.cli.models import _send as send
from piclusterd.config import Inference
from piclusterd.demo.doubles import Fault
from piclusterd.demo.huggingface_double import CdnDouble, HuggingFaceDouble
from piclusterd.errors import Refused
from piclusterd.ids import NodeId
from piclusterd.inference import catalogue
from piclusterd.inference.library import Library
from piclusterd.inference.splits import Splits
from piclusterd.inference.store import HEADROOM_BYTES
from piclusterd.stock import MODELS, Stock
from piclusterd.web import models
from piclusterd.web.app import Doors, make_app
from piclusterd.web.listener import serve
from piclusterd.web.ollama_schema import Card
from tests.inference.hub_rig import BODY, FILE, NAME, REPO, SHA256, hub_with_cdn, library_of
from tests.inference.rig import DEMO
from tests.web.house import Node, node, serving

from .command import LIMIT_S, Result, environment, picluster


def splits_of(library: Library, name: str) -> Splits:
    """Of a node whose owner wants none."""

    async def nobody(_node: NodeId, _name: str, _body: bytes, _s: float) -> AsyncGenerator[bytes, None]:
        yield b""

    return Splits(node(1), name, Inference(), library, library._pool, nobody, dict)


@dataclass
class Home:
    """pi-1 whose doors are asked, and pi-2 behind a link."""

    socket: str
    library: Library
    other: Library
    hub: HuggingFaceDouble
    cdn: CdnDouble
    doors: Doors
    stock: Stock

    async def run(self, *words: str) -> Result:
        return await picluster("--socket", self.socket, *words)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    house = Node()

    async def nobody(_node: NodeId, _name: str, _body: bytes, _s: float) -> AsyncGenerator[bytes, None]:
        yield b"pi-2 asks nobody"

    async with (
        hub_with_cdn() as (hub, cdn),
        library_of(tmp_path / "one", hub.url) as library,
        library_of(tmp_path / "two", hub.url) as other,
    ):
        there = Stock(node(2), other, nobody, house.view, splits_of(other, "pi-2"))

        async def request(asked: NodeId, name: str, body: bytes, _s: float) -> AsyncGenerator[bytes, None]:
            assert (asked, name) == (node(2), MODELS)
            async for chunk in there.serve_peer(body):
                yield chunk[:7]  # links cut where they like
                yield chunk[7:]

        here = Stock(node(1), library, request, house.view, splits_of(library, "pi-1"), "catalogue")
        doors = house.doors(extra_routes=models.routes(here.ask, here.take))
        listener = await serve(make_app(doors), "127.0.0.1", 0, tmp_path / "api.sock")
        yield Home(str(tmp_path / "api.sock"), library, other, hub, cdn, doors, here)
        await listener.close()


async def test_a_model_is_pulled_listed_shown_loaded_pinned_and_removed(home: Home) -> None:
    pulled = await home.run("pull", f"{REPO}:Q4_K_M", "--name", "demo")
    assert (pulled.code, pulled.err) == (0, "")
    assert "done 100% of" in pulled.out
    assert pulled.out.endswith("demo is in the store. See `picluster ls`.\n")
    assert "on disk" in (await home.run("ls")).out
    assert (await home.run("ps")).out.startswith("No model is loaded")
    assert (await home.run("load", "demo")).out == "demo is ready.\n"
    assert (await home.run("alias", "demo", "gpt-4o-mini")).out == "demo is also gpt-4o-mini.\n"
    assert "10m" in (await home.run("ps")).out
    assert (await home.run("pin", "demo")).code == 0
    assert "stays" in (await home.run("ps")).out
    listed = json.loads((await home.run("ls", "--json")).out)
    assert [(one["model"]["name"], one["model"]["pinned"], one["state"]) for one in listed] == [("demo", True, "ready")]
    shown = (await home.run("show", "gpt-4o-mini")).out
    assert SHA256 in shown
    assert "architecture   llama" in shown
    assert (await home.run("unpin", "demo")).code == 0
    assert (await home.run("unload", "demo")).out == "demo is unloaded.\n"
    assert (await home.run("unload", "demo")).out == "demo was not loaded.\n"
    assert (await home.run("rm", "demo")).out.startswith("demo is gone")
    assert (await home.run("ls")).out.startswith("No models here")


async def test_another_node_is_asked_by_its_name(home: Home) -> None:
    assert (await home.run("pull", REPO, "--node", "pi-2")).code == 0
    assert not home.library.list()
    assert [entry.model.name for entry in home.other.list()] == [NAME]
    assert NAME in (await home.run("ls", "--node", node(2))).out
    gone = await home.run("ls", "--node", "pi-9")
    assert (gone.code, "There are: pi-1, pi-2" in gone.err) == (1, True)
    file = await home.run("pull", str(DEMO), "--node", "pi-2")
    assert "comes over the LAN" in file.err


async def test_what_stops_a_pull_is_told_with_why_and_a_way_out(home: Home) -> None:
    home.hub.corrupt.add(FILE)
    bad = await home.run("pull", REPO)
    assert bad.code == 1
    assert "error: what was fetched is not what was promised" in bad.err
    assert "fix:   Pull it again." in bad.err
    home.library.store._free = lambda _: HEADROOM_BYTES
    full = await home.run("pull", REPO)
    assert "stay free for the ledger" in full.err
    for words in (("pull", "gpt-9"), ("show", "gpt-9"), ("rm", "gpt-9"), ("load", "gpt-9"), ("pull", "./none.gguf")):
        result = await home.run(*words)
        assert (result.code, result.out.removeprefix("resolving\n")) == (1, "")
        assert result.err.startswith("error: ")


async def test_without_a_model_it_proposes_what_suits_the_board(home: Home) -> None:
    proposed = await home.run("pull")
    assert proposed.code == 0
    assert "smollm2:360m" in proposed.out
    assert "picluster pull " in proposed.out


async def test_a_file_is_taken_by_its_path_or_sent_where_the_daemon_may_not_read_it(home: Home, tmp_path: Path) -> None:
    taken = await home.run("pull", str(DEMO))
    assert (taken.code, taken.out.startswith("triage-demo: ")) == (0, True)
    sent = await send(Target(Path(home.socket)), DEMO, "")
    assert sent["sha256"] == SHA256
    other = tmp_path / "not-a-model.gguf"
    other.write_bytes(b"\x80\x04 a pickle")
    refused = await home.run("pull", str(other))
    assert "is not a GGUF file" in refused.err


async def test_a_pull_that_is_stopped_by_hand_goes_on_where_it_was(home: Home) -> None:
    home.library.store.partial(SHA256).write_bytes(BODY[:1000])
    home.cdn.faults.append(Fault("hang"))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "piclusterd.cli.main", "--socket", home.socket, "pull", REPO,
        stdout=asyncio.subprocess.PIPE, env=environment(PYTHONUNBUFFERED="1"),
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(30):
        while b"downloading" not in await child.stdout.readline():
            pass
        running = home.library._pulls[REPO, ""].task
        assert running is not None
        child.send_signal(signal.SIGINT)
        assert await child.wait() == 130
        await asyncio.wait([running])
    home.cdn.faults.clear()
    assert (await home.run("pull", REPO)).code == 0
    assert home.hub.served_bytes == len(BODY) - 1000


async def test_on_a_terminal_a_pull_is_a_bar(home: Home) -> None:
    ours, theirs = os.openpty()
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "piclusterd.cli.main", "--socket", home.socket, "pull", REPO,
            stdout=theirs, stderr=theirs, env=environment(TERM="xterm-256color", COLUMNS="120"),
        )  # fmt: skip
        async with asyncio.timeout(LIMIT_S):
            assert await child.wait() == 0
        drawn = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert "1.7/1.7 MB" in drawn
    assert "━" in drawn
    assert "is in the store" in drawn


async def test_the_doors_of_models_are_the_owners_alone(home: Home) -> None:
    async with serving(home.doors) as client:
        for path in ("/admin/models", "/admin/models/file"):
            assert (await client.post(path, json={"what": "list"})).status == 403


async def test_clients_pull_what_the_owner_allows_and_see_what_a_file_says_of_itself(home: Home) -> None:
    known = catalogue.catalogue()[0]
    home.hub.files[known.repo] = {known.file: BODY}
    assert home.stock.client_pull is not None
    steps = [step async for step in home.stock.client_pull(known.name)]
    assert steps[0] == {"status": "resolving"}
    assert steps[-1] == {"status": "success"}
    assert any(step.get("digest") == f"sha256:{SHA256}" and step["total"] == len(BODY) for step in steps)
    with pytest.raises(Refused, match="not in the catalogue"):
        await anext(home.stock.client_pull(REPO))
    card = await home.stock.card(Card(known.name))
    assert (card.size, card.sha256, card.family) == (len(BODY), SHA256, "llama")
    assert card.modified > 0
    assert await home.stock.card(Card("elsewhere")) == Card("elsewhere")
