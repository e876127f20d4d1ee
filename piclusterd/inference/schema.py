"""JSON schemas that strangers send: refused before they become a grammar where they would explode.

A schema of 60 bytes (`maxItems: 1000000`) makes 20 MB of grammar, and one 3000 levels deep overflows the converter, so
size, depth and every repetition are capped here, and the grammar's size after conversion (`llama.compile_schema`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import UserError

SCHEMA_BYTES_MAX = 16 * 1024
DEPTH_MAX = 16
REPEAT_MAX = 1024
"""For minLength, maxLength, minItems, maxItems and the like: each unit is a copy of a grammar rule."""
PROPERTIES_MAX = 64
GRAMMAR_BYTES_MAX = 256 * 1024

_BRACES = re.compile(r"\{(\d*),?(\d*)\}")
REPEATS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def refused(why: str) -> UserError:
    return UserError("the JSON schema is refused", why, "Make it simpler.", param="response_format")


def check_schema(text: str) -> dict[str, Any]:
    """The schema in `text`, JSON. Raises `UserError` where it is not an object or passes a cap."""
    if len(text.encode()) > SCHEMA_BYTES_MAX:
        raise refused(f"It is over {SCHEMA_BYTES_MAX // 1024} KiB.")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise refused(f"It is not JSON: {fault}.") from None
    if not isinstance(schema, dict):
        raise refused("It is not a JSON object.")
    _check(schema, 1)
    return schema


def _check(node: Any, depth: int) -> None:
    if depth > DEPTH_MAX:
        raise refused(f"It is nested over {DEPTH_MAX} deep.")
    if isinstance(node, dict):
        _check_object(node)
        for value in node.values():
            _check(value, depth + 1)
    elif isinstance(node, list):
        for value in node:
            _check(value, depth + 1)


def _check_object(node: dict[str, Any]) -> None:
    for key in REPEATS:
        count = node.get(key, 0)
        if isinstance(count, dict):
            continue  # a property of that name
        if not isinstance(count, int) or not 0 <= count <= REPEAT_MAX:
            raise refused(f"{key} is not a whole number from 0 to {REPEAT_MAX}.")
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        counts = [int(count) for pair in _BRACES.findall(pattern) for count in pair if count]
        if max(counts, default=0) > REPEAT_MAX:
            raise refused(f"A pattern repeats over {REPEAT_MAX} times.")
    properties = node.get("properties")
    if isinstance(properties, dict) and len(properties) > PROPERTIES_MAX:
        raise refused(f"It has over {PROPERTIES_MAX} properties in one object.")
