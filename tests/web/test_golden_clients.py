"""The calls that Home Assistant's Ollama integration and Open WebUI make, as they go over the wire, replayed.

Each line of `golden/*.jsonl` is a request, the status its client expects, and the fields that the client reads of the
answer, by path. Home Assistant's are ollama-python's bytes for the calls of home-assistant/core
`components/ollama/{config_flow,entity}.py`, Open WebUI's those of `backend/open_webui/routers/ollama.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .test_openai import running

GOLDEN = {
    path.stem: [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((Path(__file__).parent / "golden").glob("*.jsonl"))
}


def at(answer: Any, path: str) -> Any:
    """What is at `path`, as `models.0.name`. Raises where nothing is."""
    for step in path.split("."):
        answer = answer[int(step)] if isinstance(answer, list) else answer[step]
    return answer


@pytest.mark.parametrize("calls", GOLDEN.values(), ids=GOLDEN)
async def test_every_call_of_the_client_is_answered_with_what_it_reads(calls: list[dict[str, Any]]) -> None:
    async with running() as api:
        for call in calls:
            body = None if call["body"] is None else json.dumps(call["body"])
            asked = api.http.request(call["method"], api.url + call["path"], headers=call["headers"], data=body)
            async with asked as response:
                assert response.status == call["status"], (call["path"], await response.text())
                answers = [json.loads(line) async for line in response.content] if call["lines"] else []
                answers = answers or [await response.json()]
            for path in call["reads"]:
                assert at(answers[0], path) is not None, (call["path"], path)
            if call["lines"]:
                assert [answer["done"] for answer in answers] == [False] * (len(answers) - 1) + [True]
