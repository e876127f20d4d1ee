"""The model files on this node's disk: blobs named by their content, and a small manifest for each name.

    models/blobs/sha256-<hex>          whole and verified; read-only; never written again
           blobs/sha256-<hex>.seal     how the file looked when it was verified, and the digest of each of its pieces
           partial/<hex>.part          the beginning of one that is on its way (`.lan`: pieces of it, in any order)
           manifests/<name>.json       name ─▶ blob, source, revision, aliases, pin

    partial ──length, SHA-256 of the whole──▶ fsync ──▶ rename ──▶ blob ──▶ seal ──▶ manifest ──▶ it is a model

It owns this directory. It refuses a file whose bytes are not what was promised, and to fill the disk. A name is given
last, so whatever a power cut leaves is a partial, or a blob that nothing names: both are swept up later. A blob that no
longer looks as its seal says (a hard link's other end was written to) is read again whole before it is used.
Methods block: call them from a thread. Readers see the newest `entries` without one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import quote

import msgspec

from ..board.private import sync_directory, write_private
from ..errors import NotFound, Unavailable, UserError
from .models import check_header, file_sha256
from .sealing import Seal, Stamp, digest, stamp_of

log = logging.getLogger(__name__)

MIB = 1024 * 1024
HEADROOM_BYTES = 512 * MIB
"""Left free on the disk, whatever is fetched: the ledger lives there too, and a full card stops it."""
PARTIAL_KEPT_S = 7 * 86400.0
"""A download nobody went on with for so long is not wanted any more."""
ORPHAN_KEPT_S = 3600.0
"""A blob without a name may be about to get one; after this long it is not."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ALIASES_MAX = 16
DIRECTORY_MODE, BLOB_MODE = 0o755, 0o444
"""Workers run as another user and may read models; the state directory above is closed to everybody else."""


class Manifest(msgspec.Struct, frozen=True):
    """What a name stands for. `source` is where it came from, for people; `revision` pins it there."""

    name: str
    sha256: str
    size: int
    source: str = ""
    revision: str = ""
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    added: float = 0.0
    """Unix seconds."""
    tools: bool = False
    """Whether its chat template has a place for tools."""


class NoSpace(Unavailable):
    """The disk is too full. Nothing was written, or what was written is kept to be gone on with."""

    status = 507


class NotAsPromised(UserError):
    """The bytes are not those that were promised; they are gone."""

    status = 502


