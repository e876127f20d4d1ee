"""Continuous batching: many answers side by side through one context, a bounded step at a time.

    submit ──▶ waiting (FIFO) ──admit: a slot and room──▶ active ──step──▶ Delta*, Done
                   ▲                                        │
                   └────── preempted: KV memory is full ◀───┘

A step is one decode: the next token of every answer first, then a chunk of the prompts still being read, sized so that
the answers are not held up for long. It owns which sequence holds which slot, and what is resident in each slot's KV
memory: a new prompt takes the free slot with which it shares the longest beginning and reads only the rest.

Invariants: `slot.resident` is exactly what the KV memory holds of that slot; `sequence.past == len(slot.resident)`; the
last token of an active sequence is never in the memory yet (its logits are what is wanted). When memory runs out, idle
slots are emptied, oldest first; then the youngest answer goes back to the front of the queue with all its tokens, to
be read again later: slower, never failed. A request alone always fits, since it is clamped to the context.

Sources: Orca (Yu et al., OSDI 2022) for iteration-level scheduling, Sarathi (arXiv 2308.16369) for chunked prefill.
One thread owns an engine. Runs only in the child.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from ..errors import Broken, PiclusterError, UserError
from .chat import CHATML, ChatTemplate
from .detokenise import TextStream
from .llama import BATCH_TOKENS, EMBED_SEQUENCES, Context, Embedder, KvFull, Sampler, Weights
from .protocol import Delta, Done, Embedded, Failed, GenerateRequest, Load, Ready, failed

CHUNK_TOKENS_MIN = 32
"""Prompt tokens read in a step beside answers: fewer waste the matrix kernels."""
CHUNK_SECONDS = 0.25
"""How long reading prompts may hold up the answers in a step: a pause a reader hardly notices."""
EXPECTED_ANSWER = 64
"""Tokens an answer is taken to need when it is admitted: reserving all of `max_tokens` would leave most memory idle."""
SMOOTHING = 0.3
"""Weight of the newest measurement of prefill speed."""

Output = Delta | Done | Embedded | Failed


@dataclass(slots=True)
class _Sequence:
    id: int
    tokens: list[int]
    prompt_length: int
    limit: int
    """Tokens the answer may have."""
    sampler: Sampler
    text: TextStream
    slot: int = -1
    past: int = 0
    cached: int = 0
    unreported: int = 0
    """Tokens since the last Delta."""
    started: float = 0.0
    first: float = 0.0
    """When its prompt began to be read, and when its first token was there; seconds."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.past

    @property
    def expected(self) -> int:
        return len(self.tokens) + min(self.limit - self.generated, EXPECTED_ANSWER)


@dataclass(slots=True)
class _Slot:
    resident: list[int] = field(default_factory=list)
    owner: _Sequence | None = None
    used: int = 0
    """Step in which it was last used."""


@dataclass(slots=True)
class _EmbedJob:
    id: int
    rest: deque[list[int]]
    tokens: int
    vectors: list[bytes] = field(default_factory=list)


