"""What comes in by the hub, while this node is the coordinator.

    hub ──HubHook──▶ signature checked again ──Hook──▶ take: on W ledgers ──▶ acknowledged

The provider's signature of a webhook is checked here once more, since the hub may have been stolen.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from .errors import PiclusterError
from .events import HookTaken
from .ids import NodeId, Term
from .integrations.hub import HubClient
from .integrations.hub_frames import HubHook
from .web.hooks import Ignored, Lists, hook_of
from .web.stream import EventBus
from .wire import Hook

log = logging.getLogger("piclusterd")


class HubDesk:
    def __init__(
        self, me: NodeId, url: str, token: str, secrets: Mapping[str, tuple[str, ...]], lists: Lists,
        take: Callable[[Hook], Awaitable[HookTaken]], bus: EventBus, rng: random.Random,
    ) -> None:  # fmt: skip
        """`url` is empty where there is no hub; `take` raises where a hook is not durable."""
        self._me, self._url, self._token, self._secrets, self._lists = me, url, token, secrets, lists
        self._take, self._bus, self._rng = take, bus, rng
        self._client: HubClient | None = None

    async def run(self, term: Term) -> None:
        """Take webhooks from the hub as the coordinator of `term`, until cancelled or refused."""
        client = HubClient(
            self._url, self._token, node=self._me, term=term, deliver=self._deliver, rng=self._rng,
            on_refused=lambda newer: log.warning("the hub has seen term %d, so term %d is over", newer, term),
        )  # fmt: skip
        self._client = client
        try:
            await client.run()
        finally:
            if self._client is client:
                self._client = None

    async def _deliver(self, hook: HubHook) -> bool:
        """True once it is on W ledgers."""
        try:
            verified = hook_of(hook.source, hook.headers, hook.body, self._secrets.get(hook.source, ()), self._lists)
        except Ignored as why:
            log.info("webhook %d of the hub ignored: %s", hook.seq, why)
            return True  # it would be ignored again
        except PiclusterError as fault:
            log.error("webhook %d of the hub refused: %s", hook.seq, fault)
            self._bus.publish("alarm", {"text": f"webhook {hook.seq} of the hub refused: {fault.what}"})
            return False
        taken = await self._take(verified)
        self._bus.publish(
            "hook", {"text": f"webhook {hook.seq} may be acknowledged to the hub", "seq": hook.seq, "run": taken.run}
        )
        return True

    def edge(self) -> dict[str, Any]:
        """What the status page tells of it."""
        client = self._client
        return {
            "url": self._url or None,
            "connected": client is not None and client.state in ("live", "pulling"),
            "last_seq": client.acked if client else None,
            "state": client.state if client else "this node is not the coordinator",
        }
