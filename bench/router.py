"""What a hop costs: the same request to the node that answers it, through a neighbour, and through LiteLLM's proxy.

    client ─▶ pi-2                       direct        client ─▶ pi-1 ══link══▶ pi-2        one hop
    client ─▶ LiteLLM proxy ─▶ pi-2      the peer      make bench NAME=router ARGS="--quick"

Two real daemons with the demo model on the second, one token an answer, one request at a time, the three ways by turns,
so that what else the machine does falls on all alike. The overhead is what a way's quantile has over the direct way's.
LiteLLM is installed into a virtual environment of its own under the bench's cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from bench.report import Report, main, quantile
from piclusterd.demo.cluster import MODEL, Cluster
from piclusterd.demo.hub_process import free_port

CACHE = Path(os.environ.get("PICLUSTER_BENCH_CACHE", Path.home() / ".cache" / "piclusterd-bench"))
LITELLM = CACHE / "litellm"
REQUESTS, QUICK = 2000, 200
WARM = 30
READY_S, INSTALL_S = 300.0, 900.0
BODY = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "Title: x"}], "max_tokens": 1, "temperature": 0}
).encode()
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}


def measure(report: Report, quick: bool) -> None:
    asyncio.run(_measure(report, QUICK if quick else REQUESTS))


async def _measure(report: Report, requests: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        cluster = Cluster(Path(root), size=2, with_model=(1,))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(cluster.close)
            await cluster.found()
            await cluster.until_served()
            first, second = (member.url for member in cluster.members)
            why, proxy = await _proxy(stack, Path(root), second)
            ways = {"direct": second, "hop": first} | ({"peer": proxy} if proxy else {})
            took = await _by_turns(ways, requests)
    for part, bar in ((0.5, 1.0), (0.99, 3.0)):
        direct = quantile(took["direct"], part) * 1000
        over = {way: quantile(times, part) * 1000 - direct for way, times in took.items()}
        name = f"p{part * 100:.0f}"
        report.add(f"direct, {name}", direct, "ms")
        report.add(
            f"one hop's overhead, {name}{why}", over["hop"], "ms",
            peer="LiteLLM proxy" if proxy else None, peer_value=over.get("peer"),
            at_most=bar, ratio_at_least=5.0 if proxy else None,
        )  # fmt: skip


async def _by_turns(ways: dict[str, str], requests: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {way: [] for way in ways}
    async with aiohttp.ClientSession(headers=HEADERS) as http:
        for number in range(requests + WARM):
            for way, url in ways.items():
                began = time.perf_counter()
                async with http.post(f"{url}/v1/chat/completions", data=BODY) as answer:
                    said = await answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{way}: {answer.status} {said[:300]!r}")
                if number >= WARM:
                    took[way].append(time.perf_counter() - began)
    return took


async def _proxy(stack: AsyncExitStack, root: Path, target: str) -> tuple[str, str]:
    """Why there is none, and the proxy's URL; one of the two is empty."""
    try:
        await asyncio.to_thread(_install)
        return "", await stack.enter_async_context(_running(root, target))
    except (OSError, subprocess.SubprocessError, TimeoutError) as fault:
        return f" (no LiteLLM: {str(fault) or type(fault).__name__})", ""


def _install() -> None:
    if not (LITELLM / "bin" / "litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(LITELLM)], check=True)
        pip = [str(LITELLM / "bin" / "pip"), "install", "--quiet", "litellm[proxy]"]
        subprocess.run(pip, check=True, timeout=INSTALL_S)


@asynccontextmanager
async def _running(root: Path, target: str) -> AsyncIterator[str]:
    port, config = free_port(), root / "litellm.yaml"
    params = {"model": f"openai/{MODEL}", "api_base": f"{target}/v1", "api_key": "any"}
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": params}]}))  # JSON is YAML
    with (root / "litellm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(LITELLM / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # it asks the internet for prices otherwise
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as http:
            while not await _answers(http, url):  # noqa: ASYNC110 (another program tells nobody that it is up)
                await asyncio.sleep(0.5)
        yield url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _answers(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health/liveliness") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


if __name__ == "__main__":
    main("router", measure)