class Engine:
    """One model and its context. Raises `UserError` where the file cannot be loaded."""

    def __init__(self, load: Load) -> None:
        self._weights = Weights(load.path)
        self._context = Context(self._weights, load.context, load.slots, load.threads, load.batch_threads)
        self._template = ChatTemplate(
            self._weights.chat_template or CHATML,
            self._weights.special_texts(),
            self._weights.bos_text(),
            self._weights.eos_text(),
        )
        self._embed_threads = load.batch_threads
        self._embedder: Embedder | None = None
        self._slots = [_Slot() for _ in range(load.slots)]
        self._active: list[_Sequence] = []  # in the order of admission
        self._waiting: deque[_Sequence] = deque()
        self._embeds: deque[_EmbedJob] = deque()
        self._out: list[Output] = []
        self._steps = 0
        self._prefill_tps = 0.0
        self.context = min(self._context.size, self._weights.context_trained)

    def close(self) -> None:
        for sequence in (*self._active, *self._waiting):
            sequence.sampler.close()
        if self._embedder is not None:
            self._embedder.close()
        self._context.close()
        self._weights.close()

    def ready(self) -> Ready:
        weights = self._weights
        name = weights.metadata("general.name")
        return Ready(self.context, weights.embedding_size, weights.description, name, weights.template_sha256)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._active or self._waiting or self._embeds or self._out)

    # asking ------------------------------------------------------------------------------------------------------
    def submit(self, request_id: int, request: GenerateRequest) -> None:
        """Queue a completion. Raises `UserError` (prompt too long, schema refused, template refused the chat)."""
        tokens = self.prompt_tokens(request)
        if len(tokens) >= self.context:
            raise UserError(
                f"the prompt has {len(tokens)} tokens",
                f"The context of this model is {self.context} tokens, and the answer needs at least one.",
                "Shorten it, or give the model a larger `context` in the configuration.",
                param="messages" if request.messages else "prompt",
            )
        seed = secrets.randbits(32) if request.seed is None else request.seed
        limit = self.context - len(tokens)
        self._waiting.append(
            _Sequence(
                id=request_id,
                tokens=tokens,
                prompt_length=len(tokens),
                limit=min(limit, request.max_tokens or limit),
                sampler=Sampler(self._weights, request, seed),
                text=TextStream(request.stop),
            )
        )

    def prompt_tokens(self, request: GenerateRequest) -> list[int]:
        """The prompt as the model will read it. Raises `UserError` where template or request make none."""
        weights = self._weights
        if not request.messages:
            return weights.tokenise(request.prompt, special=True, start=True) or self._empty_prompt()
        pieces = self._template.pieces(request.messages)
        bos = weights.bos_text()
        tokens: list[int] = []
        for number, (text, special) in enumerate(pieces):
            start = number == 0 and not (bos and text.startswith(bos))  # most templates write BOS themselves
            tokens += weights.tokenise(text, special, start)
        return tokens or self._empty_prompt()

    def _empty_prompt(self) -> list[int]:
        raise UserError("the prompt is empty", "There is nothing to continue.", param="prompt")

    def submit_embed(self, request_id: int, texts: tuple[str, ...]) -> None:
        """Queue texts to embed. Raises `UserError` where one is empty or longer than the model can pool."""
        if self._embedder is None:
            self._embedder = Embedder(self._weights, self._embed_threads)
        lists = [self._weights.tokenise(text, special=False, start=True) for text in texts]
        for number, tokens in enumerate(lists):
            if not tokens or len(tokens) > self._embedder.room:
                fault = f"It has {len(tokens)} tokens; 1 to {self._embedder.room} can be embedded."
                raise UserError(f"input {number} cannot be embedded", fault, param="input")
        self._embeds.append(_EmbedJob(request_id, deque(lists), sum(map(len, lists))))

    def cancel(self, request_id: int) -> None:
        """Stop the request; its slot is free at once. One that is not here any more is ignored."""
        for sequence in (*self._active, *self._waiting):
            if sequence.id == request_id:
                self._finish(sequence, "cancelled")
        self._embeds = deque(job for job in self._embeds if job.id != request_id)

    # working -----------------------------------------------------------------------------------------------------
    def step(self) -> list[Output]:
        """One decode and one pack of embeddings at most; what they produced, in order."""
        self._steps += 1
        self._admit()
        self._decode()
        self._embed()
        out, self._out = self._out, []
        return out

    def _admit(self) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            free = [number for number, slot in enumerate(self._slots) if slot.owner is None]
            needed = sequence.expected + sum(active.expected for active in self._active)
            if not free or (self._active and needed > self._context.size):
                return
            self._waiting.popleft()
            self._seat(sequence, free)

    def _seat(self, sequence: _Sequence, free: list[int]) -> None:
        """Give `sequence` the free slot whose resident tokens it can use most of; among equals the longest unused."""
        shared = {number: _common(self._slots[number].resident, sequence.tokens) for number in free}
        number = max(free, key=lambda n: (shared[n], -self._slots[n].used))
        keep = min(shared[number], len(sequence.tokens) - 1) if self._weights.prefix_reusable else 0
        slot = self._slots[number]
        if not self._context.keep(number, keep):
            self._context.keep(number, 0)
            keep = 0
        del slot.resident[keep:]
        slot.owner, sequence.slot, sequence.past = sequence, number, keep
        if not sequence.generated:
            sequence.cached, sequence.started = keep, time.perf_counter()
        self._active.append(sequence)

    def _decode(self) -> None:
        while plan := self._plan():
            wanted = sum(count for _, count in plan)
            resident = sum(len(slot.resident) for slot in self._slots)
            try:
                if resident + wanted > self._context.size:
                    raise KvFull("the KV memory is full")
                self._run(plan)
                return
            except KvFull:
                if not self._free_some():
                    self._finish(plan[0][0], "length")
            except Broken as fault:
                self._fail_all(fault)

    def _plan(self) -> list[tuple[_Sequence, int]]:
        """Which sequences advance, and by how many tokens: answers by their one, prompts by what room is left."""
        answers = [(sequence, 1) for sequence in self._active if sequence.remaining == 1]
        room = min(self._chunk(bool(answers)), BATCH_TOKENS - len(answers))
        prompts = []
        for sequence in self._active:
            if sequence.remaining > 1 and room > 0:
                count = min(room, sequence.remaining)
                prompts.append((sequence, count))
                room -= count
        return answers + prompts

    def _chunk(self, answering: bool) -> int:
        if not answering or not self._prefill_tps:
            return BATCH_TOKENS
        return max(CHUNK_TOKENS_MIN, int(self._prefill_tps * CHUNK_SECONDS))

    def _run(self, plan: list[tuple[_Sequence, int]]) -> None:
        self._context.clear_batch()
        rows: list[int] = []
        for sequence, count in plan:
            row = -1
            for position in range(sequence.past, sequence.past + count):
                last = position == len(sequence.tokens) - 1
                added = self._context.add(sequence.tokens[position], position, sequence.slot, last)
                row = added if last else -1
            rows.append(row)
        began = time.perf_counter()
        self._context.decode()
        self._measure(plan, time.perf_counter() - began)
        for (sequence, count), row in zip(plan, rows, strict=True):
            slot = self._slots[sequence.slot]
            slot.resident += sequence.tokens[sequence.past : sequence.past + count]
            slot.used = self._steps
            sequence.past += count
            if row >= 0:
                self._take(sequence, self._context.sample(sequence.sampler, row))

    def _measure(self, plan: list[tuple[_Sequence, int]], seconds: float) -> None:
        prompt = sum(count for _, count in plan if count > 1)
        if prompt >= CHUNK_TOKENS_MIN and seconds > 0:
            newest = prompt / seconds  # answers in the same batch make it an underestimate: the careful side
            self._prefill_tps += (newest - self._prefill_tps) * (SMOOTHING if self._prefill_tps else 1.0)

    def _take(self, sequence: _Sequence, token: int) -> None:
        """`token` is the next of `sequence`."""
        if not sequence.first:
            sequence.first = time.perf_counter()
        if self._weights.ends(token):
            self._finish(sequence, "stop")
            return
        sequence.tokens.append(token)
        sequence.unreported += 1
        self._say(sequence, sequence.text.push(self._weights.piece(token)))
        if sequence.text.stopped:
            self._finish(sequence, "stop")
        elif sequence.generated >= sequence.limit:
            self._finish(sequence, "length")

    def _say(self, sequence: _Sequence, text: str) -> None:
        if text:
            self._out.append(Delta(sequence.id, text, sequence.unreported))
            sequence.unreported = 0

    def _finish(self, sequence: _Sequence, reason: Literal["stop", "length", "cancelled"]) -> None:
        self._leave(sequence)
        if reason != "cancelled":
            self._say(sequence, sequence.text.finish())
        now = time.perf_counter()
        read, wrote = sequence.prompt_length - sequence.cached, sequence.generated - 1
        self._out.append(
            Done(
                id=sequence.id,
                reason=reason,
                prompt_tokens=sequence.prompt_length,
                completion_tokens=sequence.generated,
                cached_tokens=sequence.cached,
                prefill_tps=_rate(read, CHUNK_TOKENS_MIN, sequence.first - sequence.started),
                decode_tps=_rate(wrote, 1, now - sequence.first) if sequence.first else 0.0,
            )
        )

    def _leave(self, sequence: _Sequence) -> None:
        """Out of queue or slot. What is resident stays, for the next prompt that begins alike."""
        sequence.sampler.close()
        if sequence.slot < 0:
            self._waiting.remove(sequence)
            return
        self._active.remove(sequence)
        self._slots[sequence.slot].owner = None

    def _free_some(self) -> bool:
        """Empty the longest unused idle slot, or put the youngest of several answers back; False: neither is there."""
        idle = [number for number, slot in enumerate(self._slots) if slot.owner is None and slot.resident]
        if idle:
            self._empty(min(idle, key=lambda n: self._slots[n].used))
            return True
        if len(self._active) < 2:
            return False
        youngest = self._active.pop()
        self._empty(youngest.slot)
        youngest.slot, youngest.past = -1, 0
        self._waiting.appendleft(youngest)
        return True

    def _empty(self, number: int) -> None:
        self._context.keep(number, 0)
        self._slots[number].resident.clear()
        self._slots[number].owner = None

    def _fail_all(self, fault: PiclusterError) -> None:
        """The memory is in an unknown state: everything in it is given up."""
        for sequence in list(self._active):
            self._leave(sequence)
            self._out.append(failed(sequence.id, fault))
        self._context.clear()
        for slot in self._slots:
            slot.resident.clear()

    def _embed(self) -> None:
        if not self._embeds or self._embedder is None:
            return
        job, room = self._embeds[0], self._embedder.room
        pack: list[list[int]] = []
        while job.rest and len(job.rest[0]) <= room and len(pack) < EMBED_SEQUENCES:
            room -= len(job.rest[0])
            pack.append(job.rest.popleft())
        try:
            job.vectors += self._embedder.embed(pack)
        except Broken as fault:
            self._embeds.popleft()
            self._out.append(failed(job.id, fault))
            return
        if not job.rest:
            self._embeds.popleft()
            self._out.append(Embedded(job.id, tuple(job.vectors), job.tokens))


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


def _rate(count: int, count_min: int, seconds: float) -> float:
    """Tokens per second; 0 for fewer than `count_min`, which tell more of overheads than of the board."""
    return count / seconds if count >= count_min and seconds > 0 else 0.0
