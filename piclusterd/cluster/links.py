"""The links of a node: its peer listener, its diallers, and one mutually authenticated link per pair of nodes.

    dialler                                         listener (TLS 1.3; also /ca and /join)
      ── TLS, both certificates ──────────────────▶
         server's id: ourselves? linked? denied? → close
      ── GET /link, WebSocket ────────────────────▶   certificate of a member? not denied? else 403
      ── hello (protocols, id, cluster, …) ───────▶   id = certificate's, cluster ours, a protocol in common? else 4001
      ◀── hello ───────────────────────────────────   link is up here
         link is up here

A dialler says hello only if it has no link to that node, so a second link comes about only when both dial at once; then
the one dialled by the lower node id is kept, on both sides. The other is retired: it delivers what is on its way for
`retire_s` and closes, so neither side sees the peer go down. A hello from a node that dialled before means that it has
lost that link (it restarted): the old one is dropped, `LinkDown` then `LinkUp`.
Certificates say who a peer is; addresses and hellos only help to find it. Events of one peer are posted in order.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket as sockets
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from ..errors import Refused, Unavailable, UserError
from ..events import Event, LinkDown, LinkUp, Received
from ..ids import NodeId
from ..wire import PROTOCOL, Dropped, PeerMessage
from . import frames
from .frames import FRAME_BYTES_MAX, REQUEST_BYTES_MAX, REQUEST_NAME_CHARS_MAX, Frame, Hello, Kind
from .identity import Identity
from .link import CLOSE_S, DUPLICATE, GOING_AWAY, REFUSED, Link, Socket, Timing, closing_words, goodbye
from .streams import Serve

log = logging.getLogger(__name__)

DIALLERS_MAX = 256
HINT_FAILURES_MAX = 20
"""About two minutes: whoever floods the LAN with false addresses does not keep the true ones out."""
LINKS_MAX = 1024
SELF_MEMORY_S = 600.0
"""How long an address that was our own is not dialled again: DHCP may give it to another node one day."""
CONNECT_S = 10.0
UNSENT_BYTES = 128 * 1024
"""TCP_NOTSENT_LOWAT: what the kernel holds unsent cannot be overtaken by a control message any more."""
SHUTDOWN_S = 2.0
KEEPALIVE_S = 10.0
"""For what is not a link: a stranger's idle connection does not stay."""


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`path`: who dialled whom, in words; `rtt_s`: None until measured; `since`: the event loop's clock."""

    path: str
    rtt_s: float | None
    addresses: tuple[str, ...]
    since: float
    name: str


