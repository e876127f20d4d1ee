"""The links of a node: its peer listener, its diallers, and one mutually authenticated link per pair of nodes.

    dialler                                         listener (TLS 1.3; also /ca and /join)
      ── TLS, both certificates ──────────────────▶
         server's id: ourselves? linked? denied? → close
      ── GET /link, WebSocket ────────────────────▶   certificate of a member? not denied? else 403
      ── hello (protocols, id, cluster, …) ───────▶   id = certificate's, cluster ours, a protocol in common? (greeting)
      ◀── hello ───────────────────────────────────   link is up here
         link is up here

A dialler says hello only if it has no link to that node, so a second link comes about only when both dial at once; then
the one dialled by the lower node id is kept, on both sides. The other is retired: it delivers what is on its way for
`retire_s` and closes, so neither side sees the peer go down. A hello from a node that dialled before means that it has
lost that link (it restarted): the old one is dropped, `LinkDown` then `LinkUp`.
Members that cannot be reached are linked through a neighbour (`relay`), which nobody above notices; dialling goes on,
and a direct link takes the place of a relayed one, never the other way round.
A cluster is a full mesh: N - 1 links a node, half a megabyte each, and a dialler for each address that members tell. So
it is bounded by `DIALLERS_MAX` (256 addresses: 128 members with two each), and then by `LINKS_MAX`.
Certificates say who a peer is; addresses and hellos only help to find it. Events of one peer are posted in order.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping

import aiohttp
from aiohttp import web

from ..errors import Refused, Unavailable, UserError
from ..events import Event, KeyShared, LinkDown, LinkUp, Received
from ..ids import NodeId
from ..wire import PROTOCOLS, PeerMessage
from .certificates import NO_CHECK_TIME
from .dialler import Dialler, OwnAddress
from .door import Door, certificate_of, keep_little_unsent
from .frames import FRAME_BYTES_MAX, RELAY, RELAYED, REQUEST_BYTES_MAX, REQUEST_NAME_CHARS_MAX, Hello
from .greeting import Greeting, NotKept, refuse_twin
from .identity import Identity
from .link import CLOSE_S, DUPLICATE, GOING_AWAY, REFUSED, REMOVED, TWIN, Link, LinkInfo, Socket, Timing, goodbye
from .relay import Relay
from .streams import Serve
from .tunnel import Circuit, Tunnel

log = logging.getLogger(__name__)

LINKS_MAX = 1024
TWINS_MAX = 16
"""Pairs of machines with one key of which the owner was told."""
CONNECT_S = 5.0
HANDSHAKES_MAX = 16
"""Of our own making, half-open at once: a router that lost power, or a hint flood, is not met with a burst."""
SHUTDOWN_S = 2.0
KEEPALIVE_S = 10.0
"""For what is not a link: a stranger's idle connection does not stay."""


