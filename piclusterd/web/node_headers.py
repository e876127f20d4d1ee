"""Which node answered and why, how long it was taken to need, and how long it took: for clients, as headers."""

from __future__ import annotations

import re

from ..events import Choice
from ..inference.protocol import Done, Embedded


def node_headers(choice: Choice) -> dict[str, str]:
    """What is known when an answer begins."""
    why = re.sub(r"[^\x20-\x7e]", "?", choice.reason)  # a peer's name is in it: no header may be injected
    return {
        "X-Picluster-Node": _plain(choice.name or choice.node),
        "X-Picluster-Why": why,
        "X-Picluster-Predicted-Seconds": f"{choice.predicted_s:.3f}",
    }


def cache_header(answer: Done | Embedded) -> dict[str, str]:
    """Whether it was remembered (hit), another's (joined) or the model's (miss); none where that was not looked for."""
    return {"X-Picluster-Cache": answer.cache} if answer.cache else {}


def end_headers(done: Done, took_s: float) -> dict[str, str]:
    """What is known when it has ended: header fields of a whole answer, the last comment of a stream."""
    return {
        "X-Picluster-Cached-Tokens": str(done.cached_tokens),
        "X-Picluster-Waited-Seconds": f"{done.waited_s:.3f}",
        "X-Picluster-Took-Seconds": f"{took_s:.3f}",
        **({"X-Picluster-Drafts": f"{done.accepted}/{done.drafted}"} if done.drafted else {}),
        **cache_header(done),
        **_shipped(done),
    }


def _shipped(done: Done) -> dict[str, str]:
    """The beginning of the prompt that came from another node: who gave it, and what that took."""
    if done.shipped is None:
        return {}
    peer, tokens, size, ms = done.shipped
    return {"X-Picluster-Shipped": f"from={_plain(peer)}; tokens={tokens}; bytes={size}; ms={ms}"}


def _plain(name: str) -> str:
    return re.sub(r"[^\x21-\x7e]", "?", name)
