"""Tools of a request: told to the model, demanded of it by a grammar, and found in what it answers.

    request ──asked──▶ engine ──Delta*──▶ told: text goes on at once, what may be a call is held
                                                └─ a call for certain: told as it forms (`calling`) ──▶ Done(tool_calls)

Models write calls in the way they were taught: `<tool_call>{"name", "arguments"}</tool_call>` (Hermes, Qwen), bare JSON
with `parameters` (Llama 3), a list of such (Mistral). What was held and is no call of a tool that was offered is told
as text after all. Where a call is demanded, a schema of all offered tools leaves no other answer. For templates that
know no tools, they are told in the system message, the way Hermes models were taught. Nothing here calls anything.
Pure, apart from the ids of calls, which are random. Runs only in the child.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ..errors import UserError
from .calling import Reader, new_id
from .protocol import (
    TOOLS_MAX,
    CallPart,
    ChatMessage,
    Delta,
    Done,
    Failed,
    Frame,
    GenerateRequest,
    TokenLogprob,
    Told,
    ToolCall,
)

NAMED = "name:"
NOTHING = Told()
OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGINNINGS = ("{", "[", "<|python_tag|>")
"""An answer that begins so may be a call as a whole."""
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
"""Of a function whose tool names none, as OpenAI means it."""
_PREFIX = re.compile(r"^\s*(<\|python_tag\|>|\[TOOL_CALLS\]|```(json)?)?\s*")
_DECODER = json.JSONDecoder()


class ToolCalls:
    """Between the socket and the engine of a child: requests with tools, and the answers to them."""

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}

    def asked(self, number: int, request: GenerateRequest) -> GenerateRequest:
        """`request` as the engine shall have it. Raises `UserError` where its tools are none."""
        if not request.tools:
            return request
        if request.tool_choice == "none":
            return msgspec.structs.replace(request, tools="")
        tools = read_tools(request.tools)
        names = frozenset(tool["function"]["name"] for tool in tools)
        self._watches[number] = Watch(names, request.parallel_tool_calls, request.told)
        if request.tool_choice == "auto":
            return request
        wanted = request.tool_choice.removeprefix(NAMED) if request.tool_choice.startswith(NAMED) else ""
        return msgspec.structs.replace(request, json_schema=call_schema(tools, wanted))

    def told(self, frames: Iterable[Frame]) -> list[Frame]:
        """`frames` of the engine as the pool shall have them."""
        out: list[Frame] = []
        for frame in frames:
            watch = self._watches.get(getattr(frame, "id", 0))
            match frame:
                case Delta() if watch is not None:
                    out += watch.push(frame)
                case Done() if watch is not None:
                    out += watch.finish(frame)
                    self.forget(frame.id)
                case _:
                    if isinstance(frame, Failed):
                        self.forget(frame.id)
                    out.append(frame)
        return out

    def forget(self, number: int) -> None:
        self._watches.pop(number, None)


class Watch:
    """One answer. `told`: what another child has told of its beginning."""

    def __init__(self, names: frozenset[str], parallel: bool, told: Told = NOTHING) -> None:
        self._names = names
        self._parallel = parallel
        self._plain = told.chars > 0
        """Whether it has begun with something that is no call."""
        self._reader = Reader(names, TOOLS_MAX if parallel else 1, told.calls)
        self._reading = False
        """Whether all that comes goes to the reader."""
        self._held = ""
        self._tokens = 0
        self._ids: tuple[int, ...] = ()
        self._logprobs: tuple[TokenLogprob, ...] = ()

    def push(self, delta: Delta) -> list[Delta]:
        self._held += delta.text
        self._tokens += delta.tokens
        self._ids += delta.ids
        self._logprobs += delta.logprobs
        if self._reading:
            return self._release(delta.id, 0, self._reader.feed(delta.text))
        plain = self._certain()
        rest = self._held[plain:]
        self._reading = rest.startswith(OPEN) or (not self._plain and rest.lstrip().startswith(BEGINNINGS))
        return self._release(delta.id, plain, self._reader.feed(rest) if self._reading else [])

    def _certain(self) -> int:
        """How much of what is held is text for certain."""
        if not self._plain:
            begun = self._held.lstrip()
            if not begun or begun.startswith(BEGINNINGS):
                return 0
            if any(form.startswith(begun) for form in BEGINNINGS):
                return 0
            self._plain = True
        at = self._held.find(OPEN)
        if at >= 0:
            return at
        return len(self._held) - _overlap(self._held, OPEN)

    def _release(self, number: int, length: int, parts: Sequence[CallPart] = ()) -> list[Delta]:
        text, self._held = self._held[:length], self._held[length:]
        if not text and not parts:
            return []
        told = Delta(number, text, self._tokens, self._logprobs if text else (), self._ids, tuple(parts))
        self._tokens, self._ids, self._logprobs = 0, (), ()
        return [told]

    def finish(self, done: Done) -> list[Frame]:
        if done.reason == "cancelled":
            return [done]
        told = self._reader.calls
        if self._parallel or not told:
            told += find_calls(self._reader.rest if told else self._held, self._names)
        if not told:
            return [*self._release(done.id, len(self._held)), done]
        reason = "stop" if self._reader.whole else done.reason
        return [msgspec.structs.replace(done, reason=reason, tool_calls=told[: TOOLS_MAX if self._parallel else 1])]


def find_calls(text: str, names: frozenset[str]) -> tuple[ToolCall, ...]:
    """The calls that `text` is made of; none where it holds anything else."""
    bodies = [body.partition(CLOSE)[0] for body in text.split(OPEN)[1:]] if OPEN in text else [text]
    found: list[ToolCall] = []
    for body in bodies:
        calls = [_call(value, names) for value in _values(_PREFIX.sub("", body, count=1))]
        found += [call for call in calls if call is not None]
        if not calls or None in calls:
            return ()
    return tuple(found[:TOOLS_MAX])


def _values(text: str) -> list[Any]:
    """JSON values one after the other (Llama parts them by semicolons), the items of a list counted alone."""
    values: list[Any] = []
    rest = text.strip()
    while rest and not rest.startswith("```"):
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip("; \n\t,")
    return values


def _call(value: Any, names: frozenset[str]) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = next(iter(_values(arguments)), None)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(new_id(), name, json.dumps(arguments, ensure_ascii=False))


def read_tools(text: str) -> list[dict[str, Any]]:
    """OpenAI's list of tools in `text`. Raises `UserError` where it is none."""
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError("the tools are not JSON", f"{fault}.", param="tools") from None
    listed = tools if isinstance(tools, list) else []
    functions = [tool.get("function") for tool in listed if isinstance(tool, dict)]
    named = [one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str)]
    if not listed or len(named) < len(listed):
        raise UserError("the tools are not valid", "Each is an object with a function that has a name.", param="tools")
    return listed


