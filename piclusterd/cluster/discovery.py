"""Who else is on this LAN: mDNS advertising and browsing of `_piclusterd._tcp`, as a hint and nothing more.

    Discovery ── advertise <node id>._piclusterd._tcp.local. TXT c=cluster n=name p=protocol j=1|0
              ── browse ──▶ on_seen(Sighting)        whoever dials it still asks for a certificate

Never proof of membership, of liveness or of death: anybody on the LAN may say anything, and a crashed Pi stays in
caches for 75 minutes (PTR TTL 4500 s). So removals are ignored, sightings repeat, and addresses are only tried.

Measured with zeroconf 0.154 and turned into rules: a browser that was cut off while a node arrived never asks again,
so a fresh one replaces it every 30 s; a network card replugged under the same address stays deaf, so interfaces are
compared by index and address and the whole instance is rebuilt when they change; link-local and container addresses
lead to ourselves (OctoPrint#4359, esphome/device-builder#788), so they are neither used nor believed. Probing is
skipped (`cooperating_responders`): a name that is a hash of a key cannot collide, and probes loop with several
responders (#1837); two boards with a copied card are both shown, and `links` refuses one. IPv4 only: an address of
`fe80::/10` means nothing without the interface of whoever dials it. `peers.seeds` reaches all else, IPv6 in brackets.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import ifaddr
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ..ids import NodeId, is_node_id
from ..wire import PROTOCOL

log = logging.getLogger(__name__)

SERVICE = "_piclusterd._tcp.local."
BROWSE_S = 30.0
INTERFACES_S = 10.0
"""How often the interfaces are compared."""
RESOLVE_MS = 3000
RESOLVING_MAX = 64
"""Sightings being resolved at once; a LAN host that floods us with names only loses its own."""
ADDRESSES_MAX = 4
_NOT_LAN = ("docker", "br-", "veth", "virbr", "cni")


@dataclass(frozen=True, slots=True)
class Sighting:
    """Somebody says that a node is there. `addresses` are `host:port`; `admits`: it takes joins."""

    node: NodeId
    cluster_id: str
    name: str
    addresses: tuple[str, ...]
    admits: bool


@dataclass(frozen=True, slots=True)
class Advert:
    """What this node says of itself. `port` is the peer listener's; `addresses`: empty for every LAN address."""

    node: NodeId
    cluster_id: str
    name: str
    port: int
    admits: bool
    addresses: tuple[str, ...] = ()


