"""The deny-list beside the identity: a copy of what the ledger says, for the day on which the ledger is lost.

    Deny ─▶ save ─▶ identity/denied.json        start ─▶ load ─▶ links refuse them before the first handshake

A node that starts with an empty ledger fetches it from its peers; it must not take it from one that was removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from ..board.private import write_private
from ..errors import Broken
from ..ids import NodeId

FILE = "denied.json"


def load(directory: Path) -> tuple[NodeId, ...]:
    """Who was removed, from the identity directory. Raises `Broken`: to guess could let a stolen board in."""
    path = directory / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[NodeId, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as fault:
        raise Broken(
            "cannot read who was removed", f"{path}: {fault}.", "Remove it: the ledger holds it too."
        ) from fault


def save(directory: Path, nodes: Iterable[NodeId]) -> None:
    """Add `nodes` to the list; durable on return. One caller at a time."""
    write_private(directory / FILE, msgspec.json.encode(sorted({*load(directory), *nodes})))