class Store:
    def __init__(self, root: Path, free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free) -> None:
        """`free` tells the free bytes of the disk that a directory is on."""
        self.root, self._free = root, free
        self._blobs, self._partial, self._manifests = root / "blobs", root / "partial", root / "manifests"
        self._sealing = threading.Lock()  # one thread adopts a blob while another is asked for its pieces
        self.entries: dict[str, Manifest] = {}
        """By name. Replaced as a whole, never changed."""

    def open(self) -> None:
        """Make the directories and read the manifests; one that cannot be read is told, and left alone."""
        for directory in (self.root, self._blobs, self._partial, self._manifests):
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            directory.chmod(DIRECTORY_MODE)
        found = {}
        for path in sorted(self._manifests.glob("*.json")):
            try:
                manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
            except (OSError, msgspec.DecodeError) as fault:
                log.error("the manifest %s cannot be read and is left out: %s", path, fault)
                continue
            if self.has(manifest.sha256):
                found[manifest.name] = manifest
            else:
                log.error("the file of model %s is gone from %s: pull it again", manifest.name, self._blobs)
        self.entries = found

    # looking ---------------------------------------------------------------------------------------------------------
    def find(self, name: str) -> Manifest | None:
        """The model of that name or alias."""
        entries = self.entries
        return entries.get(name) or next((one for one in entries.values() if name in one.aliases), None)

    def get(self, name: str) -> Manifest:
        """As `find`. Raises `NotFound`, naming what there is."""
        if (manifest := self.find(name)) is None:
            there = ", ".join(self.entries) or "none"
            raise NotFound(
                f"no model {name[:128]!r} is in this node's store", f"It has: {there}.", "See `picluster ls`."
            )
        return manifest

    def blob(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), "digests are checked where they come in"
        return self._blobs / f"sha256-{sha256}"

    def has(self, sha256: str) -> bool:
        return SHA256.fullmatch(sha256) is not None and self.blob(sha256).is_file()

    def partial(self, sha256: str, kind: str = "part") -> Path:
        assert SHA256.fullmatch(sha256), "digests are checked where they come in"
        return self._partial / f"{sha256}.{kind}"

    def check_space(self, size: int) -> None:
        """Raises `NoSpace` where `size` more bytes would not leave the headroom."""
        free = self._free(self.root)
        if free - size < HEADROOM_BYTES:
            raise NoSpace(
                f"there is no room for {_mib(size)} on the disk of this node",
                f"{_mib(free)} are free, and {_mib(HEADROOM_BYTES)} stay free for the ledger.",
                "Remove a model (`picluster ls`, `picluster rm NAME`) or move state_dir to a larger disk.",
                retry_after_s=60.0,
            )

    # blobs -----------------------------------------------------------------------------------------------------------
    def adopt(self, partial: Path, sha256: str, size: int, pieces: tuple[bytes, ...] = ()) -> Path:
        """The blob that `partial` becomes, if it is what was promised. Raises `NotAsPromised`; it is deleted then.

        `pieces`: the digests by which each was verified as it came, where they were.
        """
        got, pieces = (file_sha256(partial), pieces) if pieces else digest(partial)
        found = partial.stat().st_size
        if found != size or got != sha256:
            partial.unlink()
            why = f"{found} bytes came, {size} were promised" if found != size else f"their SHA-256 is {got[:16]}…"
            raise NotAsPromised(
                "what was fetched is not what was promised", f"{why}, promised was {sha256[:16]}….", "Pull it again."
            )
        return self._settle(partial, sha256, pieces)

    def _settle(self, partial: Path, sha256: str, pieces: tuple[bytes, ...]) -> Path:
        try:
            check_header(partial)
        except UserError:
            partial.unlink()
            raise
        with partial.open("rb") as file:
            os.fchmod(file.fileno(), BLOB_MODE)
            os.fsync(file.fileno())
        blob = self.blob(sha256)
        with self._sealing:
            partial.rename(blob)
            sync_directory(self._blobs)
            _seal(blob, stamp_of(blob), pieces)  # a rename changes the stamp
        return blob

    def pieces(self, sha256: str) -> tuple[bytes, ...]:
        """The digest of each piece of a blob, verified by its seal. Raises `NotFound` or `NotAsPromised`."""
        blob = self.blob(sha256)
        if not blob.is_file():
            raise NotFound(f"no blob {sha256[:16]}… is in this node's store")
        with self._sealing:
            stamp, seal = stamp_of(blob), _read_seal(blob)
            if seal is not None and seal.stamp == stamp:
                return seal.pieces
            got, pieces = digest(blob)
            if got == sha256:
                _seal(blob, stamp, pieces)
                return pieces
            blob.unlink()
        raise NotAsPromised(
            f"the file of {self._name_of(sha256)} is not what it was when it was verified",
            "Its bytes have changed since; it was removed.", "Pull it again.",
        )  # fmt: skip

    def stamp(self, sha256: str) -> Stamp:
        """How the blob looks now: the same again later means that nobody wrote to it in between. Zeros: it is gone."""
        try:
            return stamp_of(self.blob(sha256))
        except FileNotFoundError:
            return Stamp(0, 0, 0, 0)

    def take_file(self, path: Path, hard_link: bool = False) -> tuple[str, int]:
        """A file of this machine as a blob: its digest and size. Raises `UserError` or `NoSpace`.

        Shares its blocks where the file system can, else copies them. `hard_link`: shares the file itself.
        """
        if not path.is_file():
            raise UserError(f"cannot read the model file {path}", "There is no such file.")  # a pipe would be for ever
        size = check_header(path)
        partial = self.new_partial()
        try:
            if not (hard_link and _linked(path, partial)):
                self.check_space(size)
                _copy(path, partial)
            size = partial.stat().st_size
            return self.settle(partial), size
        except OSError as fault:
            raise UserError(f"{path} cannot be taken into the store", f"{fault.strerror}.") from None
        finally:
            partial.unlink(missing_ok=True)

    def new_partial(self) -> Path:
        """A name for a file whose digest is not known yet."""
        return self._partial / f"import-{os.getpid()}-{time.monotonic_ns()}.part"

    def settle(self, partial: Path) -> str:
        """The digest of `partial`, which is a blob now. Raises `UserError` where it is no GGUF file."""
        sha256, pieces = digest(partial)
        if not self.has(sha256):
            self._settle(partial, sha256, pieces)
        return sha256

    # names -----------------------------------------------------------------------------------------------------------
    def put(self, manifest: Manifest) -> Manifest:
        """Give a blob its name, durably. An older model of that name loses it, and keeps its pin and aliases."""
        assert self.has(manifest.sha256), "a name is given last"
        self._check_names(manifest)
        write_private(self._manifest(manifest.name), msgspec.json.encode(manifest))
        self.entries = dict(sorted({**self.entries, manifest.name: manifest}.items()))
        return manifest

    def remove(self, name: str) -> int:
        """Take a name away, and its blob where no other name has it. Bytes freed. Raises `NotFound`."""
        manifest = self.get(name)
        self._manifest(manifest.name).unlink(missing_ok=True)
        sync_directory(self._manifests)
        self.entries = {key: one for key, one in self.entries.items() if key != manifest.name}
        if any(one.sha256 == manifest.sha256 for one in self.entries.values()):
            return 0
        blob = self.blob(manifest.sha256)
        blob.unlink(missing_ok=True)
        _seal_path(blob).unlink(missing_ok=True)
        return manifest.size

    def sweep(self, wall: float, busy: Collection[str] = ()) -> int:
        """Remove blobs without a name and partials that nobody goes on with, but those of `busy`. Bytes freed."""
        named = {one.sha256 for one in self.entries.values()} | set(busy)
        freed = 0
        for path in sorted((*self._blobs.iterdir(), *self._partial.iterdir())):
            told = SHA256.search(path.name)
            kept_s = PARTIAL_KEPT_S if path.parent == self._partial else ORPHAN_KEPT_S
            if (told and told[0] in named and path.parent == self._blobs) or (told and told[0] in busy):
                continue
            stat = path.stat()
            if wall - max(stat.st_mtime, stat.st_ctime) > kept_s:
                path.unlink()
                freed += stat.st_size
        return freed

    def _manifest(self, name: str) -> Path:
        return self._manifests / f"{quote(name, safe='')}.json"

    def _check_names(self, manifest: Manifest) -> None:
        if len(manifest.aliases) > ALIASES_MAX:
            raise UserError(f"{manifest.name} has too many aliases", f"At most {ALIASES_MAX}.")
        for name in (manifest.name, *manifest.aliases):
            if not NAME.fullmatch(name) or ".." in name:
                why = "Up to 128 letters, digits and . _ : / @ + -, beginning with a letter or digit."
                raise UserError(f"{name[:128]!r} cannot be the name of a model", why)
            other = self.find(name)
            if other is not None and other.name != manifest.name:
                raise UserError(f"{name!r} is already a name of {other.name}", "", "Take another, or remove that one.")

    def _name_of(self, sha256: str) -> str:
        return next((one.name for one in self.entries.values() if one.sha256 == sha256), f"blob {sha256[:16]}…")


def _seal_path(blob: Path) -> Path:
    return blob.with_name(blob.name + ".seal")


def _seal(blob: Path, stamp: Stamp, pieces: tuple[bytes, ...]) -> None:
    write_private(_seal_path(blob), msgspec.json.encode(Seal(stamp, pieces)))


def _read_seal(blob: Path) -> Seal | None:
    try:
        return msgspec.json.decode(_seal_path(blob).read_bytes(), type=Seal)
    except (OSError, msgspec.DecodeError):
        return None  # the power went between the blob's rename and its seal


def _linked(path: Path, to: Path) -> bool:
    try:
        to.hardlink_to(path.resolve())
    except OSError:
        return False  # another disk, or another owner
    return True


def _copy(path: Path, to: Path) -> None:
    """By the kernel, which shares the blocks where the file system can (btrfs, xfs); else byte by byte."""
    with path.open("rb") as source, to.open("xb") as target:
        left = os.fstat(source.fileno()).st_size
        try:
            while left and (copied := os.copy_file_range(source.fileno(), target.fileno(), left)):
                left -= copied
        except OSError as fault:
            if fault.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(source, target)


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"
