"""GGUF files with faults and with programs in them: the child may refuse or die; its caller stays, and says why."""

from __future__ import annotations

import os
import random
from pathlib import Path

import psutil
import pytest

from piclusterd.errors import PiclusterError
from piclusterd.inference.child import Child, ChildDied, LoadFault

from .rig import DEMO, GREEDY, NAME, READY_S, collected, pool_of, spec

FILES = 400 if os.environ.get("PICLUSTER_E2E") == "all" else 20
METADATA_BYTES = 24 * 1024
"""Where the demo model's keys, tokens and tensor table are; the rest is numbers, of which any will do."""
RSS_MAX = 256 * 1024 * 1024
TEMPLATE = "tokenizer.chat_template"


def mutated(seed: int) -> bytes:
    """The demo model with a few bytes, or a length, of its metadata changed, or cut off."""
    draw = random.Random(seed)
    data = bytearray(DEMO.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(4, METADATA_BYTES)
        match draw.randrange(4):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + 8] = draw.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
            case 2:
                data[at : at + 16] = draw.randbytes(16)
            case _:
                del data[at : at + draw.randrange(1, 64)]
    return bytes(data[: draw.randrange(64, len(data))] if draw.random() < 0.1 else data)


def with_template(path: Path, template: str) -> Path:
    """The demo model with another chat template of the same length."""
    data = DEMO.read_bytes()
    at = data.index(TEMPLATE.encode()) + len(TEMPLATE) + 4  # the key, and the type of its value
    length = int.from_bytes(data[at : at + 8], "little")
    assert len(template.encode()) <= length
    path.write_bytes(data[: at + 8] + template.encode().ljust(length) + data[at + 8 + length :])
    return path


async def outcome(path: Path) -> str:
    try:
        child, _ = await Child.start(spec(path), READY_S)
    except LoadFault:
        return "refused"
    except ChildDied:
        return "died"
    try:
        async for _ in child.generate(GREEDY):
            pass
    except ChildDied:
        return "died answering"
    except PiclusterError:
        return "refused the request"
    finally:
        await child.close(grace_s=0)
    return "answered"


async def test_a_mutated_file_never_costs_more_than_its_child(tmp_path: Path) -> None:
    me = psutil.Process()
    before = me.memory_info().rss
    found: dict[str, int] = {}
    for seed in range(FILES):
        path = tmp_path / "mutated.gguf"
        path.write_bytes(mutated(seed))
        ended = await outcome(path)
        found[ended] = found.get(ended, 0) + 1
    print(found)  # noqa: T201
    assert found.get("refused", 0) > 0
    assert len(found) > 1
    assert not me.children()
    assert me.memory_info().rss - before < RSS_MAX
    assert await outcome(DEMO) == "answered"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2000000000 }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
    ],
    ids=["memory", "doubling", "escape", "refusal"],
)
async def test_a_template_that_is_a_bomb_is_the_requests_fault(tmp_path: Path, template: str) -> None:
    async with pool_of([spec(with_template(tmp_path / "bomb.gguf", template))]) as pool:
        child = pool.pid(NAME)
        with pytest.raises(PiclusterError, match="template refused"):
            await collected(pool.generate(NAME, GREEDY))
        assert pool.pid(NAME) == child


@pytest.mark.slow_lane
@pytest.mark.skipif(os.environ.get("PICLUSTER_E2E") != "all", reason="takes the child's deadline, and is slow")
async def test_a_template_that_computes_for_ever_ends_its_child_at_the_deadline(tmp_path: Path) -> None:
    template = "{% set x = 9 ** 99999999 %}{{ x }}"
    async with pool_of([spec(with_template(tmp_path / "bomb.gguf", template))]) as pool:
        with pytest.raises(ChildDied, match="SIGALRM"):
            await collected(pool.generate(NAME, GREEDY))
