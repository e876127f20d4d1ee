"""The service that a selftest's run calls: it answers with this node's name and does nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .outcome import CallFailed


@dataclass(frozen=True, slots=True)
class Echo:
    """`echo` → `{"node": name}`."""

    node: str

    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        if operation != "echo":
            raise CallFailed(f"a selftest has no operation {operation!r}", retryable=False)
        return {"node": self.node}
