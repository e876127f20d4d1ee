"""The peer listener's door: TCP connections come in, with a bounded number of TLS handshakes at a time.

    kernel backlog ──accept──▶ handshake (<= HANDSHAKES_MAX at once, <= HANDSHAKE_S each) ──▶ aiohttp

A handshake costs a board's core milliseconds, and anybody on the LAN may begin one: when all links of a cluster come
back at once (Corrosion's reconnect storm), or a stranger opens a thousand connections and says nothing, the rest waits
in the kernel, and no address holds more than its share.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

log = logging.getLogger(__name__)

HANDSHAKES_MAX = 32
HANDSHAKES_AN_ADDRESS_MAX = 16
"""A whole site may stand behind one address of a NAT router."""
HANDSHAKE_S = 5.0
BACKLOG = 128
UNSENT_BYTES = 128 * 1024
"""TCP_NOTSENT_LOWAT: what the kernel holds unsent cannot be overtaken by a control message any more."""
NO_FILES_S = 0.5
"""Out of file descriptors: they come back when others close."""


class Door:
    def __init__(self, protocol: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext) -> None:
        """`protocol` makes the server's side of each connection."""
        self.port = 0
        self._protocol, self._context = protocol, context
        self._free = asyncio.Semaphore(HANDSHAKES_MAX)
        self._by_address: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._untouched: set[socket.socket] = set()  # accepted, and nobody has begun to shake hands yet
        self._listener: socket.socket | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._listener, self.port = listener, listener.getsockname()[1]
        self._start(self._accept(listener))

    async def close(self) -> None:
        """Accept nobody any more. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in (*self._untouched, *([self._listener] if self._listener else [])):
            connection.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                connection, address = await loop.sock_accept(listener)
                self._untouched.add(connection)
            except OSError as fault:
                self._free.release()
                log.warning("cannot accept a connection: %s", fault)
                await asyncio.sleep(NO_FILES_S)
                continue
            except BaseException:
                self._free.release()
                raise
            self._start(self._shake(connection, str(address[0])))

    async def _shake(self, connection: socket.socket, address: str) -> None:
        self._untouched.discard(connection)
        self._by_address[address] += 1
        try:
            if self._by_address[address] > HANDSHAKES_AN_ADDRESS_MAX:
                connection.close()
                return
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S
            )
        except OSError as fault:  # ssl.SSLError and ConnectionError are
            log.debug("no TLS with %s: %s", address, fault)
        finally:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]
            self._free.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _HasInfo(Protocol):
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


def certificate_of(connection: _HasInfo) -> bytes | None:
    """The certificate (DER) that the other end showed; None where it showed none."""
    tls = connection.get_extra_info("ssl_object")
    return tls.getpeercert(binary_form=True) if isinstance(tls, ssl.SSLObject) else None


def keep_little_unsent(connection: socket.socket | None) -> None:
    if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
