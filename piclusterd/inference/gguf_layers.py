"""How many bytes each layer of a GGUF file has: what a split model is cut along. Reads its header alone, under caps.

header | keys | tensors: name, shape, kind, offset … | data        a tensor reaches to where the next one begins
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .gguf import ARRAY, KEYS_MAX, SCALARS, STRING, STRING_MAX
from .models import HEADER
from .splitting import Layers

TENSORS_MAX = 20_000
ITEMS_MAX = 2_000_000
"""Of a list: the largest vocabularies have some 300,000 tokens, and as many merges."""
DIMENSIONS_MAX = 8
LAYERS_MAX = 1000
ALIGNMENT = "general.alignment"
ALIGNMENT_DEFAULT = 32
_BLOCK = re.compile(r"blk\.(\d{1,3})\.")


def read_layers(path: Path) -> Layers:
    """Blocks. Raises `UserError` where the file does not say."""
    try:
        with path.open("rb") as file:
            return _layers(file)
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as fault:
        raise UserError(f"the layers of {path} cannot be told", f"{fault}.", "Fetch the model again.") from None


def _layers(file: BinaryIO) -> Layers:
    _, _, tensors, keys = HEADER.unpack(file.read(HEADER.size))
    if tensors > TENSORS_MAX or keys > KEYS_MAX:
        raise ValueError(f"it claims {tensors} tensors and {keys} keys")
    alignment = ALIGNMENT_DEFAULT
    for _ in range(keys):
        name, kind = _text(file), _number(file, "<I")
        if name == ALIGNMENT and kind == 4:
            alignment = max(1, _number(file, "<I"))
        else:
            _skip(file, kind)
    starts = sorted(_tensor(file) for _ in range(tensors))
    data = -(-file.tell() // alignment) * alignment
    ends = [*(start for start, _ in starts[1:]), os.fstat(file.fileno()).st_size - data]
    blocks: dict[int, int] = {}
    rest = 0
    for (start, name), end in zip(starts, ends, strict=True):
        if end < start:
            raise ValueError("its tensors overlap, or the file is cut short")
        if block := _BLOCK.match(name):
            blocks[int(block[1])] = blocks.get(int(block[1]), 0) + end - start
        else:
            rest += end - start
    if sorted(blocks) != list(range(len(blocks))):
        raise ValueError("its layers are not numbered through")
    return Layers(tuple(blocks[number] for number in sorted(blocks)), rest)


def _tensor(file: BinaryIO) -> tuple[int, str]:
    """Where it begins in the data, and its name."""
    name, dimensions = _text(file), _number(file, "<I")
    if dimensions > DIMENSIONS_MAX:
        raise ValueError(f"{name[:64]} has {dimensions} dimensions")
    file.seek(8 * dimensions + 4, os.SEEK_CUR)
    return _number(file, "<Q"), name


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == STRING:
        _text(file)
    elif kind == ARRAY:
        item, count = _number(file, "<I"), _number(file, "<Q")
        if count > ITEMS_MAX or item == ARRAY:
            raise ValueError("it has a list that is not ours to read")
        if item != STRING:
            file.seek(count * struct.calcsize(SCALARS[item]), os.SEEK_CUR)
            return
        for _ in range(count):
            file.seek(_length(file), os.SEEK_CUR)
    else:
        file.seek(struct.calcsize(SCALARS[kind]), os.SEEK_CUR)


def _text(file: BinaryIO) -> str:
    return file.read(_length(file)).decode()


def _length(file: BinaryIO) -> int:
    length = _number(file, "<Q")
    if length > STRING_MAX:
        raise ValueError("it has a text that is too long")
    return length


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])
