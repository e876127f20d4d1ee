"""`choices`: which of some given answers is the most probable, found in one pass over all of them. Pure.

    options ──tokenise whole answers──▶ paths ──common beginning──▶ read once, as more of the prompt
                                          └──what differs──▶ a tree: one token a node, each option a sequence
    logits at every inner node ──log-softmax──▶ log P(option) = sum along its path ──softmax──▶ probabilities
    (a path's last token is never read: what precedes it says how probable it is)

Several fields make a JSON object, one pass a field, each given the choices before it. A path's sum is the logarithm of
the probability that sampling without any constraint would write that option, so options of different length compare as
they are. Dividing by the length instead would favour long options of rare words. Where one option begins another, paths
go on to what ends the option (the mark that closes the value, or the end of the answer), so that "P1" is not favoured
over "P10". Where none does, they end with the option: what follows it is not asked for, and costs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from .protocol import Field

Tokens = list[int]


class Logs(Protocol):
    """Log-probabilities by token: an array, in the engine."""

    def __getitem__(self, token: int, /) -> Any: ...


TREE_TOKENS_MAX = 320
"""Tokens of options in one pass; one option alone stays below (`OPTION_CHARS_MAX`, its name and the marks)."""


@dataclass(frozen=True, slots=True)
class Node:
    """A token of one or more options, `depth` tokens after the common beginning (the first: 0)."""

    token: int
    depth: int
    options: tuple[int, ...]
    parent: int
    """Index of the node before it; -1: the last token of the common beginning."""


class Choosing:
    """The course of one request. `end` is the token that ends an answer; `forks`: how many options go in a pass."""

    def __init__(
        self, fields: Sequence[Field], tokenise: Callable[[str], Tokens], end: int, forks: int
    ) -> None:  # fmt: skip
        self._fields = fields
        self._tokenise = tokenise
        self._end = end
        self._forks = forks
        self._chosen: list[str] = []
        self.probabilities: list[tuple[float, ...]] = []
        self._paths: list[Tokens] = []
        self._wholes: list[Tokens] = []
        self._best_path: Tokens = []
        self._scores: list[float] = []
        self._nodes: list[Node] = []
        self._inner: list[int] = []
        self._settled = self._at = self._group_end = 0
        self._begin()

    @property
    def done(self) -> bool:
        return len(self._chosen) == len(self._fields)

    @property
    def text(self) -> str:
        """The answer, once it is done."""
        return self._written() if self._fields[0].name else self._chosen[0]

    @property
    def common(self) -> Tokens:
        """The answer's tokens that are settled: read after the prompt, before any node."""
        return self._paths[0][: self._settled]

    @property
    def path(self) -> Tokens:
        """All tokens of the answer, once it is done."""
        return self._best_path

    @property
    def group(self) -> range:
        """The options of the next pass, by their numbers; node options count from its start."""
        return range(self._at, self._group_end)

    @property
    def nodes(self) -> list[Node]:
        return self._nodes

    @property
    def inner(self) -> list[int]:
        """Those of `nodes`, by their places, that something follows: the ones to be read."""
        return self._inner

    @property
    def longest(self) -> int:
        """Tokens of the longest answer there may be, about."""
        marks = sum(len(self._tokenise(_json(field.name))) + 6 for field in self._fields if field.name)
        return marks + sum(max(len(self._tokenise(option)) for option in field.options) + 1 for field in self._fields)

    def scored(self, logs: Mapping[int, Logs]) -> None:
        """The pass is over. `logs[node][token]`: log-probability of each child's token after `node` (-1: the root)."""
        for option in self.group:
            path = [node for node in self._nodes if option - self._at in node.options]
            self._scores.append(sum(float(logs[node.parent][node.token]) for node in path))
        self._at = self._group_end
        if self._at == len(self._paths):
            self._choose()
        else:
            self._grow()

    def _choose(self) -> None:
        peak = max(self._scores)
        weights = [math.exp(score - peak) for score in self._scores]
        best = self._scores.index(peak)
        self.probabilities.append(tuple(weight / sum(weights) for weight in weights))
        self._best_path = self._wholes[best]
        self._chosen.append(self._fields[len(self._chosen)].options[best])
        if not self.done:
            self._begin()

    def _begin(self) -> None:
        """The paths of the next field."""
        field = self._fields[len(self._chosen)]
        last = len(self._chosen) == len(self._fields) - 1
        if field.name:
            texts = [self._written(option) for option in field.options]
            bare = [self._tokenise(text[:-1]) for text in texts]
            self._wholes = [self._tokenise(text + ("}" if last else ",")) for text in texts]
        else:
            bare = [self._tokenise(option) for option in field.options]
            self._wholes = [[*tokens, self._end] for tokens in bare]
        self._paths = bare if _told_apart(field.options, bare, self._wholes) else self._wholes
        self._settled = shared(self._paths)
        self._scores = []
        self._at = 0
        self._grow()

    def _written(self, option: str | None = None) -> str:
        """The object so far, with `option` as the next value; whole and closed without one."""
        values = self._chosen if option is None else [*self._chosen, option]
        pairs = zip((field.name for field in self._fields), values, strict=False)
        text = "{" + ", ".join(f"{_json(name)}: {_json(value)}" for name, value in pairs)
        return text + "}" if option is None else text

    def _grow(self) -> None:
        """The tree of as many further options as there are forks and room for."""
        self._nodes = []
        end = self._at
        while end < len(self._paths) and end - self._at < self._forks:
            nodes = tree([path[self._settled :] for path in self._paths[self._at : end + 1]])
            if len(nodes) > TREE_TOKENS_MAX and self._nodes:
                break
            self._nodes = nodes
            end += 1
        self._group_end = end
        self._inner = sorted({node.parent for node in self._nodes} - {-1})
        if not self._nodes:
            self.scored({})  # a single option needs no pass


def _told_apart(options: Sequence[str], bare: Sequence[Tokens], wholes: Sequence[Tokens]) -> bool:
    """Whether no option begins another, and none shares a token with the mark that ends it."""
    ranked = sorted(options)
    if any(after.startswith(before) for before, after in pairwise(ranked)):
        return False
    return all(whole[: len(tokens)] == tokens for tokens, whole in zip(bare, wholes, strict=True))


def tree(paths: Sequence[Tokens]) -> list[Node]:
    """`paths` with their common beginnings folded; parents before children."""
    found: dict[tuple[int, ...], list[int]] = {}
    for option, path in enumerate(paths):
        for length in range(1, len(path) + 1):
            found.setdefault(tuple(path[:length]), []).append(option)
    place = {beginning: index for index, beginning in enumerate(found)}
    return [
        Node(beginning[-1], len(beginning) - 1, tuple(options), place.get(beginning[:-1], -1))
        for beginning, options in found.items()
    ]


def shared(paths: Sequence[Tokens]) -> int:
    """Length of the beginning common to all `paths`."""
    low, high = min(paths), max(paths)
    return next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
