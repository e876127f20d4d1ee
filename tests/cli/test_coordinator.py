"""`picluster coordinator move` against the real doors of a node."""

from __future__ import annotations

from pathlib import Path

import pytest

from piclusterd.events import LeaderChanged
from piclusterd.ids import NodeId
from piclusterd.web.admin import MoveWish
from piclusterd.web.app import make_app
from piclusterd.web.listener import serve
from tests.web.house import Node, node

from .command import picluster


@pytest.fixture
def house() -> Node:
    return Node()


async def test_it_says_who_coordinates_afterwards(path: str) -> None:
    for chosen, leader in (("pi-3", "pi-3"), (node(3), "pi-3"), (None, "pi-2")):
        result = await picluster("--socket", path, "coordinator", "move", *([chosen] if chosen else []))
        assert (result.code, result.out, result.err) == (0, f"{leader} coordinates now (term 13).\n", "")


async def test_another_winner_than_the_one_named_is_a_failure(tmp_path: Path) -> None:
    class Rival(Node):
        async def move_leadership(self, wish: MoveWish) -> LeaderChanged:
            return LeaderChanged(14, NodeId(node(1)))

    listener = await serve(make_app(Rival().doors()), "127.0.0.1", 0, tmp_path / "api.sock")
    result = await picluster("--socket", str(tmp_path / "api.sock"), "coordinator", "move", "pi-2")
    await listener.close()
    assert (result.code, result.out) == (1, "")
    assert "pi-1 coordinates now" in result.err


async def test_an_unknown_node_is_told(path: str) -> None:
    result = await picluster("--socket", path, "coordinator", "move", "pi-9")
    assert result.code == 1
    assert "no member has that name or id" in result.err
