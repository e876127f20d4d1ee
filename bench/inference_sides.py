"""Our child and llama.cpp's own server as two sides of one measurement: same GGUF, same threads, same requests.

    async with ours(model, setup) | llama_server(model, setup) as generate:   generate(Request) ──▶ Answer(times, text)

Ours is the pool with its child process, without the HTTP API: what is measured is the engine and its socket, as the
daemon sees them. llama-server is spoken to over HTTP on loopback (`/completion`), by a client that only notes when
bytes came and reads them when the answer is whole, so that the two processors are the servers'. Its settings are its
own defaults (prompt cache on, flash attention on), but for what both sides are given alike.

Linux shares processors between sessions (sched_autogroup), so `nice` alone moves nothing between terminals: the
priority that the bench was started with is handed on to the sessions of both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp as lib
import psutil

import piclusterd.inference.llama  # noqa: F401  its log callback: warnings only
from bench.load import CLOSED, Client, connect
from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Delta, Field, GenerateRequest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "piclusterd" / "bench"
DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
LOOPBACK = "127.0.0.1"
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
READY_S = 300.0
TRIED_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides are given alike. `context` is of all `slots` together."""

    slots: int
    context: int
    threads: int
    flags: tuple[str, ...] = ()
    """Of llama-server, beyond these."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    tokens: int
    """To be generated, exactly; with `schema` or `choices`: at most."""
    schema: str = ""
    grammar: str = ""
    """GBNF for llama-server in the place of `schema`."""
    choices: tuple[Field, ...] = ()
    temperature: float = 0.0
    seed: int = 1
    whole: bool = False
    """llama-server answers in one piece (its faster way); ours is a stream of frames in any case."""


@dataclass(slots=True)
class Answer:
    """Seconds from the request to each piece of text that came, and how many tokens there were."""

    at: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Of the tokens."""

    @property
    def first(self) -> float:
        return self.at[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)]


Generate = Callable[[Request], Coroutine[None, None, Answer]]


@asynccontextmanager
async def ours(model: Path, setup: Setup) -> AsyncIterator[Generate]:
    size = await asyncio.to_thread(os.path.getsize, model)
    spec = ModelSpec("bench", model, size, setup.context, setup.slots, setup.threads, setup.threads)
    pool = Pool(queue_max=4096, load_timeout_s=READY_S)
    await pool.start([spec])
    assert await pool.settled("bench") == "ready", pool.states()
    hand_on_priority()
    ends = tuple((token, -100.0) for token in await asyncio.to_thread(end_tokens, model))
    try:
        yield lambda request: _asked(pool, request, ends)
    finally:
        await pool.close()


async def _asked(pool: Pool, request: Request, ends: tuple[tuple[int, float], ...]) -> Answer:
    asked = GenerateRequest(
        prompt=request.prompt,
        max_tokens=request.tokens,
        temperature=request.temperature,
        seed=request.seed,
        json_schema=request.schema,
        choices=request.choices,
        logit_bias=() if request.schema or request.choices else ends,
    )
    answer, began = Answer(), time.perf_counter()
    async for frame in pool.generate("bench", asked):
        if isinstance(frame, Delta):
            answer.at.append(time.perf_counter() - began)
            answer.text += frame.text
            answer.ids += frame.ids
        else:
            answer.tokens = frame.completion_tokens
    return answer


def end_tokens(model: Path) -> list[int]:
    """Those that would end an answer: banned on both sides, so that every answer has its full length."""
    params = lib.llama_model_default_params()
    params.vocab_only = True
    loaded = lib.llama_model_load_from_file(str(model).encode(), params)
    vocabulary = lib.llama_model_get_vocab(loaded)
    count = int(lib.llama_vocab_n_tokens(vocabulary))
    ends = [token for token in range(count) if lib.llama_vocab_is_eog(vocabulary, token)]
    lib.llama_model_free(loaded)
    return ends


@asynccontextmanager
async def llama_server(model: Path, setup: Setup) -> AsyncIterator[Generate]:
    """Raises `subprocess.CalledProcessError` where it cannot be built."""
    binary = await asyncio.to_thread(built)
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        where = LOOPBACK, free.getsockname()[1]
    arguments = ["-m", str(model), "--port", str(where[1]), "-np", str(setup.slots), "-c", str(setup.context)]
    arguments += ["-t", str(setup.threads), "-tb", str(setup.threads), "--log-disable", *setup.flags]
    process = await asyncio.create_subprocess_exec(*DIES_WITH_US, binary, *arguments, start_new_session=True)
    hand_on_priority()
    peer = _Peer(where)
    try:
        await peer.ready()
        yield peer.generate
    finally:
        peer.close()
        process.terminate()
        await process.wait()


