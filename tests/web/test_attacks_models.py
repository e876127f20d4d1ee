"""Attacks on what answers: each ends as it should (numbers as in users-ops-security, 4.5, HTTP and Resource).

Elsewhere: G1 tests/cluster/test_attacks, G3 tests/inference/test_budget and test_loading, G6 with one slot
tests/e2e/test_many_clients, with a key's limits tests/web/test_keys.
"""

from __future__ import annotations

import asyncio
import configparser
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.inference.rig import NAME

from .test_openai import HELLO, running

UNITS = Path(__file__).parents[2] / "systemd"


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: dict[str, Any] = {
    "a million items": {"type": "array", "items": {}, "maxItems": 10**6},
    "a million letters": {"type": "string", "maxLength": 10**6},
    "a million at least": {"type": "object", "properties": {"a": {"type": "array", "minItems": 10**6}}},
    "a repeated pattern": {"type": "string", "pattern": "^[a-z]{1000000}$"},
    "seventeen levels": deep(17),
    "three hundred levels": deep(300),
    "sixty-five properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(65)}},
    "seventeen KiB": {"type": "string", "enum": ["x" * 17_000]},
    "an address": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "a file": {"$ref": "file:///etc/passwd"},
    "itself": {"$ref": "#"},
    "negative": {"type": "array", "items": {}, "maxItems": -1},
}


# G2
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
async def test_g2_a_schema_that_would_explode_is_400_in_both_apis_and_the_model_goes_on(bomb: dict[str, Any]) -> None:
    async with running() as api:
        asked = {"model": NAME, "messages": HELLO, "max_tokens": 4}
        told = {"type": "json_schema", "json_schema": {"name": "t", "schema": bomb}}
        status, _, answer = await api.post("/v1/chat/completions", asked | {"response_format": told})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer
        status, _, answer = await api.post("/api/chat", {"model": NAME, "messages": HELLO, "format": bomb})
        assert (status, list(answer)) == (400, ["error"])
        assert (await api.post("/v1/chat/completions", asked))[0] == 200


# G4
@pytest.mark.parametrize("stream", [True, False])
async def test_g4_a_killed_child_costs_its_request_at_most_and_the_next_is_answered(stream: bool) -> None:
    async with running(slots=1) as api:
        asked = {"model": NAME, "messages": HELLO, "max_tokens": 64, "stream": stream}
        long = {"type": "json_schema", "json_schema": {"name": "t", "schema": {"type": "string", "minLength": 900}}}
        first = api.http.post(f"{api.url}/v1/chat/completions", json=asked | {"response_format": long})
        answering = asyncio.create_task(first)
        await api.changes.until(lambda: api.pool.facts()[0].busy == 1)
        pid = api.pool.pid(NAME)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)  # as the OOM killer does
        async with await answering as response:
            assert response.status in (200, 503)
            if response.status == 503:
                assert int(response.headers["Retry-After"]) >= 1
            await response.read()
        await api.changes.until(lambda: bool(api.pool.facts()) and api.pool.pid(NAME) not in (None, pid))
        assert (await api.post("/v1/chat/completions", asked | {"stream": False}))[0] == 200


# G5
@pytest.mark.parametrize(("unit", "caps"), [("piclusterd.service", ("LimitNOFILE", "TasksMax")),
                                            ("piclusterd-worker@.service", ("TasksMax",))])  # fmt: skip
def test_g5_files_and_processes_are_capped(unit: str, caps: tuple[str, ...]) -> None:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read(UNITS / unit)
    for cap in caps:
        assert 0 < int(parsed["Service"][cap]) <= 4096


# B13
ABSURD: list[dict[str, Any]] = [
    {"n": 1000}, {"n": -1}, {"temperature": -1}, {"stop": ["x" * 512 * 1024]}, {"stop": ["x"] * 1000}, {"top_k": -5},
    {"max_tokens": -1}, {"logit_bias": {"1": 1e9}}, {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]}]},
]  # fmt: skip


async def test_b13_absurd_numbers_are_refused_or_clamped_and_nothing_is_fetched() -> None:
    async with running() as api:
        asked = {"model": NAME, "messages": HELLO, "max_tokens": 2}
        for absurd in ABSURD:
            status, _, answer = await api.post("/v1/chat/completions", asked | absurd)
            assert status in (400, 413), (absurd, answer)
        for clamped in ({"max_tokens": 10**9, "stop": ["e", "a", "i", "o"]}, {"n_discard": -1}, {"num_ctx": 10**9}):
            assert (await api.post("/v1/chat/completions", asked | clamped))[0] == 200
        options = {"num_ctx": 10**9, "num_predict": 2}
        body = {"model": NAME, "messages": HELLO, "stream": False, "options": options}
        assert (await api.post("/api/chat", body))[0] == 200
