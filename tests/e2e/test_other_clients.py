"""LiteLLM's SDK and `llm`, unchanged, each in an environment of its own, against one real daemon.

Their packages are many, so this is a lane: PICLUSTER_E2E=all installs them into the cache once, or PICLUSTER_CLIENTS
names an environment that has them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from piclusterd.demo.cluster import MODEL, Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PACKAGES = ("litellm==1.106.2", "mcp==2.3.0", "llm==0.32.1")
LIMIT_S = 280.0

LITELLM = """
import json, sys
import litellm
base, model = sys.argv[1:]
litellm.suppress_debug_info = True
ask = dict(model=f"openai/{model}", api_base=base, api_key="any", max_tokens=8, temperature=0,
           messages=[{"role": "user", "content": "Title: A door"}])
tool = {"type": "function", "function": {"name": "open_door", "parameters": {"type": "object", "properties": {}}}}
schema = {"type": "object", "properties": {"kind": {"enum": ["bug", "chore"]}}, "required": ["kind"],
          "additionalProperties": False}
whole = litellm.completion(**ask)
stream = litellm.completion(**ask, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
tools = litellm.completion(**ask, tools=[tool], tool_choice="auto")
typed = litellm.completion(**{**ask, "max_tokens": 40}, response_format={
    "type": "json_schema", "json_schema": {"name": "t", "schema": schema, "strict": True}})
vectors = litellm.embedding(model=f"openai/{model}", api_base=base, api_key="any", input=["a", "b"])
text = litellm.text_completion(model=f"text-completion-openai/{model}", api_base=base, api_key="any", prompt="Title:",
                               max_tokens=4)
try:
    litellm.completion(**{**ask, "model": "openai/nobody-has-it"})
    error = ""
except litellm.NotFoundError as fault:
    error = type(fault).__name__
print(json.dumps({
    "whole": whole.choices[0].message.content, "tokens": whole.usage.completion_tokens,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "tools": tools.choices[0].finish_reason, "typed": typed.choices[0].message.content,
    "vectors": [len(row["embedding"]) for row in vectors.data], "text": text.choices[0].text, "error": error}))
"""


async def run(*words: str, **environ: str) -> str:
    child = await asyncio.create_subprocess_exec(
        *words, env={**os.environ, **environ}, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(LIMIT_S):
        out, err = await child.communicate()
    assert child.returncode == 0, err.decode()[-3000:]
    return out.decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clients() -> Path:
    """The `bin` of an environment with both."""
    if given := os.environ.get("PICLUSTER_CLIENTS"):
        return Path(given) / "bin"
    if os.environ.get("PICLUSTER_E2E") != "all":
        pytest.skip("LiteLLM and llm are installed where PICLUSTER_E2E=all is set, or found with PICLUSTER_CLIENTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "piclusterd" / "-".join(PACKAGES).replace("=", "")
    if not (home / "bin" / "llm").exists():
        try:
            await run(sys.executable, "-m", "venv", str(home))
            await run(str(home / "bin" / "pip"), "install", "-q", *PACKAGES)
        except (AssertionError, TimeoutError) as fault:
            pytest.skip(f"LiteLLM and llm cannot be installed here: {fault}")
    return home / "bin"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def base(clients: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The base URL of a daemon with the demo model."""
    made = Cluster(Path(tmp_path_factory.mktemp("clients")), size=1, with_model=(0,))
    try:
        await made.found()
        await made.until_served()
        yield f"{made.members[0].url}/v1"
    finally:
        await made.close()


async def test_litellm_completes_streams_embeds_and_maps_errors(clients: Path, base: str) -> None:
    told: dict[str, Any] = json.loads(await run(str(clients / "python"), "-c", LITELLM, base, MODEL))
    assert told["whole"] == told["stream"] != ""
    assert told["tokens"] > 0
    assert told["tools"] in ("stop", "length", "tool_calls")
    assert json.loads(told["typed"])["kind"] in ("bug", "chore")
    assert told["vectors"][0] == told["vectors"][1] > 8
    assert told["text"]
    assert told["error"] == "NotFoundError"


async def test_llm_talks_to_a_model_of_its_extra_file(clients: Path, base: str, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: home\n  model_name: {MODEL}\n  api_base: {base}\n  supports_schema: true\n"
    )
    at = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    llm = str(clients / "llm")
    assert "home" in await run(llm, "models", "list", **at)
    ask = ("-m", "home", "-o", "temperature", "0", "-o", "max_tokens", "8", "Title: A door")
    whole = await run(llm, *ask, "--no-stream", "--no-log", **at)
    assert whole.strip()
    assert await run(llm, *ask, "--no-log", **at) == whole
    typed = await run(llm, "-m", "home", "--schema", "kind: bug or chore", "--no-stream", "--no-log", "A door", **at)
    assert "kind" in json.loads(typed)
