"""hashicorp/memberlist itself beside us: built, run on loopback, read.

    Peer(sizes) ──go build──▶ N nodes in one process, real time, in the background ──one line of JSON──▶ Measured

Debian and Raspberry Pi OS have it: `apt install golang-go golang-github-hashicorp-memberlist-dev`. Where it cannot be
built, `Measured` is None and the bench falls back on memberlist's published arithmetic, saying so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

SOURCE = Path(__file__).parent / "memberlist_peer" / "main.go"
GOPATH = "/usr/share/gocode"
"""Where Debian keeps Go libraries."""
BUILD_S = 120.0
IDLE_S = 20.0
RUN_S = 600.0


class Measured(msgspec.Struct, frozen=True):
    """`sent`: bytes a second and node handed to UDP and TCP at rest; times in seconds, one a surviving node."""

    nodes: int
    sent: float
    change_s: tuple[float, ...]
    death_s: tuple[float, ...]


@dataclass(slots=True)
class Peer:
    """The runs under way; `close` ends them."""

    why_not: str
    runs: dict[int, subprocess.Popen[bytes]]
    room: tempfile.TemporaryDirectory[str]

    def at(self, nodes: int) -> Measured | None:
        """What memberlist did with so many nodes; waits for its run to end."""
        run = self.runs.pop(nodes, None)
        if run is None:
            return None
        try:
            out, _ = run.communicate(timeout=RUN_S)
            return msgspec.json.decode(out, type=Measured)
        except (subprocess.TimeoutExpired, msgspec.DecodeError) as fault:
            run.kill()
            self.why_not = f"it did not end well: {fault}"
            return None

    def close(self) -> None:
        for run in self.runs.values():
            run.kill()
            run.wait()
        self.room.cleanup()


def start(deaths: dict[int, int]) -> Peer:
    """Cluster size → how many of its nodes to kill, one run each, all at once and with the lowest priority."""
    room = tempfile.TemporaryDirectory(prefix="memberlist-")
    try:
        program = _build(Path(room.name))
    except (OSError, subprocess.SubprocessError) as fault:
        return Peer(f"memberlist cannot be built here: {fault}", {}, room)
    return Peer("", {nodes: _run(program, nodes, kills) for nodes, kills in deaths.items()}, room)


def _build(room: Path) -> Path:
    program = room / "peer"
    if shutil.which("go") is None:
        raise FileNotFoundError("there is no Go compiler")
    environ = os.environ | {"GO111MODULE": "off", "GOPATH": GOPATH, "GOCACHE": str(room / "cache"), "GOFLAGS": ""}
    command: Sequence[str] = ("go", "build", "-o", str(program), str(SOURCE))
    subprocess.run(command, check=True, env=environ, capture_output=True, timeout=BUILD_S)
    return program


def _run(program: Path, nodes: int, kills: int) -> subprocess.Popen[bytes]:
    command = ("nice", "-n", "10", str(program), "-nodes", str(nodes), "-idle", f"{IDLE_S:g}s", "-deaths", str(kills))
    return subprocess.Popen(command, stdout=subprocess.PIPE)
