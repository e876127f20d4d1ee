"""Cloudflare Workers AI over its OpenAI-compatible API, as a provider of chats; what an answer costs there.

Two answers 429 need opposite handling: error 3036, the day's free neurons are spent until 00:00 UTC; 3040, out of
capacity just now. Errors come in Cloudflare's envelope, `{"success": false, "errors": [{code, message}]}`.

Source: developers.cloudflare.com/workers-ai: errors, pricing, openai-compatible endpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .openai_compatible import WORDS_MAX, ProviderFailed, as_object, by_status

API = "https://api.cloudflare.com/client/v4"

SPENT, BUSY = 3036, 3040
BUSY_S = 5.0
TIMED_OUT = (3007, 3008)

PRICES = {
    "@cf/meta/llama-3.1-8b-instruct-fast": (4_119, 34_868),
    "@cf/meta/llama-3.1-8b-instruct-fp8-fast": (4_119, 34_868),
    "@cf/meta/llama-3.3-70b-instruct-fp8-fast": (26_668, 204_805),
}
"""Neurons a million tokens read and written."""
DEAREST = max(PRICES.values())
"""Of a model whose price is not known here."""


def url_of(account: str, api: str = API) -> str:
    return f"{api.rstrip('/')}/accounts/{account}/ai/v1"


def neurons(model: str, prompt_tokens: int, completion_tokens: int) -> float:
    read, written = PRICES.get(model, DEAREST)
    return (prompt_tokens * read + completion_tokens * written) / 1e6


def dialect(status: int, headers: Mapping[str, str], body: bytes) -> ProviderFailed:
    try:
        told = as_object(json.loads(body)).get("errors")
    except ValueError:
        told = None
    errors = [as_object(error) for error in told] if isinstance(told, list) else []
    codes = {error.get("code") for error in errors}
    said = "; ".join(str(error.get("message")) for error in errors)[:WORDS_MAX]
    if SPENT in codes:
        return ProviderFailed("quota", "the day's neurons are spent", said)
    if BUSY in codes:
        return ProviderFailed("rate", "out of capacity", said, BUSY_S)
    if codes & {*TIMED_OUT}:
        return ProviderFailed("broken", "it timed out there", said)
    return by_status(status, headers, said or body[:WORDS_MAX].decode(errors="replace"))
