"""The words systemd understands, over its notification socket: sd_notify(3), in stdlib.

    READY=1 once the node answers ─▶ STATUS=… whenever it changes ─▶ WATCHDOG=1 at half the interval ─▶ STOPPING=1

Outside systemd ($NOTIFY_SOCKET unset) every call is a no-op. A lost datagram is never an error of the node: what
cannot be told is not told. The caller decides *whether* it is well enough to stroke the watchdog.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

STATUS_CHARACTERS_MAX = 200
"""One line of `systemctl status`."""


class Notifier:
    """Where to send, read once. `environ` is the process's environment or a test's."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ)
        """Seconds between two strokes of the watchdog, half of what systemd allows; None: it does not watch."""

    def ready(self, status: str = "") -> bool:
        return self._send("READY=1", status)

    def status(self, status: str) -> bool:
        return self._send("", status)

    def watchdog(self) -> bool:
        return self._send("WATCHDOG=1")

    def stopping(self, status: str = "") -> bool:
        return self._send("STOPPING=1", status)

    def _send(self, word: str, status: str = "") -> bool:
        """True when systemd has it. Never blocks: a full socket buffer loses the message."""
        if self._address is None:
            return False
        line = f"STATUS={' '.join(status.split())[:STATUS_CHARACTERS_MAX]}" if status else ""
        message = "\n".join(part for part in (word, line) if part)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(message.encode(errors="replace"), self._address)
        except OSError:
            return False
        return True


def _address(name: str) -> str | None:
    """A path, or `@name` for Linux's abstract namespace; systemd's other forms (vsock) are not for services."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    meant_for_us = not pid or pid == str(os.getpid())
    if not (microseconds.isdecimal() and int(microseconds) > 0 and meant_for_us):
        return None
    return int(microseconds) / 1_000_000 / 2