def call_schema(tools: Sequence[dict[str, Any]], name: str) -> str:
    """The JSON schema of a call of the tool `name`, or of any where that is empty."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or NO_PARAMETERS,
            },
            "required": ["name", "arguments"],
        }
        for tool in tools
        if name in ("", tool["function"]["name"])
    ]
    if not calls:
        raise UserError(f"tool_choice names {name!r}", "No such tool is offered.", param="tool_choice")
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


# for templates that know no tools --------------------------------------------------------------------------------
def in_words(messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]]) -> list[ChatMessage]:
    """`messages` with tools, calls and results as text, the way Hermes models were taught."""
    out = [_worded(message) for message in messages]
    if not tools:
        return out
    offered = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    told = (
        "You may call functions. Their signatures are within <tools></tools>:\n"
        f"<tools>\n{offered}\n</tools>\nFor each call answer with a JSON object within {OPEN}{CLOSE}:\n"
        f'{OPEN}\n{{"name": <function-name>, "arguments": <object>}}\n{CLOSE}'
    )
    first = out[0] if out and out[0].role == "system" else None
    told = f"{first.content}\n\n{told}" if first else told
    return [ChatMessage("system", told), *out[1 if first else 0 :]]


def _worded(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        return ChatMessage("user", f"<tool_response>\n{message.content}\n</tool_response>")
    calls = [
        f'{OPEN}\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n{CLOSE}' for call in message.tool_calls
    ]
    return ChatMessage(message.role, "\n".join([*([message.content] if message.content else []), *calls]))


def _overlap(text: str, mark: str) -> int:
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