class _NotKept(Exception):
    """A handshake ended without a link: close `code`, and why."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code, self.why = code, why


class _OwnAddress(Exception):
    pass


class Links:
    def __init__(
        self,
        identity: Identity,
        on_event: Callable[[Event], Awaitable[None]],
        serve: Serve,
        rng: random.Random,
        addresses: tuple[str, ...] = (),
        *,
        check_time: bool = True,
        timing: Timing | None = None,
    ) -> None:
        """`addresses`: where peers may dial us (`host:port`), told to them in the hello."""
        self.addresses = addresses
        self._identity, self._on_event, self._serve, self._rng = identity, on_event, serve, rng
        self._timing = timing or Timing()
        self._server_tls = identity.server_context(check_time=check_time)
        self._client_tls = identity.client_context(check_time=check_time)
        self._links: dict[NodeId, Link] = {}
        self._running: dict[Link, None] = {}  # the retired ones too
        self._greeting: set[NodeId] = set()  # our hello is out and not answered
        self._denied: frozenset[NodeId] = frozenset()
        self._diallers: dict[str, asyncio.Task[None]] = {}
        self._own: dict[str, float] = {}
        self._order = asyncio.Lock()
        self._closing = False
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    # the owner's calls -------------------------------------------------------------------------------------------
    async def start(self, host: str, port: int, routes: Iterable[web.RouteDef] = ()) -> int:
        """Listen, with `routes` (join desk) beside /link. The port bound. Raises OSError."""
        app = web.Application(client_max_size=64 * 1024)
        app.add_routes([web.get("/link", self._accept), *routes])
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._client_tls, force_close=True, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=KEEPALIVE_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=self._server_tls).start()
        bound: int = self._runner.addresses[0][1]
        return bound

    def dial(self, address: str, *, hint: bool = False) -> bool:
        """Keep a link to whoever answers at `address` (`host:port`). Idempotent. False: not worth dialling.

        A `hint` (mDNS, gossip) is given up after a while of failures; the next sighting tries it anew.
        """
        if self._closing or not frames.is_address(address):
            return False
        if asyncio.get_running_loop().time() - self._own.get(address, -SELF_MEMORY_S) < SELF_MEMORY_S:
            return False
        if address not in self._diallers:
            if len(self._diallers) >= DIALLERS_MAX:
                return False
            self._diallers[address] = asyncio.create_task(self._keep_dialling(address, hint))
        return True

    def undial(self, address: str) -> None:
        """Stop dialling `address`; a link that came of it ends."""
        if dialler := self._diallers.pop(address, None):
            dialler.cancel()

    def send(self, peer: NodeId, message: PeerMessage) -> bool:
        """Queue `message`. False: there is no link, or it is over. True promises nothing about arrival."""
        link = self._links.get(peer)
        return link is not None and link.send(message)

    async def request(self, peer: NodeId, name: str, body: bytes, timeout: float) -> AsyncGenerator[bytes, None]:
        """The chunks (<= 64 KiB) that `peer` serves for `name`; `timeout` bounds the wait for each one, seconds.

        Leaving early resets the stream: iterate under `contextlib.aclosing`. Raises `Unavailable` (no link, link lost
        midway, silence), `Overloaded`, or the `PiclusterError` that the peer met.
        """
        if len(name) > REQUEST_NAME_CHARS_MAX or len(body) > REQUEST_BYTES_MAX:
            raise UserError("the request is too long for a link", f"{len(body)} bytes, at most {REQUEST_BYTES_MAX}.")
        link = self._links.get(peer)
        if link is None:
            raise Unavailable(f"no link to {peer}")
        chunks = link.request(name, body, timeout)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    def peers(self) -> Mapping[NodeId, LinkInfo]:
        return {
            node: LinkInfo(link.path, link.rtt_s, link.peer.addresses, link.since, link.peer.name)
            for node, link in self._links.items()
        }

    def deny(self, nodes: Iterable[NodeId]) -> None:
        """Replace the deny-list: these get no link, and the ones they have end now."""
        self._denied = frozenset(nodes)
        for link in self._running:
            if link.peer.node in self._denied:
                link.end(REFUSED, "denied by the cluster")

    def renew(self, identity: Identity) -> None:
        """Present a renewed certificate from the next handshake on."""
        self._identity = identity
        identity.load_into(self._server_tls)
        identity.load_into(self._client_tls)

    async def close(self) -> None:
        """End everything politely; posts no events. Idempotent."""
        self._closing = True
        for link in self._running:
            link.end(GOING_AWAY, "this node stops")
        diallers = list(self._diallers.values())
        for dialler in diallers:
            dialler.cancel()
        await asyncio.gather(*diallers, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    # accepting ---------------------------------------------------------------------------------------------------
    async def _accept(self, request: web.Request) -> web.StreamResponse:
        try:
            node = self._identity.peer_of(_certificate(request.get_extra_info("ssl_object")))
            self._check_peer(node)
        except (Refused, _NotKept) as fault:
            log.info("refused a link from %s: %s", request.remote, fault)
            return web.Response(status=403, text=str(fault))
        socket = web.WebSocketResponse(
            heartbeat=None, compress=False, max_msg_size=FRAME_BYTES_MAX, timeout=CLOSE_S, autoping=True
        )
        await socket.prepare(request)
        _keep_little_unsent(request.get_extra_info("socket"))
        try:
            hello = await self._hear(socket, node)
            link = self._link(socket, hello, dialled=False, path=f"accepted from {request.remote}")
            events = self._adopt(link)
        except _NotKept as fault:
            log.info("no link with %s: %s", node, fault.why)
            await goodbye(socket, fault.code, fault.why)
            return socket
        link.greet(self._hello())
        await self._keep(link, events)
        return socket

    # dialling ----------------------------------------------------------------------------------------------------
    async def _keep_dialling(self, address: str, hint: bool) -> None:
        """Dial `address` again and again, with full jitter, unless its node is linked already."""
        failures = 0
        while not hint or failures < HINT_FAILURES_MAX:
            peer: NodeId | None = None
            try:
                peer = await self._dial_once(address)
                failures = 0
            except _OwnAddress:
                log.info("%s is this node itself", address)
                self._own[address] = asyncio.get_running_loop().time()
                break
            except (_NotKept, Refused, aiohttp.ClientError, OSError, TimeoutError, ValueError) as fault:
                failures += 1
                level = logging.INFO if failures == 1 else logging.DEBUG
                log.log(level, "no link to %s yet: %s: %s", address, type(fault).__name__, fault)
            while peer is not None and (link := self._links.get(peer)):
                await link.ended.wait()
            ceiling = self._timing.backoff_first_s * 2 ** min(failures, 16)
            await asyncio.sleep(self._rng.uniform(0, min(ceiling, self._timing.backoff_max_s)))
        del self._diallers[address]

    async def _dial_once(self, address: str) -> NodeId:
        """One attempt, and the life of the link if it gives one. The node that answers at `address`."""
        assert self._session is not None
        async with asyncio.timeout(CONNECT_S):
            socket = await self._session.ws_connect(
                f"https://{address}/link",
                heartbeat=None,
                compress=0,
                max_msg_size=FRAME_BYTES_MAX,
                timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=CLOSE_S),
            )
        try:
            _keep_little_unsent(socket.get_extra_info("socket"))
            return await self._dialled(socket, address)
        except _NotKept as fault:
            await goodbye(socket, fault.code, fault.why)
            raise
        finally:
            await goodbye(socket, GOING_AWAY, "")

    async def _dialled(self, socket: Socket, address: str) -> NodeId:
        node = self._identity.peer_of(_certificate(socket.get_extra_info("ssl_object")))
        if node == self._identity.node:
            raise _OwnAddress
        self._check_peer(node)
        if node in self._links or node in self._greeting:
            return node
        self._greeting.add(node)
        try:
            await socket.send_bytes(frames.encode(Frame(0, Kind.HELLO, frames.encode_body(self._hello()))))
            hello = await self._hear(socket, node)
            link = self._link(socket, hello, dialled=True, path=f"dialled {address}")
            try:
                events = self._adopt(link)
            except _NotKept as fault:
                if fault.code != DUPLICATE:
                    raise
                link.retire()  # the other side may count on it until our rival link has reached it
                events = ()
        finally:
            self._greeting.discard(node)
        await self._keep(link, events)
        return node

    # both --------------------------------------------------------------------------------------------------------
    def _hello(self) -> Hello:
        me = self._identity
        return Hello(PROTOCOL, PROTOCOL, me.node, me.cluster_id, me.name, self.addresses)

    def _check_peer(self, node: NodeId) -> None:
        if node in self._denied:
            raise _NotKept(REFUSED, f"{node} is denied by the cluster")
        if self._closing or len(self._running) >= LINKS_MAX:
            raise _NotKept(GOING_AWAY, "no more links here")

    async def _hear(self, socket: Socket, node: NodeId) -> Hello:
        """The peer's hello, checked against its certificate. Raises `_NotKept`."""
        try:
            async with asyncio.timeout(self._timing.hello_s):
                message = await socket.receive()
        except TimeoutError:
            raise _NotKept(REFUSED, "no hello came") from None
        if message.type is not WSMsgType.BINARY:
            raise _NotKept(REFUSED, closing_words(socket, message))
        frame = frames.decode(message.data)
        if isinstance(frame, Dropped) or frame.kind is not Kind.HELLO:
            raise _NotKept(REFUSED, "the first frame is not a hello")
        hello = frames.decode_hello(frame.body)
        if isinstance(hello, Dropped):
            raise _NotKept(REFUSED, hello.reason)
        if hello.node != node:
            raise _NotKept(REFUSED, f"it says it is {hello.node}, its certificate says {node}")
        if hello.cluster_id != self._identity.cluster_id:
            raise _NotKept(REFUSED, f"it is of cluster {hello.cluster_id}, not of {self._identity.cluster_id}")
        if hello.fault:
            raise _NotKept(REFUSED, hello.fault)
        return hello

    def _link(self, socket: Socket, hello: Hello, *, dialled: bool, path: str) -> Link:
        async def on_message(message: PeerMessage) -> None:
            await self._on_event(Received(hello.node, message))

        return Link(socket, hello, self._serve, on_message, self._timing, dialled=dialled, path=path)

    def _adopt(self, link: Link) -> tuple[Event, ...]:
        """Make `link` the one to its peer; the events this is. Raises `_NotKept` where the other one stays."""
        node = link.peer.node
        self._check_peer(node)  # the deny-list may have changed meanwhile
        if node == self._identity.node:
            raise _NotKept(REFUSED, "that is this node itself, or a copy of it")
        rival = self._links.get(node)
        if rival is None:
            events: tuple[Event, ...] = (LinkUp(node),)
        elif rival.dialled == link.dialled:
            rival.end(DUPLICATE, "its node dialled anew")
            events = (LinkDown(node), LinkUp(node))
        elif link.dialled == (self._identity.node < node):
            rival.retire()
            events = ()
        else:
            raise _NotKept(DUPLICATE, "another link is kept")
        self._links[node] = link
        return events

    async def _keep(self, link: Link, events: tuple[Event, ...]) -> None:
        """Live and bury `link`."""
        node = link.peer.node
        self._running[link] = None
        try:
            await self._post(*events)
            why = await link.run()
            log.info("link with %s (%s) ended: %s", link.peer.name, link.path, why)
        finally:
            del self._running[link]
            kept = self._links.get(node) is link
            if kept:
                del self._links[node]
            link.ended.set()
            if kept:
                await self._post(LinkDown(node))
            link.end(GOING_AWAY, "this node stops")
            await link.close()

    async def _post(self, *events: Event) -> None:
        """In the order of the calls, which is the order in which `_links` changed."""
        if self._closing:
            return  # an inbox that nobody empties any more must not hold up `close`
        async with self._order:
            for event in events:
                if not self._closing:
                    await self._on_event(event)


def _certificate(tls: Any) -> bytes | None:
    return tls.getpeercert(binary_form=True) if isinstance(tls, ssl.SSLObject) else None


def _keep_little_unsent(socket: Any) -> None:
    if socket is not None and hasattr(sockets, "TCP_NOTSENT_LOWAT"):
        socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
