"""A link's socket where no TCP connection is possible: TLS from end to end, inside two pipes through a relay.

    Link ⇄ Tunnel ── TLS 1.3, both certificates ──▶ Circuit.send ──▶ relay ──▶ the peer's Circuit.receive
                                                    Circuit.receive ◀── relay ◀── the peer's Circuit.send

The same mutual TLS as on a direct link, over memory (`ssl.MemoryBIO`): the relay sees ciphertext, and what it forges,
repeats, drops or reorders ends the tunnel. Inside TLS a record is `length (4 bytes) | frame`; with the top bit of the
length set it is a goodbye, `code (2 bytes) | why`. Offers the part of aiohttp's WebSocket that `link` uses.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import WSMessage, WSMsgType

from ..errors import PiclusterError
from .frames import CHUNK_BYTES_MAX, FRAME_BYTES_MAX

GOODBYE = 0x8000_0000
GOODBYE_BYTES_MAX = 128
LENGTH_BYTES = 4


class Circuit:
    """Two one-way pipes through a relay, each pulled by whoever reads it. Bytes only: `Tunnel` gives them meaning."""

    def __init__(self, incoming: AsyncGenerator[bytes, None]) -> None:
        """`incoming`: what the other end says, as the relay hands it on."""
        self._incoming = incoming
        self._unsent = bytearray()
        self._filled, self._drained = asyncio.Event(), asyncio.Event()
        self._over = self._pulled = False

    async def send(self, data: bytes) -> None:
        """Returns once the relay took all of it. Raises `ConnectionResetError` where it will not."""
        self.post(data)
        while self._unsent and not self._over:
            self._drained.clear()
            await self._drained.wait()
        if self._over:
            raise ConnectionResetError("the relayed circuit is over")

    def post(self, data: bytes) -> None:
        """As `send`, without waiting: for a few bytes."""
        self._unsent += data
        self._filled.set()

    async def receive(self) -> bytes:
        """Some bytes; none at the end."""
        try:
            return await anext(self._incoming, b"")
        except PiclusterError:
            return b""

    async def outgoing(self) -> AsyncGenerator[bytes, None]:
        """What this end says, for the relay's pull: in chunks, until this end is through or the relay has enough."""
        if self._pulled:
            return
        self._pulled = True
        try:
            while self._unsent or not self._over:
                if not self._unsent:
                    self._filled.clear()
                    await self._filled.wait()
                    continue
                piece = bytes(self._unsent[:CHUNK_BYTES_MAX])
                del self._unsent[:CHUNK_BYTES_MAX]
                if not self._unsent:
                    self._drained.set()
                yield piece
        finally:
            self._unsent.clear()
            self.shut()

    def shut(self) -> None:
        """Nothing more is sent; what waits still goes."""
        self._over = True
        self._filled.set()
        self._drained.set()

    async def close(self) -> None:
        """Once nobody receives any more."""
        self.shut()
        await self._incoming.aclose()


class Tunnel:
    def __init__(self, circuit: Circuit, context: ssl.SSLContext, *, server: bool) -> None:
        """`server`: this end accepted; the one that opened the circuit is the client of TLS."""
        self.close_code: int | None = None
        self._circuit = circuit
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self._plain = bytearray()
        self._closed = False

    async def handshake(self) -> None:
        """Raises `ssl.SSLError` or `ConnectionError`."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._circuit.post(self._out.read())  # nobody pulls before the first `receive` asks for the circuit
                await self._more()
        self._circuit.post(self._out.read())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of a transport: `ssl_object` is what the peer's certificate is asked of."""
        return self._tls if name == "ssl_object" else default

    async def send_bytes(self, data: bytes) -> None:
        self._tls.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        await self._flush()

    async def receive(self) -> WSMessage:
        """The next frame, or the end, as aiohttp tells them. Never raises."""
        while not self._closed:
            if (message := self._record()) is not None:
                return message
            try:
                self._plain += self._tls.read(CHUNK_BYTES_MAX)
            except ssl.SSLWantReadError:
                try:
                    await self._more()
                except ConnectionError:
                    self._closed = True
            except ssl.SSLError as fault:
                self._closed = True
                return WSMessage(WSMsgType.CLOSED, None, f"the relay spoilt it: {fault.reason}")
        return WSMessage(WSMsgType.CLOSED, None, None)

    async def close(self, *, code: int, message: bytes) -> bool:
        """Say goodbye if it can still be said, and let go of the circuit."""
        try:
            if not self._closed:
                self._closed = True
                body = code.to_bytes(2, "big") + message
                self._tls.write((len(body) | GOODBYE).to_bytes(LENGTH_BYTES, "big") + body)
                await self._flush()
        except ssl.SSLError:
            pass  # the handshake never ended
        finally:
            await self._circuit.close()
        return True

    def _record(self) -> WSMessage | None:
        """The next whole record of what was decrypted."""
        if len(self._plain) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._plain[:LENGTH_BYTES], "big")
        goodbye, length = length & GOODBYE, length & ~GOODBYE
        if length > (GOODBYE_BYTES_MAX if goodbye else FRAME_BYTES_MAX):
            self._closed = True
            return WSMessage(WSMsgType.CLOSED, None, f"a record of {length} bytes")
        if len(self._plain) < LENGTH_BYTES + length:
            return None
        body = bytes(self._plain[LENGTH_BYTES : LENGTH_BYTES + length])
        del self._plain[: LENGTH_BYTES + length]
        if not goodbye:
            return WSMessage(WSMsgType.BINARY, body, None)
        self._closed, self.close_code = True, int.from_bytes(body[:2], "big")
        return WSMessage(WSMsgType.CLOSE, self.close_code, body[2:].decode(errors="replace"))

    async def _more(self) -> None:
        data = await self._circuit.receive()
        if not data:
            raise ConnectionResetError("the relayed circuit ended")
        self._in.write(data)

    async def _flush(self) -> None:
        if data := self._out.read():
            await self._circuit.send(data)
