"""Tokens a second of three nodes against one, with as many requests for each node under way.

    make bench NAME=scaling ARGS="--quick"

Each child gets the same small share of a core from a cgroup (`town.slow`), so that three of them do not compete for
what one could have used: boards of their own, as far as one machine can pretend. Needs root and cgroup v1.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

from bench.report import Report, main
from bench.town import Town, slow, town
from piclusterd.inference.protocol import ChatMessage, GenerateRequest

DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
NODES, SLOTS = 3, 4
SHARE = 0.15
"""Of a core, for each child: three of them leave most of two cores to this process and to others."""
SECONDS, QUICK_S = 30.0, 10.0
WARM_S = 2.0
SCHEMA = '{"type": "string", "minLength": 200}'
ANSWER_TOKENS = 64


def measure(report: Report, quick: bool) -> None:
    asyncio.run(_measure(report, QUICK_S if quick else SECONDS))


async def _measure(report: Report, seconds: float) -> None:
    one = await _rate(1, seconds)
    three = await _rate(NODES, seconds)
    report.add("one node", one, "tokens/s")
    report.add("three nodes", three, "tokens/s", peer="one node", peer_value=one, larger_is_better=True,
               ratio_at_least=2.85)  # fmt: skip


async def _rate(nodes: int, seconds: float) -> float:
    """Every request comes to the first node, which spreads them."""
    async with town(DEMO, nodes, slots=SLOTS, context=4096) as made:
        with slow(made, SHARE) as bounded:
            assert bounded, "the children could not be slowed: run as root, with cgroup v1"
            await _load(made, nodes, WARM_S)
            return await _load(made, nodes, seconds)


async def _load(made: Town, nodes: int, seconds: float) -> float:
    numbers = itertools.count()
    ends = time.monotonic() + seconds
    tokens = 0

    async def drive() -> None:
        nonlocal tokens
        while time.monotonic() < ends:
            answer = await made.ask(0, _request(next(numbers)))
            tokens += answer.tokens

    began = time.monotonic()
    await asyncio.gather(*(drive() for _ in range(nodes * SLOTS)))
    return tokens / (time.monotonic() - began)


def _request(number: int) -> GenerateRequest:
    messages = (ChatMessage("user", f"Title: crash number {number}"),)
    return GenerateRequest(messages=messages, max_tokens=ANSWER_TOKENS, temperature=0.0, json_schema=SCHEMA)


if __name__ == "__main__":
    main("scaling", measure)
