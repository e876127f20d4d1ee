"""Greedy answers beside llama-server's, token by token: the same prompts alone, and eight at a time.

    held-out issues in the demo model's own chat ──▶ our ids, one by one │ eight together ──▶ equal to the peer's?

Attention, batch sizes and the kind of KV memory are the same on both sides. Sums are rounded by what else is in a
batch (llama.cpp's kernels differ by the number of rows), so two tokens that a model likes equally may change places:
batched, our answers must equal llama-server's alone as often as its own batched ones do. Random weights like many
tokens equally; their rows have no budget.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from bench.engine import prompt, threads
from bench.inference_sides import DEMO, Generate, Request, Setup, llama_server, ours, random_model
from bench.report import Report, main
from piclusterd.inference.demo_model.issues import draw_issues
from piclusterd.inference.demo_model.prompt import rendered_prompt
from piclusterd.inference.llama import BATCH_TOKENS

PROMPTS, PROMPTS_QUICK = 200, 64
RANDOM_PROMPTS, RANDOM_PROMPTS_QUICK = 40, 6
TOKENS = 32
TOGETHER = 8
CONTEXT = 8192
SAME = ("--kv-unified", "-b", str(BATCH_TOKENS), "-ub", str(BATCH_TOKENS), "-fa", "on")


def requests(model: Path, count: int) -> list[Request]:
    if model != DEMO:
        return [Request(prompt(number, 30), TOKENS, whole=True) for number in range(count)]
    issues = draw_issues(count, 7, "held_out")
    return [Request(rendered_prompt(issue.title, issue.body), TOKENS, whole=True) for issue in issues]


async def answers(generate: Generate, asked: list[Request], together: int) -> list[list[int]]:
    found: list[list[int]] = []
    for at in range(0, len(asked), together):
        found += [answer.ids for answer in await asyncio.gather(*map(generate, asked[at : at + together]))]
    return found


async def compare(report: Report, model: Path, count: int) -> None:
    asked, setup = requests(model, count), Setup(TOGETHER, CONTEXT, threads(), SAME)
    async with ours(model, setup) as generate:
        alone, batched = await answers(generate, asked, 1), await answers(generate, asked, TOGETHER)
    try:
        async with llama_server(model, setup) as generate:
            theirs, together = await answers(generate, asked, 1), await answers(generate, asked, TOGETHER)
    except (OSError, subprocess.CalledProcessError) as fault:
        report.add(f"llama-server not built: {str(fault)[:60]}", 0, "")
        return
    itself = equal(together, theirs)
    for how, mine, least in (("alone", alone, count), ("batched", batched, itself)):
        report.add(
            f"{model.stem}: answers equal to llama-server's alone, ours {how}", equal(mine, theirs), f"of {count}",
            peer="llama-server " + how, peer_value=count if how == "alone" else itself, larger_is_better=True,
            at_least=least if model == DEMO else None,
        )  # fmt: skip


def equal(some: list[list[int]], others: list[list[int]]) -> int:
    assert len({tuple(ids) for ids in some}) > 1, "the answers say something"
    return sum(one == other for one, other in zip(some, others, strict=True))


def measure(report: Report, quick: bool) -> None:
    asyncio.run(compare(report, DEMO, PROMPTS_QUICK if quick else PROMPTS))
    asyncio.run(compare(report, random_model(), RANDOM_PROMPTS_QUICK if quick else RANDOM_PROMPTS))


if __name__ == "__main__":
    main("greedy", measure)
