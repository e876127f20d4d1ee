"""Models with short names that are known to do well on small boards: config/models.toml.

    picluster pull qwen2.5:1.5b ─▶ entry ─▶ owner/repo, file          picluster pull ─▶ the largest that this board runs

Only names and sizes stand there, for choosing: what is fetched is pinned and verified by what the hub tells.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import UserError
from ..integrations.model_hub import Reference

FILE = "models.toml"
GB = 1024**3


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table of the catalogue. `ram_gb`: of the smallest board it is meant for."""

    name: str
    repo: str
    file: str
    bytes: int
    params_b: float
    """Billions of parameters."""
    quant: str
    ram_gb: int
    revision: str = ""
    does: Literal["chat", "embed"] = "chat"
    about: str = ""

    @property
    def reference(self) -> Reference:
        return Reference(self.repo, self.revision, self.file)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    models: tuple[Known, ...]


@cache
def catalogue() -> tuple[Known, ...]:
    """In the file's order. Raises `UserError` where the installation lacks it."""
    here = Path(__file__).resolve().parents[1]
    for path in (here.parent / "config" / FILE, here / "inference" / FILE):
        if path.is_file():
            return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _File).models
    raise UserError("the catalogue of models is not in this installation", fix="Name one as owner/repo:Q4_K_M.")


def named(name: str) -> Known | None:
    return next((one for one in catalogue() if one.name == name), None)


def proposed(ram: int) -> tuple[Known, ...]:
    """What a board with `ram` bytes runs well, best first: the largest chat models, then those that embed."""
    fits = [one for one in catalogue() if one.ram_gb * GB <= ram * 1.1]  # a 4 GB board shows some 3.8
    return tuple(sorted(fits, key=lambda one: (one.does != "chat", -one.params_b, -one.bytes)))
