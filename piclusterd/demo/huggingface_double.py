"""A double of HuggingFace: the router that answers chats, and the hub that has model files. For tests and the demo.

    POST /v1/chat/completions · GET /v1/models                          the router, OpenAI's words, `model:provider`
    GET  /api/models/{org}/{name}[/revision/{rev}]?blobs=true           sha, siblings with lfs.sha256
    HEAD, GET /{org}/{name}/resolve/{rev}/{file}                        ETag, X-Linked-{Etag,Size}, X-Repo-Commit
                                                                        302 to the CDN where there is one

Model files need no token, the router does. `corrupt` gives back other bytes of the same length: what the hub's own
client accepts and we must not; `cuts` break answers off, `lies` tell another size, `gated` and `private` repositories
want a token. The CDN (`CdnDouble`) refuses whoever shows it one, as its storage does. `ratelimited` is the five-minute
window (429); `spent` are credits used up (402), which open a long breaker and are no reason to try again soon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
from aiohttp import web

from .doubles import ChatBody, Double, Fault, completion

COMMIT = "a" * 40
PROVIDERS = frozenset({"auto", "cerebras", "groq", "hf-inference", "novita", "together"})


class Chat(ChatBody, forbid_unknown_fields=True, kw_only=True):
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0


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
        self.cuts: dict[str, list[int]] = {}
        """File → after how many bytes each of its next answers breaks off."""
        self.lies: dict[str, int] = {}
        """File → the size that is told of it."""
        self.gated: set[str] = set()
        """Repositories whose terms nobody has accepted."""
        self.private: set[str] = set()
        self.resumes = True
        self.served_bytes = 0
        """Of model files."""
        self.cdn: CdnDouble | None = None

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
    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await self.read(request, Chat)
        model, _, provider = asked.model.partition(":")
        if model not in self.models or (provider and provider not in PROVIDERS):
            raise self.wrong(400, f"The requested model '{asked.model}' does not exist or no provider serves it")
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        wanted = not asked.stream or (asked.stream_options is not None and asked.stream_options.include_usage)
        text = self.answer(asked.messages[-1].content)
        return await completion(request, model, text, asked.stream, usage if wanted else None)

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
                "size": self.lies.get(name, len(body)),
                "lfs": {"sha256": _sha256(body), "size": self.lies.get(name, len(body)), "pointerSize": 135},
            }
            for name, body in files.items()
        ]
        return web.json_response({"id": repository, "sha": COMMIT, "siblings": siblings})

    async def _file(self, request: web.Request) -> web.StreamResponse:
        _, files = self._find(request)
        name = request.match_info["file"]
        if name not in files:
            raise self.wrong(404, "Entry not found")
        digest = f'"{_sha256(files[name])}"'
        size = str(len(files[name]))
        headers = {"ETag": digest, "X-Linked-Etag": digest, "X-Linked-Size": size, "X-Repo-Commit": COMMIT}
        if self.cdn is not None:
            self.cdn.files[digest.strip('"')] = name, files[name]
            to = f"{self.cdn.url}/blobs/{digest.strip(chr(34))}?X-Amz-Signature=demo"
            return web.Response(status=302, headers={**headers, "Location": to})
        return await self.send(request, name, files[name], headers)

    async def send(
        self, request: web.Request, name: str, body: bytes, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        """The bytes that were asked for, as spoilt as a test wants them."""
        if name in self.corrupt:
            body = bytes(byte ^ 0xFF for byte in body)
        part = request.http_range if self.resumes else slice(None, None)
        start, stop = part.start or 0, min(part.stop or len(body), len(body))
        if start >= len(body):
            raise self.wrong(416, "Requested Range Not Satisfiable")
        ranged = part.start is not None or part.stop is not None
        told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"} if ranged else {"Accept-Ranges": "bytes"}
        response = web.StreamResponse(status=206 if ranged else 200, headers={**headers, **told})
        response.content_length = stop - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        cuts = self.cuts.get(name)
        cut = cuts.pop(0) if cuts else stop - start
        self.served_bytes += min(cut, stop - start)
        await response.write(body[start : min(stop, start + cut)])
        if cut < stop - start:
            assert request.transport is not None
            request.transport.close()  # what was written is sent first
        return response

    def _find(self, request: web.Request) -> tuple[str, dict[str, bytes]]:
        repository = f"{request.match_info['org']}/{request.match_info['name']}"
        if repository not in self.files:
            raise self.wrong(401, "Repository Not Found")  # as the hub says of what is private or not there
        with_token = request.headers.get("Authorization") == f"Bearer {self.key}"
        if repository in self.private and not with_token:
            raise self.wrong(401, "Repository Not Found")
        if repository in self.gated and not with_token:
            raise self.wrong(403, "Access to this model is restricted and you are not in the authorized list.")
        if request.match_info.get("revision", "main") not in ("main", COMMIT):
            raise self.wrong(404, "Invalid rev id")
        return repository, self.files[repository]


class CdnDouble(Double):
    """Where the hub's redirects lead. Sends what `hub` would, and refuses requests that carry a second credential."""

    def __init__(self, hub: HuggingFaceDouble) -> None:
        super().__init__("")
        self.hub = hub
        self.files: dict[str, tuple[str, bytes]] = {}
        hub.cdn = self

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/blobs/{sha256}", self._blob)]

    def limited(self, fault: Fault) -> web.Response:
        return web.Response(status=503, text="SlowDown")

    def refusal(self, status: int, why: str) -> Mapping[str, Any]:
        return {"error": why}

    def check(self, request: web.Request) -> None:
        if "Authorization" in request.headers:
            raise self.wrong(400, "Only one auth mechanism allowed")

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        found = self.files.get(request.match_info["sha256"])
        if found is None:
            raise self.wrong(404, "NoSuchKey")
        return await self.hub.send(request, *found, {})


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