def _relayed_by(relay: Link) -> str:
    return f"relayed by {relay.peer.name}"


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
        protocols: tuple[int, int] = PROTOCOLS,
    ) -> None:
        """`addresses`: where peers may dial us (`host:port`), told in the hello. `protocols`: see `greeting`."""
        self.identity, self._on_event, self._serve = identity, on_event, serve
        self._timing = timing or Timing()
        self._greeting = Greeting(identity, self._timing.hello_s, protocols)
        self._greeting.addresses = addresses
        self._server_tls = identity.server_context(check_time=check_time)
        self._client_tls = identity.client_context(check_time=check_time)
        self._links: dict[NodeId, Link] = {}
        self._running: dict[Link, None] = {}  # the retired ones too
        self._asked: set[NodeId] = set()  # our hello is out and not answered
        self.denied: frozenset[NodeId] = frozenset()
        self._twins: deque[str] = deque(maxlen=TWINS_MAX)
        self._dialler = Dialler(self._dial_once, self._links, rng, self._timing)
        self._relay = Relay(identity.node, self._links, self._dial_relayed, self._accept_relayed, rng, self._timing)
        self._handshakes = asyncio.Semaphore(HANDSHAKES_MAX)
        self._order = asyncio.Lock()
        self._closing = False
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._door: Door | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._greeting.addresses

    @addresses.setter
    def addresses(self, addresses: tuple[str, ...]) -> None:
        self._greeting.addresses = addresses

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
        assert self._runner.server is not None, "set up above"
        self._door = Door(self._runner.server, self._server_tls)
        await self._door.open(host, port)
        return self._door.port

    def dial(self, address: str, *, hint: bool = False) -> bool:
        """Keep a link to whoever answers at `address` (`host:port`). Idempotent. False: not worth dialling.

        A `hint` (mDNS, gossip) is given up after a while of failures; the next sighting tries it anew.
        """
        return not self._closing and self._dialler.dial(address, hint=hint)

    def undial(self, address: str) -> None:
        """Stop dialling `address`; a link that came of it ends."""
        self._dialler.undial(address)

    @property
    def relaying(self) -> tuple[int, int]:
        """Links of others that this node relays just now, and the bytes it has relayed so far."""
        return (self._relay.pipes + 1) // 2, self._relay.bytes

    def reach(self, members: Iterable[NodeId]) -> None:
        """Have a link with all of these: whoever cannot be dialled is sought through neighbours. Call it often."""
        if not self._closing:
            self._relay.want(node for node in members if node not in self.denied)

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
        return {node: link.info for node, link in self._links.items()}

    def deny(self, nodes: Iterable[NodeId]) -> None:
        """Replace the deny-list: these get no link, and the ones they have end now."""
        self.denied = frozenset(nodes)
        for link in self._running:
            if link.peer.node in self.denied:
                link.end(REFUSED, REMOVED)

    def renew(self, identity: Identity) -> None:
        """Present a renewed certificate, and trust the CAs it says, from now on: open links are looked at again."""
        self.identity = identity
        for context in (self._server_tls, self._client_tls):
            identity.load_into(context)
        self._recheck(None)

    def check_dates(self, wall: float) -> None:
        """The clock (Unix seconds) can be trusted from now on: certificates have dates, those of open links too."""
        for context in (self._server_tls, self._client_tls):
            context.verify_flags &= ~NO_CHECK_TIME
        self._recheck(wall)

    def _recheck(self, wall: float | None) -> None:
        """End the links that would not come about now."""
        for link in self._running:
            try:
                self.identity.peer_of(certificate_of(link.socket), wall)
            except Refused as fault:
                link.end(REFUSED, str(fault))

    async def close(self) -> None:
        """End everything politely; posts no events. Idempotent."""
        self._closing = True
        for link in self._running:
            link.end(GOING_AWAY, "this node stops")
        await self._relay.close()
        await self._dialler.close()
        if self._door is not None:
            await self._door.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    # accepting ---------------------------------------------------------------------------------------------------
    async def _accept(self, request: web.Request) -> web.StreamResponse:
        try:
            node = self.identity.peer_of(certificate_of(request))
            self._check_peer(node)
        except (Refused, NotKept) as fault:
            log.info("refused a link from %s: %s", request.remote, fault)
            return web.Response(status=403, text=str(fault))
        socket = web.WebSocketResponse(
            heartbeat=None, compress=False, max_msg_size=FRAME_BYTES_MAX, timeout=CLOSE_S, autoping=True
        )
        await socket.prepare(request)
        keep_little_unsent(request.get_extra_info("socket"))
        await self._accepted(socket, node, f"accepted from {request.remote}")
        return socket

    async def _accept_relayed(self, node: NodeId, circuit: Circuit, relay: Link) -> None:
        tunnel = Tunnel(circuit, self._server_tls, server=True)
        try:
            await self._shake(tunnel, node)
            await self._accepted(tunnel, node, _relayed_by(relay), relay.peer.node)
        finally:
            await goodbye(tunnel, GOING_AWAY, "")

    async def _accepted(self, socket: Socket, node: NodeId, path: str, relay: NodeId | None = None) -> None:
        try:
            hello = await self._greeting.hear(socket, node)
            await refuse_twin(hello, self._links.get(node), path)
            link = self._link(socket, hello, dialled=False, path=path, relay=relay)
            events = self._adopt(link)
        except NotKept as fault:
            log.log(fault.level, "no link with %s: %s", node, fault.why)
            await goodbye(socket, fault.code, fault.why)
            await self._tell_of_twin(fault)
            return
        link.greet(self._greeting.hello())
        await self._keep(link, events)

    # dialling ----------------------------------------------------------------------------------------------------
    async def _dial_once(self, address: str) -> NodeId:
        """One attempt, and the life of the link if it gives one. The node that answers at `address`."""
        assert self._session is not None
        async with self._handshakes, asyncio.timeout(CONNECT_S):
            socket = await self._session.ws_connect(
                f"https://{address}/link",
                heartbeat=None,
                compress=0,
                max_msg_size=FRAME_BYTES_MAX,
                timeout=aiohttp.ClientWSTimeout(ws_receive=None, ws_close=CLOSE_S),
            )
        keep_little_unsent(socket.get_extra_info("socket"))
        return await self._dialled(socket, f"dialled {address}")

    async def _dial_relayed(self, node: NodeId, circuit: Circuit, relay: Link) -> None:
        tunnel = Tunnel(circuit, self._client_tls, server=False)
        try:
            async with self._handshakes:
                await self._shake(tunnel, node)
            await self._dialled(tunnel, _relayed_by(relay), relay.peer.node)
        except NotKept as fault:
            raise Unavailable(fault.why) from fault
        finally:
            await goodbye(tunnel, GOING_AWAY, "")

    async def _dialled(self, socket: Socket, path: str, relay: NodeId | None = None) -> NodeId:
        """The life of a link if `socket` gives one; the node at its other end."""
        try:
            return await self._dialled_open(socket, path, relay)
        except NotKept as fault:
            await goodbye(socket, fault.code, fault.why)
            await self._tell_of_twin(fault)
            raise
        finally:
            await goodbye(socket, GOING_AWAY, "")

    async def _dialled_open(self, socket: Socket, path: str, relay: NodeId | None) -> NodeId:
        node = self.identity.peer_of(certificate_of(socket))
        if node == self.identity.node:
            raise OwnAddress
        self._check_peer(node)
        linked = self._links.get(node)
        if node in self._asked or (linked and (linked.relay is None or relay is not None)):
            return node
        self._asked.add(node)
        try:
            await socket.send_bytes(self._greeting.frame())
            hello = await self._greeting.hear(socket, node)
            await refuse_twin(hello, self._links.get(node), path)
            link = self._link(socket, hello, dialled=True, path=path, relay=relay)
            try:
                events = self._adopt(link)
            except NotKept as fault:
                if fault.code != DUPLICATE:
                    raise
                link.retire()  # the other side may count on it until our rival link has reached it
                events = ()
        finally:
            self._asked.discard(node)
        await self._keep(link, events)
        return node

    # both --------------------------------------------------------------------------------------------------------
    def _check_peer(self, node: NodeId) -> None:
        if node in self.denied:
            raise NotKept(REFUSED, f"{node}: {REMOVED}")
        if self._closing or len(self._running) >= LINKS_MAX:
            raise NotKept(GOING_AWAY, "no more links here")

    async def _shake(self, tunnel: Tunnel, node: NodeId) -> None:
        """TLS inside a relayed circuit, with `node` and nobody else. Raises `Refused`, `ssl.SSLError`, `OSError`."""
        async with asyncio.timeout(self._timing.hello_s):
            await tunnel.handshake()
        found = self.identity.peer_of(certificate_of(tunnel))
        if found != node:
            raise Refused(f"{found} is at the far side of the relay", f"{node} was asked for.")
        self._check_peer(node)

    def _link(self, socket: Socket, hello: Hello, *, dialled: bool, path: str, relay: NodeId | None) -> Link:
        async def on_message(message: PeerMessage) -> None:
            await self._on_event(Received(hello.node, message))

        def serve(peer: NodeId, name: str, body: bytes) -> AsyncIterator[bytes]:
            if name in (RELAY, RELAYED):
                return self._relay.serve(link, name, body)
            return self._serve(peer, name, body)

        link = Link(socket, hello, serve, on_message, self._timing, dialled=dialled, path=path, relay=relay)
        return link

    def _adopt(self, link: Link) -> tuple[Event, ...]:
        """Make `link` the one to its peer; the events this is. Raises `NotKept` where the other one stays."""
        node = link.peer.node
        self._check_peer(node)  # the deny-list may have changed meanwhile
        if node == self.identity.node:
            raise NotKept(REFUSED, "that is this node itself, or a copy of it")
        rival = self._links.get(node)
        if rival is None:
            events: tuple[Event, ...] = (LinkUp(node),)
        elif (rival.relay is None) != (link.relay is None):
            if rival.relay is None:
                raise NotKept(DUPLICATE, "a direct link is kept")
            rival.retire()
            events = ()
        elif rival.dialled == link.dialled:
            rival.end(DUPLICATE, "its node dialled anew")
            events = (LinkDown(node), LinkUp(node))
        elif link.dialled == (self.identity.node < node):
            rival.retire()
            events = ()
        else:
            raise NotKept(DUPLICATE, "another link is kept")
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

    async def _tell_of_twin(self, fault: NotKept) -> None:
        """Once for each pair of machines, though the second tries again and again."""
        if fault.code == TWIN and fault.why not in self._twins:
            self._twins.append(fault.why)
            await self._post(KeyShared(fault.why))

    async def _post(self, *events: Event) -> None:
        """In the order of the calls, which is the order in which `_links` changed."""
        if self._closing:
            return  # an inbox that nobody empties any more must not hold up `close`
        async with self._order:
            for event in events:
                if not self._closing:
                    await self._on_event(event)
