"""Time to the first token where prompts share long beginnings: routing by what nodes remember, against taking turns.

    make bench NAME=prefix ARGS="--quick"

Three children on this machine (`town`), more beginnings than one of them remembers, asked for in random order, one
request at a time. The first round, in which all is read for the first time, is not counted on either side. Each child
gets a small share of a core from a cgroup: the demo model then reads some hundred tokens a second, as a Pi does with a
model that is of use. Needs root and cgroup v1. What a state from another node saves, `prefix_states` measures.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path

from bench.prefix_states import measure_states
from bench.report import Report, main
from bench.town import Timed, Town, slow, town
from piclusterd.inference.protocol import GenerateRequest

DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
NODES, BEGINNINGS, ROUNDS = 3, 9, 3
WORDS = 260
"""Of a beginning, and some 500 tokens."""
ANSWER_TOKENS = 4
CONTEXT = 4096
SHARE = 0.05
"""Of a core."""
SEED = 7


def measure(report: Report, quick: bool) -> None:
    asyncio.run(_measure(report, 2 if quick else ROUNDS))
    asyncio.run(measure_states(report, 1 if quick else ROUNDS - 1))


async def _measure(report: Report, rounds: int) -> None:
    turns = await _side(rounds, robin=True)
    routed = await _side(rounds, robin=False)
    firsts = [[one.first_s for one in side] for side in (routed, turns)]
    for name, of in (("median", statistics.median), ("mean", statistics.fmean)):
        ours, theirs = (of(side) * 1000 for side in firsts)
        cut = 100 * (1 - ours / theirs)
        report.add(f"first token, {name}", ours, "ms", peer="taking turns", peer_value=theirs)
        report.add(f"cut of the {name}", cut, "%", at_least=90.0 if name == "median" else None)
    cached = [statistics.fmean(one.cached for one in side) for side in (routed, turns)]
    report.add(
        "tokens of the prompt not read again", cached[0], "", peer="taking turns", peer_value=cached[1],
        larger_is_better=True,
    )  # fmt: skip


async def _side(rounds: int, robin: bool) -> list[Timed]:
    """One request at a time, at each node in turn."""
    rng = random.Random(SEED)
    async with town(DEMO, NODES, robin=robin, slots=2, context=CONTEXT) as nodes:
        with slow(nodes, SHARE) as bounded:
            assert bounded, "the children could not be slowed: run as root, with cgroup v1"
            return [one for number in range(rounds + 1) for one in await _round(nodes, rng, number)][BEGINNINGS:]


async def _round(nodes: Town, rng: random.Random, number: int) -> list[Timed]:
    order = rng.sample(range(BEGINNINGS), BEGINNINGS)
    return [await nodes.ask(at, _request(beginning, number)) for at, beginning in enumerate(order)]


def _request(beginning: int, number: int) -> GenerateRequest:
    words = random.Random(beginning)
    system = " ".join(words.choice(("save", "crash", "file", "button", "login")) for _ in range(WORDS))
    prompt = f"{system}\nTitle: number {number}"
    return GenerateRequest(prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0.0)


if __name__ == "__main__":
    main("prefix", measure)
