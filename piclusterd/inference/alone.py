"""A network of the process's own, in which nothing but its own loopback is: ggml's RPC server asks nobody who they are.

    systemd's worker     PrivateNetwork=yes made it           (`systemd/split.conf` lets it open sockets there)
    a child of ours      unshare(user, network), loopback up  before it has threads

Where neither is to be had the child refuses: another user of this board could else write into its memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from pathlib import Path

from ..errors import UserError

CLONE_NEWUSER, CLONE_NEWNET = 0x1000_0000, 0x4000_0000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # linux/sockios.h, net/if.h
LOOPBACK = b"lo"


def leave_the_network() -> None:
    """A network of its own for this process and the threads it will have, where the kernel lets it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0 and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return  # `check` says so
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        asked = struct.pack("16sH14x", LOOPBACK, 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(sock, SIOCGIFFLAGS, asked), 16)
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", LOOPBACK, flags | IFF_UP))


def check(devices: Path = Path("/proc/thread-self/net/dev")) -> None:
    """Raises `UserError` unless this thread's network is nobody else's, and sockets can be opened in it."""
    names = {line.partition(":")[0].strip() for line in devices.read_text().splitlines()[2:]}
    if names != {LOOPBACK.decode()}:
        raise UserError(
            "a split model needs workers with a network of their own", f"This one sees {', '.join(sorted(names))}.",
            "Run it under systemd with systemd/split.conf, or allow user namespaces.",
        )  # fmt: skip
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError as fault:
        fix = "Install systemd/split.conf as /etc/systemd/system/piclusterd-worker@.service.d/split.conf."
        raise UserError("the workers of this board may open no socket", f"{fault.strerror}.", fix) from None
