"""One TCP connection after the other through one Unix socket, for the two children of a split model.

    head   llama.cpp ──TCP──▶ listen ──┐ frames ┌── connect ──TCP──▶ ggml's server   part
                                       └────────┘
    frame: length (4 bytes, little-endian) | bytes        length 0: that connection is over

A connection is over once both ends said so; only then does the next begin: ggml's server takes them one by one, too.
Where the Unix socket ends, everything does: the daemon has closed it, and there is nobody left to compute for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

LENGTH_BYTES = 4
READ_BYTES = 64 * 1024
"""A chunk of a link."""
HOST = "127.0.0.1"


class Frames:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb", buffering=4 * READ_BYTES)

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._sock.close()

    def send(self, data: bytes | memoryview) -> None:
        self._sock.sendall(len(data).to_bytes(LENGTH_BYTES, "little") + data)

    def receive(self) -> bytes | None:
        """The next frame; None where there is none any more."""
        head = self._file.read(LENGTH_BYTES)
        length = int.from_bytes(head, "little")
        if len(head) < LENGTH_BYTES or length > READ_BYTES:
            return None
        data = self._file.read(length)
        return data if len(data) == length else None


def listen(tunnel: socket.socket) -> int:
    """A port at which whoever connects speaks through `tunnel`, from a thread of its own."""
    server = socket.create_server((HOST, 0))
    threading.Thread(target=_accept, args=(server, Frames(tunnel)), daemon=True).start()
    return int(server.getsockname()[1])


def _accept(server: socket.socket, frames: Frames) -> None:
    with server, frames:
        over = False
        while not over:
            connection, _ = server.accept()
            with connection:
                over = not _join(connection, frames)  # then llama.cpp aborts: its device is gone


def connect(tunnel: socket.socket, port: int) -> None:
    """Speak to `port` for whoever speaks through `tunnel`. Returns once nobody will."""
    with Frames(tunnel) as frames:
        while (first := frames.receive()) is not None:
            if not first:
                frames.send(b"")
                continue
            with socket.create_connection((HOST, port)) as connection:
                connection.sendall(first)
                if not _join(connection, frames):
                    return


def _join(connection: socket.socket, frames: Frames) -> bool:
    """Until the connection is over at both ends. False: the tunnel is over."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    whole: list[bool] = []
    down = threading.Thread(target=lambda: whole.append(_deliver(connection, frames)), daemon=True)
    down.start()
    with contextlib.suppress(OSError):
        while data := connection.recv(READ_BYTES):
            frames.send(data)
    with contextlib.suppress(OSError):
        frames.send(b"")
    down.join()
    return whole == [True]


def _deliver(connection: socket.socket, frames: Frames) -> bool:
    over = False
    while (data := frames.receive()) is not None:
        with contextlib.suppress(OSError):  # the connection is over here, and is about to be there
            if not data:
                over = True
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.sendall(data)
        if over:
            return True
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    return False


def taken(fds: list[int]) -> list[socket.socket]:
    """Sockets of descriptors that came over a socket."""
    for fd in fds:
        os.set_inheritable(fd, False)
    return [socket.socket(fileno=fd) for fd in fds]
