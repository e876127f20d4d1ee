"""What a node says of itself: the board's readings and the pool's models as one `wire.Facts`."""

from __future__ import annotations

from .. import __version__
from ..config import Config
from ..wire import Facts, ModelFacts
from . import sensors


def describe_node(
    config: Config,
    name: str,
    addresses: tuple[str, ...],
    api_port: int,
    models: tuple[ModelFacts, ...],
    ledger_entries: int,
    ledger_flags: tuple[str, ...] = (),
) -> Facts:
    """One look at the machine. Blocks for the time of a few reads from /sys. `ledger_flags`: see `upkeep`."""
    board = sensors.read()
    host = addresses[0].rsplit(":", 1)[0] if addresses else "127.0.0.1"
    return Facts(
        name=name,
        addresses=addresses,
        api=f"http://{host}:{api_port}",
        release=__version__,
        role=config.node.role,
        board=board.model,
        cpu_percent=board.cpu_percent,
        memory_used=board.memory_used,
        memory_total=board.memory_total,
        temperature_c=board.temperature_c,
        flags=(*board.flags, *ledger_flags),
        models=models,
        ledger_entries=ledger_entries,
    )
