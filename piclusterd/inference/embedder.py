"""A second context over the weights, made when first asked for, that pools each sequence into one vector.

    submit ──▶ jobs ──step: one pack of texts──▶ … ──all of a job──▶ Embedded | Failed

The vectors' context is apart from the one answers are written in: nothing resident there is lost. One thread owns it.
Runs only in the child.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import llama_cpp as lib
import numpy as np

from ..errors import Broken, UserError
from .faults import failed
from .llama import Batch, Weights, last_errors
from .protocol import Embedded, Failed

EMBED_TOKENS_MAX = 2048
"""Tokens of one text to embed. It has to fit one physical batch, whose buffers grow with it."""
EMBED_SEQUENCES = 16
"""Texts pooled in one decode."""


class Embedder:
    """A context that turns texts into vectors of length 1, pooled as the model says, or else by the mean."""

    def __init__(self, weights: Weights, threads: int) -> None:
        self._weights = weights
        self.room = min(EMBED_TOKENS_MAX, weights.context_trained)
        self._pointer = self._open(lib.LLAMA_POOLING_TYPE_UNSPECIFIED, threads)
        if lib.llama_pooling_type(self._pointer) == lib.LLAMA_POOLING_TYPE_NONE:
            lib.llama_free(self._pointer)
            self._pointer = self._open(lib.LLAMA_POOLING_TYPE_MEAN, threads)
        self._batch = Batch(self.room, 1)

    def _open(self, pooling: int, threads: int) -> Any:
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.room
        params.n_seq_max = EMBED_SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.pooling_type, params.embeddings, params.kv_unified = pooling, True, True
        pointer = lib.llama_init_from_model(self._weights.model, params)
        if not pointer:
            raise Broken("llama.cpp cannot make a context for embeddings", " ".join(last_errors))
        return pointer

    def close(self) -> None:
        self._batch.close()
        lib.llama_free(self._pointer)

    def embed(self, texts: list[list[int]]) -> list[bytes]:
        """One vector, float32, for each list of tokens. All together they must fit `room` and `EMBED_SEQUENCES`."""
        self._batch.clear()
        for sequence, tokens in enumerate(texts):
            for position, token in enumerate(tokens):
                self._batch.add(token, position, (sequence,), True)
        memory = lib.llama_get_memory(self._pointer)
        if memory:
            lib.llama_memory_clear(memory, False)
        if (status := lib.llama_decode(self._pointer, self._batch.struct)) != 0:
            raise Broken("llama.cpp failed to embed", f"It returned {status}.")
        return [self._vector(sequence) for sequence in range(len(texts))]

    def _vector(self, sequence: int) -> bytes:
        pointer = lib.llama_get_embeddings_seq(self._pointer, sequence)
        if not pointer:
            raise Broken("llama.cpp gave no embedding for a text")
        vector = np.ctypeslib.as_array(pointer, shape=(self._weights.embedding_size,)).astype("<f4")
        norm = float(np.linalg.norm(vector))
        return (vector / norm if norm > 0 else vector).astype("<f4").tobytes()


@dataclass(slots=True)
class _Job:
    id: int
    rest: deque[list[int]]
    tokens: int
    vectors: list[bytes] = field(default_factory=list)


class Embeddings:
    """The queue before an `Embedder`, which is made with the first job."""

    def __init__(self, weights: Weights, threads: int) -> None:
        self._weights = weights
        self._threads = threads
        self._embedder: Embedder | None = None
        self._jobs: deque[_Job] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()

    def submit(self, request_id: int, texts: tuple[str, ...]) -> None:
        """Queue `texts`. Raises `UserError` where one is empty or longer than the model can pool."""
        if self._embedder is None:
            self._embedder = Embedder(self._weights, self._threads)
        lists = [self._weights.tokenise(text, special=False, start=True) for text in texts]
        for number, tokens in enumerate(lists):
            if not tokens or len(tokens) > self._embedder.room:
                fault = f"It has {len(tokens)} tokens; 1 to {self._embedder.room} can be embedded."
                raise UserError(f"input {number} cannot be embedded", fault, param="input")
        self._jobs.append(_Job(request_id, deque(lists), sum(map(len, lists))))

    def cancel(self, request_id: int) -> None:
        self._jobs = deque(job for job in self._jobs if job.id != request_id)

    def step(self) -> list[Embedded | Failed]:
        """Embed one pack of the oldest job; that job's end, if it was the last."""
        if not self._jobs or self._embedder is None:
            return []
        job, room = self._jobs[0], self._embedder.room
        pack: list[list[int]] = []
        while job.rest and len(job.rest[0]) <= room and len(pack) < EMBED_SEQUENCES:
            room -= len(job.rest[0])
            pack.append(job.rest.popleft())
        try:
            job.vectors += self._embedder.embed(pack)
        except Broken as fault:
            self._jobs.popleft()
            return [failed(job.id, fault)]
        if job.rest:
            return []
        self._jobs.popleft()
        return [Embedded(job.id, tuple(job.vectors), job.tokens)]
