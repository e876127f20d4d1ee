"""Connections of two children through one pipe, with a server that takes them one by one, as ggml's does."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from piclusterd.inference import bridge

PATIENCE_S = 20.0


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server((bridge.HOST, 0)) as listening:
        listening.settimeout(PATIENCE_S)
        yield listening


@pytest.fixture
def port(server: socket.socket, pipe: socket.socket) -> int:
    """On the head's side."""
    return bridge.listen(pipe)


@pytest.fixture
def pipe(server: socket.socket) -> Iterator[socket.socket]:
    """The head's end; the part is at the other, and ends with it."""
    ours, theirs = socket.socketpair()
    part = threading.Thread(target=bridge.connect, args=(theirs, server.getsockname()[1]), daemon=True)
    part.start()
    yield ours
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)
    part.join(PATIENCE_S)
    assert not part.is_alive()


def dial(port: int) -> socket.socket:
    return socket.create_connection((bridge.HOST, port), PATIENCE_S)


def whole(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := sock.recv(length - len(data))):
        data += more
    return data


def test_bytes_go_both_ways_and_one_connection_follows_the_other(server: socket.socket, port: int) -> None:
    for number in range(3):
        body = os.urandom(500_000) + bytes([number])
        with dial(port) as client:
            sending = threading.Thread(target=client.sendall, args=(body,))
            sending.start()
            at_server, _ = server.accept()
            with at_server:
                assert whole(at_server, len(body)) == body
                sending.join()
                at_server.sendall(body[::-1])
                assert whole(client, len(body)) == body[::-1]
                client.shutdown(socket.SHUT_WR)
                assert at_server.recv(1) == b""
            assert client.recv(1) == b""


def test_a_connection_that_says_nothing_harms_no_other(server: socket.socket, port: int) -> None:
    dial(port).close()
    with dial(port) as client:
        client.sendall(b"hello")
        at_server, _ = server.accept()
        with at_server:
            assert whole(at_server, 5) == b"hello"


def test_the_end_of_the_pipe_is_the_end_of_the_connection(
    server: socket.socket, pipe: socket.socket, port: int
) -> None:
    with dial(port) as client:
        client.sendall(b"hello")
        at_server, _ = server.accept()
        with at_server:
            pipe.shutdown(socket.SHUT_RDWR)
            assert client.recv(1) == b""
            assert whole(at_server, 6) == b"hello"


def test_a_frame_over_the_cap_ends_the_pipe() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((bridge.READ_BYTES + 1).to_bytes(4, "little") + b"x")
        assert bridge.Frames(theirs).receive() is None
