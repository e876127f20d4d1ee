"""A second context over the weights, made when first asked for, that pools each sequence into one vector.

One thread owns it. Runs only in the child.
"""

from __future__ import annotations

from typing import Any

import llama_cpp as lib
import numpy as np

from ..errors import Broken
from .llama import Batch, Weights, last_errors

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
