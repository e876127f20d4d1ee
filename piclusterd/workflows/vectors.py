"""Vectors of texts, small enough to be kept on every node: int8, compared by their angle.

    a model's floats ─quantised─▶ bytes ─┐
    words of a text ──of_words──▶ bytes ─┴─ likeness(a, b) ─▶ -1 … 1

`of_words` needs no model: each word and each run of three letters falls on a place that its hash names. It finds texts
that share words; a sentence encoder also finds those that share a meaning.

Source: Weinberger et al., "Feature hashing for large scale multitask learning", 2009 (places and signs by hash).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from math import sqrt
from operator import mul

WORDS = "words"
"""The name of `of_words` where an encoder is named."""
DIMS_MAX = 512
"""Numbers of a vector that are kept; a longer one is folded onto so many, which keeps angles nearly as they are."""
WORD_DIMS = 256
WORDS_MAX = 300
"""Of a text: its beginning says what it is about."""
TOP = 127
"""The largest number of an int8 vector."""
_FOLD_SIGNS = 0x9E3779B1
"""Knuth's multiplicative hash: which places of a long vector are turned round before they are added to another."""
_WORD = re.compile(r"[^\W_]+")


def quantised(values: Sequence[float]) -> bytes:
    """`values` as at most DIMS_MAX signed bytes, the largest of them TOP."""
    folded = list(values[:DIMS_MAX])
    for at in range(DIMS_MAX, len(values)):
        folded[at % DIMS_MAX] += values[at] if (at * _FOLD_SIGNS) & 0x8000 else -values[at]
    peak = max((abs(value) for value in folded), default=0.0)
    return bytes(round(value / peak * TOP) & 0xFF for value in folded) if peak > 0 else bytes(len(folded))


def of_words(text: str) -> bytes:
    """The words of `text` and their parts, hashed; how often one occurs counts by its root."""
    places = [0.0] * WORD_DIMS
    for part, count in Counter(_parts(text)).items():
        hashed = zlib.crc32(part.encode("utf-8", "replace"))
        places[hashed % WORD_DIMS] += sqrt(count) * (1.0 if hashed & 0x10000 else -1.0) * (2.0 if part[0] == " " else 1)
    return quantised(places)


def _parts(text: str) -> Iterator[str]:
    for word in _WORD.findall(text.casefold())[:WORDS_MAX]:
        yield f" {word}"
        yield from (word[at : at + 3] for at in range(len(word) - 2))


def likeness(one: bytes, other: bytes) -> float:
    """The cosine of two int8 vectors; 0 where they are of different length or one is null."""
    a, b = memoryview(one).cast("b"), memoryview(other).cast("b")
    if len(a) != len(b):
        return 0.0
    lengths = sum(map(mul, a, a)) * sum(map(mul, b, b))
    return sum(map(mul, a, b)) / sqrt(lengths) if lengths else 0.0
