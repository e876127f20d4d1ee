"""Keys of the API: what a line of the file grants, and what a holder may ask of this node and how often."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import pytest
from aiohttp import web

from piclusterd.errors import ConfigError, NotFound, Overloaded, Refused, UserError
from piclusterd.inference.protocol import ChatMessage, EmbedRequest, GenerateRequest
from piclusterd.web import key_file
from piclusterd.web.key_file import Grant, added, digest_of, mint, read, removed
from piclusterd.web.keys import RELOAD_S, Caller, Keyring, NoKey, caller
from piclusterd.web.metered import Metered
from tests.inference.rig import NAME, collected

from .house import Node, serving
from .test_openai import HELLO, running

KEY = mint()
WALL = 1_800_000_000.0


def line(key: str = KEY, **fields: Any) -> str:
    return Grant(digest_of(key.encode()), **{"name": "ha", **fields}).line()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# the file --------------------------------------------------------------------------------------------------------
def test_a_line_says_what_it_was_made_of() -> None:
    grant = Grant("a" * 64, "ha", ("small", "qwen*"), 60, 20_000, WALL)
    assert read([grant.line()]) == ((grant,), [])
    assert KEY not in line()


def test_a_line_that_is_no_digest_is_a_key_without_limits() -> None:
    (grant,), faults = read(["# comment", "", "hand-written"])
    assert (grant, faults) == (Grant(digest_of(b"hand-written"), "line-3"), [])


@pytest.mark.parametrize(
    "bad",
    [
        "sha256:beef name=x",
        line() + " admin=yes",
        line().replace("name=ha", "name=<b>"),
        line(requests_per_minute=1).replace("=1", "=many"),
        line(expires=WALL).replace("expires=2", "expires=x"),
        line(models=("a",)).replace("models=a", "models=" + "a," * 100),
    ],
    ids=["digest", "field", "name", "rate", "expiry", "models"],
)
def test_a_line_that_is_not_right_grants_nothing_and_is_told_without_the_key(bad: str) -> None:
    grants, faults = read([bad, line("other", name="second")])
    assert [grant.name for grant in grants] == ["second"]
    assert faults[0].startswith("line 1: ")
    assert digest_of(KEY.encode()) not in faults[0]


def test_there_are_only_so_many_keys() -> None:
    grants, faults = read([f"key-{number}" for number in range(key_file.KEYS_MAX + 1)])
    assert (len(grants), len(faults)) == (key_file.KEYS_MAX, 1)


def test_names_are_taken_once_and_keys_go_by_name() -> None:
    lines = added(["# head"], Grant("a" * 64, "one"))
    lines = added(lines, Grant("b" * 64, "two"))
    with pytest.raises(UserError, match="called one"):
        added(lines, Grant("c" * 64, "one"))
    with pytest.raises(UserError, match="no name"):
        added(lines, Grant("c" * 64, "no name"))
    assert removed(lines, "one") == ["# head", Grant("b" * 64, "two").line()]
    with pytest.raises(UserError, match="There are: one, two"):
        removed([*lines, "sha256:broken"], "three")


# who calls -------------------------------------------------------------------------------------------------------
async def test_a_key_is_known_by_its_digest_until_it_expires() -> None:
    wall = [WALL]
    keys = Keyring(lambda: [line(expires=WALL + 5)], wall=lambda: wall[0])
    assert (await keys.identify(f"Bearer {KEY}")).grant.name == "ha"
    for wrong in ("", "Bearer ", f"Basic {KEY}", f"Bearer {digest_of(KEY.encode())}", "Bearer \udcff"):
        with pytest.raises(NoKey):
            await keys.identify(wrong)
    with pytest.raises(Refused, match="join token"):
        await keys.identify("Bearer pcl1.a.b.c")
    wall[0] += 5
    with pytest.raises(NoKey, match="ha has expired"):
        await keys.identify(f"Bearer {KEY}")


async def test_the_file_is_read_again_and_what_is_left_of_a_minute_stays(caplog: pytest.LogCaptureFixture) -> None:
    clock, lines = Clock(), [line(requests_per_minute=1)]

    def load() -> list[str]:
        if not lines:
            raise ConfigError(["there is no file"])
        return list(lines)

    keys = Keyring(load, clock)
    (await keys.identify(f"Bearer {KEY}")).ask()
    lines.append(line("other", name="second"))
    with pytest.raises(NoKey):
        await keys.identify("Bearer other")
    clock.now += RELOAD_S
    await keys.identify("Bearer other")
    with pytest.raises(Overloaded):
        (await keys.identify(f"Bearer {KEY}")).ask()
    lines[0] = line(requests_per_minute=9)
    clock.now += RELOAD_S
    (await keys.identify(f"Bearer {KEY}")).ask()
    lines.clear()
    for _ in range(2):
        clock.now += RELOAD_S
        with pytest.raises(NoKey):
            await keys.identify(f"Bearer {KEY}")
    assert caplog.text.count("none is valid") == 1
    lines += ["sha256:broken"]
    clock.now += RELOAD_S
    with pytest.raises(NoKey):
        await keys.identify("Bearer sha256:broken")
    assert "gives no key" in caplog.text


def test_requests_come_back_over_the_minute() -> None:
    clock = Clock()
    who = Caller(Grant("", "ha", requests_per_minute=2), clock)
    who.ask()
    who.ask()
    with pytest.raises(Overloaded) as caught:
        who.ask()
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now += 30
    who.ask()
    clock.now += 3600
    who.ask()
    who.ask()
    with pytest.raises(Overloaded):
        who.ask()


def test_tokens_are_reserved_and_settled() -> None:
    clock = Clock()
    who = Caller(Grant("", "ha", tokens_per_minute=600), clock)
    who.reserve(500)
    with pytest.raises(Overloaded) as caught:
        who.reserve(200)
    assert caught.value.retry_after_s == pytest.approx(10)
    who.settle(-400)
    who.reserve(200)
    who.settle(900)  # it took more than there was: the next waits for all of it
    with pytest.raises(Overloaded) as caught:
        who.reserve(1)
    assert caught.value.retry_after_s > 60
    clock.now += 1000
    who.reserve(10_000)  # more than a minute has: let in when the minute is full


def test_a_key_without_limits_is_never_out() -> None:
    who = Caller(Grant("", "ha"), Clock())
    for _ in range(1000):
        who.ask()
        who.reserve(10**9)
        who.settle(10**9)
    who.check("anything")


def test_models_are_allowed_by_name_or_pattern() -> None:
    who = Caller(Grant("", "ha", ("small", "qwen*")), Clock())
    for model in ("small", "qwen2.5:1.5b"):
        who.check(model)
    for model in ("smaller", "", "Small"):
        with pytest.raises(Refused):
            who.check(model)


# through the doors -----------------------------------------------------------------------------------------------
async def ask(client: Any, path: str, key: str = KEY) -> tuple[int, Mapping[str, str], Any]:
    async with client.post(path, headers={"Authorization": f"Bearer {key}"}) as answer:
        return answer.status, answer.headers, await answer.json()


@pytest.mark.parametrize(("path", "shape"), [("/v1/x", dict), ("/api/x", str)])
async def test_each_api_refuses_in_its_own_shape(path: str, shape: type) -> None:
    seen: list[str] = []

    async def handler(_request: web.Request) -> web.Response:
        who = caller.get()
        assert who is not None
        seen.append(who.grant.name)
        return web.json_response({"error": {}})

    wall = [WALL]
    keys = Keyring(lambda: [line(requests_per_minute=2, expires=WALL + 1)], wall=lambda: wall[0])
    doors = Node().doors(keys=keys, extra_routes=[web.post(path, handler), web.get(path, handler)])
    async with serving(doors) as client:
        for _ in range(3):
            async with client.get(path, headers={"Authorization": f"Bearer {KEY}"}) as answer:
                assert answer.status == 200, "to look is not counted"
        assert [(await ask(client, path))[0] for _ in range(2)] == [200, 200]
        status, headers, told = await ask(client, path)
        assert (status, type(told["error"])) == (429, shape)
        assert 1 <= int(headers["Retry-After"]) <= 30
        status, headers, told = await ask(client, path, "wrong")
        assert (status, headers["WWW-Authenticate"], type(told["error"])) == (401, "Bearer", shape)
        wall[0] += 1
        status, _, told = await ask(client, path)
        assert (status, "has expired" in str(told)) == (401, True)
    assert seen == ["ha"] * 5
    assert caller.get() is None


async def test_models_and_tokens_are_limited_whatever_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    clock = Clock()
    async with running() as api:
        metered = Metered(api.serving)
        ask = GenerateRequest(NAME, (ChatMessage("user", HELLO[0]["content"] + ""),), max_tokens=8, temperature=0)  # type: ignore[operator]
        free, _ = await collected(metered.generate(ask))
        caller.set(who := Caller(Grant("", "ha", (NAME,), tokens_per_minute=1000), clock))
        text, done = await collected(metered.generate(ask))
        spent = done.prompt_tokens + done.completion_tokens
        assert text == free
        assert who._tokens is not None
        assert who._tokens.wait_s(1000 - spent, clock()) == 0
        assert who._tokens.wait_s(1001 - spent, clock()) > 0
        unnamed = GenerateRequest("", ask.messages, max_tokens=1)
        assert (await collected(metered.generate(unnamed)))[1].completion_tokens == 1
        choice, embedded = await metered.embed(EmbedRequest(NAME, ("word",) * 3))
        assert (choice.model, len(embedded.vectors)) == (NAME, 3)
        who.settle(5000)
        for refused in (metered.embed(EmbedRequest(NAME, ("word " * 9,))), collected(metered.generate(ask))):
            with pytest.raises(Overloaded):
                await refused
        caller.set(Caller(Grant("", "ha", ("other",)), clock))
        for denied in (metered.embed(EmbedRequest(NAME, ("a",))), collected(metered.generate(ask))):
            with pytest.raises(Refused, match="may not use"):
                await denied
        with pytest.raises(NotFound):
            await collected(metered.generate(unnamed))  # its own model, which nobody serves
    assert KEY not in caplog.text


async def test_a_reader_that_goes_away_pays_for_what_it_got() -> None:
    clock = Clock()
    async with running() as api:
        caller.set(who := Caller(Grant("", "ha", tokens_per_minute=1000), clock))
        ask = GenerateRequest(NAME, prompt="Title:", max_tokens=100, json_schema='{"type": "string", "minLength": 900}')
        answer = Metered(api.serving).generate(ask)
        await anext(answer)
        await anext(answer)
        await answer.aclose()
        assert who._tokens is not None
        assert who._tokens.wait_s(999, clock()) > 0, "the prompt was read, and a token written"
        assert who._tokens.wait_s(900, clock()) == 0


# G6
async def test_g6_two_hundred_at_once_get_no_more_than_the_key_has() -> None:
    keys = Keyring(lambda: [line(requests_per_minute=20), line("other", name="other")])
    answered = []

    async def handler(_request: web.Request) -> web.Response:
        answered.append(1)
        return web.json_response({})

    async with serving(Node().doors(keys=keys, extra_routes=[web.post("/v1/x", handler)])) as client:
        told = await asyncio.gather(*(ask(client, "/v1/x") for _ in range(200)))
        other = await ask(client, "/v1/x", "other")
    codes = [status for status, _, _ in told]
    assert codes.count(200) in (20, 21), "one may have come back meanwhile"
    assert codes.count(429) == 200 - codes.count(200)
    assert other[0] == 200, "another key is not held up"
