"""Answers written by `generate` of transformers, several side by side, each with its own settings. Child only.

    rows ──padded on the left──▶ generate ──each step──▶ Choose: a token a row ──▶ Watch: told, ended or cancelled

`generate` knows each architecture's ways (caches, first tokens, beams); two hooks give every row its own sampling and
its own end, so that requests of any kind share a batch. Models that were tuned to summarize with beams keep their
beams: their answer is told when it is whole. Runs in the thread of `hf.HfEngine`; only `Row.cancelled` is set from
outside.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .detokenise import TextStream
from .hf_model import HfModel
from .hf_text import TokenStream
from .protocol import Delta, Done, GenerateRequest

REPEAT_TOKENS = 64
"""So many of the last tokens are penalised, as llama.cpp does."""
RATE_TOKENS_MIN = 16
"""Prompts shorter than this tell more of overheads than of the board's speed."""

Emit = Callable[[Delta | Done], None]
Reason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True, eq=False)
class Row:
    """One request in a batch."""

    id: int
    request: GenerateRequest
    prompt: list[int]
    limit: int
    """Tokens its answer may have."""
    tokens: TokenStream
    text: TextStream
    random: torch.Generator
    cancelled: bool = False
    ended: bool = False
    written: list[int] = field(default_factory=list)
    _untold: str = ""
    unreported: int = 0
    skip: int = 0
    """Characters of its text that another child has told already."""
    started: float = 0.0
    first: float = 0.0

    def choose(self, scores: torch.Tensor) -> int:
        """The next token, by the row's own settings (in llama.cpp's order: penalties, cuts, temperature)."""
        asked = self.request
        scores = self._penalised(scores)
        if asked.temperature == 0:
            return int(scores.argmax())
        count = min(asked.top_k or scores.numel(), scores.numel())
        best, tokens = scores.topk(count)
        shares = best.softmax(dim=0)
        kept = (shares.cumsum(dim=0) - shares < asked.top_p) & (shares >= asked.min_p * shares[0])
        kept[0] = True
        weights = (best.masked_fill(~kept, -torch.inf) / asked.temperature).softmax(dim=0)
        return int(tokens[torch.multinomial(weights, 1, generator=self.random)])

    def _penalised(self, scores: torch.Tensor) -> torch.Tensor:
        asked = self.request
        if asked.repeat_penalty == 1 and not asked.frequency_penalty and not asked.presence_penalty:
            return scores
        recent = torch.tensor([*self.prompt, *self.written][-REPEAT_TOKENS:])
        seen, counts = recent.unique(return_counts=True)
        values = scores[seen]
        values = torch.where(values > 0, values / asked.repeat_penalty, values * asked.repeat_penalty)
        scores = scores.clone()
        scores[seen] = values - asked.frequency_penalty * counts - asked.presence_penalty
        return scores

    def took(self, token: int, ends: frozenset[int], emit: Emit) -> None:
        """`token` is its next; tells what that makes certain."""
        self.first = self.first or time.perf_counter()
        if self.cancelled:
            self.end("cancelled", emit)
            return
        if token in ends:
            self.end("stop", emit)
            return
        self.written.append(token)
        self.unreported += 1
        self._tell(self.text.push(self.tokens.push(token)), emit)
        if self.text.stopped:
            self.end("stop", emit)
        elif len(self.written) >= self.limit:
            self.end("length", emit)

    def end(self, reason: Reason, emit: Emit) -> None:
        now = time.perf_counter()
        if reason != "cancelled":
            self._tell(self.text.push(self.tokens.finish()) + self.text.finish(), emit)
        self.ended = True
        read, wrote = len(self.prompt), len(self.written) - 1
        emit(
            Done(
                id=self.id,
                reason=reason,
                prompt_tokens=read,
                completion_tokens=len(self.written),
                prefill_tps=read / (self.first - self.started) if self.first and read >= RATE_TOKENS_MIN else 0.0,
                decode_tps=wrote / (now - self.first) if self.first and wrote > 0 else 0.0,
            )
        )

    def take_up(self, tokens: Sequence[int]) -> None:
        """Go on after `tokens`, which another child has told."""
        for token in tokens:
            self.written.append(token)
            self._untold += self.text.push(self.tokens.push(token))

    def _tell(self, text: str, emit: Emit) -> None:
        text, self._untold = self._untold + text, ""
        text, self.skip = text[self.skip :], max(0, self.skip - len(text))
        if text:
            ids = tuple(self.written[len(self.written) - self.unreported :])
            emit(Delta(self.id, text, self.unreported, (), ids))
            self.unreported = 0


class Choose(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row's scores only the token that the row takes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        for number, row in enumerate(self._rows):
            only[number, 0 if row.ended else row.choose(scores[number].float())] = 0.0
        return only


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Sees each row's newest token; true for rows that have ended."""

    def __init__(self, rows: Sequence[Row], ends: frozenset[int], emit: Emit, beams: int) -> None:
        self._rows, self._ends, self._emit, self._beams = rows, ends, emit, beams

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._beams > 1:  # what a beam holds is not yet what will be said
            over = all(row.cancelled for row in self._rows)
            return torch.full((input_ids.shape[0],), over)
        for number, row in enumerate(self._rows):
            if not row.ended:
                row.took(int(input_ids[number, -1]), self._ends, self._emit)
        return torch.tensor([row.ended for row in self._rows])


def write(model: HfModel, rows: Sequence[Row], emit: Emit) -> None:
    """Write all answers. Returns once each has ended, with its `Done` told."""
    settings = _settings(model, max(row.limit for row in rows))
    ends = ends_of(model)
    tokens, mask = model.padded([[*row.prompt, *row.written] for row in rows], left=not model.config.is_encoder_decoder)
    for row in rows:
        row.started = time.perf_counter()
    with torch.inference_mode():
        found = model.module.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([] if settings.num_beams > 1 else [Choose(rows)]),
            stopping_criteria=StoppingCriteriaList([Watch(rows, ends, emit, settings.num_beams)]),
        )
    start = 1 if model.config.is_encoder_decoder else tokens.shape[1]
    for row, sequence in zip(rows, found.tolist(), strict=True):
        for token in sequence[start:] if settings.num_beams > 1 else ():
            if not row.ended:
                row.took(token, ends, emit)
        if not row.ended:
            row.end("cancelled" if row.cancelled else "length", emit)


def ends_of(model: HfModel) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.module.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _settings(model: HfModel, limit: int) -> Any:
    """The model's own settings of generation, with what is ours to say put in."""
    settings = copy.deepcopy(model.module.generation_config)
    settings.do_sample = False  # `Choose` samples
    settings.temperature = settings.top_k = settings.top_p = settings.min_p = settings.typical_p = None
    settings.max_length, settings.max_new_tokens = None, limit
    settings.pad_token_id = model.filler
    settings.num_beams = settings.num_beams or 1 if model.config.is_encoder_decoder else 1
    settings.num_return_sequences = 1
    settings.return_dict_in_generate = False
    return settings
