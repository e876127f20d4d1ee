"""The shapes of OpenAI's answers: completions whole and in chunks, embeddings, models, errors. Pure.

Request bodies are `inference.openai_body`'s. Shapes: OpenAI API reference, as openai-python 3.54 parses them.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import NotFound, Overloaded, PiclusterError, Refused, TooLong, Unavailable, UserError
from ..inference.protocol import CallPart, Done, Embedded, Field, TokenLogprob

Json = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One of the `n` answers, as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """One completion's constant parts. `chat` chooses between the two kinds; `created` is a Unix time."""

    id: str
    created: int
    model: str
    chat: bool
    asked: tuple[Field, ...] = ()
    """What was to be chosen between."""
    logprobs: bool = False

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The answers in one piece."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(kind, choices) | {"usage": usage([answer.done for answer in answers if answer.done])}

    def _choice(self, index: int, answer: Answer) -> Json:
        assert answer.done is not None, "it has come to its end"
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.done.tool_calls:
            message |= {"content": answer.text or None, "tool_calls": _tool_calls(answer.done)}
        content = {"message": message} if self.chat else {"text": answer.text}
        logprobs = self._logprobs(answer.logprobs)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason(answer.done)}
        return choice | self._probabilities(answer.done)

    def opening(self, index: int) -> Json:
        """The first chunk of a chat: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def part(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._chunk(index, {"content": text} if self.chat else {"text": text}, None, self._logprobs(logprobs))

    def calling(self, index: int, parts: Sequence[CallPart]) -> Json:
        """What has come of the calls that the answer makes."""
        return self._chunk(index, {"tool_calls": [_call_part(part) for part in parts]}, None)

    def ending(self, index: int, done: Done) -> Json:
        chunk = self._chunk(index, {} if self.chat else {"text": ""}, finish_reason(done))
        chunk["choices"][0] |= self._probabilities(done)
        return chunk

    def usage_chunk(self, dones: Sequence[Done]) -> Json:
        """The extra last chunk that `stream_options.include_usage` asks for."""
        return self._envelope(self._chunk_kind, []) | {"usage": usage(dones)}

    def _probabilities(self, done: Done) -> Json:
        """`choice_probabilities`: by option; where fields have names, by name and option."""
        told = {
            asked.name: dict(zip(asked.options, found, strict=True))
            for asked, found in zip(self.asked, done.choices, strict=False)
        }
        return {"choice_probabilities": told.get("", told)} if told else {}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        return _chat_logprobs(tokens) if self.chat else _text_logprobs(tokens)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, content: Json, reason: str | None, logprobs: Json | None = None) -> Json:
        body = {"delta": content} if self.chat else content
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope(self._chunk_kind, [choice])

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def finish_reason(done: Done) -> str:
    """ "length" goes before calls: the last of them is not whole then."""
    if done.reason == "length":
        return "length"
    return "tool_calls" if done.tool_calls else "stop"


def _call_part(part: CallPart) -> Json:
    told: Json = {"index": part.index, "function": {"arguments": part.arguments}}
    if part.name:
        told |= {"id": part.id, "type": "function"}
        told["function"] = {"name": part.name, "arguments": part.arguments}
    return told


def _tool_calls(done: Done) -> list[Json]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in done.tool_calls
    ]


def usage(dones: Sequence[Done]) -> Json:
    """Of all answers to one prompt, which counts once."""
    prompt, cached = dones[0].prompt_tokens, dones[0].cached_tokens
    completion = sum(done.completion_tokens for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    content = [
        _token(told.text, told.logprob) | {"top_logprobs": [_token(text, logprob) for text, logprob in told.top]}
        for told in tokens
    ]
    return {"content": content, "refusal": None}


def _token(text: bytes, logprob: float) -> Json:
    return {"token": text.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(text)}


def _text_logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    texts = [told.text.decode("utf-8", "replace") for told in tokens]
    tops = [{text.decode("utf-8", "replace"): logprob for text, logprob in told.top} for told in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [told.logprob for told in tokens],
        "top_logprobs": tops,
        "text_offset": [sum(map(len, texts[:at])) for at in range(len(texts))],
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
        case TooLong():
            return "invalid_request_error", fault.code
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
