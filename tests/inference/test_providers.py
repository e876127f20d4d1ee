"""Chats that no node can answer, by real HTTP to the doubles of three providers, with each of their faults."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from piclusterd.config import Provider as Table
from piclusterd.demo.doubles import Double, Fault, FaultKind
from piclusterd.demo.huggingface_double import HuggingFaceDouble
from piclusterd.demo.workers_ai_double import MODEL as CF_MODEL
from piclusterd.demo.workers_ai_double import WorkersAIDouble
from piclusterd.errors import NotFound, Overloaded, PiclusterError, Unavailable
from piclusterd.events import Choice
from piclusterd.ids import NodeId
from piclusterd.inference.answering import Item
from piclusterd.inference.openai_body import ChatBody, chat_request, parse
from piclusterd.inference.protocol import (
    Classified,
    ClassifyRequest,
    Delta,
    Done,
    Embedded,
    EmbedRequest,
    Field,
    GenerateRequest,
)
from piclusterd.inference.providers import Fallback, made
from piclusterd.inference.serving import Started
from piclusterd.inference.spending import Spending
from piclusterd.integrations import openai_compatible

HF_MODEL = "Qwen/Qwen2.5-7B-Instruct"
NOON = 20_000 * 86_400 + 43_200.0


class Nodes:
    """The cluster: `fault` is what it says; "" answers, "half" breaks off."""

    def __init__(self, fault: PiclusterError | str) -> None:
        self.fault = fault

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        if isinstance(self.fault, PiclusterError):
            raise self.fault
        yield Started(Choice(NodeId("1" * 16), "pi-1", "small", "idle"))
        yield Delta(0, "from home", 2)
        if self.fault == "half":
            raise Unavailable("pi-1 stopped in the middle of its answer")
        yield Done(0, "stop", 3, 2)

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        raise Unavailable("nobody embeds")

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        raise Unavailable("nobody classifies")


class Rig:
    def __init__(self, fallback: Fallback, nodes: Nodes, hf: HuggingFaceDouble, cf: WorkersAIDouble, wall: list[float]):
        self.fallback, self.nodes, self.hf, self.cf, self.wall = fallback, nodes, hf, cf, wall

    async def ask(self, request: GenerateRequest | None = None) -> tuple[str, str, Done]:
        """Who answered, what, and the end."""
        who, text = "", ""
        async for item in self.fallback.generate(request or chat()):
            match item:
                case Started(choice=choice):
                    who = choice.name
                case Delta():
                    text += item.text
                case Done():
                    return who, text, item
        raise AssertionError("an answer ends with Done")

    def state(self, name: str) -> dict[str, Any]:
        return next(one for one in self.fallback.told() if one["name"] == name)


def chat(text: str = "How urgent?", **body: Any) -> GenerateRequest:
    told = {"model": "gone", "messages": [{"role": "user", "content": text}], "max_tokens": 9, **body}
    return chat_request(parse(told, ChatBody))


@asynccontextmanager
async def rig(
    fault: PiclusterError | str = "", outside: bool = True, kept: Path | None = None, **limits: Any
) -> AsyncIterator[Rig]:
    """Workers AI first, then HuggingFace; `fault`: the nodes'; `kept`: the file of what was used."""
    wall, nodes = [NOON], Nodes(fault or NotFound("nobody serves it"))
    async with (
        HuggingFaceDouble(answer=lambda _: "P1 says HF") as hf,
        WorkersAIDouble(answer=lambda _: "P2 says CF") as cf,
    ):
        tables = (
            Table("cf", "workers-ai", CF_MODEL, f"{cf.account_url}/ai/v1", key_file="cf", timeout_s=2.0, **limits),
            Table("hf", "huggingface", HF_MODEL, f"{hf.url}/v1", key_file="hf", timeout_s=2.0),
        )
        keys = {"cf": cf.key, "hf": hf.key}
        fallback = Fallback(nodes, made(tables, lambda file: (keys[file],)), outside, lambda: wall[0], Spending(kept))
        try:
            yield Rig(fallback, nodes, hf, cf, wall)
        finally:
            await fallback.close()
            assert [*hf.violations, *cf.violations] == []


