"""What a workflow asks of a model, and how the answer is written down (a workflow's `AskModel`).

    {"messages": …}                                  ──▶ generate ──▶ {"text"}
    {"task": "embed", "model", "texts"}              ──▶ embed    ──▶ {"vectors": [bytes]}
    {"task": "classify", "model", "texts"}           ──▶ classify ──▶ {"scores": [{label: score}]}
                                                          each with {"model", "node": id, "name": of the node}

Answers are plain values that msgpack knows, since the ledger keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ..errors import UserError
from ..events import Choice
from .protocol import ClassifyRequest, EmbedRequest
from .serving import Serving

TEXTS_MAX = 64
"""Of one step: what comes back is appended to the ledger of every node."""


class _Texts(msgspec.Struct):
    texts: Annotated[tuple[str, ...], Meta(min_length=1, max_length=TEXTS_MAX)]
    model: str = ""


async def perform(serving: Serving, body: Mapping[str, Any], prefer: str = "") -> dict[str, Any]:
    """The answer to `body`. Raises as `Serving.generate` does, and `UserError` where it is no request."""
    match body.get("task", "generate"):
        case "generate":
            return await serving.complete(body, prefer)
        case "embed":
            asked = _texts(body)
            choice, embedded = await serving.embed(EmbedRequest(asked.model, asked.texts))
            return {"vectors": list(embedded.vectors), **_by(choice)}
        case "classify":
            asked = _texts(body)
            choice, classified = await serving.classify(ClassifyRequest(asked.model, asked.texts))
            return {"scores": [dict(one) for one in classified.scores], **_by(choice)}
        case other:
            raise UserError(f"there is no task {other!r}", "Models generate, embed or classify.", param="task")


def _by(choice: Choice) -> dict[str, Any]:
    return {"model": choice.model, "node": choice.node, "name": choice.name}


def _texts(body: Mapping[str, Any]) -> _Texts:
    try:
        return msgspec.convert(dict(body), _Texts)
    except msgspec.ValidationError as fault:
        raise UserError("the request is not valid", f"{fault}.", param="texts") from None
