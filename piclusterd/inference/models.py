"""Which file a configured model is: resolved, looked at, and named by its content, before any child is started.

It owns the cheap refusals (no such file, not a GGUF, cut short), so that most bad files are turned away with a clear
text by the daemon. Deeper faults are the child's to find: it may die of them, and nothing else does.

A GGUF starts with magic, version, tensor count and key count (ggml/docs/gguf.md).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import socket
import struct
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Protocol

from ..config import Model
from ..errors import UserError
from .hf_files import check_directory
from .protocol import Kind

BUILTIN_PREFIX = "builtin:"
BUILTIN = {"triage-demo": "triage-demo.gguf"}

HEADER = struct.Struct("<4sIQQ")
VERSIONS = (2, 3)
"""Version 1 files are from before August 2023; llama.cpp refuses them too."""
COUNT_MAX = 1_000_000
"""Tensors or metadata keys. The largest models have some thousands; absurd counts are how parsers were attacked."""
HASH_CHUNK = 1024 * 1024


class Parts(Protocol):
    """The boards that hold layers of a model."""

    def told(self) -> tuple[str, ...]:
        """Who holds how many, for people; the head first."""

    async def open(self) -> list[socket.socket]:
        """One socket to each, anew, for the child. Raises a `PiclusterError`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model this node is to serve. `threads` are settled: no zero any more."""

    name: str
    path: Path
    size: int
    """Bytes of the file."""
    context: int
    slots: int
    threads: int
    batch_threads: int
    aliases: tuple[str, ...] = ()
    kind: Kind = "llama"
    task: str = ""
    adapter: Path | None = None
    """A LoRA adapter over the weights, and how strongly it acts."""
    scale: float = 1.0
    drafts: int = -1
    """Tokens guessed at a time (`drafts`); -1: as the pool does."""
    shares: tuple[int, ...] = ()
    """Of a model that is split: how many of its last layers each other board holds."""
    apart: int = 0
    """Bytes that they hold; of a part (kind "part"), what it may take."""
    parts: Parts | None = None
    """What connects it to them."""


def resolve_all(model: Model) -> list[ModelSpec]:
    """`model` by itself, and once more with each of its adapters. Raises as `resolve` does."""
    alone = resolve(model)
    return [alone, *(_adapted(alone, name, where) for name, where in model.adapters.items())]


def _adapted(alone: ModelSpec, name: str, where: str) -> ModelSpec:
    if alone.kind != "llama":
        raise UserError(f"{alone.name} takes no adapters", "Only GGUF models do.")
    file, at, scale = where.rpartition("@")
    if not at:
        file, scale = where, "1"
    try:
        strength = float(scale)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UserError(f"the adapter {name!r} of {alone.name} has no scale", f"{scale!r} is no number.")
    path = Path(file).expanduser()
    check_header(path)
    return replace(alone, name=f"{alone.name}:{name}", aliases=(), adapter=path, scale=strength)


def resolve(model: Model) -> ModelSpec:
    """The file or directory behind `model` and how to run it. Raises `UserError` where it cannot be a model."""
    path = _path_of(model.path)
    kind: Kind = "hf" if model.kind == "hf" or (model.kind == "auto" and path.is_dir()) else "llama"
    size = check_directory(path, model.task).size if kind == "hf" else check_header(path)
    threads, batch_threads = default_threads(model.threads)
    return ModelSpec(
        name=model.name,
        path=path,
        size=size,
        context=model.context,
        slots=model.slots,
        threads=threads,
        batch_threads=batch_threads,
        aliases=model.aliases,
        kind=kind,
        task=model.task,
        drafts=model.drafts,
    )


def default_threads(threads: int = 0) -> tuple[int, int]:
    """For decoding and for prompts, which are bound by arithmetic; one core stays for the daemon."""
    cores = os.cpu_count() or 1
    threads = threads or max(1, cores // 2)
    return threads, max(threads, cores - 1)


def _path_of(text: str) -> Path:
    if not text.startswith(BUILTIN_PREFIX):
        return Path(text).expanduser()
    name = text.removeprefix(BUILTIN_PREFIX)
    if name not in BUILTIN:
        raise UserError(f"there is no builtin model {name!r}", f"The package has: {', '.join(BUILTIN)}.")
    return Path(str(resources.files("piclusterd.inference.demo_model") / BUILTIN[name]))


def check_header(path: Path) -> int:
    """The size of the GGUF file at `path` in bytes. Raises `UserError` saying what is wrong with it."""
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as fault:
        raise UserError(f"cannot read the model file {path}", f"{fault.strerror}.") from None
    if head[:4] != b"GGUF":
        raise UserError(f"{path} is not a GGUF file", "It does not start with the letters GGUF.")
    if len(head) < HEADER.size:
        raise UserError(f"{path} is cut short", f"It has {size} bytes, less than a GGUF header.", "Fetch it again.")
    _, version, tensors, keys = HEADER.unpack(head)
    if version not in VERSIONS:
        raise UserError(f"{path} has GGUF version {version}", "Versions 2 and 3 can be read.", "Convert it again.")
    if not 0 < tensors <= COUNT_MAX or not 0 < keys <= COUNT_MAX:
        raise UserError(
            f"{path} is damaged", f"Its header claims {tensors} tensors and {keys} keys.", "Fetch it again."
        )
    return size


async def sha256(path: Path) -> str:
    """Hex digest of the file at `path`, read in a thread (a 2 GB model takes a Pi some 20 s)."""
    return await asyncio.to_thread(file_sha256, path)


def file_sha256(path: Path) -> str:
    """As `sha256`, blocking."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
