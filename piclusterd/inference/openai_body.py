"""OpenAI request bodies, checked, as the requests our children understand.

Unknown fields are ignored, as clients expect. What is known is checked by type and range; what would change the answer
and is not supported (images) is refused rather than ignored. Both the HTTP API and workflows
(`Serving.complete`) come through here.

Shapes: OpenAI API reference, `chat/create`, `completions/create`, `embeddings/create`. Beyond it, as vLLM names it:
`guided_choice` (or `structured_outputs.choice`), a list of options, of which the most probable is the answer; here also
an object of such lists, whose answer is a JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ..errors import UserError
from .protocol import (
    BIASES_MAX,
    FIELDS_MAX,
    MESSAGES_MAX,
    OPTION_CHARS_MAX,
    OPTIONS_MAX,
    PROMPT_CHARS_MAX,
    STOPS_MAX,
    TOP_LOGPROBS_MAX,
    ChatMessage,
    EmbedRequest,
    Field,
    GenerateRequest,
)
from .tools_body import Calls, ToolChoice, Tools, calls, choice_text, tools_text

SEED_MASK = 2**32 - 1
"""Clients send 64-bit and negative seeds; llama.cpp takes 32 bits."""
TOKENS_MAX = 2**31 - 1
"""`max_tokens` beyond the context is clamped, this far."""

Name = Annotated[str, Meta(max_length=256)]
Prompt = Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]
Text = Annotated[str, Meta(min_length=1)]
"""To embed: of nothing there is no vector."""
Choices = Annotated[int, Meta(ge=1, le=8)]
"""Answers to one request: each takes a place of the model."""
Option = Annotated[str, Meta(min_length=1, max_length=OPTION_CHARS_MAX)]
Options = Annotated[list[Option], Meta(min_length=1, max_length=OPTIONS_MAX)]
Guided = Options | Annotated[dict[Option, Options], Meta(min_length=1, max_length=FIELDS_MAX)]
Tokens = Annotated[int, Meta(ge=1)]
Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
Roles = Literal["system", "developer", "user", "assistant", "tool"]


class Part(msgspec.Struct):
    type: str
    text: str = ""


class MessageBody(msgspec.Struct):
    role: Roles
    content: str | list[Part] | None = None
    tool_calls: Calls | None = None
    tool_call_id: Name | None = None
    name: Name | None = None


class SchemaBody(msgspec.Struct):
    schema: dict[str, Any] = msgspec.field(default_factory=dict)


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class StructuredOutputs(msgspec.Struct):
    choice: Guided | None = None


class SamplingBody(msgspec.Struct):
    """What chats and completions have in common. Null means the default, as clients send it."""

    model: Name = ""
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0, le=TOKENS_MAX)] | None = None
    min_p: Fraction | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=BIASES_MAX)] | None
    ) = None
    guided_choice: Guided | None = None
    structured_outputs: StructuredOutputs | None = None


class ChatBody(SamplingBody, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Tokens | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(SamplingBody, kw_only=True):
    prompt: Prompt | Annotated[list[Prompt], Meta(min_length=1, max_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    model: Name = ""
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def parse(data: bytes | Mapping[str, Any], kind: type[Body]) -> Body:
    """The body in `data` (JSON bytes, or values already decoded). Raises `UserError` naming the field."""
    try:
        if isinstance(data, bytes):
            return msgspec.json.decode(data, type=kind)
        return msgspec.convert(dict(data), kind)
    except msgspec.ValidationError as fault:
        text, param = _described(str(fault))
        raise UserError("the request body is not valid", text, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise UserError("the request body is not JSON", f"{fault}.") from None


def _described(fault: str) -> tuple[str, str | None]:
    """msgspec's "Expected … - at `$.messages[0].role`" as a sentence and the path without the `$.`."""
    match = re.search(r" - at `(?:key in )?\$\.?(.*?)`$", fault)
    if match:
        return f"{match[1] or 'body'}: {fault[: match.start()]}.", match[1] or None
    missing = re.search(r"missing required field `(\w+)`", fault)
    return f"{fault}.", missing[1] if missing else None


def chat_request(body: ChatBody) -> GenerateRequest:
    return _request(
        body,
        messages=tuple(_message(number, message) for number, message in enumerate(body.messages)),
        max_tokens=min(body.max_completion_tokens or body.max_tokens or 0, TOKENS_MAX),
        json_schema=_schema(body.response_format),
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        tools=tools_text(body.tools),
        tool_choice=choice_text(body.tool_choice, body.tools),
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )


def completion_request(body: CompletionBody) -> GenerateRequest:
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    return _request(
        body,
        prompt=prompt,
        max_tokens=min(body.max_tokens or 0, TOKENS_MAX),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
    )


def embed_request(body: EmbeddingsBody) -> EmbedRequest:
    if body.dimensions is not None:
        raise UserError("`dimensions` is not supported", "Vectors have the model's own size.", param="dimensions")
    return EmbedRequest(body.model, (body.input,) if isinstance(body.input, str) else tuple(body.input))


def _request(body: SamplingBody, **rest: Any) -> GenerateRequest:
    given = {
        name: value
        for name in (
            "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repeat_penalty",
        )
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    if body.seed is not None:
        given["seed"] = body.seed & SEED_MASK
    stops = body.stop or ()
    given["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
    given["logit_bias"] = tuple(_bias(token, bias) for token, bias in (body.logit_bias or {}).items())
    given["choices"] = _fields(body)
    return GenerateRequest(model=body.model, **given, **rest)


def _bias(token: str, bias: float) -> tuple[int, float]:
    if not re.fullmatch(r"[0-9]{1,9}", token):
        raise UserError(f"{token!r} is not a token's number", param="logit_bias")
    return int(token), bias


def _fields(body: SamplingBody) -> tuple[Field, ...]:
    guided = body.guided_choice or (body.structured_outputs and body.structured_outputs.choice)
    if not guided:
        return ()
    lists = guided if isinstance(guided, dict) else {"": guided}
    if any(len(set(options)) < len(options) for options in lists.values()):
        raise UserError("an option is given twice", param="guided_choice")
    return tuple(Field(name, tuple(options)) for name, options in lists.items())


def _message(number: int, body: MessageBody) -> ChatMessage:
    content = body.content or ""
    if isinstance(content, list):
        for part in content:
            if part.type != "text":
                raise UserError(
                    f"content of type {part.type!r} is not supported",
                    "Only text is; nothing is fetched.",
                    param=f"messages[{number}].content",
                )
        content = "".join(part.text for part in content)
    role = "system" if body.role == "developer" else body.role
    return ChatMessage(role, content, calls(body.tool_calls), body.tool_call_id or "", body.name or "")


def _schema(form: ResponseFormat | None) -> str:
    if form is None or form.type == "text":
        return ""
    if form.type == "json_object":
        return '{"type": "object"}'
    if form.json_schema is None:
        raise UserError("response_format has no json_schema", param="response_format.json_schema")
    try:
        return json.dumps(form.json_schema.schema)
    except RecursionError:
        raise UserError("the JSON schema is nested too deep", param="response_format") from None
