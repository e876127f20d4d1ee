"""Who advances in the next step of an engine, who comes in, and who has to go: rules over numbers. Pure.

    waiting ──admit: a place, and room for what it is expected to need──▶ active ──plan──▶ one batch
       ▲                                                                    │
       └───────────────── preempted when memory runs out: the youngest ◀────┘

Answers advance first, by the token each has pending; prompts share what is left of the batch, in the order of
admission, and no more than may be read in the time the answers (or a cancellation) can be held up.

Sources: Orca (Yu et al., OSDI 2022) for iteration-level scheduling, Sarathi (arXiv 2308.16369) for chunked prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHUNK_TOKENS_MIN = 16
"""Prompt tokens read in a step at least: fewer waste the matrix kernels."""
CHUNK_TOKENS_FIRST = 60
"""While no speed has been measured: a slow board must not be committed to a full batch."""
READING_S = 0.7
"""How long a step may read prompts: it holds up the answers, and a cancelled prompt is let go between two steps, within
a second. Shorter steps read slower: the weights pass by in each, and so do the answers' own rows."""
STRETCH = 3
"""A prompt is read to its end where that is at most this part more than the step may read: 0.93 s."""
TILE_ROWS = 64
"""Rows from which llama.cpp's attention goes by tiles; fewer go cell by cell, at several times the cost. Those do not
depend on what else is in the batch; by tiles sums are rounded otherwise, which moves logits by some hundredths."""
EXPECTED_ANSWER = 64
"""Tokens an answer is taken to need when it is admitted: reserving all of `max_tokens` would leave most memory idle."""
OVERTAKEN_MAX = 8
"""How often smaller requests may be admitted past one that does not fit yet."""
SHARED_MIN = 32
"""Tokens of a prompt that another is just reading, for which a request waits instead of reading them too."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An active sequence: `remaining` tokens are to be decoded before its next is known. With the last of them go
    `tree` tokens of options, in `forks` sequences of their own. `answering`: its prompt has been read."""

    remaining: int
    answering: bool
    tree: int = 0
    forks: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Sequence `index` decodes `count` of its pending tokens, and its options' where `tree` is set."""

    index: int
    count: int
    tree: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue: the `cells` of memory it is expected to need beyond what it shares with active ones."""

    cells: int
    held: bool
    """An active one is reading a beginning that it shares: admitted now, it would be read twice."""
    overtaken: int


def chunk(prefill_tps: float, room: int) -> int:
    """Prompt tokens one step may read, by the speed measured (tokens a second; 0: not yet)."""
    if not prefill_tps:
        return min(room, CHUNK_TOKENS_FIRST)
    return min(room, max(CHUNK_TOKENS_MIN, int(prefill_tps * READING_S)))


def plan(pending: Sequence[Pending], prefill_tps: float, batch: int, forks: int) -> list[Share]:
    """What one batch of at most `batch` tokens holds, with at most `forks` options side by side."""
    shares: list[Share] = []
    room = batch
    for index, one in enumerate(pending):
        if one.answering and not one.tree and one.remaining <= room:
            shares.append(Share(index, one.remaining))
            room -= one.remaining
    budget = chunk(prefill_tps, room)
    for index, one in enumerate(pending):
        if one.answering and not one.tree:
            continue
        tree = _fits(one, budget, room, forks)
        count = one.remaining if tree else _part(one, budget, room)
        if count > 0:
            shares.append(Share(index, count, tree))
            room -= count + one.tree * tree
            forks -= one.forks * tree
            budget = max(0, budget - count)
    return shares


def _part(one: Pending, budget: int, room: int) -> int:
    """How much of it is read: what is left for the next step is nothing, or worth a step."""
    whole = one.remaining - bool(one.tree)
    if whole <= min(room, budget + budget // STRETCH):
        return whole
    count = min(budget, room)
    left = one.remaining - count
    return count - (TILE_ROWS - left) if left < TILE_ROWS <= count // 2 else count


def _fits(one: Pending, budget: int, room: int, forks: int) -> bool:
    """Whether the rest of it and its options can go into this batch. Options are few tokens: no budget is asked."""
    read = one.answering or one.remaining <= max(1, budget)
    return one.tree > 0 and read and one.remaining + one.tree <= room and one.forks <= forks


def admit(queue: Sequence[Waiting], active: int, places: int, promised: int, size: int) -> int | None:
    """Which of `queue` comes in next. `promised` cells of `size` are held, or expected to be needed, by active ones.

    One request alone always comes in: it was clamped to the memory when it came.
    """
    if active >= places:
        return None
    for index, waiting in enumerate(queue):
        if waiting.held:
            continue
        if not active or promised + waiting.cells <= size:
            return index
        if waiting.overtaken >= OVERTAKEN_MAX:
            return None
    return None