class Discovery:
    """Advertises and browses from `start` to `close`, whatever the network does meanwhile."""

    def __init__(self, advert: Advert, on_seen: Callable[[Sighting], None], interfaces: tuple[str, ...] = ()) -> None:
        """`interfaces`: addresses to use; empty for all but containers' and bridges'."""
        self._advert, self._on_seen, self._interfaces = advert, on_seen, interfaces
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Returns at once: the network may come later, and its faults are only logged."""
        self._task = asyncio.create_task(self._live())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self) -> None:
        while True:
            try:
                await self._until_interfaces_change()
            except Exception as fault:  # OSError, zeroconf's own, EventLoopBlocked on a busy board
                log.info("no mDNS for now (%s: %s); seeds and known peers still work", type(fault).__name__, fault)
                await asyncio.sleep(INTERFACES_S)

    async def _until_interfaces_change(self) -> None:
        found = await _usable(self._interfaces)
        if not found:
            await asyncio.sleep(INTERFACES_S)
            return
        async with _Responder([address for _, address in found]) as responder:
            await responder.browse(self._seen)
            await responder.advertise(self._advert, [address for _, address in found])
            until_fresh = BROWSE_S
            while await _usable(self._interfaces) == found:
                if until_fresh <= 0:
                    await responder.browse(self._seen)
                    until_fresh = BROWSE_S
                await asyncio.sleep(INTERFACES_S)
                until_fresh -= INTERFACES_S
        log.info("network interfaces changed: mDNS starts anew")

    def _seen(self, sighting: Sighting) -> None:
        if sighting.node != self._advert.node:
            self._on_seen(sighting)


async def find(
    timeout: float,
    cluster_id: str | None = None,
    interfaces: tuple[str, ...] = (),
    enough: Callable[[Sighting], bool] = lambda _: False,
) -> tuple[Sighting, ...]:
    """Look round for `timeout` seconds, or until a sighting is `enough`. Only those of `cluster_id`, if given."""
    seen: dict[NodeId, Sighting] = {}
    done = asyncio.Event()

    def take(sighting: Sighting) -> None:
        if cluster_id is None or sighting.cluster_id == cluster_id:
            seen[sighting.node] = sighting
            if enough(sighting):
                done.set()

    found = await _usable(interfaces)
    if not found:
        return ()
    try:
        async with _Responder([address for _, address in found]) as responder:
            await responder.browse(take)
            try:
                async with asyncio.timeout(timeout):
                    await done.wait()
            except TimeoutError:
                pass  # that is how looking round ends
    except OSError as fault:
        log.info("no mDNS here: %s", fault)
    return tuple(seen.values())


def lan_addresses(interfaces: tuple[str, ...] = ()) -> tuple[str, ...]:
    """IPv4 addresses at which the LAN can reach this node, or those of `interfaces` that exist. Blocks for a moment."""
    return tuple(address for _, address in _usable_now(interfaces))


class _Responder:
    """One AsyncZeroconf on fixed interfaces, with at most one advert and one browser."""

    def __init__(self, interfaces: list[str]) -> None:
        self._loopback = any(ipaddress.ip_address(text).is_loopback for text in interfaces)
        self._zeroconf = AsyncZeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
        self._browser: AsyncServiceBrowser | None = None
        self._resolving: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> _Responder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._resolving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._browser is not None:
            await self._browser.async_cancel()
        await self._zeroconf.async_close()

    async def advertise(self, advert: Advert, addresses: list[str]) -> None:
        told = [text for text in advert.addresses if _is_ipv4(text)] or addresses
        info = AsyncServiceInfo(
            SERVICE,
            f"{advert.node}.{SERVICE}",
            port=advert.port,
            parsed_addresses=told,
            server=f"{advert.node}.local.",
            properties={
                "c": advert.cluster_id,
                "n": advert.name,
                "p": str(PROTOCOL),
                "j": "1" if advert.admits else "0",
            },
        )
        await (await self._zeroconf.async_register_service(info, cooperating_responders=True))

    async def browse(self, on_seen: Callable[[Sighting], None]) -> None:
        """Start a fresh browser; it asks the network again and repeats what is cached."""
        if self._browser is not None:
            await self._browser.async_cancel()

        def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is ServiceStateChange.Removed or name in self._resolving:
                return
            if len(self._resolving) >= RESOLVING_MAX:
                return
            task = asyncio.ensure_future(self._resolve(name, on_seen))
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))

        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[on_change])

    async def _resolve(self, name: str, on_seen: Callable[[Sighting], None]) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            if await info.async_request(self._zeroconf.zeroconf, RESOLVE_MS):
                sighting = sighting_of(info, loopback=self._loopback)
                if sighting is not None:
                    on_seen(sighting)
        except Exception as fault:  # garbage from the LAN
            log.debug("cannot read %.80s: %s", name, fault)


def sighting_of(info: AsyncServiceInfo, *, loopback: bool = False) -> Sighting | None:
    """What `info` says, if it is one of ours and names an address worth trying. `loopback` believes 127.0.0.0/8."""
    node = info.name.removesuffix("." + SERVICE)
    texts = {key: value or "" for key, value in info.decoded_properties.items()}
    if not is_node_id(node) or not info.port:
        return None
    hosts = [text for text in info.parsed_addresses(IPVersion.V4Only) if _worth_dialling(text, loopback)]
    if not hosts:
        return None
    addresses = tuple(f"{host}:{info.port}" for host in hosts[:ADDRESSES_MAX])
    cluster, name = texts.get("c", "")[:64], texts.get("n", "")[:63]
    cluster = cluster if cluster.isalnum() else ""
    return Sighting(NodeId(node), cluster, name if name.isprintable() else "", addresses, texts.get("j") == "1")


def _worth_dialling(text: str, loopback: bool) -> bool:
    address = ipaddress.ip_address(text)
    if address.is_loopback:
        return loopback
    return not (address.is_link_local or address.is_multicast or address.is_unspecified)


def _is_ipv4(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 4
    except ValueError:
        return False


async def _usable(wanted: tuple[str, ...]) -> list[tuple[int, str]]:
    """(interface index, IPv4 address) of what we may use, sorted: the index tells a replugged card from the old one."""
    return await asyncio.to_thread(_usable_now, wanted)


def _usable_now(wanted: tuple[str, ...]) -> list[tuple[int, str]]:
    found = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            if not isinstance(ip.ip, str):
                continue  # IPv6 comes as a tuple
            lan = not adapter.name.startswith(_NOT_LAN) and _worth_dialling(ip.ip, loopback=False)
            if ip.ip in wanted if wanted else lan:
                found.append((adapter.index or 0, ip.ip))
    return sorted(found)
