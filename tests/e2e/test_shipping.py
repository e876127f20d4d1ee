"""Two daemons, and a model that reads slowly: what one has read the other fetches over their link, as routing said."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from piclusterd.demo.cluster import MODEL, Cluster, Member
from tests.inference.rig import DEMO
from tests.inference.widened import widened

from .rig import LIMIT_S

pytestmark = pytest.mark.e2e
TIMES = 256
"""Wide enough that reading takes twice what a fetch from a busy node is predicted to, on an idle machine too."""
TABLE = '[[models]]\nname = "{name}"\npath = "{path}"\ncontext = 4096\nslots = 1\naliases = ["{alias}"]\n'
ANSWER_TOKENS = 12


def issue(what: str, sentences: int) -> str:
    """Some twelve tokens a sentence."""
    return "Title: Crash\n\n" + "".join(f"The {what} crashes when file {at} is saved. " for at in range(sentences))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Each node's model has an alias of that node's own."""
    path = tmp_path / "wide.gguf"
    widened(DEMO, path, TIMES)
    own = {at: TABLE.format(name=MODEL, path=path, alias=f"at-pi-{at + 1}") for at in range(2)}
    home = Cluster(tmp_path, size=2, with_model=(), own=own)
    try:
        await home.found()
        await home.until_served()
        await home.until(lambda: told(home, lambda facts: facts["slots"] == 1), "both have it loaded", LIMIT_S)
        yield home
    finally:
        await home.close()


async def told(cluster: Cluster, holds: Callable[[dict[str, Any]], Any], by: Member | None = None) -> bool:
    """Whether pi-2 has heard of the model facts that `holds`: from `by`, or from both nodes."""
    view = await cluster.status(cluster.members[1]) or {"members": []}
    tellers = [one for one in view["members"] if by is None or one["node"] == by.node]
    facts = [one for member in tellers for one in member["facts"]["models"] if one["name"] == MODEL]
    return len(facts) == (2 if by is None else 1) and all(holds(one) for one in facts)


async def ask(cluster: Cluster, member: Member, model: str, text: str) -> tuple[str, Mapping[str, str], str]:
    """The answer's text, the headers, and what `picluster why` tells of it."""
    body = {
        "model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": ANSWER_TOKENS,
    }  # fmt: skip
    url, patience = f"{member.url}/v1/chat/completions", aiohttp.ClientTimeout(total=LIMIT_S)
    async with cluster.http.post(url, json=body, timeout=patience) as answer:
        said, headers = await answer.json(), answer.headers
        assert answer.status == 200, said
    why = await cluster.owner(member, "why", headers["X-Request-Id"])
    return said["choices"][0]["message"]["content"], headers, why


async def test_a_busy_nodes_reading_is_fetched_by_the_other_as_predicted_and_the_answer_is_the_same(
    cluster: Cluster,
) -> None:
    first, second = cluster.members
    for what in ("editor", "server"):  # the first need of a file's hash, on the one and then on the other
        await ask(cluster, first, "at-pi-1", issue(what, 20))
        _, headers, _ = await ask(cluster, second, "at-pi-2", issue(what, 20))
        assert "X-Picluster-Shipped" not in headers

    long = issue("browser", 64)
    expected, headers, _ = await ask(cluster, first, "at-pi-1", long)
    assert headers["X-Picluster-Node"] == "pi-1"
    busy = asyncio.create_task(ask(cluster, first, "at-pi-1", issue("clock", 64)))
    await cluster.until(
        lambda: told(cluster, lambda facts: facts["busy"] and facts["token_bytes"], first), "pi-2 hears of it", LIMIT_S
    )
    text, headers, why = await ask(cluster, second, MODEL, long)
    assert headers["X-Picluster-Node"] == "pi-2"
    assert headers.get("X-Picluster-Shipped", "").startswith("from=pi-1; tokens="), why
    assert int(headers["X-Picluster-Cached-Tokens"]) > 700
    assert re.search(r"to pi-2: .* fetches \d+ tokens of it in", why)
    assert re.search(r"\d+ tokens of it came from pi-1: ", why)
    assert text == expected
    await busy
