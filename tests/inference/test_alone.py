from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from piclusterd.errors import UserError
from piclusterd.inference import alone

HEAD = "Inter-|   Receive\n face |bytes\n"
LEAVE = """
from piclusterd.inference import alone
import socket
try:
    alone.check()
except Exception as fault:
    print("before:", fault)
alone.leave_the_network()
alone.check()
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
    print("alone")
"""


def test_a_network_with_anything_but_loopback_is_somebody_elses(tmp_path: Path) -> None:
    devices = tmp_path / "dev"
    devices.write_text(f"{HEAD}    lo: 0 0\n  eth0: 1 2\n")
    with pytest.raises(UserError, match=r"a network of their own. This one sees eth0, lo\. Run it under systemd"):
        alone.check(devices)
    devices.write_text(f"{HEAD}    lo: 0 0\n")
    alone.check(devices)


def test_a_child_gets_a_network_of_its_own_and_its_loopback_works() -> None:
    told = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60, check=False)
    if "a network of their own" in told.stderr:
        pytest.skip("this kernel lets nobody have a network of their own")
    assert told.stdout.endswith("alone\n"), told.stderr
