"""Join tokens, as the owner asks for them at this node's socket.

picluster token ─▶ admin door ─▶ TokenDesk ─▶ `cluster.tokens`: made, listed and taken back where the CA's key is
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from .cluster.identity import Identity
from .cluster.tokens import Tokens
from .errors import UserError
from .web import admin


class TokenDesk:
    """`addresses()`: `host:port` of our peer listener, where it is known."""

    def __init__(self, me: Identity, addresses: Callable[[], Sequence[str]]) -> None:
        self._me = me
        self._addresses = addresses

    def _tokens(self) -> Tokens:
        if not self._me.can_issue:
            raise UserError("this node cannot admit others", "the CA's key is where `init` ran.", "Ask there.")
        return Tokens(self._me.directory, self._me.ca_pin)

    async def create(self, wish: admin.TokenWish) -> admin.TokenMade:
        token = await asyncio.to_thread(self._tokens().create, wish.ttl_s, wish.uses, wish.role)
        return admin.TokenMade(token, token.split(".")[2], next(iter(self._addresses()), ""), wish.ttl_s)

    async def list(self) -> Sequence[admin.TokenLine]:
        infos = await asyncio.to_thread(self._tokens().list)
        return [admin.TokenLine(info.id, int(info.expires - time.time()), info.uses_left, info.role) for info in infos]

    async def revoke(self, token: str) -> bool:
        await asyncio.to_thread(self._tokens().revoke, token)
        return True
