"""A double of HuggingFace: the router that answers chats, and the hub that has model files. For tests and the demo.

    POST /v1/chat/completions · GET /v1/models                          the router, OpenAI's words, `model:provider`
    GET  /api/models/{org}/{name}[/revision/{rev}]?blobs=true           sha, siblings with lfs.sha256
    HEAD, GET /{org}/{name}/resolve/{rev}/{file}                        ETag, X-Linked-{Etag,Size}, X-Repo-Commit

Model files need no token, the router does. `corrupt` gives back other bytes of the same length: what the hub's own
client accepts and we must not. `ratelimited` is the five-minute window (429); `spent` are credits used up (402), which
open a long breaker and are no reason to try again soon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web

from .doubles import Double, Fault

COMMIT = "a" * 40
PROVIDERS = frozenset({"auto", "cerebras", "groq", "hf-inference", "novita", "together"})


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str


class Chat(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    stream: bool = False


class HuggingFaceDouble(Double):
    def __init__(
        self,
        key: str = "hf_demo",
        models: tuple[str, ...] = ("Qwen/Qwen2.5-7B-Instruct",),
        answer: Callable[[str], str] = lambda prompt: "P2",
    ) -> None:
        super().__init__(key)
        self.models = models
        self.answer = answer
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository → file → bytes."""
        self.corrupt: set[str] = set()
        """Names of files that are served with other bytes than were promised."""

    def routes(self) -> list[web.RouteDef]:
        file = "/{org}/{name}/resolve/{revision}/{file:.+}"
        return [
            web.post("/v1/chat/completions", self._chat),
            web.get("/v1/models", self._list),
            web.get("/api/models/{org}/{name}", self._repository),
            web.get("/api/models/{org}/{name}/revision/{revision}", self._repository),
            web.get(file, self._file),
        ]

    def limited(self, fault: Fault) -> web.Response:
        if fault.kind == "spent":
            why = "You have exceeded your monthly included credits for Inference Providers."
            return web.json_response(self.refusal(402, why), status=402)
        headers = {"RateLimit": f'"resolvers";r=0;t={fault.seconds:g}', "Retry-After": f"{fault.seconds:g}"}
        return web.json_response(self.refusal(429, "Too Many Requests"), status=429, headers=headers)

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        return {"error": why}

    def check(self, request: web.Request) -> None:
        if request.path.startswith("/v1/"):
            super().check(request)

    # the router -----------------------------------------------------------------------------------------------------
    async def _chat(self, request: web.Request) -> web.Response:
        asked = await self.read(request, Chat)
        model, _, provider = asked.model.partition(":")
        if model not in self.models or (provider and provider not in PROVIDERS):
            raise self.wrong(400, f"The requested model '{asked.model}' does not exist or no provider serves it")
        if asked.stream:
            raise self.wrong(422, "this double does not stream")
        message = {"role": "assistant", "content": self.answer(asked.messages[-1].content)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        told = {"id": "chat-1", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
        return web.json_response(told)

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": model, "object": "model"} for model in self.models]}
        )

    # the hub --------------------------------------------------------------------------------------------------------
    async def _repository(self, request: web.Request) -> web.Response:
        if dict(request.query).keys() - {"blobs"}:
            raise self.wrong(400, "unknown query parameter")
        repository, files = self._find(request)
        siblings = [
            {
                "rfilename": name,
                "size": len(body),
                "lfs": {"sha256": _sha256(body), "size": len(body), "pointerSize": 135},
            }
            for name, body in files.items()
        ]
        return web.json_response({"id": repository, "sha": COMMIT, "siblings": siblings})

    async def _file(self, request: web.Request) -> web.Response:
        _, files = self._find(request)
        name = request.match_info["file"]
        if name not in files:
            raise self.wrong(404, "Entry not found")
        body = files[name]
        digest = f'"{_sha256(body)}"'
        headers = {"ETag": digest, "X-Linked-Etag": digest, "X-Linked-Size": str(len(body)), "X-Repo-Commit": COMMIT}
        if name in self.corrupt:
            body = bytes(byte ^ 0xFF for byte in body)
        part = request.http_range
        if part.start is None and part.stop is None:
            return web.Response(body=body, headers={**headers, "Accept-Ranges": "bytes"})
        start, stop = part.start or 0, min(part.stop or len(body), len(body))
        if start >= len(body):
            raise self.wrong(416, "Requested Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return web.Response(status=206, body=body[start:stop], headers=headers)

    def _find(self, request: web.Request) -> tuple[str, dict[str, bytes]]:
        repository = f"{request.match_info['org']}/{request.match_info['name']}"
        if repository not in self.files:
            raise self.wrong(401, "Repository Not Found")  # as the hub says of what is private or not there
        if request.match_info.get("revision", "main") not in ("main", COMMIT):
            raise self.wrong(404, "Invalid rev id")
        return repository, self.files[repository]


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
