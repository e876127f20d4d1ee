"""What a pool asks of whoever loads models on demand, and what stands there where nobody does. See `loading`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..errors import Refused
from .protocol import Done


class Demand(Protocol):
    async def ready(self, name: str) -> None:
        """Returns once the model may be asked, or is none of those that are loaded on demand."""

    def keep(self, model: str, keep_alive_s: float | None) -> bool:
        """Have it stay for so long after its last answer, as a request asked. False: it stays whatever is asked."""

    async def look(self) -> None:
        """Unload now what is wanted no longer and answers nobody."""


class Wanted(Protocol):
    """A model of the pool."""

    async def settled(self) -> Any: ...

    def wanted(self) -> None: ...


async def only_load(demand: Demand, of: Callable[[str], Wanted], model: str, keep_alive_s: float | None) -> Done:
    """Nothing is asked of `model`: it is in memory now, or has been asked to leave it (it answers to the end first).

    Raises `Refused` where it stays, and what keeps it from being loaded.
    """
    if keep_alive_s == 0:
        if not demand.keep(model, keep_alive_s):
            raise Refused(f"{model} stays in memory", "It is pinned, or one of [[models]] of its node.")
        await demand.look()
    else:
        await demand.ready(model)
        served = of(model)
        await served.settled()
        served.wanted()
        demand.keep(model, keep_alive_s)
    return Done(0, "stop", 0, 0)


class Configured:
    """Models are there, or they are not."""

    async def ready(self, name: str) -> None:
        pass

    def keep(self, model: str, keep_alive_s: float | None) -> bool:
        return False

    async def look(self) -> None:
        pass
