"""The shapes of Ollama's answers: parts and ends of an answer, embeddings, lists of models, errors. Pure.

Durations are nanoseconds, times RFC 3339. Shapes: ollama docs/api.md, as ollama-python 0.6 parses them.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..errors import PiclusterError
from ..inference.protocol import Done, Embedded, ToolCall
from .ollama_body import LATEST

Json = dict[str, Any]
NANO = 1_000_000_000
NEVER = "2318-12-31T23:59:59Z"
"""Until when a model stays loaded that nothing unloads: what Ollama says of `keep_alive` -1."""
NEVER_S = 10 * 365 * 86400.0
"""What is kept longer is kept for ever."""


@dataclass(frozen=True, slots=True)
class Card:
    """What is known of one model. Zero and "" are what is not known."""

    name: str
    size: int = 0
    """Bytes of its file."""
    sha256: str = ""
    modified: float = 0.0
    """Unix time."""
    family: str = "llama"
    parameters: str = ""
    """As people say it: 1.5B."""
    quantisation: str = ""
    context: int = 0
    """Tokens; 0 where it is not loaded anywhere."""
    generates: bool = True
    embeds: bool = False
    tools: bool = False
    template: str = ""
    expires_s: float = math.inf
    """Of one in memory: seconds until it leaves it if nobody asks for it."""


@dataclass(frozen=True, slots=True)
class Clock:
    """When an answer was asked for and when its first part came, by one monotonic clock, seconds."""

    asked: float
    first: float
    ended: float

    def durations(self, done: Done) -> Json:
        """Split by what was measured of this request where it was long enough to tell, else by what was seen here."""
        read = done.prompt_tokens - done.cached_tokens
        evaluated = read / done.prefill_tps if done.prefill_tps > 0 else 0.0
        written = done.completion_tokens / done.decode_tps if done.decode_tps > 0 else self.ended - self.first
        return {
            "total_duration": _nano(self.ended - self.asked),
            "load_duration": _nano(self.first - self.asked - evaluated),
            "prompt_eval_count": done.prompt_tokens,
            "prompt_eval_duration": _nano(evaluated),
            "eval_count": done.completion_tokens,
            "eval_duration": _nano(written),
        }


def _nano(seconds: float) -> int:
    return max(0, math.ceil(seconds * NANO))


def stamp(wall: float) -> str:
    return datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True, slots=True)
class Shape:
    """One answer's constant parts: of a chat or of a generation. `model` is called as it was asked for."""

    model: str
    chat: bool

    def part(self, text: str, wall: float) -> Json:
        return self._envelope(wall) | self._said(text) | {"done": False}

    def calling(self, calls: Sequence[ToolCall], wall: float) -> Json:
        """A part with what the model wants called: whole calls, since arguments are objects here."""
        return self._envelope(wall) | self._said("", calls) | {"done": False}

    def ending(self, done: Done, clock: Clock, wall: float) -> Json:
        """The last line of a stream."""
        return self._ended("", (), done, clock, wall)

    def whole(self, text: str, done: Done, clock: Clock, wall: float) -> Json:
        """The one answer of no stream."""
        return self._ended(text, done.tool_calls, done, clock, wall)

    def _ended(self, text: str, calls: Sequence[ToolCall], done: Done, clock: Clock, wall: float) -> Json:
        reason = {"done": True, "done_reason": "length" if done.reason == "length" else "stop"}
        return self._envelope(wall) | self._said(text, calls) | reason | clock.durations(done)

    def nothing(self, reason: str, wall: float) -> Json:
        """The answer to an empty request: the model was loaded, or unloaded."""
        return self._envelope(wall) | self._said("") | {"done": True, "done_reason": reason}

    def _envelope(self, wall: float) -> Json:
        return {"model": self.model, "created_at": stamp(wall)}

    def _said(self, text: str, calls: Sequence[ToolCall] = ()) -> Json:
        if not self.chat:
            return {"response": text}
        message: Json = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": _object(call.arguments)}} for call in calls
            ]
        return {"message": message}


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def embeddings(model: str, embedded: Embedded, seconds: float) -> Json:
    vectors = [_vector(vector) for vector in embedded.vectors]
    counts = {"total_duration": _nano(seconds), "load_duration": 0, "prompt_eval_count": embedded.tokens}
    return {"model": model, "embeddings": vectors, **counts}


def old_embedding(embedded: Embedded) -> Json:
    return {"embedding": _vector(embedded.vectors[0])}


def _vector(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


# models ----------------------------------------------------------------------------------------------------------
def tagged(name: str) -> str:
    return name if ":" in name else name + LATEST


def tags(cards: Sequence[Card]) -> Json:
    return {"models": [_line(card) | {"modified_at": stamp(card.modified)} for card in cards]}


def running(cards: Sequence[Card], wall: float) -> Json:
    """Of those in memory. Nothing here is in a GPU's."""
    return {"models": [_line(card) | _loaded(card, wall) for card in cards]}


def _loaded(card: Card, wall: float) -> Json:
    expires = stamp(wall + card.expires_s) if card.expires_s < NEVER_S else NEVER
    return {"expires_at": expires, "size_vram": 0, "context_length": card.context}


def shown(card: Card) -> Json:
    length = {f"{card.family}.context_length": card.context} if card.context else {}
    can = {"completion": card.generates, "tools": card.generates and card.tools, "embedding": card.embeds}
    return {
        "modelfile": f"FROM {card.name}\n",
        "parameters": "",
        "template": card.template,
        "details": _details(card),
        "model_info": {"general.architecture": card.family, "general.basename": card.name, **length},
        "capabilities": [name for name, able in can.items() if able],
        "modified_at": stamp(card.modified),
    }


def _line(card: Card) -> Json:
    name = tagged(card.name)
    # Ollama's own client cuts twelve characters off the digest, so there must be one: of the name, if not of the file.
    digest = card.sha256 or hashlib.sha256(card.name.encode()).hexdigest()
    return {"name": name, "model": name, "size": card.size, "digest": digest, "details": _details(card)}


def _details(card: Card) -> Json:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": card.family,
        "families": [card.family],
        "parameter_size": card.parameters,
        "quantization_level": card.quantisation,
    }


def error(fault: PiclusterError) -> Json:
    param = getattr(fault, "param", None)
    return {"error": f"{fault} ({param})" if param and param not in str(fault) else str(fault)}
