"""`picluster doctor` on a planted tree, beside a real node and without one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from piclusterd.web.app import make_app
from piclusterd.web.listener import serve
from tests.board.test_sensors import board
from tests.web.house import Node, member, view

from .command import picluster

DEMO = Path(__file__).parents[2] / "piclusterd/inference/demo_model/triage-demo.gguf"


async def told(tmp_path: Path, *words: str, socket: str = "none.sock") -> tuple[int, dict[str, dict[str, str]]]:
    """(exit code, finding by id) of a run that sees `tmp_path/root` and `tmp_path/state`."""
    (tmp_path / "state").mkdir(exist_ok=True)
    ended = await picluster(
        "--socket", str(tmp_path / socket), "doctor", "--json", "--root", str(board(tmp_path / "root")),
        "--state-dir", str(tmp_path / "state"), *words,
    )  # fmt: skip
    assert not ended.err, ended
    answer = json.loads(ended.out)
    assert answer["format"] == 1
    return ended.code, {finding["id"]: finding for finding in answer["findings"]}


async def test_a_planted_fault_is_exit_code_1_and_a_note_alone_is_0(tmp_path: Path) -> None:
    code, found = await told(tmp_path, "--section", "power")
    assert (code, found) == (0, {})
    board(tmp_path / "root", sys__class__hwmon__hwmon1__in0_lcrit_alarm="1\n")
    ended = await picluster(
        "doctor", "--root", str(tmp_path / "root"), "--state-dir", str(tmp_path / "state"), "--section", "power"
    )
    assert ended.code == 1
    first, why, fix, end = ended.out.splitlines()
    assert first.split()[:2] == ["warning", "power.undervolt"]
    assert why.split()[0] == "why:"
    assert "27 W" in fix
    assert end.startswith("1 finding of")
    code, found = await told(tmp_path, "--section", "mem.psi")
    assert (code, list(found)) == (0, ["mem.psi_off"])


async def test_a_node_that_never_joined_is_told_how_to(tmp_path: Path) -> None:
    _, found = await told(tmp_path, "--section", "node")
    assert list(found) == ["node.no_cluster"]
    assert "picluster join" in found["node.no_cluster"]["fix"]


async def test_a_joined_node_without_its_daemon_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    await picluster("init", "--cluster", "home", "--expect", "1", "--state-dir", str(tmp_path / "state"))
    code, found = await told(tmp_path, "--section", "node")
    assert (code, list(found)) == (1, ["node.down"])


async def test_a_model_whose_content_is_not_what_its_sum_says_is_found(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(DEMO.read_bytes())
    (tmp_path / "c.toml").write_text(f'[[models]]\nname = "m"\npath = "{model}"\n')
    words = ("--config", str(tmp_path / "c.toml"), "--section", "model")
    (tmp_path / "m.gguf.sha256").write_text(hashlib.sha256(model.read_bytes()).hexdigest() + "  m.gguf\n")
    assert await told(tmp_path, *words) == (0, {})
    model.chmod(0o600)
    assert list((await told(tmp_path, *words))[1]) == ["model.private"]
    with model.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    code, found = await told(tmp_path, *words)
    assert (code, list(found)) == (1, ["model.file"])


async def test_the_neighbours_are_judged_by_what_the_daemon_tells(tmp_path: Path) -> None:
    house = Node()
    house.picture = view(member(1), member(2, release="0.0.1"), member(3, "failed"))
    listener = await serve(make_app(house.doors()), "127.0.0.1", 0, tmp_path / "api.sock")
    try:
        _, found = await told(tmp_path, "--section", "cluster", socket="api.sock")
        assert "pi-2 0.0.1" in found["cluster.versions"]["what"]
    finally:
        await listener.close()
