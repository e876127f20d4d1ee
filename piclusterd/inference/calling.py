"""Calls of tools as they form: the name as soon as it is certain, then the arguments piece by piece.

    text that may be a call ──Reader.feed──▶ CallPart(index, id, name), CallPart(index, arguments)* … ──▶ `Calling`
      head: {"name": "<an offered one>", "arguments": {   ──▶ a call for certain; told from here on, never taken back
      arguments: until their braces close                 ──▶ the next head, or whatever is left (`Reader.rest`)

Other spellings of a call (arguments first, or as a string) are found when the answer is whole: `tools.find_calls`.
Arguments are told as the model wrote them, so that pieces and whole are the same text; like OpenAI's, they are JSON
unless the model erred or the answer was cut. An answer that goes on elsewhere is read again from its first token by
another `Reader`, which is told of the calls its reader has: ids stay, and no piece comes twice. Pure, apart from
the ids of calls, which are random.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence

from .protocol import TOOLS_MAX, CallPart, Done, ToolCall

HEAD_CHARS_MAX = 512
"""Where a call's name does not come within so much text, the whole answer is waited for: heads are looked at often."""
_HEAD = re.compile(
    r"""(?: <\|python_tag\|> | \[TOOL_CALLS\] | </?tool_call> | ```(?:json)? | [\s;,\[\]}] )*+
    \{ \s* (?: "type" \s* : \s* "function" \s* , \s* )? (?: "function" \s* : \s* \{ \s* )?
    "name" \s* : \s* "([A-Za-z0-9_.-]+)" \s* , \s* "(?:arguments|parameters)" \s* : \s* (?=\{)""",
    re.VERBOSE,
)


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Reader:
    """One answer's calls of `names`, at most `most`. `told`: those that its reader has from another child already."""

    def __init__(self, names: frozenset[str], most: int = TOOLS_MAX, told: Sequence[ToolCall] = ()) -> None:
        self._names, self._most, self._told = names, most, told
        self._found: list[ToolCall] = []
        self._head = ""
        self._arguments: list[str] | None = None
        """Those of the newest call, while they come."""
        self._depth, self._quoted, self._escaped = 0, False, False
        self._given_up = False

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """Those begun, the last with what there is of its arguments."""
        if self._arguments is None:
            return tuple(self._found)
        last = self._found[-1]
        return (*self._found[:-1], ToolCall(last.id, last.name, "".join(self._arguments)))

    @property
    def whole(self) -> bool:
        """No call is open."""
        return self._arguments is None

    @property
    def rest(self) -> str:
        """What followed the last call."""
        return self._head

    def feed(self, text: str) -> list[CallPart]:
        """`text` comes next; what that makes certain."""
        parts: list[CallPart] = []
        while text:
            if self._arguments is not None:
                text = self._argue(text, parts)
            else:
                self._head += text
                text = self._begin(parts)
        return parts

    def _begin(self, parts: list[CallPart]) -> str:
        """Open a call where the head is whole; the text that follows it."""
        if self._given_up or len(self._found) >= self._most:
            return ""
        match = _HEAD.match(self._head)
        if match is None or match[1] not in self._names:
            self._given_up = match is not None or len(self._head) > HEAD_CHARS_MAX
            return ""
        index = len(self._found)
        again = index < len(self._told)
        call = ToolCall(self._told[index].id if again else new_id(), match[1], "")
        self._found.append(call)
        self._arguments = []
        if not again:
            parts.append(CallPart(index, "", call.id, call.name))
        text, self._head = self._head[match.end() :], ""
        return text

    def _argue(self, text: str, parts: list[CallPart]) -> str:
        """Take the arguments out of `text`; what is left of it."""
        assert self._arguments is not None
        end = self._end(text)
        index, before = len(self._found) - 1, sum(map(len, self._arguments))
        self._arguments.append(text[:end])
        known = len(self._told[index].arguments) if index < len(self._told) else 0
        last = self._depth == 0
        new = text[max(0, min(end, known - before)) : end]
        if new:
            parts.append(CallPart(index, new, last=last))
        if last:
            self._found = list(self.calls)
            self._arguments = None
        return text[end:]

    def _end(self, text: str) -> int:
        """Where in `text` the arguments end; its length where they go on."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{}":
                self._depth += 1 if char == "{" else -1
                if self._depth == 0:
                    return at + 1
        return len(text)


class Calling:
    """What a reader has of an answer's calls."""

    def __init__(self) -> None:
        self._calls: list[ToolCall] = []

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(self._calls)

    def add(self, parts: Iterable[CallPart]) -> None:
        for part in parts:
            if part.index >= len(self._calls):
                self._calls.append(ToolCall(part.id, part.name, part.arguments))
            else:
                call = self._calls[part.index]
                self._calls[part.index] = ToolCall(call.id, call.name, call.arguments + part.arguments)

    def rest(self, done: Done) -> list[CallPart]:
        """What is not told yet of the calls that the answer ends with."""
        parts = []
        for index, call in enumerate(done.tool_calls):
            if index >= len(self._calls):
                parts.append(CallPart(index, call.arguments, call.id, call.name, True))
            elif left := call.arguments[len(self._calls[index].arguments) :]:
                parts.append(CallPart(index, left, last=True))
        return parts