def hand_on_priority() -> None:
    """This process's niceness to its own session's share of the processors, and to those of its children."""
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):  # no autogroups here, or too often (the kernel limits it for users)
            Path(f"/proc/{process.pid}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))


@cache
def built() -> str:
    """llama-server's path. Raises `subprocess.CalledProcessError`, with why in `stderr`."""
    build = Path(__file__).parent / "llama_server_build"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([build, CACHE / "llama.cpp"], check=True, capture_output=True, text=True, env=environment)
    return done.stdout.strip()


class _Peer:
    """llama-server at `where`, over connections that are kept."""

    def __init__(self, where: tuple[str, int]) -> None:
        self._where = where
        self._idle: list[Completion] = []

    async def ready(self) -> None:
        async with asyncio.timeout(READY_S):
            while True:
                with contextlib.suppress(OSError):
                    one = await self._connection()
                    if await one.request(http("GET", "/health")) == "":
                        self._idle.append(one)
                        return
                    one.transport.abort()
                await asyncio.sleep(TRIED_EVERY_S)

    async def _connection(self) -> Completion:
        while self._idle:
            one = self._idle.pop()
            if not one.transport.is_closing():  # the server gives up idle ones after some seconds
                return one
        fresh = await connect(Completion, self._where)
        assert isinstance(fresh, Completion)
        return fresh

    async def generate(self, request: Request) -> Answer:
        prepared = http("POST", "/completion", json.dumps(_body(request)).encode())
        began = time.perf_counter()
        one = await self._connection()
        while (why := await one.request(prepared)) == CLOSED:  # it had been kept for too long, or too often
            one = await self._connection()
        assert not why, why
        self._idle.append(one)
        return one.answer(began)

    def close(self) -> None:
        for one in self._idle:
            one.transport.abort()


def _body(request: Request) -> dict[str, Any]:
    shaped: dict[str, Any] = {"json_schema": json.loads(request.schema)} if request.schema else {"ignore_eos": True}
    if request.grammar:
        shaped = {"grammar": request.grammar}
    return {
        "prompt": request.prompt,
        "n_predict": request.tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "cache_prompt": True,
        "stream": not request.whole,
        "return_tokens": True,
        **shaped,
    }


def http(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Completion(Client):
    """HTTP/1.1, the answer in one piece or as chunks of events; both are only kept until it is whole."""

    def send(self, prepared: bytes) -> None:
        self.came: list[tuple[float, bytes]] = []
        super().send(prepared)

    def data_received(self, data: bytes) -> None:
        self.came.append((time.perf_counter(), data))
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        chunked = b"chunked" in head
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0) if not chunked else 0
        if body.endswith(b"\r\n0\r\n\r\n") if chunked else len(body) >= length:
            self._buffer = b""
            self._done("" if head.startswith(b"HTTP/1.1 200") else self.came[0][1][:300].decode(errors="replace"))

    def answer(self, began: float) -> Answer:
        answer, buffer = Answer(), b""
        for at, data in self.came:
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    self._told(answer, json.loads(line[6:]), at - began)
        if buffer.startswith(b"{"):
            self._told(answer, json.loads(buffer), self.came[-1][0] - began)
        return answer

    def _told(self, answer: Answer, event: dict[str, Any], at: float) -> None:
        if event.get("content"):
            answer.at.append(at)
            answer.text += event["content"]
        if event.get("stop"):
            answer.tokens = int(event["tokens_predicted"])
        answer.ids += event.get("tokens", [])


def random_model() -> Path:
    """The random-weight model of 0.5B shape, made on the spot, once. Raises `subprocess.CalledProcessError`."""
    out = CACHE / "random-0.5b-q4_0.gguf"
    if not out.exists():
        built()
        [vocabulary] = CACHE.glob("llama.cpp/llama_cpp_python-*/vendor/llama.cpp/models/ggml-vocab-qwen2.gguf")
        with tempfile.TemporaryDirectory() as folder:
            venv = Path(folder) / "venv"
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([venv / "bin" / "pip", "install", "-q", "gguf>=0.19", "numpy"], check=True)
            made, writer = out.with_suffix(".part"), Path(__file__).parent / "random_model.py"
            subprocess.run([venv / "bin" / "python", writer, vocabulary, made], check=True)
            made.rename(out)
    return out
