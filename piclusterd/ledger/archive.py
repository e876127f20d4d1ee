"""A node in one file: what `picluster backup create` writes and `restore` reads.

    state_dir ── identity/* votes/* ledger.db (consistent copy) ──▶ tar.gz, MANIFEST.json first
    tar.gz ──▶ staging, every member checked against the manifest ──▶ renamed into an empty state_dir
                    votes are set aside, `votes.lost`, `new-epoch` and `convalescent` are left beside

The ledger is copied with SQLite's backup interface, so a running daemon need not stop. A backup is always older than
the world: the node it makes opens a new log (its old one may go on at peers), and may have voted since, so it does not
vote by what the backup says. `votes.lost` keeps it from voting until it is made a voter again.

It refuses members that are not plain files named as we name them (CVE-2007-4559: path traversal in tar), sizes that
are not the manifest's, checksums that do not match, a state directory that is in use or has a node in it.
The checksums find damage, not forgery: the archive holds the node's private key, so it is 0600 and to be kept as one.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import sqlite3
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

import msgspec

from ..board.private import sync_directory, write_private
from ..errors import Broken, Refused, UserError
from . import rescue
from .database import open_reader

FORMAT = 1
MANIFEST = "MANIFEST.json"
MANIFEST_BYTES_MAX = 1024 * 1024
LEDGER = "ledger.db"
VOTES_LOST = "votes.lost"
"""In the state directory: this node may have voted and does not know for whom. It holds the reason, in words."""
VOTES_ASIDE = "votes.restored"
"""The backup's vote record: not to vote by, but `picluster recover` learns from it who the voters were."""
SMALL_FILE_BYTES_MAX = 1024 * 1024
"""Of a member other than the ledger: keys, certificates, records."""
MEMBERS_MAX = 256
_MEMBER = re.compile(r"(identity|votes)/[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_CHUNK = 1024 * 1024


class Member(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """`made`: Unix time, seconds."""

    format: int
    release: str
    node: str
    cluster: str
    made: float
    files: dict[str, Member]


# making ----------------------------------------------------------------------------------------------------------
def create(state_dir: Path, out: IO[bytes], node: str, cluster: str, release: str, made: float) -> Manifest:
    """Write the node in `state_dir` to `out`. Raises Broken where the ledger cannot be read."""
    copy = state_dir / f"{LEDGER}.backup"
    try:
        _copy_ledger(state_dir / LEDGER, copy)
        files = {LEDGER: copy} if copy.exists() else {}
        files |= dict(_small_files(state_dir))
        members = {name: Member(path.stat().st_size, _sha256(path)) for name, path in files.items()}
        manifest = Manifest(FORMAT, release, node, cluster, made, members)
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            _add(tar, MANIFEST, io.BytesIO(msgspec.json.encode(manifest)), len(msgspec.json.encode(manifest)))
            for name, path in files.items():
                with path.open("rb") as file:
                    _add(tar, name, file, members[name].size)
        out.flush()
        os.fsync(out.fileno())
    finally:
        copy.unlink(missing_ok=True)
    return manifest


def _copy_ledger(source: Path, target: Path) -> None:
    """A copy as of one moment, without stopping whoever writes."""
    target.unlink(missing_ok=True)
    if not source.exists():
        return
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with closing(open_reader(source)) as conn, closing(sqlite3.connect(target)) as copy:
            conn.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a WAL beside it
    except sqlite3.Error as fault:
        raise Broken("the ledger cannot be copied", str(fault), "Run `picluster ledger verify`.") from fault


def _small_files(state_dir: Path) -> Iterator[tuple[str, Path]]:
    for room in ("identity", "votes"):
        for path in sorted((state_dir / room).glob("*")):
            name = f"{room}/{path.name}"
            if path.is_file() and not path.is_symlink() and _MEMBER.fullmatch(name) and path.suffix != ".new":
                yield name, path


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    tar.addfile(info, file)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# reading ---------------------------------------------------------------------------------------------------------
def restore(archive: IO[bytes], state_dir: Path, force: bool = False) -> Manifest:
    """Make `state_dir` the node in `archive`. Raises UserError or Refused; `state_dir` is then as it was.

    `force`: a node that is there already is set aside (`*.replaced`) instead of refused.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = rescue.lock(state_dir / LEDGER)
    staging = state_dir / "restoring"
    try:
        there = [name for name in ("identity", "votes", LEDGER) if (state_dir / name).exists()]
        if there and not force:
            why = f"{state_dir} holds {', '.join(there)}"
            raise Refused("a node lives there already", why, "Add --force to set it aside.")
        shutil.rmtree(staging, ignore_errors=True)
        manifest = _unpack(archive, staging)
        _set_aside(state_dir)
        _settle(staging, state_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(handle)
    return manifest


def _unpack(archive: IO[bytes], staging: Path) -> Manifest:
    """Every member of `archive` in `staging`, checked."""
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            manifest = _manifest(tar)
            for name in manifest.files:
                (staging / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = {info.name for info in _members(tar, manifest) if _extract(tar, info, staging, manifest)}
    except (tarfile.TarError, zlib.error, EOFError, OSError, msgspec.DecodeError) as fault:
        raise UserError("this is not a backup that can be read", str(fault), "Choose another file.") from fault
    missing = sorted(set(manifest.files) - found)
    if missing:
        raise UserError("the backup is not whole", f"it lacks {', '.join(missing)}", "Choose another file.")
    return manifest


def _manifest(tar: tarfile.TarFile) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isfile() or first.size > MANIFEST_BYTES_MAX:
        raise UserError("this is not a backup of a piclusterd node", "it does not begin with its manifest")
    file = tar.extractfile(first)
    assert file is not None, "a plain file can be read"
    manifest = msgspec.json.decode(file.read(MANIFEST_BYTES_MAX), type=Manifest)
    if manifest.format > FORMAT:
        raise UserError("a newer release made this backup", f"format {manifest.format}", "Upgrade piclusterd first.")
    bad = [name for name in manifest.files if name != LEDGER and not _MEMBER.fullmatch(name)]
    if bad or len(manifest.files) > MEMBERS_MAX:
        raise UserError("the backup is refused", f"it names {bad[:1] or 'too many files'}, which no backup of ours has")
    return manifest


def _members(tar: tarfile.TarFile, manifest: Manifest) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        known = manifest.files.get(info.name)
        too_large = info.name != LEDGER and info.size > SMALL_FILE_BYTES_MAX
        if known is None or not info.isfile() or info.size != known.size or too_large:
            raise UserError("the backup is refused", f"{info.name!r} is not a plain file of its manifest")
        yield info


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo, staging: Path, manifest: Manifest) -> bool:
    source = tar.extractfile(info)
    assert source is not None, "a plain file can be read"
    digest = hashlib.sha256()
    handle = os.open(staging / info.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != manifest.files[info.name].sha256:
        raise UserError("the backup is damaged", f"{info.name} has another checksum", "Choose another file.")
    return True


def _set_aside(state_dir: Path) -> None:
    for old in sorted(state_dir.glob(f"{LEDGER}*")):
        if old.name != f"{LEDGER}.lock" and not old.name.endswith(".replaced"):
            old.rename(f"{old}.replaced")
    for room in ("identity", "votes"):
        if (state_dir / room).exists():
            shutil.rmtree(state_dir / f"{room}.replaced", ignore_errors=True)
            (state_dir / room).rename(state_dir / f"{room}.replaced")


def _settle(staging: Path, state_dir: Path, manifest: Manifest) -> None:
    """Marks first: a restore that is cut short must not leave a node that votes, or goes on with its old log."""
    why = f"restored from a backup of {manifest.node}; it may have acknowledged and voted since that was made"
    write_private(state_dir / VOTES_LOST, why.encode())
    rescue.want_new_epoch(state_dir / LEDGER)
    rescue.set_convalescent(state_dir / LEDGER, why)
    shutil.rmtree(state_dir / VOTES_ASIDE, ignore_errors=True)
    for name, target in (("votes", VOTES_ASIDE), (LEDGER, LEDGER), ("identity", "identity")):
        if (staging / name).exists():
            (staging / name).rename(state_dir / target)
    sync_directory(state_dir)
