"""Continuous batching beside llama-server: same GGUF, same source of llama.cpp, same threads, same prompts.

    for each model, for k in 1, 2, 4, 8, 16: k clients at once, greedy ──▶ prefill, decode, TTFT and inter-token times
    then a mixed load: 8 answers while long prompts come in

Both sides are up all the time and take turns, round by round, so that whatever else the machine does hits both. Of the
rounds the best counts for rates (noise only slows), the median for times.
TTFT is of prompts of 60 words. Decode is of prompts of four words: tokens of all answers over the time from the first
request to the last token, so that it does not matter in how many pieces tokens come.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

from bench.inference_sides import DEMO, Generate, Request, Setup, llama_server, ours, random_model
from bench.report import Report, main, quantile

SEQUENCES, SEQUENCES_QUICK = (1, 2, 4, 8, 16), (1, 4, 8)
BUDGETED = (1, 4, 8)
RATIO = 0.97
ANSWER_TOKENS, ANSWER_TOKENS_QUICK = 96, 32
CONTEXT = 16_384
ROUNDS, ROUNDS_QUICK = 5, 2
PROMPT_WORDS, SHORT_WORDS, LONG_WORDS, MIXED_WORDS = 60, 4, 400, 300
MIXED_ANSWERS, MIXED_LATE = 8, 4
SENTENCE = "the editor crashes when saving a large file over the network since the last update and nobody knows why"
WORDS = SENTENCE.split()

Found = dict[str, float]
Measure = Callable[[Generate, int], Awaitable[Found]]
"""A measurement of one side; the number makes its prompts new."""


def prompt(number: int, words: int) -> str:
    return f"{number}: " + " ".join(WORDS[(number * 7 + at * at) % len(WORDS)] for at in range(words))


def threads() -> int:
    """What our configuration's default is for decoding: the other half of the cores is the daemon's and the client's,
    on both sides."""
    return max(1, (os.cpu_count() or 1) // 2)


async def beside(generate: Generate, number: int, count: int, tokens: int) -> Found:
    """`count` prompts at once, read for one token each; then as many short ones, for whole answers."""
    read = await asyncio.gather(*map(generate, asked(number, count, PROMPT_WORDS, 1)))
    began = time.perf_counter()
    answers = await asyncio.gather(*map(generate, asked(number, count, SHORT_WORDS, tokens)))
    took = time.perf_counter() - began
    firsts = [answer.first for answer in read]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        f"decode tok/s at {count}": sum(answer.tokens for answer in answers) / took,
        f"TTFT p50 ms at {count}": 1000 * quantile(firsts, 0.5),
        f"TTFT p99 ms at {count}": 1000 * quantile(firsts, 0.99),
        f"inter-token p50 ms at {count}": 1000 * quantile(gaps, 0.5),
        f"inter-token p99 ms at {count}": 1000 * quantile(gaps, 0.99),
    }


def asked(number: int, count: int, words: int, tokens: int) -> list[Request]:
    """Prompts that no other `number` has."""
    return [Request(prompt(number * 1000 + words * 100 + each, words), tokens) for each in range(count)]


async def prefill(generate: Generate, number: int) -> Found:
    long = await generate(Request(prompt(number, LONG_WORDS), 1))
    return {"prefill ms of a long prompt": 1000 * long.first}


async def mixed(generate: Generate, number: int, tokens: int) -> Found:
    """Eight answers, with longer prompts coming in between."""
    asked = [Request(prompt(number * 1000 + each, 20), 2 * tokens) for each in range(MIXED_ANSWERS)]
    answers = [asyncio.create_task(generate(request)) for request in asked]
    late = [
        await generate(Request(prompt(number * 1000 + 500 + each, MIXED_WORDS), 4)) for each in range(MIXED_LATE)
    ]  # fmt: skip
    gaps = [gap for answer in await asyncio.gather(*answers) for gap in answer.gaps]
    return {
        "mixed: TTFT p99 ms": 1000 * quantile([answer.first for answer in late], 0.99),
        "mixed: inter-token p99 ms": 1000 * quantile(gaps, 0.99),
    }


def measures(quick: bool) -> list[Measure]:
    tokens = ANSWER_TOKENS_QUICK if quick else ANSWER_TOKENS

    def at(count: int) -> Measure:
        return lambda generate, number: beside(generate, number, count, tokens)

    counts = SEQUENCES_QUICK if quick else SEQUENCES
    return [*map(at, counts), prefill, lambda generate, number: mixed(generate, number, tokens)]


async def in_turns(sides: list[Generate], quick: bool) -> list[Found]:
    """What was found of each of `sides`."""
    found: list[dict[str, list[float]]] = [{} for _ in sides]
    for generate in sides:
        await beside(generate, 1, 2, ANSWER_TOKENS_QUICK)  # pages of the model are read, kernels are warm
    number = 2
    for measure in measures(quick):
        for _ in range(ROUNDS_QUICK if quick else ROUNDS):
            number += 1
            turn = list(zip(sides, found, strict=True))
            for generate, kept in turn if number % 2 else reversed(turn):
                for what, value in (await measure(generate, number)).items():
                    kept.setdefault(what, []).append(value)
    return [{what: max(v) if "tok/s" in what else median(v) for what, v in kept.items()} for kept in found]


async def compare(report: Report, model: Path, quick: bool) -> None:
    setup = Setup(max(SEQUENCES), CONTEXT, threads())
    peer: str | None = "llama-server"
    async with AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(ours(model, setup))]
        try:
            sides.append(await stack.enter_async_context(llama_server(model, setup)))
        except (OSError, subprocess.CalledProcessError) as fault:
            peer = f"llama-server not built: {str(fault)[:60]}"
        mine, *others = await in_turns(sides, quick)
    theirs = others[0] if others else {}
    for what, value in mine.items():
        larger = "tok/s" in what
        at = int(what.rpartition(" ")[2]) if what.rpartition(" ")[2].isdigit() else 0
        bar = RATIO if larger and at in BUDGETED else 1.0 if what.startswith("mixed") else None
        report.add(
            f"{model.stem}: {what}",
            value,
            "tok/s" if larger else "ms",
            peer=peer,
            peer_value=theirs.get(what),
            larger_is_better=larger,
            ratio_at_least=bar if theirs else None,
        )


def measure(report: Report, quick: bool) -> None:
    for model in (DEMO, random_model()):
        asyncio.run(compare(report, model, quick))


if __name__ == "__main__":
    main("engine", measure)
