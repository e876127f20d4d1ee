"""What the doubles of outside services share: one plan of faults, one guard, and a ledger of what was wrongly asked.

    client ──▶ guard ──planned fault?──▶ key? ──▶ handler, which checks each field ──▶ answer
                 │ before: limited, spent, internal, unavailable, hang, malformed, oversized
                 └ after the request was performed: lost, partial, slow

A double is strict: an unknown path, field or header value that the provider would refuse is refused in the provider's
own words and kept in `violations`, so that a test or the demo can demand that there are none. Faults are planned in
`faults`, one for each of the next requests, and used up. `limited` and `spent` are the two kinds of "too many": the
first passes within seconds, the second with the day or the month, and a client must not treat them alike.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web

FaultKind = Literal[
    "ratelimited", "spent", "internal", "unavailable", "hang", "slow", "malformed", "partial", "lost", "oversized",
    "quota-spent", "unsuccessful", "wrong-id",
]  # fmt: skip
OVERSIZED_BYTES = 2_000_000
BODY_BYTES_MAX = 8 * 1024 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one request. `seconds`: how long a limit stands, or a slow answer takes.

    `lost`: it is performed and the connection drops before the answer; `quota-spent`: it is answered, and its headers
    say that it was the last one. Linear's alone: `unsuccessful` and `wrong-id` lie about what was performed.
    """

    kind: FaultKind
    seconds: float = 30


class Faults(deque[Fault | None]):
    """One for each of the next requests; None leaves one alone."""

    def take(self) -> Fault | None:
        return self.popleft() if self else None


class Wrong(Exception):
    """A request the provider would refuse: its status and the body of its answer."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(body))
        self.status, self.body = status, body


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str


Messages = Annotated[list[Message], msgspec.Meta(min_length=1)]


class ChatBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A chat in OpenAI's words; a provider adds the numbers it has limits of its own for."""

    model: str
    messages: Messages
    seed: int | None = None
    stop: list[str] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


async def completion(
    request: web.Request, model: str, text: str, stream: bool, usage: Mapping[str, int] | None
) -> web.StreamResponse:
    """`text` as a chat completion in OpenAI's words: whole, or word by word as server-sent events with `usage` last."""
    shared = {"id": "chat-1", "created": 1, "model": model}
    if not stream:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({**shared, "object": "chat.completion", "choices": [choice], "usage": usage})
    words = text.split(" ")
    parts = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
    deltas: list[tuple[Mapping[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [*(({"content": part}, None) for part in parts), ({}, "stop")]
    lines: list[Any] = [
        {
            **shared,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
        }
        for delta, reason in deltas
    ]
    lines += [{**shared, "object": "chat.completion.chunk", "choices": [], "usage": usage}] if usage else []
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    return web.Response(body=body.encode(), content_type="text/event-stream")


class Double:
    """`async with GitHubDouble() as double:` then `double.url`. A subclass gives routes and the provider's words."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.url = ""
        self.faults = Faults()
        self.violations: list[str] = []
        self.requests = 0
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    # what a subclass says -------------------------------------------------------------------------------------------
    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def limited(self, fault: Fault) -> web.Response:
        """The provider's answer to `ratelimited` or `spent`."""
        raise NotImplementedError

    def overloaded(self, fault: Fault) -> web.Response:
        """The provider's answer to `unavailable`."""
        return web.Response(status=503, text="Service Unavailable", headers={"Retry-After": f"{fault.seconds:g}"})

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        """The body of the provider's error."""
        raise NotImplementedError

    def check(self, request: web.Request) -> None:
        """Headers that each request needs. Raises `Wrong`."""
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            raise self.wrong(401, "the token is missing or wrong")

    # for handlers ---------------------------------------------------------------------------------------------------
    def wrong(self, status: int, why: str) -> Wrong:
        return Wrong(status, self.refusal(status, why))

    async def read(self, request: web.Request, shape: type[T], status: int = 400) -> T:
        """The JSON body as `shape`, whose unknown fields are refused. Raises `Wrong`."""
        try:
            return msgspec.json.decode(await request.read(), type=shape)
        except msgspec.DecodeError as fault:
            raise self.wrong(status, str(fault)) from None

    # the service ----------------------------------------------------------------------------------------------------
    async def start(self, port: int = 0, host: str = "127.0.0.1") -> str:
        """Listen; the base URL."""
        app = web.Application(middlewares=[self._guard], client_max_size=BODY_BYTES_MAX)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        self._stopping.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Any:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests += 1
        fault = self.faults.take()
        if fault is not None and fault.kind not in ("lost", "partial", "slow", "quota-spent"):
            return await self._fail(fault)
        try:
            self.check(request)
            answer = await handler(request)
        except Wrong as wrong:
            self.violations.append(f"{request.method} {request.path}: {wrong}")
            return web.json_response(wrong.body, status=wrong.status)
        except web.HTTPException as error:
            self.violations.append(f"{request.method} {request.path}: {error.reason}")
            return web.json_response(self.refusal(error.status, error.reason), status=error.status)
        return answer if fault is None else await self._spoil(fault, request, answer)

    async def _fail(self, fault: Fault) -> web.StreamResponse:
        """A fault that comes before anything is performed."""
        match fault.kind:
            case "ratelimited" | "spent":
                return self.limited(fault)
            case "internal":
                return web.Response(status=500, text="Internal Server Error")
            case "unavailable":
                return self.overloaded(fault)
            case "malformed":
                return web.Response(text='{"result": {"id": ', content_type="application/json")
            case "oversized":
                return web.json_response({"filler": "x" * OVERSIZED_BYTES})
            case _:
                await self._stopping.wait()
                return web.Response(status=503)

    async def _spoil(self, fault: Fault, request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        """A fault that comes after the request was performed."""
        if fault.kind == "slow":
            try:
                async with asyncio.timeout(fault.seconds):
                    await self._stopping.wait()
            except TimeoutError:
                pass
            return answer
        if fault.kind == "partial" and isinstance(answer, web.Response) and isinstance(answer.body, bytes):
            half = answer.body[: len(answer.body) // 2]
            return web.Response(status=answer.status, body=half, content_type=answer.content_type)
        assert request.transport is not None
        request.transport.abort()
        return answer
