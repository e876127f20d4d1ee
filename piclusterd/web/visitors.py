"""What a request says of itself beside its body: whose it is, how urgent, and its id; one wrapper round what answers.

    request ─▶ remember (middleware) ─▶ handler ─▶ Marked.generate ─▶ GenerateRequest(tenant, priority, id) ─▶ …

A tenant is the holder of a key; where no keys are asked for, an address; through the unix socket, the owner. Tenants
share the queue before a model fairly (`inference.fair`). Urgency is the client's to say: `X-Picluster-Priority: batch`
where nobody waits. What is marked already (by a batch, say) keeps its tenant.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeVar, get_args

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from ..board.logs import request_id
from ..errors import UserError
from ..events import Choice
from ..inference.answering import Answering, Item
from ..inference.protocol import (
    TENANT_CHARS_MAX,
    Classified,
    ClassifyRequest,
    Embedded,
    EmbedRequest,
    GenerateRequest,
    Priority,
)
from .keys import caller

HEADER = "X-Picluster-Priority"
PRIORITIES: tuple[str, ...] = get_args(Priority)
OWNER = "owner"

visitor: ContextVar[tuple[str, str]] = ContextVar("visitor", default=("", ""))
"""Address and priority of the request that the current task serves; "" where it says none."""
Request = TypeVar("Request", GenerateRequest, EmbedRequest)


@web.middleware
async def remember(request: web.Request, handler: Handler) -> web.StreamResponse:
    priority = request.headers.get(HEADER, "")
    if priority and priority not in PRIORITIES:
        raise UserError(f"{HEADER} is not valid", f"It is one of {', '.join(PRIORITIES)}.", param=HEADER)
    visitor.set((request.remote or OWNER, priority))
    return await handler(request)


class Marked:
    """`inner`, asked in the visitor's name."""

    def __init__(self, inner: Answering) -> None:
        self._inner = inner

    async def generate(self, request: GenerateRequest, prefer: str = "") -> AsyncGenerator[Item, None]:
        async with aclosing(self._inner.generate(_marked(request), prefer)) as items:
            async for item in items:
                yield item

    async def embed(self, request: EmbedRequest) -> tuple[Choice, Embedded]:
        return await self._inner.embed(_marked(request))

    async def classify(self, request: ClassifyRequest) -> tuple[Choice, Classified]:
        return await self._inner.classify(request)


def _marked(request: Request) -> Request:
    address, priority = visitor.get()
    who = caller.get()
    changes: dict[str, Any] = {"id": request.id or request_id.get()}
    if not request.tenant:
        changes["tenant"] = (f"key {who.grant.name}" if who is not None else address)[:TENANT_CHARS_MAX]
    if priority:
        changes["priority"] = priority
    return msgspec.structs.replace(request, **changes)
