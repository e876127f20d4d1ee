"""What a grammar forces: the text that must come next, found without the model. Pure.

    GBNF ──parse──▶ rules ──▶ Follower ──feed(text)──▶ where the answer may stand ──forced()──▶ the only continuation

Half of a JSON answer is its frame: once `{"type": "b` is there and only `bug` is allowed, `ug", "priority": "` follows
whatever the model thinks. Such text is appended as one batch instead of sampled token by token.

llama.cpp's grammar stays the judge of what is allowed; this follows it character by character with the same rules and
gives up (`lost`) where it cannot: then nothing is forced and nothing else changes. A stack is what is yet to come, the
nearest first: linked pairs `((alternative, at), rest)`; an empty one is the grammar's end. Source: llama.cpp's
`llama-grammar.cpp`; jump-forward decoding as in SGLang (arXiv 2312.07104).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STACKS_MAX = 128
"""Ways to read one answer at a time. A JSON schema needs a handful; more would cost more than they save."""
FORCED_MAX = 256
"""Characters forced at a time: one batch takes them."""
GRAMMAR_CHARS_MAX = 64 * 1024
"""A larger grammar is not followed: parsing it would hold up the other answers."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of, or (`negated`) none of, the ranges."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def holds(self, char: str) -> bool:
        code = ord(char)
        return any(low <= code <= high for low, high in self.ranges) != self.negated

    @property
    def only(self) -> str:
        """The character, where just one is allowed; else empty."""
        if self.negated or len(self.ranges) != 1 or self.ranges[0][0] != self.ranges[0][1]:
            return ""
        return chr(self.ranges[0][0])


Element = Chars | str
"""A character, or the name of a rule."""
Alternative = tuple[Element, ...]
Stack = tuple[Any, ...]
"""`()` or `((alternative, at), rest)`."""

_TOKEN = re.compile(
    r"""\s*(?: (?P<literal>"(?:[^"\\]|\\.)*") | (?P<class>\[(?:[^\]\\]|\\.)*\]) | (?P<name>[A-Za-z0-9-]+)
      | (?P<mark>::=|[()|*+?]) )""",
    re.VERBOSE,
)
_CHAR = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(slots=True)
class _Group:
    """An open parenthesis, or a whole rule: the alternatives so far, and the elements of the one being read."""

    alternatives: list[list[Element]] = field(default_factory=lambda: [[]])

    def done(self) -> tuple[Alternative, ...]:
        return tuple(tuple(elements) for elements in self.alternatives)


class Grammar:
    """The rules of a GBNF text of one rule a line. Raises ValueError where it has more than the converter writes."""

    def __init__(self, text: str) -> None:
        if len(text) > GRAMMAR_CHARS_MAX:
            raise ValueError("the grammar is too large to follow")
        self.rules: dict[str, tuple[Alternative, ...]] = {}
        for line in text.splitlines():
            self._rule(line)

    def _rule(self, line: str) -> None:
        name, mark, body = line.partition(" ::= ")
        if not mark:
            raise ValueError(f"not a rule: {line[:40]}")
        open_groups = [_Group()]
        at = 0
        while body[at:].strip():
            match = _TOKEN.match(body, at)
            if match is None:
                raise ValueError(f"cannot read {body[at : at + 20]}")
            at = match.end()
            self._read(match, open_groups)
        if len(open_groups) != 1:
            raise ValueError("a parenthesis is not closed")
        self.rules[name] = open_groups[0].done()

    def _read(self, match: re.Match[str], groups: list[_Group]) -> None:
        elements = groups[-1].alternatives[-1]
        if literal := match["literal"]:
            elements.append(self._new((tuple(Chars(((code, code),)) for code in _codes(literal[1:-1])),)))
        elif ranges := match["class"]:
            elements.append(_class(ranges[1:-1]))
        elif name := match["name"]:
            elements.append(name)
        elif match["mark"] == "(":
            groups.append(_Group())
        elif match["mark"] == ")" and len(groups) > 1:
            closed = self._new(groups.pop().done())
            groups[-1].alternatives[-1].append(closed)
        elif match["mark"] == "|":
            groups[-1].alternatives.append([])
        elif match["mark"] in "*+?" and elements:
            elements.append(self._repeated(elements.pop(), match["mark"]))
        else:
            raise ValueError(f"{match['mark']} does not belong there")

    def _repeated(self, element: Element, mark: str) -> str:
        if mark == "?":
            return self._new(((element,), ()))
        name = self._new(())
        self.rules[name] = ((element, name), ()) if mark == "*" else ((element, name), (element,))
        return name

    def _new(self, alternatives: tuple[Alternative, ...]) -> str:
        name = f"_{len(self.rules)}"  # the converter's names have no underscore
        self.rules[name] = alternatives
        return name


