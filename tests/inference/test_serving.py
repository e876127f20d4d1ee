"""Several nodes in one process: each a pool and a Serving, joined by a relay that calls the other's handler."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
import pytest

from piclusterd.errors import NotFound, PiclusterError, Unavailable, UserError
from piclusterd.events import Choice, WhoServes
from piclusterd.ids import NodeId
from piclusterd.inference.calling import Calling
from piclusterd.inference.placement import Placement
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import (
    ChatMessage,
    Delta,
    Done,
    EmbedRequest,
    Failed,
    GenerateRequest,
    decode,
    encode,
)
from piclusterd.inference.serving import Serving, Started
from piclusterd.wire import Facts, Member, ModelFacts

from .rig import GREEDY, NAME, Changes, collected, pool_of, rest, spec

PI_1, PI_2, PI_3 = (NodeId(digit * 16) for digit in "123")
ASKED = msgspec.structs.replace(GREEDY, model=NAME)
FAST = ModelFacts(NAME, embeddings=True, prefill_tps=9999.0, decode_tps=9999.0)
"""What a node claims that is chosen first."""
SLOW = ModelFacts(NAME, embeddings=True, prefill_tps=1.0, decode_tps=1.0)


class Town:
    """The nodes there are, by what they claim to serve, and the way from each to each."""

    def __init__(self) -> None:
        self._claims: dict[NodeId, tuple[ModelFacts, ...]] = {}
        self._pools: dict[NodeId, Pool] = {}
        self._servings: dict[NodeId, Serving] = {}
        self.relayed: list[tuple[NodeId, str]] = []

    def move_in(
        self, me: NodeId, pool: Pool, claims: Sequence[ModelFacts] | None = None, patience_s: float = 0.0
    ) -> Serving:
        if claims is not None:
            self._claims[me] = tuple(claims)
        self._pools[me] = pool

        async def who(asked: WhoServes) -> Choice:
            placement = Placement(me)
            placement.members_changed(
                [Member(node, 0, "alive", Facts(name=f"pi-{node[0]}", models=m)) for node, m in self._told().items()],
                self._told(),
            )
            choice = placement.choose(asked, 0.0)
            if isinstance(choice, PiclusterError):
                raise choice
            return choice

        async def relay(peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
            self.relayed.append((peer, name))
            if peer not in self._servings:
                raise ConnectionResetError("no way there")
            async with aclosing(self._servings[peer].answer_peer(me, name, body)) as messages:
                async for message in messages:
                    yield message

        self._servings[me] = Serving(me, pool, who, relay, patience_s=patience_s)
        return self._servings[me]

    def _told(self) -> dict[NodeId, tuple[ModelFacts, ...]]:
        """What gossip says: what a pool says of itself, where it does not claim something else."""
        return {node: pool.facts() for node, pool in self._pools.items()} | self._claims

    def claim(self, node: NodeId, *models: ModelFacts) -> None:
        """A node that is not there, in gossip."""
        self._claims[node] = models


async def test_a_node_answers_itself_where_it_can() -> None:
    town = Town()
    async with pool_of([spec()]) as pool:
        serving = town.move_in(PI_1, pool)
        async with aclosing(serving.generate(ASKED)) as answer:
            items = [item async for item in answer]
    assert isinstance(items[0], Started)
    assert (items[0].choice.node, items[0].choice.name) == (PI_1, "pi-1")
    assert isinstance(items[-1], Done)
    assert town.relayed == []


async def test_a_node_without_the_model_relays_to_one_that_has_it() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        there, here = town.move_in(PI_2, full), town.move_in(PI_1, empty)
        assert (await collected(here.generate(ASKED)))[0] == (await collected(there.generate(ASKED)))[0] != ""
        choice, embedded = await here.embed(EmbedRequest(NAME, ("one", "two", "three")))
        _, local = await there.embed(EmbedRequest(NAME, ("one", "two", "three")))
    assert choice.node == PI_2
    assert embedded == local
    assert town.relayed == [(PI_2, "generate"), (PI_2, "embed")]


async def test_a_request_without_a_model_gets_the_only_one_there_is() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        town.move_in(PI_2, full)
        here = town.move_in(PI_1, empty)
        assert (await collected(here.generate(GREEDY)))[0]
        body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
        completed = await here.complete(body)
        assert completed == {"text": completed["text"], "model": NAME, "node": PI_2, "name": "pi-2"}
        assert completed["text"]


async def test_a_completion_under_a_schema_is_what_a_workflow_can_parse() -> None:
    town = Town()
    async with pool_of([spec()]) as pool:
        schema = {"type": "object", "properties": {"type": {"enum": ["bug", "chore"]}}, "required": ["type"]}
        completed = await town.move_in(PI_1, pool).complete(
            {
                "messages": [{"role": "user", "content": "hello"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}},
            }
        )
        assert json.loads(completed["text"])["type"] in ("bug", "chore")


async def test_nodes_that_fail_before_the_first_token_are_passed_over() -> None:
    town = Town()
    town.claim(PI_2, FAST)
    town.claim(PI_3, FAST)
    async with pool_of([spec()]) as pool:
        serving = town.move_in(PI_1, pool, [SLOW])
        assert (await collected(serving.generate(ASKED)))[0]
        assert (await serving.embed(EmbedRequest(NAME, ("x",))))[0].node == PI_1
    assert town.relayed == [(PI_2, "generate"), (PI_3, "generate"), (PI_2, "embed"), (PI_3, "embed")]


async def test_when_every_node_fails_the_newest_fault_is_told() -> None:
    town = Town()
    for digit in "23456":
        town.claim(NodeId(digit * 16), FAST)
    async with pool_of([]) as empty:
        serving = town.move_in(PI_1, empty)
        with pytest.raises(Unavailable, match="pi-4 cannot be reached"):
            await collected(serving.generate(ASKED))
    assert len(town.relayed) == 3


async def test_a_fault_of_the_request_is_not_tried_elsewhere() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        town.move_in(PI_2, full)
        town.claim(PI_3, ModelFacts(NAME, decode_tps=0.1, context=spec().context))
        here = town.move_in(PI_1, empty)
        long = msgspec.structs.replace(ASKED, messages=(ChatMessage("user", "word " * 6000),))
        with pytest.raises(UserError, match="tokens") as caught:
            await collected(here.generate(long))
        assert caught.value.param == "messages"
        with pytest.raises(NotFound, match=NAME):
            await collected(here.generate(msgspec.structs.replace(ASKED, model="gpt-5")))
    assert town.relayed == [(PI_2, "generate")]


async def test_a_relayed_request_is_not_relayed_again_but_taken_elsewhere_by_who_was_asked() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        town.move_in(PI_3, full)
        town.move_in(PI_2, empty, claims=[FAST])  # it says it has the model, and has not
        here = town.move_in(PI_1, empty)
        assert (await collected(here.generate(ASKED)))[0]
    assert town.relayed == [(PI_2, "generate"), (PI_3, "generate")]


async def test_closing_a_relayed_answer_frees_the_slot_over_there() -> None:
    town = Town()
    async with pool_of([spec(slots=1)]) as full, pool_of([]) as empty:
        town.move_in(PI_2, full)
        here = town.move_in(PI_1, empty)
        async with aclosing(here.generate(msgspec.structs.replace(ASKED, max_tokens=0, temperature=1.0))) as answer:
            assert isinstance(await anext(answer), Started)
            assert full.facts()[0].busy == 1
        assert full.facts()[0].busy == 0
        assert (await collected(here.generate(ASKED)))[0]


LONG = GenerateRequest(NAME, prompt="x", json_schema='{"type": "string", "minLength": 300}', temperature=0.0)
"""An answer that takes its time, and says the same wherever it is given."""


async def begun(answer: AsyncGenerator[Started | Delta | Done, None], deltas: int = 5) -> str:
    """The text of the first `deltas` of `answer`."""
    text = ""
    while deltas:
        item = await anext(answer)
        if isinstance(item, Delta):
            text += item.text
            deltas -= 1
    return text


async def test_an_answer_whose_node_is_gone_ends_with_an_error_where_nobody_else_can_go_on() -> None:
    town = Town()
    async with pool_of([spec()]) as full, pool_of([]) as empty:
        town.move_in(PI_2, full)
        here = town.move_in(PI_1, empty)
        async with aclosing(here.generate(LONG)) as answer:
            await begun(answer, 1)
            closing = asyncio.create_task(full.close())
            with pytest.raises(Unavailable):
                await rest(answer)
            await closing
    assert town.relayed == [(PI_2, "generate")]


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0, "seed": 5}])
async def test_an_answer_goes_on_on_another_node_as_if_it_had_not_broken_off(changes: dict[str, float]) -> None:
    town, asked = Town(), msgspec.structs.replace(LONG, **changes)
    async with pool_of([spec()]) as first, pool_of([spec()]) as second, pool_of([]) as empty:
        whole, end = await collected(town.move_in(PI_2, first).generate(asked))
        here = town.move_in(PI_1, empty)
        async with aclosing(here.generate(asked)) as answer:
            text = await begun(answer)
            town.move_in(PI_3, second)
            closing = asyncio.create_task(first.close())
            more, ended = await collected(answer)
            await closing
    assert text + more == whole
    assert (ended.reason, ended.prompt_tokens, ended.completion_tokens) == (
        end.reason, end.prompt_tokens, end.completion_tokens,
    )  # fmt: skip
    assert town.relayed == [(PI_2, "generate"), (PI_3, "generate")]


async def test_a_tool_call_goes_on_on_another_node_in_the_midst_of_its_arguments() -> None:
    parameters = {"type": "object", "properties": {"text": {"type": "string", "minLength": 200}}, "required": ["text"]}
    tool = {"type": "function", "function": {"name": "say", "parameters": parameters}}
    asked = GenerateRequest(NAME, prompt="x", temperature=0.0, tools=json.dumps([tool]), tool_choice="required")
    town, calling = Town(), Calling()
    async with pool_of([spec()]) as first, pool_of([spec()]) as second, pool_of([]) as empty:
        _, end = await collected(town.move_in(PI_2, first).generate(asked))
        here = town.move_in(PI_1, empty)
        async with aclosing(here.generate(asked)) as answer:
            while not (calling.calls and len(calling.calls[0].arguments) > 30):
                item = await anext(answer)
                calling.add(item.calls if isinstance(item, Delta) else ())
            town.move_in(PI_3, second)
            closing = asyncio.create_task(first.close())
            ids = {call.id for call in calling.calls}
            async for item in answer:
                if isinstance(item, Delta):
                    calling.add(item.calls)
                    assert not item.text
                elif isinstance(item, Done):
                    assert calling.rest(item) == []
                    assert item.tool_calls == calling.calls
            await closing
    assert calling.calls[0].arguments == end.tool_calls[0].arguments
    assert {call.id for call in calling.calls} == ids
    assert town.relayed == [(PI_2, "generate"), (PI_3, "generate")]


async def test_an_answer_waits_for_the_only_child_to_be_started_again_and_goes_on() -> None:
    town, changes = Town(), Changes()
    async with pool_of([spec()], changes=changes) as pool:
        serving = town.move_in(PI_1, pool, patience_s=60.0)
        whole, _ = await collected(serving.generate(LONG))
        async with aclosing(serving.generate(LONG)) as answer:
            text = await begun(answer)
            pid = pool.pid(NAME)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            more, _ = await collected(answer)
        assert pool.pid(NAME) not in (None, pid)
    assert text + more == whole


async def test_a_node_that_stops_gives_its_answers_to_those_who_can_go_on() -> None:
    town = Town()
    async with pool_of([spec()]) as leaving, pool_of([spec()]) as staying:
        there, here = town.move_in(PI_2, staying), town.move_in(PI_1, leaving)
        whole, _ = await collected(here.generate(LONG))
        async with aclosing(here.generate(LONG)) as own, aclosing(there.generate(LONG)) as others:
            texts = [await begun(own), await begun(others)]
            await here.drain()
            assert leaving.facts() == ()
            ends = [await collected(own), await collected(others)]
    assert [text + more for text, (more, _) in zip(texts, ends, strict=True)] == [whole, whole]


async def test_a_node_that_stops_keeps_the_answers_that_nobody_else_can_give() -> None:
    town = Town()
    async with pool_of([spec()]) as leaving:
        here = town.move_in(PI_1, leaving)
        async with aclosing(here.generate(LONG)) as answer:
            await begun(answer)
            await here.drain()
            assert (await collected(answer))[1].reason in ("stop", "length")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("generate", b"junk"),
        ("embed", encode(GREEDY)),
        ("rm -rf", b""),
        ("generate", encode(EmbedRequest("m", ("x",)))),
    ],
)
async def test_junk_from_a_peer_is_answered_by_an_error(name: str, body: bytes) -> None:
    town = Town()
    async with pool_of([]) as empty:
        serving = town.move_in(PI_1, empty)
        messages = [message async for message in serving.answer_peer(PI_2, name, body)]
    frame = decode(messages[0], Failed)
    assert isinstance(frame, Failed)
    assert frame.status == 400
    assert len(messages) == 1
