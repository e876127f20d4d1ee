"""llama.cpp's RPC backend by ctypes: layers of a model computed by a process on another board. Only in a child.

    head:  register(port)  ─▶ a device at 127.0.0.1:port, on which `llama.Weights` puts layers
    part:  serve(port)     ─▶ ggml's server, which holds those layers and computes with them

The Python binding has no words for it: its `rpc_servers` does nothing since 2025-07. The server asks nobody who they
are and has had holes that let a client write where it likes, so it listens only inside a network of the child's own
(`alone`), and only a member's bytes reach it (`bridge`, `splits`). Both ends must be of one build.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path

from ..errors import UserError

LIBRARY = "libggml-rpc.so"
NO_RPC = ("this build of llama.cpp cannot split models", f"It has no {LIBRARY}.", "Build it with `make setup RPC=1`.")
CPU = 0  # ggml_backend_dev_type
PARTS_MAX = 15
"""Boards beside the head: GGML_RPC_MAX_SERVERS less one."""


def built() -> str:
    """What both ends must have in common, or empty where this build cannot. Loads nothing."""
    return importlib.metadata.version("llama-cpp-python") if _library(LIBRARY).exists() else ""


def register(ports: list[int]) -> None:
    """Make a device of each server on those ports of this network. One that does not answer ends the process."""
    library = _load()
    for port in ports:
        device = library.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())
        if not device:
            raise UserError("a part of the model has no device", "Its llama.cpp computes on none.")
        library.ggml_backend_register(ctypes.c_void_p(device))


def serve(port: int, threads: int) -> None:
    """Compute for whoever connects, one after the other. Returns only where that cannot be."""
    library = _load()
    devices = (ctypes.c_void_p * 1)(library.ggml_backend_dev_by_type(CPU))
    library.ggml_backend_rpc_start_server(
        f"127.0.0.1:{port}".encode(), None, ctypes.c_size_t(threads), ctypes.c_size_t(1), devices
    )


def _load() -> ctypes.CDLL:
    """All of llama.cpp, by the file that the binding opens: another of these files would be another registry."""
    if not built():
        raise UserError(*NO_RPC)
    library = ctypes.CDLL(str(_library("libllama.so")))
    library.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    library.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    return library


def _library(name: str) -> Path:
    if where := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(where) / name
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" / name if spec is not None and spec.origin else Path(os.devnull) / name
