"""What a key's holder asks of models, within the key's limits: one wrapper round whatever answers.

    request ──key for this model?──▶ reserve what it may take ──▶ answers ──▶ settle what it took

A reservation keeps two hundred requests that come at once from all being let in on the same few tokens; it is settled
when the answer ends, also where its reader goes away in the middle.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import msgspec

from ..events import Choice
from ..inference.answering import Answering, Item
from ..inference.placement import ANY_MODEL
from ..inference.protocol import Classified, ClassifyRequest, Delta, Done, Embedded, EmbedRequest, GenerateRequest
from .keys import Caller, caller

CHARS_PER_TOKEN = 4
"""English in common vocabularies; settled by the engine's count."""
ANSWER_TOKENS = 128
"""What an answer without a bound is reserved for."""

Texts = TypeVar("Texts", EmbedRequest, ClassifyRequest)
Read = TypeVar("Read", Embedded, Classified)


class Metered:
    def __init__(self, inner: Answering) -> None:
        self._inner = inner

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        who = caller.get()
        if who is None:
            async with aclosing(self._inner.generate(request, prefer)) as items:
                async for item in items:
                    yield item
            return
        request = msgspec.structs.replace(request, model=_allowed(who, request.model))
        prompt = request.text_length // CHARS_PER_TOKEN
        reserved = prompt + min(request.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS)
        who.reserve(reserved)
        used = 0
        try:
            async with aclosing(self._inner.generate(request, prefer)) as items:
                async for item in items:
                    if isinstance(item, Delta):
                        used = (used or prompt) + item.tokens
                    elif isinstance(item, Done):
                        used = item.prompt_tokens + item.completion_tokens
                    yield item
        finally:
            who.settle(used - reserved)

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        return await _counted(request, self._inner.embed)

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        return await _counted(request, self._inner.classify)


async def _counted(request: Texts, ask: Callable[[Texts], Awaitable[tuple[Choice, Read]]]) -> tuple[Choice, Read]:
    who = caller.get()
    if who is None:
        return await ask(request)
    request = msgspec.structs.replace(request, model=_allowed(who, request.model))
    reserved = sum(map(len, request.texts)) // CHARS_PER_TOKEN
    who.reserve(reserved)
    choice, answer = await ask(request)
    who.settle(answer.tokens - reserved)
    return choice, answer


def _allowed(who: Caller, model: str) -> str:
    """The model that is asked for; who names none gets the first its key is for."""
    named = [name for name in who.grant.models if "*" not in name]
    chosen = named[0] if model in ANY_MODEL and named else model
    if chosen not in ANY_MODEL or who.grant.models:
        who.check(chosen)
    return chosen
