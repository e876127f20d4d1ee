"""Passed sockets are real ones: a child process gets them as systemd would pass them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from piclusterd.board import listen_fds

SHOW = """
import json, os, sys
from piclusterd.board import listen_fds
os.environ["LISTEN_PID"] = os.environ.get("PID") or str(os.getpid())
found = listen_fds.take("api", os.environ)
print(json.dumps({family.name: [str(sock.getsockname()), sock.get_inheritable()] for family, sock in found.items()}))
"""


def taken(*passed: socket.socket, names: str, **environ: str) -> dict[str, list[object]]:
    """What a process that got `passed` as file descriptors 3, 4 … takes."""
    fds = [sock.fileno() for sock in passed]

    def place() -> None:
        for place, fd in enumerate([os.dup(os.dup2(fd, 100 + at)) for at, fd in enumerate(fds)], start=3):
            os.dup2(fd, place)

    told = {**os.environ, "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names, **environ}
    child = subprocess.run(
        [sys.executable, "-c", SHOW], env=told, preexec_fn=place, close_fds=False, capture_output=True, check=True
    )
    found: dict[str, list[object]] = json.loads(child.stdout)
    return found


def test_the_sockets_of_that_name_are_taken_by_family_and_not_passed_on(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket() as other,
    ):
        local.bind(str(tmp_path / "s"))
        found = taken(tcp, other, local, names="api:else:api")
        assert found == {"AF_INET": [str(tcp.getsockname()), False], "AF_UNIX": [str(tmp_path / "s"), False]}


def test_what_was_meant_for_another_process_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        assert taken(tcp, names="api", PID="1") == {}


@pytest.mark.parametrize("count", ["", "0", "-1", "three"])
def test_without_sockets_there_are_none(count: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "api"}
    assert listen_fds.take("api", environ) == {}
    assert listen_fds.take("api", {}) == {}
