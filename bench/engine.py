"""Continuous batching beside llama-server: same GGUF, same build of llama.cpp, same threads, same prompts.

    for each model, for k in 1, 2, 4, 8, 16: k clients at once, greedy ──▶ prefill, decode, TTFT and inter-token times
    greedy texts of both sides ──▶ how many are equal          mixed load: 8 answers while long prompts come in

Decode: tokens of all answers after each one's first, over the time from the last first token to the last token.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from bench.inference_sides import DEMO, Answer, Generate, Request, llama_server, ours, random_model
from bench.report import Report, main, quantile

SEQUENCES = (1, 2, 4, 8, 16)
BUDGETED = (1, 4, 8)
RATIO = 0.97
ANSWER_TOKENS, ANSWER_TOKENS_QUICK = 128, 32
CONTEXT = 16_384
ROUNDS = 3
EQUAL_PROMPTS, EQUAL_PROMPTS_QUICK = 200, 20
SENTENCE = "the editor crashes when saving a large file over the network since the last update and nobody knows why"
WORDS = SENTENCE.split()


def prompt(number: int, words: int) -> str:
    return f"{number}: " + " ".join(WORDS[(number * 7 + at * at) % len(WORDS)] for at in range(words))


def threads() -> int:
    return max(1, os.cpu_count() or 1)


async def batch(generate: Generate, count: int, tokens: int, seed: int) -> list[Answer]:
    asked = [Request(prompt(seed * 1000 + number, 60), tokens) for number in range(count)]
    return list(await asyncio.gather(*map(generate, asked)))


def decode_rate(answers: list[Answer]) -> float:
    began, ended = max(answer.first for answer in answers), max(answer.at[-1] for answer in answers)
    after = sum(_tokens_after(answer, began) for answer in answers)
    return after / (ended - began)


def _tokens_after(answer: Answer, moment: float) -> float:
    """A piece of text may be several tokens: those after the first are taken to be spread evenly over the pieces."""
    pieces = sum(at > moment for at in answer.at)
    return pieces / max(1, len(answer.at) - 1) * (answer.tokens - 1)


async def measure_side(generate: Generate, quick: bool) -> dict[str, float]:
    tokens = ANSWER_TOKENS_QUICK if quick else ANSWER_TOKENS
    await batch(generate, 2, 8, 0)  # pages of the model are read, kernels are warm
    found: dict[str, float] = {}
    for count in SEQUENCES:
        rounds = [await batch(generate, count, tokens, 1 + count + number) for number in range(1 if quick else ROUNDS)]
        flat = [answer for answers in rounds for answer in answers]
        gaps = [gap for answer in flat for gap in answer.gaps]
        found[f"decode tok/s at {count}"] = max(map(decode_rate, rounds))
        found[f"TTFT p50 ms at {count}"] = 1000 * quantile([answer.first for answer in flat], 0.5)
        found[f"TTFT p99 ms at {count}"] = 1000 * quantile([answer.first for answer in flat], 0.99)
        found[f"inter-token p50 ms at {count}"] = 1000 * quantile(gaps, 0.5)
        found[f"inter-token p99 ms at {count}"] = 1000 * quantile(gaps, 0.99)
    words = 400
    long = await generate(Request(prompt(9999, words), 1))
    found["prefill ms of a long prompt"] = 1000 * long.first
    found |= await mixed(generate, tokens)
    return found


async def mixed(generate: Generate, tokens: int) -> dict[str, float]:
    """Eight answers, with prompts of 300 words coming in between."""
    answers = [asyncio.create_task(generate(Request(prompt(500 + number, 20), 2 * tokens))) for number in range(8)]
    late = [await generate(Request(prompt(600 + number, 300), 4)) for number in range(4)]
    done = list(await asyncio.gather(*answers))
    gaps = [gap for answer in done for gap in answer.gaps]
    return {
        "mixed: TTFT p99 ms": 1000 * quantile([answer.first for answer in late], 0.99),
        "mixed: inter-token p99 ms": 1000 * quantile(gaps, 0.99),
    }


async def texts(generate: Generate, count: int) -> list[str]:
    return [(await generate(Request(prompt(number, 30), 24))).text for number in range(count)]


async def compare(report: Report, model: Path, quick: bool) -> None:
    count = EQUAL_PROMPTS_QUICK if quick else EQUAL_PROMPTS
    async with ours(model, max(SEQUENCES), CONTEXT, threads()) as generate:
        mine, my_texts = await measure_side(generate, quick), await texts(generate, count)
    theirs: dict[str, float] = {}
    peer: str | None = "llama-server"
    equal = 0
    try:
        async with llama_server(model, max(SEQUENCES), CONTEXT, threads()) as generate:
            theirs, their_texts = await measure_side(generate, quick), await texts(generate, count)
        equal = sum(one == other for one, other in zip(my_texts, their_texts, strict=True))
    except (OSError, subprocess.CalledProcessError) as fault:
        peer = f"llama-server not built: {str(fault)[:60]}"
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
    if theirs:
        report.add(f"{model.stem}: greedy texts equal to llama-server's", equal, f"of {count}", at_least=count)


def measure(report: Report, quick: bool) -> None:
    for model in (DEMO,) if quick else (DEMO, random_model()):
        asyncio.run(compare(report, model, quick))


if __name__ == "__main__":
    main("engine", measure)
