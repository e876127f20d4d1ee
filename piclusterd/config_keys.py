"""Every key of the configuration as data: its type, default, unit and legal range, read off the tree in config.py.

The tree is the one place where keys are defined. From its annotations this module makes what people read: the legal
range in a fault's text, and the documented file `config/piclusterd.toml` (`render_default`).
Owns no values and reads no files; `config_file` does.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta

from .config import Config, Model, Provider, Scheduled

MODELS, SCHEDULE, PROVIDERS = "models", "schedule", "providers"
LISTS: Mapping[str, type] = {MODELS: Model, SCHEDULE: Scheduled, PROVIDERS: Provider}
"""Sections that are lists of tables, `[[models]]` and `[[schedule]]`, and what a table is."""
WIDTH = 110
"""Columns of the rendered file's comments."""

_INTRODUCTIONS = {
    MODELS: "One table for each model this node serves; there is none by default.",
    SCHEDULE: "One table for each thing done by the clock, the same on every node; there is none by default.",
    PROVIDERS: "One table for each service that answers chats when no node can, in order; there is none by default.",
}
_HEADER = """\
# piclusterd: every key at its default. Any line may be left out; a changed line is all a small file needs.
# Environment variables win over this file: PICLUSTER_<SECTION>_<KEY>, lists as comma-separated text.
# A relative file name is looked up in systemd's $CREDENTIALS_DIRECTORY first, then beside this file.
# `picluster config check` reports every fault of a file at once; `picluster config show` prints what is in force.
"""


@dataclass(frozen=True, slots=True)
class Key:
    """One key: `type` is its annotation with all `Meta`, `default` is MISSING where the key must be given."""

    section: str
    name: str
    type: Any
    default: Any
    doc: str

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def legal(self) -> str:
        """What may stand there, in words."""
        return _legal(self.type)


def sections() -> Mapping[str, Mapping[str, Key]]:
    """Every section and its keys, in the order of the tree; those of `LISTS` hold the keys of one table."""
    hints = get_type_hints(Config)
    return {f.name: dict(_keys(f.name, LISTS.get(f.name, hints[f.name]))) for f in fields(Config)}


def render_default() -> str:
    """The text of `config/piclusterd.toml`: every key commented with its doc and legal range, at its default."""
    blocks = [_HEADER]
    for section, keys in sections().items():
        lines = [f"# {_INTRODUCTIONS[section]}", f"# [[{section}]]"] if section in LISTS else [f"[{section}]"]
        for key in keys.values():
            lines += _render_key(key, commented=section in LISTS)
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def render_values(config: Config) -> str:
    """`config` as TOML, without comments; it loads to the same configuration."""
    known = sections()
    tables = [(f"[{name}]", getattr(config, name), known[name]) for name in known if name not in LISTS]
    tables += [(f"[[{name}]]", table, known[name]) for name in LISTS for table in getattr(config, name)]
    blocks = (
        "\n".join([header, *(f"{name} = {toml_value(getattr(table, name))}" for name in keys)])
        for header, table, keys in tables
    )
    return "\n\n".join(blocks) + "\n"


def toml_value(value: object) -> str:
    """`value` as TOML. JSON's strings, numbers, booleans and lists of them are TOML's too."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_key(name: str) -> str:
    return name if name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name) else json.dumps(name)


def _keys(section: str, cls: type) -> Iterator[tuple[str, Key]]:
    hints = get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        doc = next((m.description for m in _metas(hints[f.name])[::-1] if m.description), "")
        yield f.name, Key(section, f.name, hints[f.name], default, doc)


def _metas(annotation: Any) -> list[Meta]:
    return [m for m in get_args(annotation)[1:] if isinstance(m, Meta)] if get_origin(annotation) is Annotated else []


def _legal(annotation: Any) -> str:
    metas = _metas(annotation)
    kind = get_args(annotation)[0] if metas else annotation
    limit = next((m.max_length for m in metas if m.max_length is not None), None)
    at_most = f"at most {limit} " if limit is not None else ""
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(kind))
    if origin is tuple:
        return f"list of {at_most}texts"
    if origin is dict:
        return f"table of {at_most}name = text"
    if kind is str:
        return _legal_text(metas, limit)
    word = {int: "whole number", float: "number", bool: "true or false"}[kind]
    low = next((m.ge for m in metas if m.ge is not None), None)
    high = next((m.le for m in metas if m.le is not None), None)
    return word if low is None else f"{word}, {low} to {high}"


def _legal_text(metas: list[Meta], limit: int | None) -> str:
    pattern = next((m.pattern for m in metas if m.pattern), None)
    parts = ["text"]
    if any(m.min_length for m in metas):
        parts.append("not empty")
    if limit is not None:
        parts.append(f"at most {limit} characters")
    if pattern:
        parts.append(f"matching {pattern}")
    return ", ".join(parts)


def _render_key(key: Key, *, commented: bool) -> list[str]:
    comment = textwrap.wrap(f"{key.doc} ({key.legal})", WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    example = "" if key.default is MISSING else key.default
    setting = f"{key.name} = {toml_value(example)}"
    return [*(f"# {line}" for line in comment), f"# {setting}" if commented else setting]
