"""What Ollama's client asks of memory, on two nodes that load models from their stores: loads, unloads, keep_alive."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import ollama
import pytest
from aiohttp import web

from piclusterd.config import Inference
from piclusterd.config import Store as Settings
from piclusterd.errors import PiclusterError, UserError
from piclusterd.events import Choice, WhoServes
from piclusterd.ids import NodeId
from piclusterd.inference.echoes import Echoes
from piclusterd.inference.library import Library
from piclusterd.inference.placement import Placement
from piclusterd.inference.serving import Serving
from piclusterd.inference.splits import Splits
from piclusterd.stock import Stock
from piclusterd.views import MemberView, View
from piclusterd.web import ollama as api_of_ollama
from piclusterd.web.ollama_body import seconds
from piclusterd.wire import Facts, Member
from tests.inference.hub_rig import library_of
from tests.inference.rig import DEMO

from .house import view as picture

ME, PEER = NodeId("1" * 16), NodeId("2" * 16)
HELLO = [{"role": "user", "content": "Title: Crash on save"}]
FEW = {"num_predict": 2, "temperature": 0}
TEMPLATE_KEY = b"tokenizer.chat_template"
HOUR_S = 3600.0


@dataclass
class House:
    """Two nodes; the client speaks to the one that has no model."""

    client: ollama.AsyncClient
    near: Library
    far: Library

    def in_memory(self) -> list[str]:
        return [one.name for one in (*self.near.loaded(), *self.far.loaded())]

    async def expires_s(self) -> float:
        [model] = (await self.client.ps()).models
        assert model.expires_at is not None
        return (model.expires_at - datetime.now(UTC)).total_seconds()


@asynccontextmanager
async def house(tmp_path: Path) -> AsyncIterator[House]:
    settings = Settings(context=512, slots=1, keep_alive_minutes=10)
    async with AsyncExitStack() as stack:
        libraries = {
            node: await stack.enter_async_context(library_of(tmp_path / node, settings=settings)) for node in (ME, PEER)
        }
        servings: dict[NodeId, Serving] = {}
        stocks: dict[NodeId, Stock] = {}

        def members() -> list[Member]:
            told = {node: library._pool.facts() for node, library in libraries.items()}
            return [Member(node, 0, "alive", Facts(name=node, models=models)) for node, models in told.items()]

        async def view() -> View:
            alive = [MemberView(one.node, "alive", 1.0, 1.0, one.facts, True, "") for one in members()]
            return picture(*alive)

        def move_in(me: NodeId) -> None:
            async def who(asked: WhoServes) -> Choice:
                placement = Placement(me)
                placement.members_changed(members(), tuple(libraries))
                choice = placement.choose(asked, 0.0)
                if isinstance(choice, PiclusterError):
                    raise choice
                return choice

            def relay(peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
                return servings[peer].answer_peer(me, name, body)

            def request(peer: NodeId, name: str, body: bytes, silence_s: float) -> AsyncGenerator[bytes, None]:
                return stocks[peer].serve_peer(body)

            pool = libraries[me]._pool
            servings[me] = Serving(me, pool, who, relay, patience_s=0.0, echoes=Echoes(pool, 2**20))
            splits = Splits(me, me, Inference(), libraries[me], pool, request, dict)
            stocks[me] = Stock(me, libraries[me], request, view, splits)

        for node in libraries:
            move_in(node)

        app = web.Application()
        app.add_routes(api_of_ollama.routes(servings[ME], stocks[ME].cards, stocks[ME].running))
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = ollama.AsyncClient(f"http://127.0.0.1:{runner.addresses[0][1]}")
        stack.push_async_callback(client._client.aclose)
        yield House(client, libraries[ME], libraries[PEER])


async def test_an_empty_request_loads_the_model_on_the_node_that_has_it(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        await at.far.take_file(DEMO, "one")
        assert (await at.client.ps()).models == []
        assert (await at.client.generate("one")).done_reason == "load"
        assert at.in_memory() == ["one"]
        assert 500 < await at.expires_s() <= 600
        assert (await at.client.chat("one", [], keep_alive="1h")).done_reason == "load"
        assert 3500 < await at.expires_s() <= HOUR_S
        assert (await at.client.generate("one", keep_alive=0)).done_reason == "unload"
        assert at.in_memory() == []
        assert (await at.client.ps()).models == []


async def test_a_model_that_does_not_load_is_not_said_to(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        await at.far.take_file(DEMO, "one")
        at.far.loads._memory = lambda: (2**20, 2**20)
        with pytest.raises(ollama.ResponseError) as caught:
            await at.client.generate("one")
        assert caught.value.status_code == 503
        assert at.in_memory() == []


async def test_it_leaves_the_memory_of_every_node_and_stays_where_its_owner_pinned_it(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        for library in (at.near, at.far):
            await library.take_file(DEMO, "one")
            await library.load("one")
        assert (await at.client.chat("one", [], keep_alive="0s")).done_reason == "unload"
        assert at.in_memory() == []
        await at.near.pin("one", True)
        for library in (at.near, at.far):
            await library.load("one")
        with pytest.raises(ollama.ResponseError, match="stays in memory") as caught:
            await at.client.generate("one", keep_alive=0)
        assert caught.value.status_code == 403
        assert at.far.loaded() == ()
        assert await at.expires_s() > 10 * 365 * 86400


async def test_every_answer_says_how_long_its_model_stays(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        await at.far.take_file(DEMO, "one")
        await at.client.chat("one", HELLO, options=FEW, keep_alive="1h30m")
        assert 5300 < await at.expires_s() <= 5400
        await at.client.generate("one", "Title:", options=FEW)
        assert await at.expires_s() > 5300, "who does not say changes nothing"
        await at.client.embed("one", "printer on fire", keep_alive=60)
        assert await at.expires_s() <= 60
        await at.client.embed("one", "printer on fire", keep_alive=120)
        assert 60 < await at.expires_s() <= 120, "an answer that is remembered counts too"
        async for _ in await at.client.chat("one", HELLO, options=FEW, stream=True, keep_alive=-1):
            pass
        assert await at.expires_s() > 10 * 365 * 86400
        await at.client.embeddings("one", "printer on fire", keep_alive="5m")
        assert await at.expires_s() <= 300
        await at.client.embed("one", [], keep_alive="1h")
        assert 3500 < await at.expires_s() <= 3600, "nothing to embed: the model is kept loaded"
        await at.client.embeddings("one", "", keep_alive="5m")
        assert await at.expires_s() <= 300
        with pytest.raises(ollama.ResponseError, match="keep_alive"):
            await at.client.chat("one", HELLO, keep_alive="soon")


async def test_zero_unloads_when_the_answer_is_whole_and_a_model_that_is_asked_at_once_is_loaded_again(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as at:
        await at.near.take_file(DEMO, "one")
        ended = await at.client.chat("one", HELLO, options=FEW, keep_alive=0)
        assert ended.eval_count == 2
        assert at.near.loads._ending.is_set(), "whoever looks after idle models need not wait"
        assert await at.expires_s() == pytest.approx(0.0, abs=5.0)
        await at.near.loads.look()
        assert at.in_memory() == []
        assert (await at.client.chat("one", HELLO, options=FEW)).eval_count == 2


async def test_unloading_lets_a_running_answer_end(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        await at.near.take_file(DEMO, "one")
        stream = await at.client.chat("one", HELLO, options={"num_predict": 60, "temperature": 0}, stream=True)
        async with aclosing(stream) as parts:  # type: ignore[type-var]
            first = await anext(parts)
            await at.client.generate("one", keep_alive=0)
            rest = [part async for part in parts]
        assert not first.done
        assert rest[-1].done_reason in ("stop", "length")
        await at.near.loads.look()
        assert at.in_memory() == []


def with_tools(target: Path) -> Path:
    """The demo model with a template that names tools: longer by a multiple of the file's alignment."""
    body, more = DEMO.read_bytes(), b"{#- tools: {{ tools | tojson }}-#}".ljust(64)
    at = body.index(TEMPLATE_KEY) + len(TEMPLATE_KEY) + 4
    length = int.from_bytes(body[at : at + 8], "little")
    target.write_bytes(body[:at] + (length + len(more)).to_bytes(8, "little") + more + body[at + 8 :])
    return target


