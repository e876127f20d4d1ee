"""The demo model with a feed-forward many times as wide, all of it zeros: the same answers, read as by a large one.

header | keys: feed_forward_length × times | tensors: ffn_* grown, places moved | data    (Q8_0: 32 in 34 bytes)
"""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path
from typing import BinaryIO

from piclusterd.inference.gguf_layers import _number, _skip, _text
from piclusterd.inference.models import HEADER

ALIGNMENT = 32
F32, Q8_0 = 0, 8  # ggml_type
FEED = "llama.feed_forward_length"


def widened(source: Path, out: Path, times: int) -> None:
    """Write `out`: `source`, a Q8_0 file of llama's shape, with so many times the width in its layers."""
    with source.open("rb") as file:
        magic, version, tensors, keys = HEADER.unpack(file.read(HEADER.size))
        told = b"".join(_key(file, times) for _ in range(keys))
        found = [_tensor(file) for _ in range(tensors)]
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        infos, data = b"", b""
        for name, shape, kind, at in found:
            file.seek(start + at)
            rows, weights = _grown(name, shape, file.read(_size(shape, kind)), times)
            infos += _told(name, rows, kind, len(data))
            data += _padded(weights)
        head = HEADER.pack(magic, version, tensors, keys) + told + infos
    out.write_bytes(_padded(head) + data)


def _key(file: BinaryIO, times: int) -> bytes:
    """The bytes of a key and its value."""
    begin = file.tell()
    name, kind = _text(file), _number(file, "<I")
    if name == FEED:
        return _string(name) + struct.pack("<II", kind, times * _number(file, "<I"))
    _skip(file, kind)
    end = file.tell()
    file.seek(begin - end, os.SEEK_CUR)
    return file.read(end - begin)


def _tensor(file: BinaryIO) -> tuple[str, list[int], int, int]:
    name, dimensions = _text(file), _number(file, "<I")
    shape = [_number(file, "<Q") for _ in range(dimensions)]
    return name, shape, _number(file, "<I"), _number(file, "<Q")


def _grown(name: str, shape: list[int], weights: bytes, times: int) -> tuple[list[int], bytes]:
    if name.endswith(("ffn_gate.weight", "ffn_up.weight")):
        return [shape[0], times * shape[1]], weights + bytes((times - 1) * len(weights))
    if name.endswith("ffn_down.weight"):
        row = len(weights) // shape[1]
        rows = (weights[at : at + row] + bytes((times - 1) * row) for at in range(0, len(weights), row))
        return [times * shape[0], shape[1]], b"".join(rows)
    return shape, weights


def _told(name: str, shape: list[int], kind: int, at: int) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


def _size(shape: list[int], kind: int) -> int:
    return prod(shape) // 32 * 34 if kind == Q8_0 else prod(shape) * 4


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
