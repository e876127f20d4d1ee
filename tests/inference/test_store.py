from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest

from piclusterd.errors import NotFound, UserError
from piclusterd.inference.sealing import PIECE_BYTES, digest, piece_digest
from piclusterd.inference.store import HEADROOM_BYTES, ORPHAN_KEPT_S, PARTIAL_KEPT_S, Manifest, NoSpace, NotAsPromised

from .hub_rig import BODY, SHA256, opened
from .rig import DEMO

LATER = 4_000_000_000.0


def manifest(name: str = "demo", aliases: tuple[str, ...] = ()) -> Manifest:
    return Manifest(name, SHA256, len(BODY), "here", aliases=aliases)


def test_a_file_is_taken_by_its_content_and_found_by_its_names(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.take_file(DEMO) == (SHA256, len(BODY))
    store.put(manifest(aliases=("gpt-4o-mini",)))
    assert store.blob(SHA256).read_bytes() == BODY
    again = opened(tmp_path)
    assert again.get("demo") == again.get("gpt-4o-mini") == store.get("demo")
    with pytest.raises(NotFound, match="demo"):
        again.get("other")


def test_workers_may_read_models_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        store = opened(tmp_path / "models")
        store.take_file(DEMO)
        store.put(manifest())
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.blob(SHA256).stat().st_mode) == 0o444
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.root.rglob("*.json")} == {0o600}


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b"x", BODY[:-1] + b"x"], ids=["short", "long", "other"])
def test_a_partial_that_is_not_what_was_promised_gets_no_name(tmp_path: Path, body: bytes) -> None:
    store = opened(tmp_path)
    partial = store.partial(SHA256)
    partial.write_bytes(body)
    with pytest.raises(NotAsPromised):
        store.adopt(partial, SHA256, len(BODY))
    assert not store.has(SHA256)
    assert not partial.exists()


@pytest.mark.parametrize(
    "body",
    [b"\x80\x04\x95 a pickle", b"PK\x03\x04", (2**63).to_bytes(8, "little") + b"{}"],
    ids=["pickle", "zip", "st"],
)
def test_a_file_that_is_no_gguf_is_refused_whatever_it_is_called(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(body)
    store = opened(tmp_path / "models")
    with pytest.raises(UserError, match="GGUF"):
        store.take_file(path)
    partial = store.new_partial()
    partial.write_bytes(body)
    with pytest.raises(UserError, match="GGUF"):
        store.settle(partial)
    assert not list((tmp_path / "models" / "blobs").iterdir())


def test_a_file_that_was_written_to_after_it_was_verified_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.gguf"
    theirs.write_bytes(BODY)
    store = opened(tmp_path / "models")
    store.take_file(theirs, hard_link=True)
    store.put(manifest())
    assert theirs.stat().st_ino == store.blob(SHA256).stat().st_ino
    before = store.stamp(SHA256)
    assert store.pieces(SHA256) == digest(DEMO)[1]
    theirs.chmod(0o644)
    theirs.write_bytes(BODY[:-1] + b"x")
    os.utime(theirs, ns=(before.mtime_ns, before.mtime_ns))
    assert store.stamp(SHA256) != before
    with pytest.raises(NotAsPromised, match="demo"):
        store.pieces(SHA256)


def test_a_file_that_only_looks_other_is_read_again_and_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    os.utime(store.blob(SHA256))
    assert store.pieces(SHA256) == digest(DEMO)[1]
    store.blob(SHA256).with_name(f"sha256-{SHA256}.seal").unlink()
    assert store.pieces(SHA256) == digest(DEMO)[1]


def test_a_full_disk_is_told_with_numbers_before_anything_is_written(tmp_path: Path) -> None:
    store = opened(tmp_path, lambda _: HEADROOM_BYTES + 100)
    store.check_space(100)
    with pytest.raises(NoSpace, match="512 MiB are free, and 512 MiB stay free"):
        store.check_space(101)
    with pytest.raises(NoSpace):
        store.take_file(DEMO)
    assert not list((tmp_path / "partial").iterdir())


def test_removing_a_name_frees_what_no_other_name_has(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    store.put(manifest("one"))
    store.put(manifest("two"))
    assert store.remove("one") == 0
    assert store.has(SHA256)
    assert store.remove("two") == len(BODY)
    assert not list((tmp_path / "blobs").iterdir())
    with pytest.raises(NotFound):
        store.remove("two")


def test_what_nothing_names_is_swept_up_and_what_is_fetched_just_now_is_not(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    stale, fresh = store.partial("a" * 64), store.partial("b" * 64, "lan")
    for path in (stale, fresh):
        path.write_bytes(b"GGUF")
    now = stale.stat().st_mtime
    assert store.sweep(now + ORPHAN_KEPT_S - 1) == 0
    assert store.sweep(now + PARTIAL_KEPT_S + 1, busy=("b" * 64, SHA256)) == 4
    assert (stale.exists(), fresh.exists(), store.has(SHA256)) == (False, True, True)
    store.put(manifest())
    store.sweep(LATER)
    assert store.has(SHA256)
    store.remove("demo")
    store.take_file(DEMO)
    store.sweep(LATER)
    assert not store.has(SHA256)


def test_a_damaged_manifest_and_a_lost_file_leave_the_others_alone(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    store.put(manifest("whole"))
    (tmp_path / "manifests" / "cut.json").write_bytes(b'{"name": "cu')
    gone = msgspec.structs.replace(manifest("gone"), sha256="c" * 64)
    (tmp_path / "manifests" / "gone.json").write_bytes(msgspec.json.encode(gone))
    assert list(opened(tmp_path).entries) == ["whole"]


@pytest.mark.parametrize("name", ["../x", "a/../b", "", "x" * 129, ".hidden", "new\nline", "-rf"])
def test_a_name_that_could_be_a_path_or_an_option_is_refused(tmp_path: Path, name: str) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    with pytest.raises(UserError, match="name"):
        store.put(manifest(name))
    with pytest.raises(UserError, match="name"):
        store.put(manifest("demo", (name,)))


def test_a_name_belongs_to_one_model(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.take_file(DEMO)
    store.put(manifest("hf/one:q4", ("small",)))
    with pytest.raises(UserError, match="already a name of hf/one:q4"):
        store.put(manifest("two", ("small",)))
    with pytest.raises(UserError, match="At most"):
        store.put(manifest("two", tuple(f"a{n}" for n in range(17))))
    assert store.put(manifest("hf/one:q4", ("small", "tiny"))).aliases == ("small", "tiny")


def test_each_piece_of_a_file_has_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size, pieces in ((0, 0), (1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2)):
        path.write_bytes(b"x" * size)
        found = digest(path)[1]
        assert len(found) == pieces
        if pieces == 2:
            assert found == (piece_digest(b"x" * PIECE_BYTES).digest(), piece_digest(b"x").digest())
