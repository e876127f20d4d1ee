"""Certificates are renewed while the node runs, at two thirds of their life.

    node ──request("renew", CSR) over a link──▶ the node that holds the CA's key ──certificate──▶ node

The request carries a key only, and the issuer signs it for nobody but the peer at the other end of the link: who it is
was settled by mutual TLS. A node that holds the CA's key issues for itself. (k3s renews at restart only: a node left
alone for a year dies, k3s discussion 10024.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing

from ..errors import PiclusterError, Refused
from ..ids import NodeId, node_id
from .certificates import key_of_request
from .identity import Identity
from .links import Links

log = logging.getLogger(__name__)

REQUEST = "renew"
CHECK_EVERY_S = 3600.0
"""A certificate has ten days left when the first try is due; an hour between tries loses nothing."""
ANSWER_S = 10.0


def issue_for(peer: NodeId, name: str, request_pem: bytes, issuer: Identity) -> bytes:
    """A fresh certificate (PEM) for `peer`, called `name`. Raises `Refused` where the key is not the peer's own."""
    if node_id(key_of_request(request_pem).public_bytes_raw()) != peer:
        raise Refused("a certificate is renewed for its own node only", f"the key is not that of {peer}.")
    return issuer.issue(request_pem, name)


async def renew(me: Identity, links: Links) -> Identity | None:
    """This identity with a fresh certificate, in use for the next handshakes; None where nobody could issue one."""
    request = me.signer.request()
    if me.can_issue:
        return await _use(me, links, me.issue(request, me.name))
    for peer in sorted(links.peers()):
        try:
            async with aclosing(links.request(peer, REQUEST, request, ANSWER_S)) as chunks:
                return await _use(me, links, b"".join([chunk async for chunk in chunks]))
        except PiclusterError as fault:
            log.info("%s did not renew our certificate: %s", peer, fault)
    return None


async def keep_renewed(me: Identity, links: Links, wall: Callable[[], float] = time.time) -> None:
    """Renew whenever it is due, for ever."""
    while True:
        if wall() >= me.renew_after:
            renewed = await renew(me, links)
            if renewed is None:
                log.warning("our certificate is due for renewal and no node that holds the CA's key is linked")
            me = renewed or me
        await asyncio.sleep(CHECK_EVERY_S)


async def _use(me: Identity, links: Links, cert_pem: bytes) -> Identity:
    renewed = await asyncio.to_thread(me.renewed, cert_pem)
    links.renew(renewed)
    log.info("our certificate is renewed")
    return renewed
