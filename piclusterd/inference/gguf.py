"""The few keys of a GGUF file's metadata that decide about memory, read under caps before llama.cpp sees the file.

Reads up to the list of tokens, which comes after the model's own keys, and skips what it does not know; only for the
chat template, which comes after the tokens, it goes through all. A file that
cannot be read so has an empty shape: whether it is a fault is llama.cpp's to say. Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from .budget import QUANTS, Shape
from .models import HEADER

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
KEYS_MAX, ITEMS_MAX, STRING_MAX = 512, 4096, 1024 * 1024
"""Before the list of tokens: some fifty keys; lists of a number a layer; a chat template."""
LIST_MAX = 4 * 1024 * 1024
"""Of tokens and merges, which are skipped: vocabularies have a quarter of a million."""
TOKENS, TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"


def read_shape(path: Path) -> Shape:
    """What the file at `path` says of its size; empty where it says nothing readable."""
    try:
        with path.open("rb") as file:
            return _shape(_keys(file))
    except (OSError, ValueError, struct.error, UnicodeDecodeError):
        return Shape()


def describe(path: Path) -> dict[str, Any]:
    """What the file at `path` says of itself, for people; keys that it lacks are left out. Never raises."""
    try:
        with path.open("rb") as file:
            keys = _keys(file)
        shape = _shape(keys)
    except (OSError, ValueError, struct.error, UnicodeDecodeError):
        return {}
    name = keys.get("general.architecture", "")
    quant = next((quant for quant, number, _ in QUANTS if number == shape.file_type), "")
    told = {
        "architecture": name,
        "name": keys.get("general.name"),
        "parameters": keys.get("general.size_label"),
        "licence": keys.get("general.license"),
        "quantization": quant,
        "context": keys.get(f"{name}.context_length"),
        "layers": shape.layers,
        "embedding": shape.width,
        "vocabulary": shape.vocabulary,
    }
    return {key: value for key, value in told.items() if isinstance(value, str | int) and value}


def names_tools(template: str) -> bool:
    """Whether a chat template has a place for tools."""
    return "tools" in template


def takes_tools(path: Path) -> bool:
    """Whether the chat template in the file at `path` does. Reads a second at most. Never raises."""
    try:
        with path.open("rb") as file:
            return names_tools(str(_keys(file, whole=True).get(TEMPLATE, "")))
    except (OSError, ValueError, struct.error, UnicodeDecodeError):
        return False


def _keys(file: BinaryIO, whole: bool = False) -> dict[str, Any]:
    """Up to the list of tokens, or to the end with long lists left out."""
    _, _, _, count = HEADER.unpack(file.read(HEADER.size))
    found: dict[str, Any] = {}
    for _ in range(min(count, KEYS_MAX)):
        key = _string(file)
        kind = _number(file, "<I")
        if whole and kind == ARRAY:
            _skip_list(file)
            continue
        if key == TOKENS and kind == ARRAY:
            _number(file, "<I")
            found[key] = _number(file, "<Q")
            break
        found[key] = _value(file, kind)
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        item, count = _number(file, "<I"), _number(file, "<Q")
        if count > ITEMS_MAX or item == ARRAY:
            raise ValueError("a list that is not ours to read")
        return [_value(file, item) for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"unknown kind {kind}")
    return _number(file, SCALARS[kind])


def _skip_list(file: BinaryIO) -> None:
    item, count = _number(file, "<I"), _number(file, "<Q")
    if count > LIST_MAX or (item != STRING and item not in SCALARS):
        raise ValueError("a list that is not ours to read")
    if item != STRING:
        file.seek(count * struct.calcsize(SCALARS[item]), 1)
        return
    for _ in range(count):
        length = int.from_bytes(file.read(8), "little")
        if len(file.read(min(length, STRING_MAX))) < length:
            raise ValueError("a text that is too long")


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _number(file, "<Q")
    if length > STRING_MAX:
        raise ValueError("a text that is too long")
    return file.read(length).decode()


def _shape(keys: dict[str, Any]) -> Shape:
    name = keys.get("general.architecture", "")

    def count(key: str, default: int = 0) -> int:
        value = keys.get(f"{name}.{key}", default)
        value = max(value, default=default) if isinstance(value, list) else value
        if not isinstance(value, int) or not 0 <= value < 2**32:
            raise ValueError(f"{key} is not a count")
        return value

    width, heads = count("embedding_length"), count("attention.head_count")
    each = width // heads if heads else 0
    kv_width = count("attention.head_count_kv", heads) * (
        count("attention.key_length", each) + count("attention.value_length", each)
    )
    file_type = keys.get("general.file_type", -1)
    return Shape(
        count("block_count"), width, kv_width, keys.get(TOKENS, 0), file_type if isinstance(file_type, int) else -1
    )
