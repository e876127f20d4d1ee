"""LoRA adapters: a model with one is a model of its own, over the same weights."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.config import Model
from piclusterd.errors import UserError
from piclusterd.inference.models import ModelSpec, resolve_all

from .rig import DEMO, GREEDY, NAME, collected, pool_of, spec

WIDTH, RANK, LAYERS = 160, 4, 4
"""Of the demo model; of the adapter; of the demo model."""
STRING, U32, F32, ALIGNMENT = 8, 4, 6, 32


def gguf(path: Path, keys: Sequence[tuple[str, object]], tensors: Sequence[tuple[str, tuple[int, int], bytes]]) -> Path:
    """A small GGUF file: strings, whole numbers and floats; matrices of float32."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: object) -> bytes:
        match value:
            case str():
                return struct.pack("<I", STRING) + text(value)
            case int():
                return struct.pack("<II", U32, value)
            case _:
                return struct.pack("<If", F32, value)

    head, table, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)), b"", b""
    for key, value in keys:
        head += text(key) + typed(value)
    for name, shape, numbers in tensors:
        table += text(name) + struct.pack("<IQQIQ", 2, *shape, 0, len(data))
        data += numbers + bytes(-len(numbers) % ALIGNMENT)
    whole = head + table
    path.write_bytes(whole + bytes(-len(whole) % ALIGNMENT) + data)
    return path


def lora(path: Path, width: int = WIDTH, seed: int = 1) -> Path:
    """An adapter of the demo model's attention, of random numbers."""
    draw = random.Random(seed)

    def matrix() -> bytes:
        return struct.pack(f"<{width * RANK}f", *(draw.gauss(0, 0.2) for _ in range(width * RANK)))

    tensors: list[tuple[str, tuple[int, int], bytes]] = []
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_v", "attn_output"):
            name = f"blk.{layer}.{part}.weight"
            tensors += [(f"{name}.lora_a", (width, RANK), matrix()), (f"{name}.lora_b", (RANK, width), matrix())]
    keys = [("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")]
    return gguf(path, [*keys, ("adapter.lora.alpha", 8.0)], tensors)


def adapted(path: Path, name: str, scale: float = 1.0) -> ModelSpec:
    return replace(spec(name=f"{NAME}:{name}"), adapter=path, scale=scale)


async def test_an_adapter_changes_what_is_said_and_the_plain_model_stays_as_it_is(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.gguf")
    specs = [spec(), adapted(path, "strong"), adapted(path, "again"), adapted(path, "off", 0.0)]
    async with pool_of(specs) as pool:
        said = {one.name: (await collected(pool.generate(one.name, GREEDY)))[0] for one in specs}
        assert pool.mapped() == pool.mapped(NAME) + DEMO.stat().st_size, "the weights are in memory once"
        assert {facts.name: facts.tasks for facts in pool.facts()}[f"{NAME}:strong"] == ("generate",)
    assert said[f"{NAME}:strong"] == said[f"{NAME}:again"] != said[NAME]
    assert said[f"{NAME}:off"] == said[NAME]


async def test_an_adapter_of_another_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with pool_of([adapted(lora(tmp_path / "a.gguf", width=64), "wrong")]) as pool:
        state, why = pool.states()[f"{NAME}:wrong"]
    assert state == "failed"
    assert "cannot load the adapter" in why


def test_a_configured_adapter_is_a_model_of_its_own_with_a_scale(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.gguf")
    adapters = {"calm": f"{path}@0.5", "loud": str(path)}
    plain, calm, loud = resolve_all(Model("m", str(DEMO), aliases=("x",), adapters=adapters))
    assert (plain.name, plain.adapter, plain.aliases) == ("m", None, ("x",))
    assert (calm.name, calm.adapter, calm.scale, calm.aliases) == ("m:calm", path, 0.5, ())
    assert (loud.name, loud.scale) == ("m:loud", 1.0)


@pytest.mark.parametrize("where", ["nowhere.gguf", "{path}@loud", "{path}@nan"])
def test_what_is_no_adapter_is_refused(tmp_path: Path, where: str) -> None:
    path = lora(tmp_path / "a.gguf")
    with pytest.raises(UserError):
        resolve_all(Model("m", str(DEMO), adapters={"a": where.format(path=path)}))
