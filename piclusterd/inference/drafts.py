"""Prompt-lookup drafts: what followed the last time the text came this way, guessed and checked in one batch. Pure.

    prompt + answer so far ──the last N tokens, seen before?──▶ what followed there ──rows of the next batch──▶
    logits after each ──sampled as ever──▶ as guessed: the next row's count too │ not: the rest is cut off

A guess changes no answer: each token is sampled from the logits after what really stands before it, as it would have
been alone. It saves a pass over the weights for each one that was right, where an answer repeats its prompt (a summary,
code, a corrected text, JSON). A batch of a few rows costs a board little more than one row, since memory is what it
waits for; but rows of other answers use that better. So nothing is drafted unless one answer is alone with the model.
Source: Saxena, prompt lookup decoding (2023); Leviathan et al., arXiv 2211.17192.
"""

from __future__ import annotations

N = 3
"""Tokens that must have been seen in a row: two come by chance too often, four miss the beginnings of what repeats."""
FIRST = 3
"""Tokens guessed at first: with the one that is read anyway, a group of llama.cpp's kernels for repacked weights."""
REST = 8
"""Tokens written without a guess after one that was all wrong."""


class Drafts:
    """Of one answer: at most `most` tokens at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0
        """Tokens whose beginnings are in `_after`."""
        self._length = min(FIRST, most)
        self._not_before = 0

    def guess(self, tokens: list[int], room: int) -> list[int]:
        """What may follow `tokens`, at most `room`; they only ever grow."""
        for end in range(max(self._seen, N), len(tokens)):
            self._after[tuple(tokens[end - N : end])] = end
        self._seen = len(tokens)
        at = self._after.get(tuple(tokens[-N:]))
        if at is None or len(tokens) < self._not_before:
            return []
        return tokens[at : at + min(self._length, room)]

    def judged(self, guessed: int, right: int, length: int) -> None:
        """Of a guess so many were right; the answer's tokens are `length` now. What is right is tried longer."""
        if right == guessed:
            self._length = min(self._most, 2 * self._length + 1)
        else:
            self._length = min(self._most, FIRST)
        if not right:
            self._not_before = length + REST


def alone(active: int, waiting: int, remaining: int, answering: bool) -> bool:
    """Whether a guess may be read: one answer is being written, by its one next token, and nobody waits."""
    return active == 1 and not waiting and answering and remaining == 1
