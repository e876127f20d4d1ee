"""A real encoder (BERT) through the llama child: what means the same is near, and it says that it cannot write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from piclusterd.errors import UserError

from .rig import GREEDY, collected, pool_of, spec

ALIKE = (
    ("The app crashes when I save a file", "Saving a document makes the program quit"),
    ("Please add a dark theme", "Feature request: dark mode"),
    ("How do I reset my password?", "I forgot my password and cannot get a new one"),
    ("Upgrade the linter in CI", "Bump the CI linter to the newest version"),
)


async def test_what_means_the_same_is_nearer_than_anything_else(encoder_gguf: Path) -> None:
    async with pool_of([spec(encoder_gguf, "minilm")]) as pool:
        first = await pool.embed("minilm", [one for one, _ in ALIKE])
        second = await pool.embed("minilm", [other for _, other in ALIKE])
    nearness = _matrix(first.vectors) @ _matrix(second.vectors).T
    assert nearness.argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert nearness.diagonal().min() > 0.5


async def test_an_encoder_is_for_embeddings_only(encoder_gguf: Path) -> None:
    async with pool_of([spec(encoder_gguf, "minilm")]) as pool:
        (facts,) = pool.facts()
        assert (facts.tasks, facts.embeddings) == (("embed",), True)
        with pytest.raises(UserError, match="cannot generate"):
            await collected(pool.generate("minilm", GREEDY))
        assert len((await pool.embed("minilm", ["still there"])).vectors) == 1


def _matrix(vectors: tuple[bytes, ...]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.array([np.frombuffer(vector, "<f4") for vector in vectors])
