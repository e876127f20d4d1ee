"""A node's certificate while it runs: renewed at two thirds of its life, and issued anew when the cluster's CA changes.

    node ──request("renew", CSR) over a link──▶ the node that holds the CA's key ──certificate──▶ node
    node ──request("ca", what it trusts)──────▶ the same one: is the CA being changed? (`succession`)

The request carries a key only, and the issuer signs it for nobody but the peer at the other end of the link: who it is
was settled by mutual TLS. A node that holds the CA's key issues for itself. (k3s renews at restart only: a node left
alone for a year dies, k3s discussion 10024.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing

import msgspec

from ..errors import PiclusterError, Refused, UserError
from ..ids import NodeId, node_id
from . import succession
from .certificates import key_of_request
from .identity import Identity
from .links import Links
from .succession import Asked, Progress, Succession, Told

log = logging.getLogger(__name__)

REQUEST = "renew"
LOOK_EVERY_S = 10.0
"""Three steps of a change of the CA take three looks; a look at rest is one small request."""
ASKED_MAX = 8
"""Peers asked in one look for the holder of the CA's key, while it is not known."""
STEPS_MAX = 4
"""A node goes as far as it can in one look: trusts, says so, is issued anew, says so."""
ANSWER_S = 10.0


def issue_for(peer: NodeId, name: str, request_pem: bytes, issuer: Identity, *, by_next: bool = False) -> bytes:
    """A fresh certificate (PEM) for `peer`, called `name`. Raises `Refused` where the key is not the peer's own."""
    if node_id(key_of_request(request_pem).public_bytes_raw()) != peer:
        raise Refused("a certificate is renewed for its own node only", f"the key is not that of {peer}.")
    return issuer.issue(request_pem, name, by_next=by_next)


class Renewal:
    def __init__(
        self,
        links: Links,
        members: Callable[[], Awaitable[Iterable[NodeId]]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`members`: all that are listed, here or away. `wall`: Unix seconds."""
        self._links, self._members, self._wall = links, members, wall
        self._lead = Succession(links.identity.directory) if links.identity.can_issue else None
        self._holder: NodeId | None = None
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except (PiclusterError, OSError) as fault:
                log.warning("our certificate and the cluster's CA were not looked after: %s", fault)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Do what is due."""
        if self._wall() >= self._links.identity.renew_after and not await self.renew():
            log.warning("our certificate is due for renewal and no node that holds the CA's key is linked")
        if self._lead is None:
            await self._follow()
        else:
            await self._proceed(force=False)

    async def renew(self) -> bool:
        """Have a fresh certificate, in use for the next handshakes. False where nobody could issue one."""
        me = self._links.identity
        request = me.signer.request()
        if self._lead is not None:
            await self._use(await asyncio.to_thread(me.issue, request, me.name, by_next=self._lead.issuing))
            return True
        cert_pem = await self._of_holder(REQUEST, request)
        if cert_pem is not None:
            await self._use(cert_pem)
        return cert_pem is not None

    # what others ask, where the CA's key is ----------------------------------------------------------------------
    async def issue(self, peer: NodeId, name: str, request_pem: bytes) -> bytes:
        """A fresh certificate for `peer`. Raises `PiclusterError`."""
        by_next = self._lead is not None and self._lead.issuing
        return await asyncio.to_thread(issue_for, peer, name, request_pem, self._links.identity, by_next=by_next)

    async def answer(self, peer: NodeId, body: bytes) -> bytes:
        """Where the change of the CA stands for `peer`, which said what it has done."""
        lead = self._leading()
        try:
            asked = msgspec.json.decode(body, type=Asked)
        except msgspec.DecodeError as fault:
            raise UserError("not understood", str(fault)) from None
        async with self._one_at_a_time:
            return msgspec.json.encode(await asyncio.to_thread(lead.answer, self._links.identity, peer, asked))

    async def rotate(self, finish: bool) -> Progress:
        """Begin to change the CA, or go on; `finish`: without whoever the present stage waits for."""
        lead = self._leading()
        async with self._one_at_a_time:
            before = self._links.identity
            me = await asyncio.to_thread(lead.begin, before)
            if me is not before:
                self._links.renew(me)
                log.warning("the cluster's CA is being changed")
        await self._proceed(force=finish)
        return lead.progress(self._links.identity.node, await self._members())

    def _leading(self) -> Succession:
        if self._lead is None:
            raise Refused("this node does not hold the CA's key", "", "Ask the node where `init` ran.")
        return self._lead

    async def _proceed(self, *, force: bool) -> None:
        """As far as nobody is waited for; `force` goes one stage further."""
        lead = self._leading()
        for _ in range(STEPS_MAX):
            members = await self._members()
            async with self._one_at_a_time:
                before, issuing = self._links.identity, lead.issuing
                me = await asyncio.to_thread(lead.advance, before, members, force=force)
                if me is not before:
                    self._links.renew(me)
                    log.warning("the cluster's CA is changed: the old one is trusted no more")
            force = False
            if lead.issuing == issuing:
                return
            if lead.issuing:
                await self.renew()

    # what a node asks ---------------------------------------------------------------------------------------------
    async def _follow(self) -> None:
        for _ in range(STEPS_MAX):
            me = self._links.identity
            body = await self._of_holder(succession.REQUEST, msgspec.json.encode(succession.ask(me)))
            if body is None:
                return
            told = msgspec.json.decode(body, type=Told)
            changed = await asyncio.to_thread(succession.obey, me, told)
            if changed is not me:
                self._links.renew(changed)
                log.warning("two CAs are trusted now" if changed.next_ca_pem else "the old CA is trusted no more")
            elif not (told.reissue and await self.renew()):
                return

    async def _of_holder(self, name: str, body: bytes) -> bytes | None:
        """The answer of the node that holds the CA's key; None where it is not linked."""
        peers = sorted(self._links.peers(), key=lambda node: (node != self._holder, node))
        for peer in peers[:ASKED_MAX]:
            try:
                async with aclosing(self._links.request(peer, name, body, ANSWER_S)) as chunks:
                    answer = b"".join([chunk async for chunk in chunks])
            except PiclusterError as fault:
                log.debug("%s did not answer %s: %s", peer, name, fault)
                continue
            self._holder = peer
            return answer
        return None

    async def _use(self, cert_pem: bytes) -> None:
        self._links.renew(await asyncio.to_thread(self._links.identity.renewed, cert_pem))
        log.info("our certificate is renewed")
