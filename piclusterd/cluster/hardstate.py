"""A voter's memory: term, vote, voters and incarnation, durable before any message that depends on them leaves.

    save n    ──▶ vote.a   (n odd)        each: SHA-256 | msgpack [n, state]
    save n+1  ──▶ vote.b   (n even)       written beside, fsynced, renamed, directory fsynced, then `save` returns

`load` takes the newest copy whose checksum holds. A write cut short never replaces a good copy; a copy that the disk
damaged later leaves the other, which is one save older. Where files exist and none is good the node must not guess:
having voted and forgotten it could elect two leaders of one term (Raft, Ongaro 2014, §3.8), so it is `Broken`, and the
node comes back as a learner with a new id. Where no file exists, `voted` beside the identity tells a fresh node from
one whose record vanished (a folder deleted, a file system repaired): it is written once the first save is durable, and
names the node, for another identity in the same place has another vote. Blocking: the daemon calls this in an
executor, one call at a time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from ..board.private import make_private_directory, write_private
from ..errors import Broken
from ..events import HardState
from ..ids import NodeId

COPIES = ("vote.a", "vote.b")
VOTED = "voted"
_CHECKSUM_BYTES = 32


class _Copy(msgspec.Struct, frozen=True, array_like=True):
    count: int
    state: HardState


def load(directory: Path) -> HardState | None:
    """The newest state saved in `directory`; None if there never was one. Raises `Broken` if it is lost."""
    newest = _newest(directory)
    return newest.state if newest else None


def save(directory: Path, state: HardState) -> None:
    """Durable on return. Raises `Broken` where an earlier state is lost, OSError where the disk refuses."""
    make_private_directory(directory)
    newest = _newest(directory)
    count = newest.count + 1 if newest else 1
    packed = msgspec.msgpack.encode(_Copy(count, state))
    write_private(directory / COPIES[(count - 1) % len(COPIES)], hashlib.sha256(packed).digest() + packed)


def note_voted(identity: Path, node: NodeId) -> None:
    """From now on a start without a vote record is a loss. Durable on return; comes after the first `save`."""
    if not has_voted(identity, node):
        write_private(identity / VOTED, node.encode())


def has_voted(identity: Path, node: NodeId) -> bool:
    """Did this node ever have a vote record?"""
    try:
        return (identity / VOTED).read_bytes() == node.encode()
    except FileNotFoundError:
        return False


def _newest(directory: Path) -> _Copy | None:
    paths = [path for name in COPIES if (path := directory / name).exists()]
    good = [copy for path in paths if (copy := _read(path))]
    if paths and not good:
        raise Broken(
            "lost vote record",
            f"no readable copy is left in {directory}; this node may have voted and does not know for whom.",
            "Reset the node and join it again: it gets a new id and votes for nobody until it is made a voter.",
        )
    return max(good, key=lambda copy: copy.count, default=None)


def _read(path: Path) -> _Copy | None:
    data = path.read_bytes()
    checksum, packed = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if hashlib.sha256(packed).digest() != checksum:
        return None
    try:
        return msgspec.msgpack.decode(packed, type=_Copy)
    except msgspec.DecodeError:
        return None
