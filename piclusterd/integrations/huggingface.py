"""HuggingFace's router of inference providers, as a provider of chats.

`model` may name who serves it: `Qwen/Qwen2.5-7B-Instruct:groq`. 402 is a month's credits used up, and free accounts
have none; 429 passes, `RateLimit: …;t=SECONDS` or Retry-After says when.

Source: huggingface.co/docs/inference-providers; rate-limits in hub-docs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .openai_compatible import WORDS_MAX, ProviderFailed, by_status, openai

URL = "https://router.huggingface.co/v1"

_WINDOW = re.compile(r";\s*t=(\d+)")


def dialect(status: int, headers: Mapping[str, str], body: bytes) -> ProviderFailed:
    window = _WINDOW.search(headers.get("RateLimit", ""))
    if status == 429 and window and "Retry-After" not in headers:
        said = body[:WORDS_MAX].decode(errors="replace")
        return by_status(status, {"Retry-After": window[1]}, said)
    return openai(status, headers, body)