async def test_nodes_that_can_answer_are_not_helped() -> None:
    async with rig("home") as at:
        assert (await at.ask())[:2] == ("pi-1", "from home")
        assert at.cf.requests == at.hf.requests == 0


@pytest.mark.parametrize(
    "fault", [NotFound("no such model"), Unavailable("all are away"), Overloaded("full", retry_after_s=60)]
)
async def test_the_first_provider_answers_in_their_place_and_is_named(fault: PiclusterError) -> None:
    async with rig(fault) as at:
        who, text, done = await at.ask()
        assert (who, text, done.prompt_tokens, done.completion_tokens) == ("cf", "P2 says CF", 1000, 200)
        told = at.state("cf")
        assert told["today"] == {"requests": 1, "tokens": 1200, "neurons": pytest.approx(11.1, abs=0.1)}


async def test_a_short_queue_is_waited_for_and_nothing_begun_is_taken_elsewhere() -> None:
    for fault, kind in ((Overloaded("full", retry_after_s=2), Overloaded), ("half", Unavailable)):
        async with rig(fault) as at:
            with pytest.raises(kind):
                await at.ask()
            assert at.cf.requests == 0


async def test_nothing_leaves_the_house_that_the_configuration_keeps_there() -> None:
    async with rig(outside=False) as at:
        with pytest.raises(NotFound, match="nobody serves it"):
            await at.ask()
        assert at.cf.requests == at.hf.requests == 0
        assert [one["allowed"] for one in at.fallback.told()] == [False, False]


UNSUPPORTED: list[Callable[[], GenerateRequest]] = [
    lambda: chat(guided_choice=["a", "b"]),
    lambda: chat(logit_bias={"7": 1}),
    lambda: chat(logprobs=True),
    lambda: GenerateRequest("gone", prompt="Title:"),
    lambda: GenerateRequest("gone", prompt="Title:", choices=(Field("", ("a",)),)),
]


@pytest.mark.parametrize("request_", UNSUPPORTED)
async def test_what_only_our_engine_can_do_is_asked_of_nobody_else(request_: Callable[[], GenerateRequest]) -> None:
    async with rig() as at:
        with pytest.raises(NotFound):
            await at.ask(request_())
        with pytest.raises(Unavailable):
            await at.fallback.embed(EmbedRequest("gone", ("a",)))
        with pytest.raises(Unavailable):
            await at.fallback.classify(ClassifyRequest("gone", ("a",)))
        assert at.cf.requests == at.hf.requests == 0


@pytest.mark.parametrize(
    ("kind", "state", "waits_s"),
    [
        ("ratelimited", "waits", 5),
        ("spent", "spent", 43_200),
        ("internal", "ready", 0),
        ("unavailable", "ready", 0),
        ("hang", "ready", 0),
        ("malformed", "ready", 0),
        ("oversized", "ready", 0),
        ("lost", "ready", 0),
    ],
)
async def test_each_fault_is_passed_over_to_the_next_and_judged_by_its_kind(
    kind: FaultKind, state: str, waits_s: int
) -> None:
    async with rig() as at:
        at.cf.faults.append(Fault(kind, 30))
        assert (await at.ask())[:2] == ("hf", "P1 says HF")
        told = at.state("cf")
        assert (told["state"], told["waits_s"]) == (state, waits_s)
        assert bool(told["why"])
        who, _, _ = await at.ask()
        assert who == ("cf" if not waits_s else "hf")


async def test_a_busy_provider_is_asked_again_after_its_time_and_a_spent_one_the_next_day() -> None:
    async with rig() as at:
        at.cf.faults.append(Fault("ratelimited", 30))
        assert (await at.ask())[0] == "hf"
        at.wall[0] += 5
        assert (await at.ask())[0] == "cf"
        at.hf.faults.append(Fault("ratelimited", 40))
        at.cf.faults.append(Fault("spent"))
        with pytest.raises(NotFound):
            await at.ask()
        assert at.state("hf")["waits_s"] == 40
        at.wall[0] += 3600
        assert (await at.ask())[0] == "hf"
        at.wall[0] += 43_200
        assert (await at.ask())[0] == "cf"


