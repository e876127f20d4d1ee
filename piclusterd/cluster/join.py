"""Joining: the two routes of the admitting node, the joiner's side, and who the first voters are.

    joiner                                   node that holds the CA's key
      ── GET /ca, TLS unverified ──────────▶   the CA certificate
      SHA-256 of it == pin in the token?  no: stop, the secret has not left
      ── POST /join, TLS verified by that CA ▶ check name and key, redeem the token, issue, admit
      ◀── certificate, cluster, peers, voters
      write identity/ with joined.json, cluster.json last

Every step of admitting is durable before the answer, and all are repeatable by the same key: an answer that was lost
costs a retry, not a token. `Founding` fixes the first set of voters exactly once: its only state is an append-only list
that never grows past `expect`, and the voters are a function of it, so no crash can seal two different sets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from ssl import CERT_NONE, PROTOCOL_TLS_CLIENT, SSLContext
from typing import Annotated, Literal, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Meta

from ..board.private import write_private
from ..errors import Broken, NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from ..ids import NodeId, node_id
from ..wire import Voters
from .certificates import checked_name, key_of_request, pin, trust
from .frames import is_address
from .identity import CA, EXPECT_MAX, NEXT_CA, Identity, Told, new_key, settle
from .tokens import TOKEN_CHARS_MAX, Token, Tokens, parse

log = logging.getLogger(__name__)

Role = Literal["worker", "relay"]

CA_BYTES_MAX = 16 * 1024
JOIN_BYTES_MAX = 16 * 1024
REPLY_BYTES_MAX = 256 * 1024
PEERS_MAX = 64
"""Addresses told to a joiner: it needs one that answers, and learns the rest from gossip."""
ATTEMPT_TIMEOUT_S = 15.0
"""One request: a Pi with a busy SD card may take seconds to make the join durable."""


ANOTHER_KEY = "Join with an empty state directory: it gets a new key."


class _Ask(msgspec.Struct, frozen=True):
    token: Annotated[str, Meta(max_length=TOKEN_CHARS_MAX)]
    request: Annotated[str, Meta(max_length=4096)]
    name: Annotated[str, Meta(max_length=63)]
    role: Role


class _Reply(msgspec.Struct, frozen=True):
    cluster: Annotated[str, Meta(max_length=63)]
    certificate: Annotated[str, Meta(max_length=8192)]
    peers: Annotated[tuple[Annotated[str, Meta(max_length=262)], ...], Meta(max_length=PEERS_MAX)]
    voters: Voters | None
    id: Annotated[str, Meta(max_length=16)] = ""
    """Of the cluster, where it is not that of the CA any more."""


class _Fault(msgspec.Struct, frozen=True):
    what: str
    why: str = ""
    fix: str = ""


class _Founded(msgspec.Struct, frozen=True):
    expect: Annotated[int, Meta(ge=1, le=EXPECT_MAX)]
    admitted: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """What a join gave. `voters` is None while the founding set is not complete."""

    identity: Identity
    peers: tuple[str, ...]
    voters: Voters | None


class Founding:
    """The first voters of the cluster, kept by the node where `init` ran. Blocking; one caller at a time."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the identity directory. Raises `Broken`: to guess could seal a second, different set."""
        self._path = directory / "founding.json"
        try:
            self._state = msgspec.json.decode(self._path.read_bytes(), type=_Founded)
        except (OSError, msgspec.DecodeError) as fault:
            raise Broken("cannot read the founding record", f"{self._path}: {fault}.", "Restore the file.") from fault

    @property
    def expect(self) -> int:
        return self._state.expect

    @property
    def admitted(self) -> tuple[NodeId, ...]:
        return self._state.admitted

    @property
    def voters(self) -> Voters | None:
        """The sealed record; None until `expect` workers are in."""
        if len(self._state.admitted) < self._state.expect:
            return None
        return Voters(version=1, term=0, voters=tuple(sorted(self._state.admitted)))

    def admit(self, node: NodeId, role: Role) -> Voters | None:
        """Count `node` in. The voters, durable, if this call completed the set; else None."""
        if role != "worker" or self.voters is not None or node in self._state.admitted:
            return None
        grown = _Founded(self._state.expect, (*self._state.admitted, node))
        write_private(self._path, msgspec.json.encode(grown))
        self._state = grown
        return self.voters


