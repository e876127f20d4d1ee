"""Our child and llama.cpp's own server as two sides of one measurement: same GGUF, same threads, same requests.

    async with ours(model, slots) | llama_server(model, slots) as side:   side.generate(Request) ──▶ Answer(times, text)

Ours is the pool with its child process, without the HTTP API: what `engine` measures is the engine and its socket.
llama-server is spoken to over HTTP on loopback, streamed (`/completion`), with its prompt cache on.
"""

from __future__ import annotations

import asyncio
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
from pathlib import Path

import aiohttp

from piclusterd.inference.models import ModelSpec
from piclusterd.inference.pool import Pool
from piclusterd.inference.protocol import Delta, Field, GenerateRequest

CACHE = Path(os.environ.get("PICLUSTER_BENCH_CACHE", Path.home() / ".cache" / "piclusterd-bench"))
DEMO = Path(__file__).parents[1] / "piclusterd" / "inference" / "demo_model" / "triage-demo.gguf"
END_TOKEN = 0
"""Of the demo model's tokenizer, which both models have; banned, so that every answer has its full length."""
READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Request:
    prompt: str
    tokens: int
    """To be generated; with `schema` or `choices`: at most."""
    schema: str = ""
    choices: tuple[Field, ...] = ()
    seed: int = 1


@dataclass(slots=True)
class Answer:
    """Seconds from the request to each piece of text that came, and how many tokens there were."""

    at: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""

    @property
    def first(self) -> float:
        return self.at[0]

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)]


Generate = Callable[[Request], Coroutine[None, None, Answer]]


@asynccontextmanager
async def ours(model: Path, slots: int, context: int, threads: int) -> AsyncIterator[Generate]:
    size = await asyncio.to_thread(os.path.getsize, model)
    spec = ModelSpec("bench", model, size, context, slots, threads, threads)
    pool = Pool(queue_max=4096, load_timeout_s=READY_S)
    await pool.start([spec])
    assert await pool.settled("bench") == "ready", pool.states()

    async def generate(request: Request) -> Answer:
        asked = GenerateRequest(
            prompt=request.prompt,
            max_tokens=request.tokens,
            temperature=0.0,
            seed=request.seed,
            json_schema=request.schema,
            choices=request.choices,
            logit_bias=() if request.schema else ((END_TOKEN, -100.0),),
        )
        answer, began = Answer(), time.perf_counter()
        async for frame in pool.generate("bench", asked):
            if isinstance(frame, Delta):
                answer.at.append(time.perf_counter() - began)
                answer.text += frame.text
            else:
                answer.tokens = frame.completion_tokens
        return answer

    try:
        yield generate
    finally:
        await pool.close()


@asynccontextmanager
async def llama_server(model: Path, slots: int, context: int, threads: int) -> AsyncIterator[Generate]:
    """Raises `subprocess.CalledProcessError` where it cannot be built."""
    binary = await asyncio.to_thread(_built)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-m", str(model), "--port", str(port), "-np", str(slots), "-c", str(context), "--kv-unified"]
    arguments += ["-t", str(threads), "-tb", str(threads), "--no-webui", "--log-disable"]
    process = await asyncio.create_subprocess_exec(binary, *arguments)
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await _healthy(http, url)
            yield lambda request: _streamed(http, url, request)
    finally:
        process.terminate()
        await process.wait()


def _built() -> str:
    build = Path(__file__).parent / "llama_server_build"
    return subprocess.run([build, CACHE / "llama.cpp"], check=True, capture_output=True, text=True).stdout.strip()


async def _healthy(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                async with http.get(f"{url}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


async def _streamed(http: aiohttp.ClientSession, url: str, request: Request) -> Answer:
    body = {
        "prompt": request.prompt,
        "n_predict": request.tokens,
        "temperature": 0.0,
        "seed": request.seed,
        "cache_prompt": True,
        "stream": True,
    }
    body |= {"json_schema": json.loads(request.schema)} if request.schema else {"ignore_eos": True}
    answer, began = Answer(), time.perf_counter()
    async with http.post(f"{url}/completion", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if event.get("content"):
                answer.at.append(time.perf_counter() - began)
                answer.text += event["content"]
            if event.get("stop"):
                answer.tokens = int(event["tokens_predicted"])
    return answer


def random_model() -> Path:
    """The random-weight model of 0.5B shape, made on the spot, once."""
    out = CACHE / "random-0.5b-q4_0.gguf"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            venv = Path(folder) / "venv"
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            subprocess.run([venv / "bin" / "pip", "install", "-q", "gguf>=0.19", "numpy"], check=True)
            made = out.with_suffix(".part")
            subprocess.run([venv / "bin" / "python", Path(__file__).parent / "random_model.py", made], check=True)
            made.rename(out)
    return out