async def test_credits_that_are_used_up_at_huggingface_are_no_reason_to_ask_soon() -> None:
    async with rig() as at:
        at.cf.faults.extend([Fault("internal")] * 2)
        at.hf.faults.append(Fault("spent"))
        with pytest.raises(NotFound):
            await at.ask()
        assert at.state("hf")["state"] == "spent"


async def test_a_provider_that_fails_in_a_row_is_left_alone() -> None:
    async with rig() as at:
        at.cf.faults.extend([Fault("internal")] * 3)
        for _ in range(5):
            assert (await at.ask())[0] == "hf"
        assert at.cf.requests == 3
        assert at.state("cf")["state"] == "left alone"
        at.wall[0] += 5
        assert (await at.ask())[0] == "cf"


async def test_an_answer_that_breaks_off_is_a_fault_the_client_sees() -> None:
    async with rig() as at:
        at.cf.faults.append(Fault("partial"))
        with pytest.raises(Unavailable, match="cf stopped in the middle"):
            await at.ask()


async def test_a_workflow_is_answered_by_the_provider_that_its_owner_named_and_by_no_other() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    async with rig(outside=False, requests_per_day=1) as at:
        answer = await at.fallback.complete_at("hf", body)
        assert answer == {"text": "P1 says HF", "model": HF_MODEL, "node": "hf", "name": "hf"}
        assert at.cf.requests == 0
        with pytest.raises(NotFound, match="no provider 'other'"):
            await at.fallback.complete_at("other", body)
        at.hf.faults.append(Fault("internal"))
        with pytest.raises(Unavailable, match="hf did not answer"):
            await at.fallback.complete_at("hf", body)
        await at.fallback.complete_at("cf", body)
        with pytest.raises(Unavailable, match="left alone"):
            await at.fallback.complete_at("cf", body)


async def test_the_days_budget_is_kept() -> None:
    async with rig(requests_per_day=2) as at:
        assert [(await at.ask())[0] for _ in range(3)] == ["cf", "cf", "hf"]
    async with rig(neurons_per_day=20) as at:
        assert [(await at.ask())[0] for _ in range(3)] == ["cf", "cf", "hf"]


async def test_a_refused_request_says_nothing_of_the_provider() -> None:
    async with rig() as at:
        at.cf.answer = lambda _: (_ for _ in ()).throw(at.cf.wrong(400, "too odd"))
        assert (await at.ask())[0] == "hf"
        assert at.state("cf")["state"] == "ready"
        assert at.state("cf")["why"] == ""
        at.cf.violations.clear()


async def test_a_key_that_is_refused_is_told_and_not_tried_at_each_request() -> None:
    async with rig() as at:
        at.cf.key = "changed"
        assert (await at.ask())[0] == "hf"
        assert "key is refused" in str(at.state("cf")["why"])
        assert (await at.ask())[0] == "hf"
        assert at.cf.requests == 1
        at.cf.violations.clear()


async def test_names_are_stood_in_for_by_pattern() -> None:
    async with rig(models=("gpt-*",)) as at:
        assert (await at.ask())[0] == "hf"
        assert (await at.ask(chat(model="gpt-5")))[0] == "cf"


# a box in the house --------------------------------------------------------------------------------------------------
class Box(Double):
    """A llama-server: no key, streams what it is told, keeps what it was asked."""

    def __init__(self, *events: str) -> None:
        super().__init__("")
        self.events, self.asked = events, dict[str, Any]()

    def check(self, request: web.Request) -> None:
        assert "Authorization" not in request.headers

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._chat)]

    async def _chat(self, request: web.Request) -> web.Response:
        self.asked = await request.json()
        return web.Response(body="".join(f"{line}\n\n" for line in self.events), content_type="text/event-stream")


def event(**delta: Any) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


@asynccontextmanager
async def box(*events: str) -> AsyncIterator[tuple[Rig, Box]]:
    async with Box(*events) as there:
        table = Table("box", "openai", "big", f"{there.url}/v1", at_home=True, timeout_s=5.0)
        nodes = Nodes(Unavailable("all are away"))
        fallback = Fallback(nodes, made((table,), lambda _: ()), False, lambda: NOON)
        try:
            yield Rig(fallback, nodes, HuggingFaceDouble(), WorkersAIDouble(), [NOON]), there
        finally:
            await fallback.close()


