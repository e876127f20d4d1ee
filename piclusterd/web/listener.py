"""The sockets that clients connect to: opened, or taken from systemd, and shut only when what was asked is answered.

    serve ──▶ TCP and unix socket ──▶ Served.close ──answers under way, ≤ SHUTDOWN_S──▶ doors shut ──≤ LAST_S──▶ gone

A daemon that stops has given its answers to other nodes by then (`inference.serving.drain`) and relays them to its
clients; with its doors open, so that nobody who comes meanwhile has to wait for the longest of them.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import stat
from collections.abc import Awaitable, Mapping
from pathlib import Path
from types import MappingProxyType

from aiohttp import web
from aiohttp.typedefs import Handler

from ..errors import UserError

log = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
"""How long answers under way may go on once the daemon stops. Meanwhile the doors are open: who comes is answered by
other nodes."""
LAST_S = 2.0
"""Then the doors are shut, streams of events are ended, and what is still open has so long. New clients wait that long
in the queue of systemd's socket."""
SOCKET_MODE = 0o660
"""Owner and group: whoever is in the group may administer the node."""
LINGER_S = 0.1
"""From the last connection taken to the first one closed: its request is on the way, and is to be answered."""
BACKLOG = 128


def route_of(request: web.Request) -> str:
    """The route's template: a bounded label, and what the path means whatever its spelling."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unmatched"


class Answering:
    """Counts the requests to models under way; a daemon that stops waits for none to be left."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not route_of(request).startswith(("/v1/", "/api/")):
            return await handler(request)
        self._count += 1
        self._idle.clear()
        try:
            return await handler(request)
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def idle(self) -> None:
        await self._idle.wait()


ANSWERING = web.AppKey("answering", Answering)


class Served:
    """A running listener. `port` is the TCP port it got."""

    def __init__(self, runner: web.AppRunner, port: int, socket_path: Path | None) -> None:
        """`socket_path`: the unix socket that is ours to remove."""
        self._runner, self.port, self._socket_path = runner, port, socket_path

    async def close(self) -> None:
        """Finish the answers under way with open doors, for `SHUTDOWN_S`; then shut them, and end what is left."""
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await self._runner.app[ANSWERING].idle()
        except TimeoutError:
            log.warning("answers took longer than %g s and are cut off", SHUTDOWN_S)
        for site in tuple(self._runner.sites):
            await site.stop()
        await asyncio.sleep(LINGER_S)
        await self._runner.cleanup()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)


async def serve(
    app: web.Application,
    host: str,
    port: int,
    socket_path: Path | None = None,
    passed: Mapping[socket.AddressFamily, socket.socket] = MappingProxyType({}),
) -> Served:
    """Listen on TCP and, where given, on a unix socket. Raises `UserError` where either cannot be had.

    `passed` are listening sockets that systemd holds for us (`board.listen_fds`): they are used instead of our own.
    A client that goes away cancels its handler, so that a model stops working for nobody. Bodies arrive as they were
    sent: signatures are over raw bytes, and nothing is inflated (no gzip bombs).
    """
    runner = web.AppRunner(
        app, handler_cancellation=True, auto_decompress=False, access_log=None, shutdown_timeout=LAST_S
    )
    await runner.setup()
    local = passed.get(socket.AF_UNIX)
    try:
        if tcp := passed.get(socket.AF_INET) or passed.get(socket.AF_INET6):
            _check_passed(tcp, host, port)
            await web.SockSite(runner, tcp, backlog=BACKLOG).start()
        else:
            await _listening(f"{host}:{port}", web.TCPSite(runner, host, port, backlog=BACKLOG).start())
        if local is not None:
            await web.SockSite(runner, local, backlog=BACKLOG).start()
        elif socket_path is not None:
            await _listening(str(socket_path), _serve_unix(runner, socket_path))
    except UserError:
        await runner.cleanup()
        raise
    return Served(runner, runner.addresses[0][1], None if local is not None else socket_path)


async def _listening(where: str, starting: Awaitable[None]) -> None:
    try:
        await starting
    except OSError as fault:
        raise UserError(f"cannot listen on {where}", str(fault), "Change [api] host, port or socket.") from fault


def _check_passed(sock: socket.socket, host: str, port: int) -> None:
    """Who closed the API to the LAN in the configuration must not find it open by a unit file."""
    there = sock.getsockname()[:2]
    if there != (host, port):
        raise UserError(
            f"systemd listens on {there[0]}:{there[1]}, and [api] says {host}:{port}",
            "piclusterd.socket opens the listener, so that a restart refuses nobody.",
            "`systemctl edit piclusterd.socket` with the same address (ListenStream=), or disable that unit.",
        )


async def _serve_unix(runner: web.AppRunner, path: Path) -> None:
    await web.SockSite(runner, _bind_unix(path), backlog=BACKLOG).start()


def _bind_unix(path: Path) -> socket.socket:
    """Bound with its mode set before it listens: at no moment can a stranger connect."""
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()  # left over from a process that was killed; the state directory's lock keeps out a living one
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
        path.chmod(SOCKET_MODE)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
