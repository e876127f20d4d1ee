"""`picluster load --split`: what it says before it does anything, and `picluster ps` on both boards afterwards."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from piclusterd.config import Inference
from piclusterd.stock import Stock
from piclusterd.web import models
from piclusterd.web.app import make_app
from piclusterd.web.listener import serve
from tests.inference.rig import NAME
from tests.inference.test_splits import ON, Side, needs_rpc, two
from tests.web.house import Node

from .command import Result, picluster


class Board:
    """A node's doors."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    async def run(self, *words: str) -> Result:
        return await picluster("--socket", self._socket, *words)


@asynccontextmanager
async def doors_of(side: Side, socket: str) -> AsyncIterator[Board]:
    house = Node()
    stock = Stock(side.node, side.library, side.links.request, house.view, side.splits)
    listener = await serve(
        make_app(house.doors(extra_routes=models.routes(stock.ask, stock.take))), "127.0.0.1", 0, Path(socket)
    )
    try:
        yield Board(socket)
    finally:
        await listener.close()


@asynccontextmanager
async def boards(tmp_path: Path, here: Inference = ON) -> AsyncIterator[tuple[Board, Board]]:
    async with (
        two(tmp_path, here) as (head, other),
        doors_of(head, str(tmp_path / "1.sock")) as one,
        doors_of(other, str(tmp_path / "2.sock")) as two_,
    ):
        yield one, two_


@needs_rpc
async def test_the_prediction_is_shown_first_and_ps_tells_who_holds_what(tmp_path: Path) -> None:
    async with boards(tmp_path) as (head, other):
        asked = await head.run("load", NAME, "--split")
        assert asked.code == 130  # nobody said yes
        assert re.search(r"pi-1 +2 .*\n *pi-2 +2 ", asked.out)
        assert re.search(r"Predicted: [\d.]+ tokens/s, loaded in \d+ s\. Layers run one after the other", asked.out)
        assert "Memory of pi-1, pi-2 was not measured yet: taken for a Pi 4's." in asked.out
        assert (await head.run("ps")).out.startswith("No model is loaded")
        done = await head.run("load", NAME, "--split", "--yes")
        assert (done.code, done.out.splitlines()[-1]) == (0, f"{NAME} is ready.")
        shown = (await head.run("ps")).out
        assert "layers: pi-1 2, pi-2 2" in shown
        assert "stays" in shown
        assert f"part of {NAME}" in (held := (await other.run("ps")).out)
        assert "for pi-1" in held
        again = await head.run("load", NAME, "--split", "--yes")
        assert (again.code, "is loaded already" in again.err) == (1, True)
        assert (await head.run("unload", NAME)).out == f"{NAME} is unloaded.\n"


async def test_a_node_whose_owner_wants_none_splits_none(tmp_path: Path) -> None:
    async with boards(tmp_path, Inference()) as (head, _):
        told = await head.run("load", NAME, "--split", "--yes")
        assert told.code == 1
        assert "pi-1 splits no models" in told.err
        assert "Set [inference] split = true" in told.err
