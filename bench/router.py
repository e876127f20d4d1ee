"""What a hop costs: the same request to the node that answers it, and through what may stand in between.

    client ─▶ pi-2                       direct        client ─▶ pi-1 ══link, TLS══▶ pi-2      one hop
    client ─▶ LiteLLM proxy ─▶ pi-2      the peer      client ─▶ bare_proxy ─▶ pi-2            aiohttp's own price

Two real daemons with the demo model on the second, one token an answer, one request at a time, the four ways by turns
in an order drawn anew each time, so that what else the machine does falls on all alike. The overhead is what a way's
quantile has over the direct way's. LiteLLM is installed into a virtual environment of its own under the bench's cache.
`make bench NAME=router`
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from bench.report import Report, main, quantile
from piclusterd.demo.cluster import MODEL, Cluster
from piclusterd.demo.hub_process import free_port

CACHE = Path(os.environ.get("PICLUSTER_BENCH_CACHE", Path.home() / ".cache" / "piclusterd-bench"))
LITELLM = CACHE / "litellm"
REQUESTS, QUICK = 5000, 1500
WARM = 50
READY_S, INSTALL_S = 120.0, 900.0
RATIO_MIN = 5.0
KEY = "sk-bench"
LITELLM_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it asks the internet for prices otherwise
    "LITELLM_MASTER_KEY": KEY,  # it does not start without one
}
BODY = json.dumps(
    {"model": MODEL, "messages": [{"role": "user", "content": "Title: x"}], "max_tokens": 1, "temperature": 0}
).encode()
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}

Took = dict[str, list[float]]
"""Seconds of each request, by way."""


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
            ways = {"direct": second, "hop": first}
            ways["bare"] = await stack.enter_async_context(_running(Path(root) / "bare.log", _bare(second)))
            why, proxy = await _litellm(stack, Path(root), second)
            took = await _by_turns(ways | ({"peer": proxy} if proxy else {}), requests)
    for part, bar in ((0.5, 1.0), (0.99, 3.0)):
        _tell(report, took, part, bar, why)


def _tell(report: Report, took: Took, part: float, bar: float, why: str) -> None:
    at = {way: quantile(times, part) * 1000 for way, times in took.items()}
    over = {way: value - at["direct"] for way, value in at.items()}
    name = f"p{part * 100:.0f}"
    for way, told in (("direct", "direct"), ("hop", "one hop"), ("bare", "through a bare aiohttp proxy")):
        report.add(f"{told}, {name}", at[way], "ms")
    report.add(
        f"one hop's overhead, {name}{why}", over["hop"], "ms",
        peer="LiteLLM proxy" if "peer" in over else None, peer_value=over.get("peer"),
        at_most=bar, ratio_at_least=RATIO_MIN if "peer" in over else None,
    )  # fmt: skip
    report.add(f"one hop's overhead, {name}", over["hop"], "ms", peer="a bare aiohttp proxy", peer_value=over["bare"])


async def _by_turns(ways: dict[str, str], requests: int) -> Took:
    took: Took = {way: [] for way in ways}
    order = list(ways.items())
    async with aiohttp.ClientSession(headers=HEADERS) as http:
        for number in range(requests + WARM):
            random.shuffle(order)  # the slowest leaves cold caches to the next
            for way, url in order:
                began = time.perf_counter()
                async with http.post(f"{url}/v1/chat/completions", data=BODY) as answer:
                    said = await answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"{way}: {answer.status} {said[:300]!r}")
                if number >= WARM:
                    took[way].append(time.perf_counter() - began)
    return took


async def _litellm(stack: AsyncExitStack, root: Path, target: str) -> tuple[str, str]:
    """Why there is none, and the proxy's URL; one of the two is empty."""
    config = root / "litellm.yaml"
    params = {"model": f"openai/{MODEL}", "api_base": f"{target}/v1", "api_key": "any"}
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": params}]}))  # JSON is YAML
    command = [str(LITELLM / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port"]
    try:
        await asyncio.to_thread(_install)
        return "", await stack.enter_async_context(_running(root / "litellm.log", lambda port: [*command, str(port)]))
    except (OSError, subprocess.SubprocessError, TimeoutError) as fault:
        return f" (no LiteLLM: {str(fault) or type(fault).__name__})", ""


def _bare(target: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-m", "bench.bare_proxy", str(port), target]


def _install() -> None:
    if not (LITELLM / "bin" / "litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(LITELLM)], check=True)
        pip = [str(LITELLM / "bin" / "pip"), "install", "--quiet", "litellm[proxy]"]
        subprocess.run(pip, check=True, timeout=INSTALL_S)


@asynccontextmanager
async def _running(log: Path, command: Callable[[int], list[str]]) -> AsyncIterator[str]:
    """A proxy's URL. Raises OSError where it ends, TimeoutError where it answers nobody."""
    port = free_port()
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command(port), stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, **LITELLM_ENVIRONMENT},
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as http:
            while not await _answers(http, url):
                if process.returncode is not None:
                    raise OSError(f"it ended with status {process.returncode}, see {log}")
                await asyncio.sleep(0.5)  # another program tells nobody that it is up
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
