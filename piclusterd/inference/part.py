"""What a child does that holds some layers of a model split over boards: ggml's RPC server, and the way to it.

    pool ──Load(kind part)+socket──▶ memory bounded ▶ server up ▶ Ready         socket ⇄ bridge ⇄ 127.0.0.1 ⇄ server

Its network is its own (`alone`). What it may take of memory is what was promised to the head, and the kernel holds it
to that. It never sees the model's file: the head sends it the layers.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from pathlib import Path

from ..errors import UserError
from . import alone, bridge, rpc
from .protocol import Load, Ready

PORT = 50052
"""ggml's own default; nobody else is in this network."""
SLACK = 192 * 1024 * 1024
"""Beside what was promised: serialized graphs, frames, threads' stacks."""
UP_S = 10.0
LOOK_S = 0.01


def begin(load: Load, tunnels: list[socket.socket]) -> Ready:
    """Serve `tunnels`' one end from threads. Raises `UserError`."""
    alone.check()
    if not rpc.built():
        raise UserError(*rpc.NO_RPC)
    _bound(load.apart + SLACK)
    threading.Thread(target=_serve, args=(load.threads,), daemon=True).start()
    _wait_for_server()
    threading.Thread(target=_connect, args=(tunnels[0],), daemon=True).start()
    return Ready(0, 0, "part", "", "", ())


def _bound(more: int) -> None:
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + more if hard < 0 else min(held + more, hard), hard))


def _serve(threads: int) -> None:
    rpc.serve(PORT, threads)
    os._exit(1)


def _connect(tunnel: socket.socket) -> None:
    bridge.connect(tunnel, PORT)
    os._exit(0)


def _wait_for_server() -> None:
    until = time.monotonic() + UP_S
    while True:
        try:
            socket.create_connection((bridge.HOST, PORT)).close()
            return
        except OSError as fault:
            if time.monotonic() > until:
                raise UserError("ggml's RPC server does not start", f"{fault}.") from None
            time.sleep(LOOK_S)