class JoinDesk:
    """`GET /ca` and `POST /join` for the peer listener of a node that holds the CA's key."""

    def __init__(
        self,
        identity: Identity,
        tokens: Tokens,
        founding: Founding,
        peers: Callable[[], Iterable[str]],
        on_sealed: Callable[[Voters], Awaitable[None]],
        denied: Callable[[], Container[NodeId]],
    ) -> None:
        """`peers` gives `host:port` of peer listeners, our own first; `denied`: who was removed."""
        assert identity.can_issue
        self._identity, self._tokens, self._founding = identity, tokens, founding
        self._peers, self._on_sealed, self._denied = peers, on_sealed, denied
        self._one_at_a_time = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/ca", self._give_ca), web.post("/join", self._join)]

    async def _give_ca(self, _: web.Request) -> web.Response:
        return web.Response(body=(self._identity.directory / CA).read_bytes(), content_type="application/x-pem-file")

    async def _join(self, request: web.Request) -> web.Response:
        try:
            ask = msgspec.json.decode(await _read_up_to(request.content, JOIN_BYTES_MAX), type=_Ask)
            # shielded: a handler cut short must not leave `on_sealed` uncalled for a set that is on disk
            reply = await asyncio.shield(asyncio.ensure_future(self._admit(ask, request.remote or "")))
        except msgspec.DecodeError as fault:
            return _refusal(UserError("not a join request", str(fault)))
        except PiclusterError as fault:
            log.info("refused a join from %s: %s", request.remote, fault)
            return _refusal(fault)
        return web.Response(body=msgspec.json.encode(reply), content_type="application/json")

    async def _admit(self, ask: _Ask, source: str) -> _Reply:
        async with self._one_at_a_time:
            certificate, sealed = await asyncio.to_thread(self._admit_durably, ask, source)
            if sealed is not None:
                await self._on_sealed(sealed)
        peers = tuple(dict.fromkeys(self._peers()))[:PEERS_MAX]
        return _Reply(
            self._identity.cluster, certificate.decode(), peers, self._founding.voters, self._identity.cluster_id
        )

    def _admit_durably(self, ask: _Ask, source: str) -> tuple[bytes, Voters | None]:
        name = checked_name(ask.name)
        node = node_id(key_of_request(ask.request.encode()).public_bytes_raw())
        token = parse(ask.token)
        if node in self._denied():
            raise Refused(f"{name} ({node}) was removed from this cluster", "its key is refused for good.", ANOTHER_KEY)
        if (self._identity.directory / NEXT_CA).exists():
            raise Refused("nobody is admitted now", "the cluster's CA is being changed.", "See picluster ca rotate.")
        self._tokens.redeem(token, node, source, ask.role)
        certificate = self._identity.issue(ask.request.encode(), name)
        log.info("admitted %s (%s) as %s", name, node, ask.role)
        return certificate, self._founding.admit(node, ask.role)


async def join(
    token: str, server: str, state_dir: Path, node_name: str, role: Role = "worker", *, check_time: bool = True
) -> Joined:
    """Make this node a member through the admitting node at `server` (`host:port`).

    Raises `UserError` (malformed), `Refused` (wrong CA, token not accepted) or `Unavailable` (not reached); nothing
    but an unused key is left behind then.
    """
    parsed, name = parse(token), checked_name(node_name)
    if not is_address(server):
        raise UserError(f"{server[:80]!r} is not an address", "", "Write host:port.")
    key = await asyncio.to_thread(new_key, state_dir)
    ca_pem = await _fetch_ca(server, parsed)
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the pinned CA signs nothing but members
    trust(context, ca_pem, check_time=check_time)
    ask = _Ask(token, key.request().decode(), name, role)
    body = await _exchange(context, "POST", server, "/join", msgspec.json.encode(ask), REPLY_BYTES_MAX)
    reply = _decoded(body, _Reply, server)
    certificate, told = reply.certificate.encode(), Told(reply.peers, reply.voters)
    identity = await asyncio.to_thread(settle, state_dir, key, reply.cluster, name, ca_pem, certificate, told, reply.id)
    return Joined(identity, reply.peers, reply.voters)


async def _fetch_ca(server: str, token: Token) -> bytes:
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = CERT_NONE
    ca_pem = await _exchange(context, "GET", server, "/ca", b"", CA_BYTES_MAX)
    try:
        matches = pin(ca_pem) == token.ca_pin
    except ValueError:
        matches = False
    if not matches:
        raise Refused(
            f"{server} is not of the cluster this token is for",
            "its CA is not the one the token names; the token's secret was not sent.",
            "Check the address. If it is right, somebody may be between you and it.",
        )
    return ca_pem


async def _exchange(context: SSLContext, method: str, server: str, path: str, body: bytes, bytes_max: int) -> bytes:
    """One request on a connection of its own. Raises `Unavailable`, or what the other side refused with."""
    connector = aiohttp.TCPConnector(ssl=context, force_close=True)
    limit = aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=limit, trust_env=False) as session,
            session.request(method, f"https://{server}{path}", data=body, allow_redirects=False) as response,
        ):
            answer = await _read_up_to(response.content, bytes_max)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as fault:
        raise Unavailable(f"cannot reach {server}", f"{type(fault).__name__}: {fault}") from fault
    if response.status != 200:
        raise _fault_of(response.status, answer, server)
    return answer


def _fault_of(status: int, answer: bytes, server: str) -> PiclusterError:
    if status == 404:
        return NotFound(f"{server} does not admit members", "", "Use the address of the node where `init` ran.")
    fault = _decoded(answer, _Fault, server)
    kinds: dict[int, type[PiclusterError]] = {400: UserError, 403: Refused, 429: Overloaded}
    return kinds.get(status, Unavailable)(fault.what, fault.why, fault.fix)


_T = TypeVar("_T")


def _decoded(answer: bytes, shape: type[_T], server: str) -> _T:
    try:
        return msgspec.json.decode(answer, type=shape)
    except msgspec.DecodeError as fault:
        raise Unavailable(f"{server} gave no sensible answer", str(fault)) from None


async def _read_up_to(content: aiohttp.StreamReader, bytes_max: int) -> bytes:
    parts, size = [], 0
    async for part in content.iter_any():
        size += len(part)
        if size > bytes_max:
            raise UserError("too long", f"over {bytes_max} bytes.")
        parts.append(part)
    return b"".join(parts)


def _refusal(fault: PiclusterError) -> web.Response:
    body = msgspec.json.encode(_Fault(fault.what, fault.why, fault.fix))
    return web.Response(body=body, status=fault.status, content_type="application/json")