async def test_a_box_in_the_house_is_asked_for_all_that_was_asked_of_us() -> None:
    tool = {"type": "function", "function": {"name": "on", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "on", "arguments": '{"lamp": 1}'}}
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Light"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "ok"},
        ],
        tools=[tool], tool_choice={"type": "function", "function": {"name": "on"}}, parallel_tool_calls=False,
        temperature=0.5, seed=7, stop=["x"], presence_penalty=1.0,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    async with box(": a comment", event(role="assistant", content=""), event(content="ok"), "data: [DONE]") as (
        at,
        there,
    ):
        assert (await at.ask(asked))[:2] == ("box", "ok")
    told = there.asked
    assert (told["model"], told["stream"], told["max_tokens"], told["seed"], told["stop"]) == ("big", True, 9, 7, ["x"])
    assert (told["temperature"], told["presence_penalty"], told["tools"]) == (0.5, 1.0, [tool])
    assert told["tool_choice"] == {"type": "function", "function": {"name": "on"}}
    assert told["messages"][0]["role"] == "system"
    assert (told["messages"][2]["tool_calls"], told["messages"][3]["tool_call_id"]) == ([call], "c1")
    assert told["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert told["parallel_tool_calls"] is False


async def test_tool_calls_in_pieces_are_put_together() -> None:
    pieces = [
        event(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "on", "arguments": ""}}]),
        event(tool_calls=[{"index": 0, "function": {"arguments": '{"lamp"'}}]),
        event(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
        event(tool_calls=[{"index": 1, "function": {"name": "off"}}]),
        'data: {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}',
        "data: [DONE]",
    ]
    async with box(*pieces) as (at, _):
        _, _, done = await at.ask()
    assert [(call.id, call.name, call.arguments) for call in done.tool_calls] == [
        ("c1", "on", '{"lamp": 1}'), ("call_1", "off", "{}"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "events",
    [
        (),
        ("data: [DONE]",),
        ("data: {",),
        ("data: []",),
        ('data: {"error": {"message": "out of memory"}}',),
        ('data: {"choices": 7}',),
        (event(tool_calls=[{"index": -1}]),),
        ("data: " + "x" * 300_000,),
    ],
)
async def test_what_is_no_answer_is_the_providers_fault(events: tuple[str, ...]) -> None:
    async with box(*events) as (at, _):
        with pytest.raises(Unavailable, match="all are away"):
            await at.ask()
        assert at.state("box")["why"]


async def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_compatible, "ANSWER_BYTES_MAX", 1000)
    async with box(*[event(content="x")] * 100) as (at, _):
        with pytest.raises(Unavailable, match="does not end"):
            await at.ask()


async def test_a_restart_does_not_begin_the_days_budget_anew(tmp_path: Path) -> None:
    kept = tmp_path / "spending.json"
    async with rig(kept=kept, requests_per_day=2) as first:
        assert (await first.ask())[0] == "cf"
    async with rig(kept=kept, requests_per_day=2) as second:
        assert second.state("cf")["today"]["requests"] == 1
        assert [(await second.ask())[0], (await second.ask())[0]] == ["cf", "hf"]
    async with rig(kept=kept, requests_per_day=2) as third:
        assert third.state("cf")["state"] == "spent"
        third.wall[0] += 86_400
        assert (await third.ask())[0] == "cf"


async def test_a_file_of_use_that_is_torn_or_out_of_reach_stops_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn = tmp_path / "spending.json"
    torn.write_bytes(b'{"cf": {"day"')
    async with rig(kept=torn, requests_per_day=2) as asked:
        assert (await asked.ask())[0] == "cf"
    assert "their budgets begin anew" in caplog.text
    async with rig(kept=tmp_path / "gone" / "spending.json", requests_per_day=2) as asked:
        assert [(await asked.ask())[0], (await asked.ask())[0]] == ["cf", "cf"]
    assert caplog.text.count("is not kept") == 1
