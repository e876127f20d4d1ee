"""Faults as answers, in the words of whichever API was asked.

handler ──PiclusterError──▶ its status, `tells(fault)` as JSON, Retry-After where waiting helps
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from ..errors import PiclusterError, Unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Tells = Callable[[PiclusterError], Mapping[str, Any]]


def answered(handler: Handler, tells: Tells) -> Handler:
    """`handler` with its errors as `tells` says them."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except PiclusterError as fault:
            return refusal(fault, tells)

    return handle


def refusal(fault: PiclusterError, tells: Tells, status: int | None = None) -> web.Response:
    """`fault` as an answer, with its own status where none is given."""
    response = web.json_response(tells(fault), status=status or fault.status)
    if isinstance(fault, Unavailable):
        response.headers["Retry-After"] = str(max(1, math.ceil(fault.retry_after_s)))
    return response
