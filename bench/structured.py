"""Triage beside llama-server: a shared prefix of some 400 tokens, an issue of some 60, and an answer that must fit.

    (a) the schema's JSON on both sides          (b) the same two fields by `choices`; llama-server has only (a)
    1 and 8 clients: requests a second, p50 and p99; and how many of our answers of (a) do not fit the schema

llama-server runs with its prompt cache, slots enough for all clients, `json_schema`, and answers in one piece (its
faster way). With random weights it would lose itself in the white space that its grammar allows, so there it gets our
grammar, which allows one spelling. Both sides are up all the time and take turns; of the rounds that with the best
rate counts.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.engine import WORDS, prompt, threads
from bench.inference_sides import DEMO, Generate, Request, Setup, llama_server, ours, random_model
from bench.report import Report, main, quantile
from piclusterd.inference.grammar import compile_schema
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
WORDS_OF = {"triage-demo": (130, 16)}
"""Of the prefix and of an issue: in the demo model's tokenizer a word is some three tokens."""
WORDS_ELSE = (390, 50)
ROUNDS, ROUNDS_QUICK = 5, 2
REQUESTS_A_CLIENT, REQUESTS_A_CLIENT_QUICK = 8, 2
JUDGED, JUDGED_QUICK = 1000, 100
CLIENTS = (1, 8)
SCHEMA_RATIO, CHOICE_RATIO = 1.3, 2.0
CONTEXT = 16_384


@dataclass(slots=True)
class Best:
    """Of the rounds: the best rate, and the times of that round."""

    rate: float = 0.0
    seconds: list[float] = field(default_factory=list)


def request(model: Path, number: int, choices: bool) -> Request:
    before, after = WORDS_OF.get(model.stem, WORDS_ELSE)
    prefix = "You triage issues. " + " ".join(WORDS[at % len(WORDS)] for at in range(before))
    return Request(
        f"{prefix}\n{prompt(number, after)}\nJSON: ",
        48,
        schema="" if choices else SCHEMA,
        grammar="" if model == DEMO else compile_schema(SCHEMA).decode(),
        choices=CHOICES if choices else (),
        whole=True,
    )


def fits(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    known = isinstance(found, dict) and found.keys() == {"type", "priority"}
    return known and found["type"] in TYPES and found["priority"] in PRIORITIES


async def load(generate: Generate, asked: list[Request], clients: int, best: Best) -> None:
    queue, seconds = list(reversed(asked)), list[float]()

    async def client() -> None:
        while queue:
            one, began = queue.pop(), time.perf_counter()
            answer = await generate(one)
            seconds.append(time.perf_counter() - began)
            assert fits(answer.text), answer.text

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    rate = len(seconds) / (time.perf_counter() - began)
    if rate > best.rate:
        best.rate, best.seconds = rate, seconds


async def misfits(generate: Generate, model: Path, count: int) -> int:
    """How many of `count` answers of our side do not fit, drawn hot so that the model wants to leave the schema."""
    base = [request(model, 50_000 + number, False) for number in range(count)]
    asked = [Request(one.prompt, one.tokens, SCHEMA, temperature=2.0, seed=at) for at, one in enumerate(base)]
    answers = await asyncio.gather(*map(generate, asked))
    return sum(not fits(answer.text) for answer in answers)


async def compare(report: Report, model: Path, quick: bool) -> None:
    setup = Setup(max(CLIENTS), CONTEXT, threads())
    peer: str | None = "llama-server, " + ("json_schema" if model == DEMO else "our grammar")
    async with AsyncExitStack() as stack:
        mine = await stack.enter_async_context(ours(model, setup))
        sides = [("schema JSON", mine, False), ("choices", mine, True)]
        try:
            sides.append(("peer", await stack.enter_async_context(llama_server(model, setup)), False))
        except (OSError, subprocess.CalledProcessError) as fault:
            peer = f"llama-server not built: {str(fault)[:60]}"
        for clients in CLIENTS:
            _told(report, model, clients, peer, await in_turns(sides, model, clients, quick))
        if model == DEMO:
            count = JUDGED_QUICK if quick else JUDGED
            wrong = await misfits(mine, model, count)
            report.add(f"{model.stem}: answers that do not fit the schema", wrong, f"of {count}", at_most=0)


async def in_turns(
    sides: list[tuple[str, Generate, bool]], model: Path, clients: int, quick: bool
) -> dict[str, Best]:  # fmt: skip
    found = {name: Best() for name, _, _ in sides}
    count = clients * (REQUESTS_A_CLIENT_QUICK if quick else REQUESTS_A_CLIENT)
    number = 1000 * clients
    for _, generate, choices in sides:
        await asyncio.gather(*(generate(request(model, at, choices)) for at in range(clients)))  # the prefix is known
    for turn in range(ROUNDS_QUICK if quick else ROUNDS):
        for name, generate, choices in sides if turn % 2 else reversed(sides):
            await load(generate, [request(model, number + at, choices) for at in range(count)], clients, found[name])
            number += count
    return found


def _told(report: Report, model: Path, clients: int, peer: str | None, found: dict[str, Best]) -> None:
    other = found.pop("peer", None)
    for name, best in found.items():
        title = f"{model.stem}: {name}, {clients} clients"
        bar = CHOICE_RATIO if name == "choices" else SCHEMA_RATIO
        report.add(
            f"{title}, requests/s", best.rate, "1/s", peer=peer, peer_value=other.rate if other else None,
            larger_is_better=True, ratio_at_least=bar if other else None,
        )  # fmt: skip
        for part in (0.5, 0.99):
            value, theirs = (1000 * quantile(each.seconds, part) if each else None for each in (best, other))
            assert value is not None
            report.add(f"{title}, p{100 * part:g}", value, "ms", peer=peer, peer_value=theirs)


def measure(report: Report, quick: bool) -> None:
    for model in (DEMO, random_model()):
        asyncio.run(compare(report, model, quick))


if __name__ == "__main__":
    main("structured", measure)
