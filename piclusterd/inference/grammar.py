"""From a JSON schema to the GBNF grammar that answers are held to. Runs only in the child.

The grammar allows one spelling of white space, `json.dumps`' (`{"a": 1, "b": 2}`): so most of an answer's frame has one
continuation only, which need not be sampled (`forced`), and no model can lose itself in blanks.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llama_cpp.llama_grammar import SchemaConverter

from .schema import GRAMMAR_BYTES_MAX, check_schema, refused

ANY_CHARACTER = r'[^"\\]'
JSON_CHARACTER = r"[\x20-\x21\x23-\x5B\x5D-\x7E\u0080-\uD7FF\uE000-\U0010FFFF]"
"""What may stand unescaped in a JSON string: no control characters, no surrogates, nothing beyond Unicode."""

_SPACE = re.compile(
    r"""(?P<mark>"[:,]")\ space(?![\w-])   # after a colon or a comma
      | (?P<kept>"(?:[^"\\]|\\.)*" | \[(?:[^\]\\]|\\.)*\])   # literals and classes stay as they are
      | \ space(?![\w-])                    # anywhere else""",
    re.VERBOSE,
)


class _Converter(SchemaConverter):  # type: ignore[misc]  # llama_cpp is Any to mypy
    """llama-cpp-python's converter, minus two faults: it lets raw control characters into strings, and it drops
    backslashes from constants; either made answers that are not JSON."""

    def _format_literal(self, literal: str) -> str:
        text = json.dumps(json.loads(literal), ensure_ascii=False)  # it is JSON: no raw control characters
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    def _add_primitive(self, name: str, rule: Any) -> Any:
        if rule.content.startswith(ANY_CHARACTER):
            rule = type(rule)(rule.content.replace(ANY_CHARACTER, JSON_CHARACTER, 1), rule.deps)
        return super()._add_primitive(name, rule)

    def _add_rule(self, name: str, rule: str) -> Any:
        return super()._add_rule(name, _SPACE.sub(_one_spelling, rule))


def _one_spelling(match: re.Match[str]) -> str:
    if mark := match["mark"]:
        return f'{mark[:-1]} "'
    return match["kept"] or ""


def compile_schema(text: str) -> bytes:
    """The GBNF grammar of the JSON schema `text`. Raises `UserError` where it passes a cap or cannot be expressed."""
    schema = check_schema(text)
    converter = _Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    try:
        converter.visit(converter.resolve_refs(schema, ""), "")
        grammar: bytes = converter.format_grammar().encode()
    except Exception as fault:  # it asserts, and trips over whatever is not a schema
        raise refused(f"It cannot be made a grammar: {fault}.") from None
    if len(grammar) > GRAMMAR_BYTES_MAX:
        raise refused(f"Its grammar is over {GRAMMAR_BYTES_MAX // 1024} KiB.")
    return grammar
