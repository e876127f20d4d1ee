from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from piclusterd.config import Model
from piclusterd.errors import UserError
from piclusterd.inference.models import HEADER, check_header, resolve, sha256

from .rig import DEMO


def test_the_builtin_model_is_in_the_package() -> None:
    spec = resolve(Model("demo", "builtin:triage-demo", context=512, slots=2, threads=0, aliases=("gpt-4o-mini",)))
    assert spec.path.name == "triage-demo.gguf"
    assert spec.size > 0
    assert (spec.context, spec.slots, spec.aliases) == (512, 2, ("gpt-4o-mini",))
    assert 1 <= spec.threads <= spec.batch_threads


def test_an_unknown_builtin_names_those_there_are() -> None:
    with pytest.raises(UserError, match="triage-demo"):
        resolve(Model("demo", "builtin:nothing"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04 a zip renamed", "not a GGUF"),
        (b"GGUF", "cut short"),
        (HEADER.pack(b"GGUF", 9, 1, 1), "version 9"),
        (HEADER.pack(b"GGUF", 3, 2**60, 1), "damaged"),
        (HEADER.pack(b"GGUF", 3, 1, 2**60), "damaged"),
        (HEADER.pack(b"GGUF", 3, 0, 0), "damaged"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault):
        check_header(path)


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.gguf"):
        resolve(Model("x", str(tmp_path / "nowhere.gguf")))


async def test_a_file_is_named_by_its_content() -> None:
    assert await sha256(DEMO) == hashlib.sha256(DEMO.read_bytes()).hexdigest()
