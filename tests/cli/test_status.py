"""`status`, `models` and `events` against the real doors of a node, on its unix socket and on TCP."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from piclusterd.web.app import make_app
from piclusterd.web.listener import Served, serve
from tests.web.house import Node, member, view

from .command import environment, picluster


@pytest.fixture
def house() -> Node:
    return Node()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api.sock"


@pytest.fixture
async def served(house: Node, path: Path) -> AsyncIterator[Served]:
    listener = await serve(make_app(house.doors()), "127.0.0.1", 0, path)
    yield listener
    await listener.close()


async def test_a_calm_cluster_is_a_line_a_node_and_exit_code_0(served: Served, path: Path) -> None:
    result = await picluster("--socket", str(path), "status")
    assert (result.code, result.err) == (0, "")
    head, titles, *rows, verdict = result.out.splitlines()
    assert head == "home · 4 nodes · leader pi-1 (term 12) · quorum 3/3 · ledger #18422 · ok"
    assert " ".join(titles.split()) == "NODE STATE ROLE MODELS TOK/S QUEUE CPU MEM TEMP FLAGS SEEN"
    assert " ".join(rows[0].split()) == "* pi-1 alive leader qwen2.5-1.5b 10.2 3 12% 3.0G/8.0G 49C - now"
    assert rows[3].split()[:4] == ["vps-1", "alive", "relay", "-"]
    assert verdict.startswith("All is well.")


async def test_the_state_directory_leads_to_the_socket(served: Served, path: Path) -> None:
    assert (await picluster("status", PICLUSTER_STATE_DIR=str(path.parent))).code == 0


async def test_a_url_works_as_well(served: Served) -> None:
    result = await picluster("status", "--json", PICLUSTER_HOST=f"127.0.0.1:{served.port}")
    assert (result.code, json.loads(result.out)["cluster"]) == (0, "home")


async def test_a_failed_node_stays_in_sight_and_exit_code_is_1(house: Node, served: Served, path: Path) -> None:
    house.picture = view(member(1), member(2), member(3, "failed", flags=("undervolt",)))
    result = await picluster("--socket", str(path), "status")
    assert result.code == 1
    assert "pi-3    failed  voter" in result.out
    assert "UNDERVOLT" in result.out
    assert "# Health" in result.out


async def test_one_node_is_shown_with_what_its_probes_met(house: Node, served: Served, path: Path) -> None:
    story = "40 s ago: no answer to our probe; 32 s ago: not refuted in 8 s; 3 s ago: alive again"
    house.picture = view(member(1), replace(member(2), why=story), member(3))
    result = await picluster("--socket", str(path), "status", "pi-2")
    assert result.code == 0
    _, row, head, *lines = result.out.splitlines()
    assert row.split()[:3] == ["pi-2", "alive", "voter"]
    assert head == "# Seen from pi-1"
    assert [line.strip() for line in lines] == story.split("; ")
    quiet = await picluster("--socket", str(path), "status", "pi-3")
    assert quiet.out.splitlines()[-1] == "  no probe of it ever failed"
    unknown = await picluster("--socket", str(path), "status", "pi-9")
    assert unknown.err.startswith("error: which node is pi-9?")


async def test_an_open_election_is_exit_code_2(house: Node, served: Served, path: Path) -> None:
    house.picture = view(leader=None, quorum=1, role="candidate")
    result = await picluster("--socket", str(path), "status")
    assert result.code == 2
    assert "leader none" in result.out


async def test_names_cannot_paint_the_terminal(house: Node, served: Served, path: Path) -> None:
    house.picture = view(member(1, name="\x1b]0;owned\x07pi"), member(2, name="[red]x[/red]\u202e"), cluster="a\rb")
    result = await picluster("--socket", str(path), "status")
    assert not set(result.out) & {"\x1b", "\x07", "\r", "\u202e"}
    assert "\\x1b]0;owned\\x07pi" in result.out
    assert "[red]x[/red]\\u202e" in result.out


async def test_no_daemon_is_exit_code_3_with_a_reason_and_a_fix(tmp_path: Path) -> None:
    result = await picluster("--socket", str(tmp_path / "none.sock"), "status")
    assert (result.code, result.out) == (3, "")
    assert result.err.splitlines()[0] == f"error: cannot reach the daemon at {tmp_path}/none.sock"
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "why", "fix"]


async def test_an_answer_that_is_no_status_is_a_fault_and_not_a_traceback(tmp_path: Path) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(babble, tmp_path / "s"):
        result = await picluster("--socket", str(tmp_path / "s"), "status")
    assert result.code == 1
    assert result.err.startswith("error: the answer is not a node's status\n")


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
async def test_a_terminal_gets_colours_unless_told_not_to(
    served: Served, path: Path, environ: dict[str, str], coloured: bool
) -> None:
    master, slave = os.openpty()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "piclusterd.cli.main", "--socket", str(path), "status",
        stdout=slave, env=environment(TERM="xterm-256color", COLUMNS="140", **environ),
    )  # fmt: skip
    async with asyncio.timeout(30):
        assert await child.wait() == 0
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "pi-1" in shown
    assert ("\x1b[32m" in shown) is coloured


async def test_models_are_listed_with_the_nodes_that_serve_them(house: Node, served: Served, path: Path) -> None:
    house.picture = view(member(1), member(2), member(3, "failed"))
    result = await picluster("--socket", str(path), "models")
    assert [line.split()[:2] for line in result.out.splitlines()[1:]] == [
        ["qwen2.5-1.5b", "pi-1"],
        ["qwen2.5-1.5b", "pi-2"],
    ]
    as_json = await picluster("--socket", str(path), "models", "--json")
    assert json.loads(as_json.out) == {"qwen2.5-1.5b": ["pi-1", "pi-2"]}


async def test_recent_events_are_told_and_the_command_ends(house: Node, served: Served, path: Path) -> None:
    house.bus.publish("leader", {"text": "pi-1 coordinates term 12"})
    house.bus.publish("run", {"text": "evil \x1b[2J title"})
    result = await picluster("--socket", str(path), "events")
    first, second = result.out.splitlines()
    assert first.endswith("leader        pi-1 coordinates term 12")
    assert second.endswith("evil \\x1b[2J title")


async def test_followed_events_come_as_they_happen_and_end_with_the_daemon(
    house: Node, served: Served, path: Path
) -> None:
    house.bus.publish("leader", {"text": "first"})
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "piclusterd.cli.main", "--socket", str(path), "events", "-f", "--json",
        stdout=asyncio.subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert child.stdout is not None
    async with asyncio.timeout(30):
        assert json.loads(await child.stdout.readline())["data"]["text"] == "first"
        house.bus.publish("leader", {"text": "second"})
        assert json.loads(await child.stdout.readline())["data"]["text"] == "second"
        house.bus.close()
        assert await child.wait() == 0