async def test_tools_are_offered_by_models_whose_template_takes_them_loaded_or_not(tmp_path: Path) -> None:
    async with house(tmp_path) as at:
        await at.far.take_file(with_tools(tmp_path / "tools.gguf"), "able")
        await at.far.take_file(DEMO, "plain")
        for _ in range(2):
            assert "tools" in ((await at.client.show("able")).capabilities or [])
            assert "tools" not in ((await at.client.show("plain")).capabilities or [])
            for name in ("able", "plain"):
                await at.client.generate(name)
        assert len(at.in_memory()) == 2


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        (None, None), (0, 0.0), (90, 90.0), (1.5, 1.5), (-1, -1.0), ("5m", 300.0), ("1h30m", 5400.0), ("-1s", -1.0),
        ("0", 0.0), ("0s", 0.0), ("500ms", 0.5), ("1.5h", 5400.0), ("24h", 86400.0), ("-1", -1.0), ("300", 300.0),
    ],
)  # fmt: skip
def test_durations_are_read_as_ollama_writes_them(told: int | float | str | None, meant: float | None) -> None:
    assert seconds(told) == meant


@pytest.mark.parametrize("told", ["", "soon", "5 minutes", "5d", "m", "1h-30m", "9" * 100, "nan", float("nan")])
def test_other_texts_are_no_durations(told: str | float) -> None:
    with pytest.raises(UserError):
        seconds(told)
