"""One line of a batch, answered as the API would answer it by itself.

    {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
        ──▶ {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}

A line that cannot be answered has the error that the API would have given, and its status. A stream is not asked for:
`stream` in a body is ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Literal, get_args

import msgspec

from ..errors import NotFound, PiclusterError, Unavailable, UserError
from ..inference.answering import Answering
from ..inference.openai_body import (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    SamplingBody,
    chat_request,
    completion_request,
    embed_request,
    parse,
)
from ..inference.protocol import Delta, Done, GenerateRequest
from ..inference.serving import Started
from . import openai_schema as schema
from .openai import side_by_side, varied

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
LINES_MAX = 50_000
"""OpenAI's limit."""
LINE_BYTES_MAX = 1024 * 1024
"""As much as one request may have."""
CUSTOM_ID_CHARS_MAX = 256

Json = dict[str, Any]


class Line(msgspec.Struct, frozen=True):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


class _Model(msgspec.Struct):
    model: str = ""


def check(lines: Iterable[bytes], endpoint: str = "") -> tuple[int, set[str]]:
    """How many requests there are, and the models they name. Raises `UserError` naming the line.

    `endpoint` is where all of them go; else where the first one does.
    """
    seen: set[str] = set()
    models: set[str] = set()
    for number, raw in enumerate(lines, 1):
        line = read(raw, number)
        if line.url not in get_args(Endpoint):
            raise wrong(number, f"its url is {line.url[:100]!r}, none of {', '.join(get_args(Endpoint))}")
        endpoint = endpoint or line.url
        if line.url != endpoint:
            raise wrong(number, f"its url is {line.url[:100]!r}, and the batch's endpoint {endpoint}")
        if not 0 < len(line.custom_id) <= CUSTOM_ID_CHARS_MAX:
            raise wrong(number, f"its custom_id has {len(line.custom_id)} characters, not 1 to {CUSTOM_ID_CHARS_MAX}")
        if line.custom_id in seen:
            raise wrong(number, f"its custom_id {line.custom_id[:100]!r} is an earlier line's, too")
        if number > LINES_MAX:
            raise UserError("the file has too many lines", f"At most {LINES_MAX}.", param="input_file_id")
        seen.add(line.custom_id)
        models.add(_model(line.body))
    if not seen:
        raise UserError("the file has no lines", param="input_file_id")
    return len(seen), models


def read(raw: bytes, number: int) -> Line:
    """Line `number`, counted from one."""
    if len(raw) > LINE_BYTES_MAX:
        raise wrong(number, f"it is over {LINE_BYTES_MAX} bytes long")
    try:
        return msgspec.json.decode(raw, type=Line)
    except (msgspec.DecodeError, RecursionError) as fault:
        raise wrong(number, f"{fault}") from None


def wrong(number: int, why: str) -> UserError:
    return UserError(f"line {number} of the file is no request", f"{why}.", param="input_file_id")


def _model(body: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(body, type=_Model).model
    except msgspec.DecodeError:
        return ""  # the request itself will say what is wrong


async def answered(serving: Answering, line: Line) -> Json:
    """The line of the output. Raises `Unavailable` where no node can answer it now."""
    try:
        body, status = await _answer(serving, line), 200
    except NotFound as fault:
        raise Unavailable(fault.what, fault.why, fault.fix) from None  # it was there when the batch began
    except UserError as fault:
        body, status = schema.error(fault), fault.status
    return told(line.custom_id, {"status_code": status, "request_id": secrets.token_hex(12), "body": body})


def told(custom_id: str, response: Json | None, error: Json | None = None) -> Json:
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}


def failure(custom_id: str, fault: PiclusterError) -> Json:
    """A line that was given up."""
    response = {"status_code": fault.status, "request_id": secrets.token_hex(12), "body": schema.error(fault)}
    return told(custom_id, response)


def expired(custom_id: str) -> Json:
    why = "This request could not be executed before the completion window expired."
    error = {"code": "batch_expired", "message": why}
    return told(custom_id, None, error)


def is_good(line: Json) -> bool:
    return line["response"] is not None and line["response"]["status_code"] == 200


async def _answer(serving: Answering, line: Line) -> Json:
    match line.url:
        case "/v1/chat/completions":
            chat = parse(bytes(line.body), ChatBody)
            return await _completed(serving, chat, chat_request(chat), chat=True)
        case "/v1/completions":
            completion = parse(bytes(line.body), CompletionBody)
            return await _completed(serving, completion, completion_request(completion), chat=False)
        case _:
            embeddings = parse(bytes(line.body), EmbeddingsBody)
            choice, embedded = await serving.embed(embed_request(embeddings))
            return schema.embeddings(choice.model, embedded, embeddings.encoding_format == "base64")


async def _completed(serving: Answering, body: SamplingBody, asked: GenerateRequest, chat: bool) -> Json:
    name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
    answers, model = [schema.Answer() for _ in range(body.n or 1)], body.model
    async with aclosing(side_by_side([serving.generate(one) for one in varied(asked, len(answers))])) as items:
        async for index, item in items:
            match item:
                case Started(choice=choice):
                    model = choice.model
                case Delta():
                    answers[index].text += item.text
                    answers[index].logprobs += item.logprobs
                case Done():
                    answers[index].done = item
    shape = schema.Shape(name, int(time.time()), model, chat, asked.choices, asked.logprobs)
    return shape.whole(answers)


def encode(line: Json) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
