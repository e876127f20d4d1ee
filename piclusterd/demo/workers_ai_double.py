"""A double of Workers AI, as the Worker's binding and the REST API reach it. For tests and the demo.

    POST /accounts/{account}/ai/run/{model}               {messages} → {result: {response}, success, …}
    POST /accounts/{account}/ai/v1/chat/completions       the same in OpenAI's words

Checks what the documentation says: models that were deprecated on 2026-05-30 are gone (5007), paid-only ones refused
(5035), and the two kinds of 429 have codes of their own, since they need opposite handling: 3036 the day's 10,000
neurons are spent (stop until 00:00 UTC), 3040 out of capacity (try again soon).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web

from .doubles import ChatBody, Double, Fault, Messages, completion

ACCOUNT = "0123456789abcdef0123456789abcdef"
MODEL = "@cf/meta/llama-3.1-8b-instruct-fast"
MODELS = frozenset({MODEL, "@cf/meta/llama-3.3-70b-instruct-fp8-fast", "@cf/zai-org/glm-4.7-flash"})
PAID_ONLY = frozenset({"@cf/moonshotai/kimi-k2.6", "@cf/zai-org/glm-5.2"})
NEURONS_A_DAY = 10_000
NEURONS_A_CALL = 11
"""A triage of 1,000 tokens in and 200 out on the small model."""


class Run(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    messages: Messages
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 256
    temperature: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.6


class Chat(ChatBody, forbid_unknown_fields=True, kw_only=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 256
    temperature: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.6
    top_p: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0


class WorkersAIDouble(Double):
    def __init__(self, key: str = "cf_token_demo", answer: Callable[[str], str] = lambda prompt: "P2") -> None:
        """`answer` makes the model's text of the last message's."""
        super().__init__(key)
        self.answer = answer
        self.prompts: list[str] = []
        self.neurons = 0

    @property
    def account_url(self) -> str:
        """What a client is given as its base."""
        return f"{self.url}/accounts/{ACCOUNT}"

    def routes(self) -> list[web.RouteDef]:
        base = f"/accounts/{ACCOUNT}/ai"
        return [
            web.post(base + "/run/{model:.+}", self._run),
            web.post(base + "/v1/chat/completions", self._chat),
        ]

    def limited(self, fault: Fault) -> web.Response:
        if fault.kind == "spent":
            return web.json_response(
                _failed(3036, "you have used up your daily free allocation of 10,000 neurons"), status=429
            )
        return web.json_response(_failed(3040, "Capacity temporarily exceeded, please try again."), status=429)

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        codes = {400: 5006, 401: 10000, 403: 5035, 404: 3042, 413: 3006, 429: 3036}
        return _failed(codes.get(status, 7000), why)

    async def _run(self, request: web.Request) -> web.Response:
        text = self._think(request.match_info["model"], await self.read(request, Run))
        usage = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
        return web.json_response(
            {"result": {"response": text, "usage": usage}, "success": True, "errors": [], "messages": []}
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await self.read(request, Chat)
        usage = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
        wanted = not asked.stream or (asked.stream_options is not None and asked.stream_options.include_usage)
        text = self._think(asked.model, asked)
        return await completion(request, asked.model, text, asked.stream, usage if wanted else None)

    def _think(self, model: str, asked: Run | Chat) -> str:
        if model in PAID_ONLY:
            raise self.wrong(403, f"{model} needs a paid plan")
        if model not in MODELS:
            raise self.wrong(404, f"No such model {model} or task")
        if self.neurons + NEURONS_A_CALL > NEURONS_A_DAY:
            raise self.wrong(429, "you have used up your daily free allocation of 10,000 neurons")
        self.neurons += NEURONS_A_CALL
        self.prompts.append(asked.messages[-1].content)
        return self.answer(asked.messages[-1].content)


def _failed(code: int, message: str) -> dict[str, Any]:
    return {"result": None, "success": False, "errors": [{"code": code, "message": message}], "messages": []}