class Follower:
    """Where one answer may stand in `grammar`. `lost`: it cannot tell any more, and forces nothing."""

    def __init__(self, grammar: Grammar) -> None:
        self._rules = grammar.rules
        self._stacks = self._closed([((alternative, 0), ()) for alternative in self._rules["root"]])

    @property
    def lost(self) -> bool:
        return not self._stacks

    @property
    def ended(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return self._stacks == [()]

    def feed(self, text: str) -> None:
        """`text` has been added to the answer."""
        for char in text:
            self._stacks = self._after(char)

    def forced(self) -> str:
        """The longest text that must follow, at most `FORCED_MAX` characters; `feed` it, if it is used."""
        kept, found = self._stacks, ""
        while len(found) < FORCED_MAX and (char := self._only()):
            found += char
            self._stacks = self._after(char)
        self._stacks = kept
        return found

    def _only(self) -> str:
        chars = {stack[0][0][stack[0][1]].only if stack else "" for stack in self._stacks}
        return chars.pop() if len(chars) == 1 else ""

    def _after(self, char: str) -> list[Stack]:
        moved = []
        for stack in self._stacks:
            if stack and stack[0][0][stack[0][1]].holds(char):
                (alternative, at), rest = stack
                moved.append(((alternative, at + 1), rest))
        return self._closed(moved)

    def _closed(self, stacks: Iterable[Stack]) -> list[Stack]:
        """`stacks` with rules opened until each begins with a character or is at its end; empty where too many."""
        pending, seen, found = list(stacks), set[Stack](), list[Stack]()
        while pending:
            stack = pending.pop()
            while stack and stack[0][1] == len(stack[0][0]):
                stack = stack[1]
            if stack in seen:
                continue
            seen.add(stack)
            if len(seen) > STACKS_MAX:
                return []
            if not stack or isinstance(stack[0][0][stack[0][1]], Chars):
                found.append(stack)
                continue
            (alternative, at), rest = stack
            if at + 1 < len(alternative):
                rest = ((alternative, at + 1), rest)
            pending += [((way, 0), rest) if way else rest for way in self._rules[alternative[at]]]
        return found


def _codes(text: str) -> list[int]:
    codes = []
    for match in _CHAR.finditer(text):
        number = match[1] or match[2] or match[3]
        codes.append(int(number, 16) if number else ord(_ESCAPES.get(match[4], match[4]) if match[4] else match[5]))
    return codes


def _class(text: str) -> Chars:
    negated, text = text.startswith("^"), text.removeprefix("^")
    ranges = []
    marks = [(match[0], _codes(match[0])[0]) for match in _CHAR.finditer(text)]
    at = 0
    while at < len(marks):
        if at + 2 < len(marks) and marks[at + 1][0] == "-":
            ranges.append((marks[at][1], marks[at + 2][1]))
            at += 3
        else:
            ranges.append((marks[at][1], marks[at][1]))
            at += 1
    return Chars(tuple(ranges), negated)
