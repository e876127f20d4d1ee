"""The shapes of OpenAI's answers: completions whole and in chunks, embeddings, models, errors. Pure.

Request bodies are `inference.openai_body`'s. Shapes: OpenAI API reference, as openai-python 3.54 parses them.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from ..inference.protocol import Done, Embedded

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """One answer's constant parts. `chat` chooses between the two kinds of completion; `created` is a Unix time."""

    id: str
    created: int
    model: str
    chat: bool

    def whole(self, text: str, done: Done) -> Json:
        """The answer in one piece."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason(done)}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, [choice]) | {"usage": usage(done)}

    def opening(self) -> Json:
        """The first chunk of a chat: who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def part(self, text: str) -> Json:
        return self._chunk({"content": text} if self.chat else {"text": text}, None)

    def ending(self, done: Done) -> Json:
        return self._chunk({} if self.chat else {"text": ""}, finish_reason(done))

    def usage_chunk(self, done: Done) -> Json:
        """The extra last chunk that `stream_options.include_usage` asks for."""
        return self._envelope(self._chunk_kind, []) | {"usage": usage(done)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, content: Json, reason: str | None) -> Json:
        body = {"delta": content} if self.chat else content
        return self._envelope(
            self._chunk_kind, [{"index": 0, **body, "logprobs": None, "finish_reason": reason}]
        )  # fmt: skip

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def finish_reason(done: Done) -> str:
    return "length" if done.reason == "length" else "stop"


def usage(done: Done) -> Json:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def embeddings(model: str, embedded: Embedded, as_base64: bool) -> Json:
    """`as_base64`: each vector as base64 of little-endian float32, which openai-python asks for by default."""
    data = [
        {"object": "embedding", "index": number, "embedding": _vector(vector, as_base64)}
        for number, vector in enumerate(embedded.vectors)
    ]
    counts = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}


def _vector(vector: bytes, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def model(entry: Mapping[str, Any]) -> Json:
    """`entry` has at least `id`; what else it says is passed on."""
    return {"object": "model", "created": 0, "owned_by": "picluster", **entry}


def models(entries: Sequence[Mapping[str, Any]]) -> Json:
    return {"object": "list", "data": [model(entry) for entry in entries]}


def error(fault: PiclusterError) -> Json:
    """OpenAI's error object: `message` for people, `type` and `code` for programs, `param` names the field."""
    kind, code = _kind_and_code(fault)
    return {"error": {"message": str(fault), "type": kind, "param": getattr(fault, "param", None), "code": code}}


def _kind_and_code(fault: PiclusterError) -> tuple[str, str | None]:
    match fault:
        case NotFound():
            return "invalid_request_error", "model_not_found" if fault.param == "model" else "not_found"
        case Refused():
            return "permission_error", None
        case UserError():
            return "invalid_request_error", None
        case Overloaded():
            return "rate_limit_error", "rate_limit_exceeded"
        case Unavailable():
            return "service_unavailable", None
        case _:
            return "server_error", None
