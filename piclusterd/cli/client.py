"""The daemon as the client sees it: HTTP over its unix socket, or over a URL with a key.

    Target ──▶ Client.get / Client.lines ──▶ answer
                     └─▶ {"error": {what, why, fix}} ──▶ PiclusterError       no connection ──▶ Unreachable (exit 3)

Holds one session for one command. Follows no redirects (a key must not travel to another host) and reads no proxy
variables (nodes are on the LAN). Limits every answer: the other side may be any machine.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from ..config_file import STATE_DIR, read_secret
from ..errors import NotFound, Overloaded, PiclusterError, Refused, Unavailable, UserError
from .terminal import Unreachable

if TYPE_CHECKING:
    import aiohttp

RUNTIME_SOCKET = Path("/run/piclusterd/api.sock")
CONNECT_S = 5.0
ANSWER_S = 15.0
"""A plain answer: a busy Pi takes a second or two."""
SILENCE_S = 600.0
"""Between two lines of a stream: a long prompt is read for minutes on a Pi 4 before its first token."""
ANSWER_BYTES_MAX = 8 * 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024
"""One event or one piece of an answer; also aiohttp's read buffer."""
LOCAL = "http://picluster.localhost"
"""Base URL on a unix socket, where the host has no meaning."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the daemon is: `url` if set, else `socket`."""

    socket: Path
    url: str = ""
    key: str = ""

    @property
    def name(self) -> str:
        return self.url or str(self.socket)


def target(host: str | None, socket: str | None, key_file: str | None, environ: Mapping[str, str]) -> Target:
    """From the global options. Raises `UserError` on a URL or key that cannot be one."""
    url = _base_url(host) if host else ""
    key = read_secret(Path(key_file).absolute(), environ)[0] if key_file else ""
    return Target(Path(socket) if socket else _default_socket(environ), url, key)


def _base_url(host: str) -> str:
    url = host if "://" in host else f"http://{host}"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UserError(f"{host!r} is not the URL of a node", "", "Write http://pi-1.local:8746.")
    return url.rstrip("/").removesuffix("/v1")


def _default_socket(environ: Mapping[str, str]) -> Path:
    state = environ.get("PICLUSTER_STATE_DIR")
    if not state and os.path.lexists(RUNTIME_SOCKET.parent):
        return RUNTIME_SOCKET
    return Path(state or STATE_DIR) / "api.sock"


class Client:
    def __init__(self, session: aiohttp.ClientSession, where: Target) -> None:
        self._session, self._where = session, where

    async def get(self, path: str) -> bytes:
        """The body of a JSON answer."""
        async with self._ask("GET", path, None, ANSWER_S) as response:
            return await _read(response, ANSWER_BYTES_MAX)

    async def post(self, path: str, body: Mapping[str, Any], total_s: float) -> bytes:
        """The body of a JSON answer to `body`; waits up to `total_s`."""
        async with self._ask("POST", path, body, total_s) as response:
            return await _read(response, ANSWER_BYTES_MAX)

    async def post_raw(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The body of a JSON answer to bytes that are sent as they are."""
        async with self._ask("POST", path, body, ANSWER_S, headers) as response:
            return await _read(response, ANSWER_BYTES_MAX)

    async def post_file(self, path: str, file: Path, total_s: float) -> bytes:
        """The body of a JSON answer to a file, which is sent with its length."""
        with file.open("rb") as body:
            async with self._ask("POST", path, body, total_s) as response:
                return await _read(response, ANSWER_BYTES_MAX)

    async def upload(self, path: str, file: Path, fields: Mapping[str, str], total_s: float) -> bytes:
        """The body of a JSON answer to a form: `fields`, then the file."""
        import aiohttp

        form = aiohttp.FormData(dict(fields))
        with file.open("rb") as body:
            form.add_field("file", body, filename=file.name)
            async with self._ask("POST", path, form, total_s) as response:
                return await _read(response, ANSWER_BYTES_MAX)

    async def download(self, path: str, to: BinaryIO) -> None:
        """A file of any length."""
        async with self._ask("GET", path, None, None) as response:
            async for chunk in response.content.iter_any():
                to.write(chunk)

    async def delete(self, path: str) -> bytes:
        """The body of a JSON answer."""
        async with self._ask("DELETE", path, None, ANSWER_S) as response:
            return await _read(response, ANSWER_BYTES_MAX)

    async def lines(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncGenerator[bytes, None]:
        """The lines of a stream as they come, without the empty ones."""
        async with self._ask(method, path, body, None) as response:
            try:
                async for line in response.content:
                    if stripped := line.strip():
                        yield stripped
            except ValueError:
                raise Unavailable(f"{self._where.name} sent a line over {LINE_BYTES_MAX} bytes") from None

    @asynccontextmanager
    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | bytes | BinaryIO | aiohttp.FormData | None,
        total_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=total_s, connect=CONNECT_S, sock_read=SILENCE_S)
        url = (self._where.url or LOCAL) + path
        sent: dict[str, Any] = {"json": body} if body is None or isinstance(body, Mapping) else {"data": body}
        try:
            async with self._session.request(
                method, url, headers=headers, timeout=limits, allow_redirects=False, **sent
            ) as response:
                if response.status >= 300:
                    raise _fault(response.status, await _read(response, ANSWER_BYTES_MAX), self._where.name)
                yield response
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise _unreachable(self._where, error) from error


@asynccontextmanager
async def connect(where: Target) -> AsyncIterator[Client]:
    """A client for one command; nothing is dialled before the first request."""
    import aiohttp

    connector = aiohttp.TCPConnector() if where.url else aiohttp.UnixConnector(str(where.socket))
    headers = {"Authorization": f"Bearer {where.key}"} if where.key else {}
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, trust_env=False, read_bufsize=LINE_BYTES_MAX
    ) as session:
        yield Client(session, where)


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > bytes_max:
            raise Unavailable("the answer is too long", f"it has more than {bytes_max} bytes")
    return bytes(body)


def _unreachable(where: Target, error: Exception) -> Unreachable:
    if where.url:
        why, fix = str(error) or "it did not answer in time", "Is the URL right, and the node on?"
    elif isinstance(error, PermissionError):
        why, fix = "this user may not use the socket", "Join its group: sudo usermod -aG piclusterd $USER"
    else:
        why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        fix = "Is the daemon running? systemctl status piclusterd; or name a node with --host URL."
    return Unreachable(f"cannot reach the daemon at {where.name}", why, fix)


def _fault(status: int, body: bytes, name: str) -> PiclusterError:
    """The error object of an answer as the error it was."""
    import msgspec

    try:
        told = msgspec.json.decode(body)["error"]
        what, why, fix = (str(told.get(part) or "") for part in ("what", "why", "fix"))
        what = what or str(told["message"])
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        what, why, fix = f"{name} answered with status {status}", "", "Is this a piclusterd node?"
    if status in (401, 403):
        return Refused(what, why, fix or "Give a key with --key-file.")
    kinds: dict[int, type[PiclusterError]] = {404: NotFound, 429: Overloaded}
    return kinds.get(status, UserError if status < 500 else Unavailable)(what, why, fix)
