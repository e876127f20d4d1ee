"""One request inside the engine: its tokens, where its answer stands, and what is to be told of it.

    tokens = prompt + answer so far        seat.tokens = what of them the memory holds        remaining = the rest

Runs only in the child.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .choosing import Choosing
from .detokenise import TextStream
from .drafts import Drafts
from .llama import Logits, likeliest
from .protocol import Delta, Done, TokenLogprob
from .residents import Seat
from .sampler import Sampler
from .schedule import CHUNK_TOKENS_MIN, EXPECTED_ANSWER, Pending

SMOOTHING = 0.3
"""Weight of the newest measurement of a pace."""

Reason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True, eq=False)
class Sequence:
    id: int
    tokens: list[int]
    prompt_length: int
    limit: int
    """Tokens the answer may have."""
    text: TextStream
    sampler: Sampler | None = None
    choosing: Choosing | None = None
    """One of the two."""
    drafts: Drafts | None = None
    drafted: int = 0
    accepted: int = 0
    """Of the tokens guessed, those that were right."""
    top_logprobs: int | None = None
    """Alternatives told of each token; None: no log-probabilities at all."""
    seat: Seat | None = None
    state: bytes = b""
    """What `Residents.swap_out` left of it while it waits for its second turn."""
    state_tokens: int = 0
    """How many of `tokens` that holds."""
    cached: int = 0
    overtaken: int = 0
    unreported: int = 0
    """Tokens since the last Delta."""
    skip: int = 0
    """Characters still to come that the reader has from the child before this one."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of those."""
    started: float = 0.0
    first: float = 0.0
    """When its prompt began to be read, and when its first token was there; seconds."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def past(self) -> int:
        return len(self.seat.tokens) if self.seat is not None else 0

    @property
    def expected(self) -> int:
        """Tokens it is expected to have in the memory when it ends."""
        return len(self.tokens) + min(self.limit - self.generated, EXPECTED_ANSWER)

    @property
    def pending(self) -> Pending:
        remaining = len(self.tokens) - self.past
        if self.choosing is not None:
            answering = bool(self.choosing.probabilities)
            return Pending(remaining, answering, len(self.choosing.inner), len(self.choosing.group))
        return Pending(remaining, self.past >= self.prompt_length)

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()

    def note(self, logs: Logits, token: int, piece: Callable[[int], bytes]) -> None:
        """`token` was sampled where its log-probabilities were `logs`."""
        top = tuple((piece(other), float(logs[other])) for other in likeliest(logs, self.top_logprobs or 0))
        self.logprobs.append(TokenLogprob(piece(token), float(logs[token]), top))

    def delta(self, text: str, last: bool = False) -> list[Delta]:
        """`text` as what is to be told, with the tokens since the last time; nothing for no text, unless it is the
        `last` chance to tell of them."""
        text, self.skip = text[self.skip :], max(0, self.skip - len(text))
        if not text and not (last and self.logprobs):
            return []
        ids = tuple(self.tokens[len(self.tokens) - self.unreported :])
        told = Delta(self.id, text, self.unreported, tuple(self.logprobs), ids)
        self.unreported, self.logprobs = 0, []
        return [told]

    def end(self, reason: Reason) -> Done:
        now = time.perf_counter()
        read, wrote = self.prompt_length - self.cached, self.generated - 1
        return Done(
            id=self.id,
            reason=reason,
            prompt_tokens=self.prompt_length,
            completion_tokens=self.generated,
            cached_tokens=self.cached,
            prefill_tps=_rate(read, CHUNK_TOKENS_MIN, self.first - self.started),
            decode_tps=_rate(wrote, 1, now - self.first) if self.first and self.choosing is None else 0.0,
            choices=tuple(self.choosing.probabilities) if self.choosing is not None else (),
            drafted=self.drafted,
            accepted=self.accepted,
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the logits of one sequence are in the batch: after its last token (-1: not there), and after nodes."""

    sequence: Sequence
    last: int
    nodes: dict[int, int] | None = None
    guess: list[int] = field(default_factory=list)
    """Tokens in the rows behind the last."""


@dataclass(slots=True)
class Counts:
    """What the engine has done so far, for tests and measurements."""

    steps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens decoded (those found in the memory are not among them)."""
    answer_tokens: int = 0
    forced_tokens: int = 0
    """Of the answers' tokens, those that no logits were looked at for."""
    preempted: int = 0
    restored: int = 0
    """Of the preempted, those that went on from their state."""


class Pace:
    """How fast prompts are read: `tokens_per_s`, 0 until that was measured."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0

    def add(self, counts: list[int], seconds: float) -> None:
        """A step took so long for so many tokens of each sequence."""
        if sum(count for count in counts if count > 1) >= CHUNK_TOKENS_MIN and seconds > 0:
            newest = sum(counts) / seconds  # answers' rows cost what a prompt's do
            self.tokens_per_s += (newest - self.tokens_per_s) * (SMOOTHING if self.tokens_per_s else 1.0)


def log_probabilities(logits: Logits) -> Logits:
    """The log-softmax of `logits`."""
    shifted = logits - logits.max()
    result: Logits = shifted - np.log(np.exp(shifted).sum())
    return result


def _rate(count: int, count_min: int, seconds: float) -> float:
    """Tokens per second; 0 for fewer than `count_min`, which tell more of overheads than of the board."""
    return count / seconds if count >= count_min and seconds > 0 else 0.0
