"""Triage beside llama-server: a shared prefix of some 400 tokens, an issue of some 60, and an answer that must fit.

    (a) the schema's JSON on both sides          (b) the same two fields by `choices`; llama-server has only (a)
    1 and 8 clients: requests a second, p50 and p99

llama-server runs with its prompt cache, slots enough for all clients, and `json_schema`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from pathlib import Path

from bench.engine import WORDS, prompt, threads
from bench.inference_sides import DEMO, Generate, Request, llama_server, ours, random_model
from bench.report import Report, main, quantile
from piclusterd.inference.protocol import Field

TYPES, PRIORITIES = ("bug", "feature", "question", "chore"), ("P0", "P1", "P2", "P3")
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"type": {"enum": TYPES}, "priority": {"enum": PRIORITIES}},
        "required": ["type", "priority"],
        "additionalProperties": False,
    }
)
CHOICES = (Field("type", TYPES), Field("priority", PRIORITIES))
PREFIX_WORDS, ISSUE_WORDS = 150, 20
"""In the demo model's tokenizer a word is some three tokens."""
REQUESTS, REQUESTS_QUICK = 200, 24
CLIENTS = (1, 8)
SCHEMA_RATIO, CHOICE_RATIO = 1.3, 2.0
CONTEXT = 8192
Found = tuple[float, float, float]
"""Requests a second; p50 and p99 in milliseconds."""


def requests(count: int, choices: bool) -> list[Request]:
    prefix = "You triage issues. " + " ".join(WORDS[at % len(WORDS)] for at in range(PREFIX_WORDS))
    return [
        Request(
            f"{prefix}\n{prompt(number, ISSUE_WORDS)}\nJSON: ",
            48,
            schema="" if choices else SCHEMA,
            choices=CHOICES if choices else (),
        )
        for number in range(count)
    ]


async def run(generate: Generate, clients: int, count: int, choices: bool) -> Found:
    await asyncio.gather(*map(generate, requests(clients, choices)))  # the prefix is resident from here on
    queue, seconds = list(reversed(requests(count, choices))), list[float]()

    async def client() -> None:
        while queue:
            request, began = queue.pop(), time.perf_counter()
            answer = await generate(request)
            seconds.append(time.perf_counter() - began)
            found = json.loads(answer.text)
            assert (found["type"] in TYPES, found["priority"] in PRIORITIES) == (True, True), answer.text

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    rate = len(seconds) / (time.perf_counter() - began)
    return rate, 1000 * quantile(seconds, 0.5), 1000 * quantile(seconds, 0.99)


async def compare(report: Report, model: Path, quick: bool) -> None:
    count = REQUESTS_QUICK if quick else REQUESTS
    mine: dict[tuple[int, bool], Found] = {}
    theirs: dict[int, Found] = {}
    peer: str | None = "llama-server, json_schema"
    async with ours(model, max(CLIENTS), CONTEXT, threads()) as generate:
        for clients in CLIENTS:
            for choices in (False, True):
                mine[clients, choices] = await run(generate, clients, count, choices)
    try:
        async with llama_server(model, max(CLIENTS), CONTEXT, threads()) as generate:
            for clients in CLIENTS:
                theirs[clients] = await run(generate, clients, count, False)
    except (OSError, subprocess.CalledProcessError) as fault:
        peer = f"llama-server not built: {str(fault)[:60]}"
    for (clients, choices), (rate, p50, p99) in mine.items():
        name = f"{model.stem}: {'choices' if choices else 'schema JSON'}, {clients} clients"
        bar = CHOICE_RATIO if choices else SCHEMA_RATIO
        other = theirs.get(clients)
        report.add(
            f"{name}, requests/s", rate, "1/s", peer=peer, peer_value=other[0] if other else None,
            larger_is_better=True, ratio_at_least=bar if other else None,
        )  # fmt: skip
        for what, value, at in (("p50", p50, 1), ("p99", p99, 2)):
            report.add(f"{name}, {what}", value, "ms", peer=peer, peer_value=other[at] if other else None)


def measure(report: Report, quick: bool) -> None:
    for model in (DEMO,) if quick else (DEMO, random_model()):
        asyncio.run(compare(report, model, quick))


if __name__ == "__main__":
    main("structured", measure)
