"""The owner's doors: only on the unix socket, whose file mode says who may come in.

    picluster ──/run/piclusterd/api.sock──▶ GET    /admin/view          the node's View, with health and edge
                                            POST   /admin/tokens        {ttl_s, uses, role} → 201 {token, id, server, …}
                                            GET    /admin/tokens        what is outstanding, never a secret
                                            DELETE /admin/tokens/{id}   204, or 404
                                            GET    /admin/jobs/{run}    what the ledger says of a run
                                            POST   /admin/jobs          {what, run} → the run as it is then
                                            GET    /admin/upgrade       what runs, and what the source has
                                            POST   /admin/upgrade       {action, version} → the run that does it
                                            POST   /admin/models        see `web.models`
    anybody   ──TCP──────────────────────▶  /admin/*: 403
                                            GET    /status.json         the same as /admin/view: reading is free

Owns no state: each door calls what the daemon injected. A token's secret leaves once, in the answer that made it.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from ..errors import NotFound, Refused, UserError
from ..events import LeaderChanged
from ..ids import NodeId
from ..views import RunView
from ..wire import Voters
from ..workflows.deploy import OwnersWish
from .health import finite

T = TypeVar("T")

TTL_S_MIN, TTL_S_MAX = 60, 30 * 86400
"""A join token lives from a minute to the length of a node's certificate."""
USES_MAX = 64
"""More nodes than one token should ever let in."""


class TokenWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/tokens`."""

    ttl_s: Annotated[int, msgspec.Meta(ge=TTL_S_MIN, le=TTL_S_MAX)] = 3600
    uses: Annotated[int, msgspec.Meta(ge=1, le=USES_MAX)] = 1
    role: Literal["worker", "relay", ""] = ""
    """The only kind of node it admits; "": either."""


class VoterWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/voters`. `node` is an id of 16 hex digits."""

    what: Literal["add", "remove"]
    node: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class RemoveWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/removals`. `node` is an id of 16 hex digits."""

    node: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]


class RotateWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/ca`. `finish`: without the members that are waited for."""

    finish: bool = False


class MoveWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/coordinator`. `node` is an id of 16 hex digits; without one the fittest voter is chosen."""

    node: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] | None = None


class JobWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/jobs`: what is to become of a run."""

    what: Literal["retry", "cancel", "approve", "reject"]
    run: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class ModelWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/models`: what is to be done with the models of a node.

    `name`: of a model, a reference to the hub (pull) or an absolute path (import); `to`: the name it gets; `node`: a
    name or id, "" for this one.
    """

    what: Literal[
        "list",
        "show",
        "loaded",
        "propose",
        "pull",
        "import",
        "remove",
        "pin",
        "unpin",
        "alias",
        "load",
        "unload",
        "plan",
        "split",
    ]
    name: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    to: Annotated[str, msgspec.Meta(max_length=128)] = ""
    node: Annotated[str, msgspec.Meta(max_length=64)] = ""
    aliases: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=128)], ...], msgspec.Meta(max_length=16)] = ()
    hard_link: bool = False


@dataclass(frozen=True, slots=True)
class JobLine:
    """One entry about a run: when (milliseconds of the hybrid clock), by which coordinator, and what it says."""

    at_ms: int
    node: str
    term: int
    kind: str
    step: str
    text: str


@dataclass(frozen=True, slots=True)
class JobShown:
    """`view` is None for a run that is not among the newest."""

    run: str
    view: RunView | None
    lines: tuple[JobLine, ...]


@dataclass(frozen=True, slots=True)
class TokenMade:
    """The one time the secret is shown. `server` is the `host:port` to join at."""

    token: str
    id: str
    server: str
    expires_s: int


@dataclass(frozen=True, slots=True)
class TokenLine:
    """An outstanding token, without its secret. `expires_s` from now; `uses` left."""

    id: str
    expires_s: int
    uses: int
    role: str = ""


@dataclass(frozen=True, slots=True)
class AdminDoors:
    """What the daemon lets its owner do."""

    create_token: Callable[[TokenWish], Awaitable[TokenMade]]
    list_tokens: Callable[[], Awaitable[Sequence[TokenLine]]]
    revoke_token: Callable[[str], Awaitable[bool]]
    """False where there is no such token."""
    change_voters: Callable[[VoterWish], Awaitable[Voters]]
    """The new voters, stored by a majority of them."""
    move_leadership: Callable[[MoveWish], Awaitable[LeaderChanged]]
    """Who leads afterwards."""
    remove_node: Callable[[RemoveWish], Awaitable[NodeId]]
    """Who is a member no more."""
    rotate_ca: Callable[[bool], Awaitable[Any]]
    """Begin or finish; {stage, waiting}."""
    show_job: Callable[[str], Awaitable[JobShown]]
    change_job: Callable[[JobWish], Awaitable[RunView]]
    """The run as it is once that is on W ledgers."""
    look_upgrade: Callable[[], Awaitable[Mapping[str, Any]]]
    begin_upgrade: Callable[[OwnersWish], Awaitable[str]]
    """The id of its run."""


def as_json(value: object) -> Any:
    """`value` as what JSON can say; records become objects keyed by their field names, whatever they look like
    on the wire."""
    if isinstance(value, msgspec.Struct):
        return {name: as_json(getattr(value, name)) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: as_json(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, bytes):
        return value.hex()
    return finite(value) if isinstance(value, float) else value


def is_local(request: web.Request) -> bool:
    """Did the request come by the unix socket?"""
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX


def owner_only(handler: Handler) -> Handler:
    async def guarded(request: web.Request) -> web.StreamResponse:
        if not is_local(request):
            raise Refused(
                "this door is for the node's owner", "it opens on the unix socket only",
                "Run `picluster` on the node itself.",
            )  # fmt: skip
        return await handler(request)

    return guarded


def routes(doors: AdminDoors, picture: Callable[[], Awaitable[Mapping[str, Any]]]) -> list[web.RouteDef]:
    """`picture` gives the body of /status.json."""

    async def show(_request: web.Request) -> web.Response:
        return web.json_response(await picture())

    async def create(request: web.Request) -> web.Response:
        wish = _decoded(await request.read() or b"{}", TokenWish, '{"ttl_s": 3600, "uses": 1}')
        made = await doors.create_token(wish)
        return web.json_response(as_json(made), status=201)

    async def outstanding(_request: web.Request) -> web.Response:
        return web.json_response({"tokens": as_json(list(await doors.list_tokens()))})

    async def revoke(request: web.Request) -> web.Response:
        token = request.match_info["id"]
        if not await doors.revoke_token(token):
            raise NotFound(f"no token {token[:64]!r}", "it was used up, has expired or was never made here")
        return web.Response(status=204)

    async def change_voters(request: web.Request) -> web.Response:
        wish = _decoded(await request.read(), VoterWish, '{"what": "add", "node": "<id>"}')
        return web.json_response(as_json(await doors.change_voters(wish)))

    async def move_leadership(request: web.Request) -> web.Response:
        wish = _decoded(await request.read() or b"{}", MoveWish, '{"node": "<id>"}')
        return web.json_response(as_json(await doors.move_leadership(wish)))

    async def remove_node(request: web.Request) -> web.Response:
        wish = _decoded(await request.read(), RemoveWish, '{"node": "<id>"}')
        return web.json_response({"removed": await doors.remove_node(wish)})

    async def rotate_ca(request: web.Request) -> web.Response:
        wish = _decoded(await request.read() or b"{}", RotateWish, '{"finish": false}')
        return web.json_response(as_json(await doors.rotate_ca(wish.finish)))

    async def show_job(request: web.Request) -> web.Response:
        return web.json_response(as_json(await doors.show_job(request.match_info["run"])))

    async def change_job(request: web.Request) -> web.Response:
        wish = _decoded(await request.read(), JobWish, '{"what": "retry", "run": "<id>"}')
        return web.json_response(as_json(await doors.change_job(wish)))

    async def look_upgrade(_request: web.Request) -> web.Response:
        return web.json_response(as_json(await doors.look_upgrade()))

    async def begin_upgrade(request: web.Request) -> web.Response:
        wish = _decoded(await request.read(), OwnersWish, '{"action": "install", "version": ""}')
        return web.json_response({"run": await doors.begin_upgrade(wish)})

    return [
        web.get("/status.json", show),
        web.get("/admin/upgrade", owner_only(look_upgrade)),
        web.post("/admin/upgrade", owner_only(begin_upgrade)),
        web.get("/admin/jobs/{run:[0-9a-f]{32}}", owner_only(show_job)),
        web.post("/admin/jobs", owner_only(change_job)),
        web.get("/admin/view", owner_only(show)),
        web.post("/admin/voters", owner_only(change_voters)),
        web.post("/admin/coordinator", owner_only(move_leadership)),
        web.post("/admin/ca", owner_only(rotate_ca)),
        web.post("/admin/removals", owner_only(remove_node)),
        web.post("/admin/tokens", owner_only(create)),
        web.get("/admin/tokens", owner_only(outstanding)),
        web.delete("/admin/tokens/{id}", owner_only(revoke)),
    ]


def _decoded(body: bytes, shape: type[T], example: str) -> T:
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.DecodeError as fault:
        raise UserError("that is not understood", str(fault), f"Send {example}.") from None
