"""Ollama's request bodies, checked, as the requests our children understand. Pure.

Options that are only about speed or memory of one process (`num_ctx`, `num_thread`, …) are taken and ignored:
sends its own `num_ctx` with every call, and a model's context is what its node was configured with. What would change
the answer and cannot be had (images, thinking, a template or suffix of one's own) is refused.

Shapes: ollama docs/api.md; as ollama-python 0.6 sends them.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..errors import UserError
from ..inference.openai_body import SEED_MASK, TOKENS_MAX, Body, Name, Prompt, parse
from ..inference.protocol import MESSAGES_MAX, STOPS_MAX, ChatMessage, EmbedRequest, GenerateRequest
from ..inference.tools_body import Calls, Tools, calls, tools_text

LATEST = ":latest"
"""The tag a name has that is written without one."""

DURATION_CHARS_MAX = 64
"""Of a duration: every unit once is half of that."""

Number = int | float
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
KeepAlive = int | float | str
SECONDS = {"": 1.0, "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
"""Units of Go's durations, and of a number without one."""
_DURATION = re.compile(r"([0-9]*\.?[0-9]+|[0-9]+\.)(ns|us|µs|μs|ms|s|m|h|)")
Format = Literal["", "json"] | dict[str, Any]


class Options(msgspec.Struct):
    """Those that mean something here; all others are ignored, as Ollama does with what it does not know."""

    num_predict: Number | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)] | None = None
    top_k: Number | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] | None = None
    seed: Number | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None = None


class MessageBody(msgspec.Struct):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: Calls | None = None
    tool_name: Name | None = None
    tool_call_id: Name | None = None


class AnsweredBody(msgspec.Struct):
    """What chats and generations have in common. `stream` is the default."""

    model: Name
    stream: bool | None = None
    format: Format | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    think: bool | str | None = None


class ChatBody(AnsweredBody, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(max_length=MESSAGES_MAX)] = []
    tools: Tools | None = None


class GenerateBody(AnsweredBody, kw_only=True):
    prompt: Prompt = ""
    system: Prompt | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    suffix: str | None = None
    template: str | None = None


class EmbedBody(msgspec.Struct):
    model: Name
    input: str | Annotated[list[str], Meta(max_length=2048)] | None = None
    keep_alive: KeepAlive | None = None


class OldEmbedBody(msgspec.Struct):
    model: Name
    prompt: str = ""
    keep_alive: KeepAlive | None = None


class NamedBody(msgspec.Struct):
    """`name` is what `model` was called before."""

    model: Name = ""
    name: Name = ""
    stream: bool | None = None

    @property
    def called(self) -> str:
        """Raises `UserError` where there is neither."""
        if not (self.model or self.name):
            raise UserError("the request names no model", param="model")
        return self.model or self.name


def read(data: bytes, kind: type[Body]) -> Body:
    """The body in `data`; an empty one is read as `{}`. Raises `UserError` naming the field."""
    return parse(data or b"{}", kind)


def chat_request(body: ChatBody, model: str) -> GenerateRequest:
    messages = tuple(_message(number, message) for number, message in enumerate(body.messages))
    return _request(body, model, messages=messages, tools=tools_text(body.tools))


def generate_request(body: GenerateBody, model: str) -> GenerateRequest:
    """Of a prompt: the one turn of a chat, or where `raw` is set the text itself."""
    _refuse_images(body.images, "images")
    if body.suffix:
        raise UserError(f"{model} does not support insert", "`suffix` cannot be kept to.", param="suffix")
    if body.template:
        raise UserError("`template` is not supported", "A model's own template is used.", param="template")
    if body.raw:
        return _request(body, model, prompt=body.prompt)
    system = (ChatMessage("system", body.system),) if body.system else ()
    return _request(body, model, messages=(*system, ChatMessage("user", body.prompt)))


def embed_request(body: EmbedBody, model: str) -> EmbedRequest:
    texts = (body.input,) if isinstance(body.input, str) else tuple(body.input or ())
    return EmbedRequest(model, texts, keep_alive_s=seconds(body.keep_alive))


def load_request(body: AnsweredBody | EmbedBody, model: str) -> GenerateRequest:
    """Of nothing: the model comes into memory, or leaves it where `keep_alive` is 0."""
    return GenerateRequest(model, max_tokens=1, keep_alive_s=seconds(body.keep_alive), only_loads=True)


def seconds(keep_alive: KeepAlive | None) -> float | None:
    """Seconds in a number, or in a duration as Go writes it (`5m`, `1h30m`); -1 for what is negative: for ever.

    Raises `UserError`.
    """
    if keep_alive is None:
        return None
    told = f"{keep_alive:f}s" if isinstance(keep_alive, int | float) else keep_alive.strip()
    parts = _DURATION.findall(told.lstrip("+-"))
    if not parts or "".join(map("".join, parts)) != told.lstrip("+-") or len(told) > DURATION_CHARS_MAX:
        why = f"{str(keep_alive)[:64]!r} is neither a number of seconds nor a duration such as 5m."
        raise UserError("keep_alive is not valid", why, param="keep_alive")
    return -1.0 if told.startswith("-") else sum(float(number) * SECONDS[unit] for number, unit in parts)


def _request(body: AnsweredBody, model: str, **rest: Any) -> GenerateRequest:
    if body.think:
        raise UserError(f"{model} does not support thinking", "Leave `think` out or false.", param="think")
    options = body.options or Options()
    given: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_p", "min_p", "repeat_penalty", "frequency_penalty", "presence_penalty")
        if (value := getattr(options, name)) is not None
    }
    if options.top_k is not None:
        given["top_k"] = _whole(options.top_k, "top_k")  # 0 and less: off
    if options.num_predict is not None:
        given["max_tokens"] = _whole(options.num_predict, "num_predict")  # -1 and -2: until the context is full
    if options.seed is not None:
        given["seed"] = int(options.seed) & SEED_MASK
    stops = options.stop or ()
    given["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
    given["keep_alive_s"] = seconds(body.keep_alive)
    return GenerateRequest(model=model, json_schema=_schema(body.format), **given, **rest)


def _whole(number: Number, option: str) -> int:
    if number != number or abs(number) == float("inf"):
        raise UserError(f"{option} is not a number", param=f"options.{option}")
    return max(0, min(int(number), TOKENS_MAX))


def _schema(form: Format | None) -> str:
    if not form:
        return ""
    if form == "json":
        return '{"type": "object"}'
    try:
        return json.dumps(form)
    except RecursionError:
        raise UserError("the JSON schema is nested too deep", param="format") from None


def _message(number: int, body: MessageBody) -> ChatMessage:
    _refuse_images(body.images, f"messages[{number}].images")
    return ChatMessage(
        body.role, body.content or "", calls(body.tool_calls), body.tool_call_id or "", body.tool_name or ""
    )


def _refuse_images(images: list[Any] | None, param: str) -> None:
    if images:
        raise UserError("images are not supported", "Only text is.", param=param)
