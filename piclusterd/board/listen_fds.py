"""Listening sockets that systemd opened before us and keeps open while we restart: sd_listen_fds(3), in stdlib.

    piclusterd.socket ──LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES──▶ take("api") ──▶ {AF_INET: socket, AF_UNIX: socket}

A client that connects while no daemon runs waits in the kernel's queue for the next one instead of being refused.
The sockets are ours once taken and are not inherited by children. Closing them does not close systemd's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""
FDS_MAX = 16
"""More than any unit of ours passes; a wild number in the environment must not make us touch others' files."""


def take(name: str, environ: Mapping[str, str] = os.environ) -> dict[socket.AddressFamily, socket.socket]:
    """The sockets that were passed to this process under `name` (FileDescriptorName=), by family; often none.

    Call it once: each call makes new objects of the same file descriptors.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    passed = range(FIRST_FD, FIRST_FD + min(int(count) if count.isdecimal() else 0, FDS_MAX))
    found = {}
    for fd, called in zip(passed, names, strict=False):
        if called == name:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            found[sock.family] = sock
    return found
