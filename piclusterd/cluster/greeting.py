"""The hellos that begin every link: what this node says of itself, and whether what the other says fits.

    hello (protocols lowest..highest, id, cluster, name, addresses) ⇄ hello

Both speak the highest protocol that both know; where their ranges do not meet there is no link, and each is told which
of the two is too old. A node's certificate is the proof of its id: a hello only repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from aiohttp import WSMsgType

from ..ids import NodeId
from ..wire import PROTOCOLS, Dropped, Twin
from . import frames
from .frames import Hello, Kind
from .identity import Identity
from .link import REFUSED, TWIN, VERSION, Link, Socket, closing_words

LIFE_BITS = 53
"""Of the number a process draws at its start: two processes with one key are told apart from one that dials anew."""


class NotKept(Exception):
    """A handshake ended without a link: close `code`, and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why

    @property
    def level(self) -> int:
        """How loudly to say it: an owner must mend a release that is too old, and a disk that was cloned."""
        return logging.WARNING if self.code in (VERSION, TWIN) else logging.INFO


class Greeting:
    def __init__(self, identity: Identity, hello_s: float, protocols: tuple[int, int] = PROTOCOLS) -> None:
        """`protocols`: lowest and highest spoken. `hello_s`: how long the other side may take to say hello."""
        self.addresses: tuple[str, ...] = ()
        self._life = secrets.randbits(LIFE_BITS)
        self._me, self._hello_s, self._protocols = identity, hello_s, protocols

    def hello(self) -> Hello:
        me = self._me
        return Hello(*self._protocols, me.node, me.cluster_id, me.name, self.addresses, self._life, True)

    def frame(self) -> bytes:
        """Our hello as the first bytes on a link."""
        return frames.encode(frames.Frame(0, Kind.HELLO, frames.encode_body(self.hello())))

    async def hear(self, socket: Socket, node: NodeId) -> Hello:
        """The hello of the peer whose certificate says `node`. Raises `NotKept`."""
        try:
            async with asyncio.timeout(self._hello_s):
                message = await socket.receive()
        except TimeoutError:
            raise NotKept(REFUSED, "no hello came") from None
        if message.type is not WSMsgType.BINARY:
            raise NotKept(socket.close_code or REFUSED, closing_words(socket, message))
        frame = frames.decode(message.data)
        if isinstance(frame, Dropped) or frame.kind is not Kind.HELLO:
            raise NotKept(REFUSED, "the first frame is not a hello")
        hello = frames.decode_hello(frame.body)
        if isinstance(hello, Dropped):
            raise NotKept(REFUSED, hello.reason)
        self._check(hello, node)
        return hello

    def _check(self, hello: Hello, node: NodeId) -> None:
        if hello.node != node:
            raise NotKept(REFUSED, f"it says it is {hello.node}, its certificate says {node}")
        if hello.cluster_id != self._me.cluster_id:
            raise NotKept(REFUSED, f"it is of cluster {hello.cluster_id}, not of {self._me.cluster_id}")
        if fault := frames.no_protocol(hello, self.hello()):
            raise NotKept(VERSION, fault)


async def refuse_twin(hello: Hello, rival: Link | None, path: str) -> None:
    """Raises `NotKept` where another process with the key of `hello` is linked and lives: its disk was cloned.

    The one that is linked is told. One that restarted drew another number too, but its old link does not answer.
    """
    if rival is None or not hello.life or hello.life == rival.peer.life or not await rival.answers():
        return
    rival.send(Twin(path))
    raise NotKept(TWIN, f"the key of {hello.name} is in use on two machines: {rival.path}, and {path}")
