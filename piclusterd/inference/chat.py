"""From chat messages to prompt pieces, by the chat template that came with the model file.

The template is code from a stranger: it runs in jinja2's immutable sandbox, in the child only, under the child's
deadline (`worker.SUBMIT_DEADLINE_S`). Contents are text from strangers: where one spells a special token of the model
(`<|im_end|>`), that span is swapped for an unguessable mark before rendering, and comes out as a piece of its own
that is tokenised as plain text. A chat without such spans is one piece, tokenised as the template's author meant.

    contents ──▶ swap special spans for marks ──▶ render ──▶ split at marks ──▶ [(text, special?), ...]
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError, pass_context
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError
from .gguf import names_tools
from .protocol import PROMPT_CHARS_MAX, ChatMessage
from .tools import in_words, read_tools

CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""For files without a template: the form most base models have seen."""


class Piece(NamedTuple):
    text: str
    special: bool
    """Whether the texts of special tokens in it stand for those tokens."""


class ChatTemplate:
    """A compiled template. `specials` are the texts of the model's special tokens."""

    def __init__(self, source: str, specials: Iterable[str], bos: str = "", eos: str = "") -> None:
        # Neither optimized nor finalized without the context: folding constants while compiling would run a part of the
        # template outside the deadline (jinja folds what is output even where it does not optimize).
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], optimized=False, finalize=_as_it_is
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except TemplateError as fault:
            raise UserError("the model's chat template cannot be read", str(fault)) from None
        self._bos, self._eos = bos, eos
        self.knows_tools = names_tools(source)
        texts = sorted((text for text in specials if text), key=len, reverse=True)  # the longest match wins
        self._specials = re.compile("|".join(map(re.escape, texts))) if texts else None

    def pieces(self, messages: Sequence[ChatMessage], tools: str = "") -> list[Piece]:
        """The prompt for the assistant's next turn; `tools` as in `GenerateRequest`.

        Raises `UserError` where the template refuses the messages.
        """
        mark = f"\ue000{secrets.token_hex(16)}\ue001"
        spans: list[str] = []
        offered = read_tools(tools) if tools else []
        if not self.knows_tools:
            messages, offered = in_words(messages, offered), []
        plain = self._guard([_plain(message) for message in messages], mark, spans)
        try:
            text = self._template.render(
                messages=plain,
                tools=self._guard(offered, mark, spans) or None,
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except Exception as fault:  # the template is a stranger's program: it may raise anything
            raise UserError("the model's chat template refused the messages", str(fault), param="messages") from None
        if len(text) > PROMPT_CHARS_MAX:
            raise UserError("the prompt is too long", f"It is over {PROMPT_CHARS_MAX} characters.", param="messages")
        return _split(text, mark, spans)

    def _guard(self, content: Any, mark: str, spans: list[str]) -> Any:
        """`content` with the special tokens in all its texts swapped for marks."""
        if self._specials is None:
            return content
        if isinstance(content, list):
            return [self._guard(item, mark, spans) for item in content]
        if isinstance(content, dict):
            return {self._guard(key, mark, spans): self._guard(item, mark, spans) for key, item in content.items()}
        if not isinstance(content, str):
            return content

        def swap(match: re.Match[str]) -> str:
            spans.append(match.group())
            return f"{mark}{len(spans) - 1}\ue002"

        return self._specials.sub(swap, content)


def _plain(message: ChatMessage) -> dict[str, Any]:
    """As templates know messages: calls have their arguments as an object, and keys that say nothing are not there."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    told = {"tool_call_id": message.tool_call_id, "name": message.name}
    return plain | {key: value for key, value in told.items() if value}


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _split(text: str, mark: str, spans: list[str]) -> list[Piece]:
    head, *tails = text.split(mark)
    pieces = [Piece(head, True)]
    for tail in tails:
        number, _, rest = tail.partition("\ue002")
        pieces += [Piece(spans[int(number)], False), Piece(rest, True)]
    return [piece for piece in pieces if piece.text]


@pass_context
def _as_it_is(_: Context, value: Any) -> Any:
    return value


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja's own filter escapes for HTML


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now(UTC).strftime(form)
