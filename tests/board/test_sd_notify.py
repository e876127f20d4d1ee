"""systemd's side of the conversation is a real datagram socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from piclusterd.board.sd_notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@piclusterd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.settimeout(5)
        yield sock, name


def test_the_four_words_arrive(systemd: tuple[socket.socket, str]) -> None:
    sock, name = systemd
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.ready("serving")
    assert notifier.status("leader=pi-1\nmembers=3/3")
    assert notifier.watchdog()
    assert notifier.stopping()
    heard = [sock.recv(4096) for _ in range(4)]
    assert heard == [b"READY=1\nSTATUS=serving", b"STATUS=leader=pi-1 members=3/3", b"WATCHDOG=1", b"STOPPING=1"]


def test_a_status_cannot_smuggle_another_word(systemd: tuple[socket.socket, str]) -> None:
    sock, name = systemd
    Notifier({"NOTIFY_SOCKET": name}).status("x\nMAINPID=1")
    assert sock.recv(4096) == b"STATUS=x MAINPID=1"


def test_outside_systemd_nothing_happens() -> None:
    assert not Notifier({}).ready()


def test_a_socket_that_is_gone_is_not_an_error(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).watchdog()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_stroked_at_half_its_interval(environ: dict[str, str], interval: float | None) -> None:
    assert Notifier(environ).watchdog_s == interval
