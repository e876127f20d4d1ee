"""A house of four nodes to look at, and the doors of one of them: hand-made views served on real sockets."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from piclusterd.errors import NotFound, PiclusterError
from piclusterd.events import HookTaken, LeaderChanged
from piclusterd.ids import NodeId, RunId
from piclusterd.views import MemberView, RunView, View
from piclusterd.web.admin import (
    AdminDoors,
    JobLine,
    JobShown,
    JobWish,
    MoveWish,
    RemoveWish,
    TokenLine,
    TokenMade,
    TokenWish,
    VoterWish,
)
from piclusterd.web.app import Doors, make_app
from piclusterd.web.keys import Keyring
from piclusterd.web.listener import serve
from piclusterd.web.stream import EventBus
from piclusterd.wire import Facts, Head, Hook, ModelFacts, Voters
from piclusterd.workflows.deploy import OwnersWish

GB = 2**30
WALL = 1_800_000_000.0
HOSTILE = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'


def node(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


def member(number: int, state: str = "alive", **facts: Any) -> MemberView:
    told: dict[str, Any] = {
        "name": f"pi-{number}",
        "addresses": (f"192.168.1.1{number}:7946",),
        "api": f"http://192.168.1.1{number}:8746",
        "release": "0.1.0",
        "board": "Raspberry Pi 5 Model B",
        "cpu_percent": 12.0 * number,
        "memory_used": 3 * GB,
        "memory_total": 8 * GB,
        "temperature_c": 48.0 + number,
        "models": (ModelFacts("qwen2.5-1.5b", busy=1, queued=2, decode_tps=10.2, prefill_tps=80.0, context=4096),),
        "ledger_entries": 18_422,
        **facts,
    }
    heard = None if number == 1 else 0.4 if state == "alive" else 42.0
    return MemberView(node(number), state, 3600.0, heard, Facts(**told), number <= 3, "")


def relay() -> MemberView:
    return member(
        4, name="vps-1", role="relay", board="", models=(), temperature_c=None, addresses=("203.0.113.9:7946",)
    )


def run(number: int, title: str = "The door opens twice", state: str = "done", detail: str = "P1, bug") -> RunView:
    hlc = int((WALL - 60 * number) * 1000) << 16
    return RunView(RunId(f"{number:032x}"), "triage", title, state, "update", 1, detail, hlc)


def view(*members: MemberView, **changes: Any) -> View:
    """A calm cluster seen from pi-1, its coordinator; `changes` replace fields of the view."""
    calm = View(
        me=node(1),
        name="pi-1",
        cluster="home",
        role="leader",
        term=12,
        leader=node(1),
        voters=(node(1), node(2), node(3)),
        quorum=3,
        members=members or (member(1), member(2), member(3), relay()),
        heads=(Head(node(1), 1, 18_000), Head(node(2), 1, 422)),
        digest="9f2c4e1a77b05d31",
        entries=18_422,
        runs=(run(1), run(2, "Login fails on Safari", "open", "")),
        hooks=117,
    )
    return dataclasses.replace(calm, **changes)


def ring(*keys: str) -> Keyring:
    """The keys in these lines of a file."""
    return Keyring(lambda: keys)


class Node:
    """What a daemon injects, played by a few fields that a test may set."""

    def __init__(self, picture: View | None = None) -> None:
        self.picture: View | PiclusterError = picture or view()
        self.taken: list[Hook] = []
        self.hook_answer: HookTaken | PiclusterError = HookTaken(RunId("0" * 32), False)
        self.bus = EventBus(wall=lambda: WALL)
        self.edge: dict[str, Any] = {"url": "https://hub.example", "connected": True, "last_seq": 117}
        self.ledger_fault = ""
        self.job_wishes: list[JobWish] = []
        self.objection: PiclusterError | None = None
        self.tokens = {"k7f2": TokenLine("k7f2", 3500, 1)}

    async def view(self) -> View:
        if isinstance(self.picture, PiclusterError):
            raise self.picture
        return self.picture

    async def take_hook(self, hook: Hook) -> HookTaken:
        if isinstance(self.hook_answer, PiclusterError):
            raise self.hook_answer
        self.taken.append(hook)
        return self.hook_answer

    async def create_token(self, wish: TokenWish) -> TokenMade:
        self.tokens["new"] = TokenLine("new", wish.ttl_s, wish.uses)
        return TokenMade("pcl1.ca.new.secret", "new", "192.168.1.11:7946", wish.ttl_s)

    async def list_tokens(self) -> Sequence[TokenLine]:
        return list(self.tokens.values())

    async def revoke_token(self, token: str) -> bool:
        return self.tokens.pop(token, None) is not None

    async def change_voters(self, wish: VoterWish) -> Voters:
        return Voters(2, 7, (NodeId(wish.node),))

    async def move_leadership(self, wish: MoveWish) -> LeaderChanged:
        return LeaderChanged(13, NodeId(wish.node or node(2)))

    async def remove_node(self, wish: RemoveWish) -> NodeId:
        return NodeId(wish.node)

    async def rotate_ca(self, finish: bool) -> dict[str, object]:
        return {"stage": "over" if finish else "announced", "waiting": []}

    async def show_job(self, run: str) -> JobShown:
        assert isinstance(self.picture, View)
        shown = next((one for one in self.picture.runs if one.run == run), None)
        if shown is None:
            raise NotFound(f"there is no run {run}")
        lines = (JobLine(int(WALL * 1000), "pi-1", 12, "run.result", "classify", HOSTILE),)
        return JobShown(run, shown, lines)

    async def change_job(self, wish: JobWish) -> RunView:
        self.job_wishes.append(wish)
        if self.objection is not None:
            raise self.objection
        assert isinstance(self.picture, View)
        return next(one for one in self.picture.runs if one.run == wish.run)

    async def look_upgrade(self) -> dict[str, Any]:
        return {"version": "0.2.0", "sha256": "0" * 64, "nodes": [], "away": []}

    async def begin_upgrade(self, wish: OwnersWish) -> str:
        return "0" * 32

    def doors(self, **changes: Any) -> Doors:
        admin = AdminDoors(
            self.create_token, self.list_tokens, self.revoke_token, self.change_voters, self.move_leadership,
            self.remove_node, self.rotate_ca, self.show_job, self.change_job, self.look_upgrade, self.begin_upgrade,
        )  # fmt: skip
        told: dict[str, Any] = {
            "name": "pi-1",
            "release": "0.1.0",
            "view": self.view,
            "take_hook": self.take_hook,
            "bus": self.bus,
            "admin": admin,
            "edge": lambda: self.edge,
            "ledger_fault": lambda: self.ledger_fault,
            "wall": lambda: WALL,
            "clock_synced": lambda: False,
            "clock": lambda: 90.0,
            "started": 0.0,
            **changes,
        }
        return Doors(**told)


@asynccontextmanager
async def serving(doors: Doors, socket_path: Path | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the application on an ephemeral port (or on `socket_path` alone, where given)."""
    served = await serve(make_app(doors), "127.0.0.1", 0, socket_path)
    connector = aiohttp.UnixConnector(str(socket_path)) if socket_path else None
    base = "http://localhost" if socket_path else f"http://127.0.0.1:{served.port}"
    try:
        as_browser = {"Accept": "text/html, */*"}
        async with aiohttp.ClientSession(base, connector=connector, headers=as_browser) as session:
            yield session
    finally:
        await served.close()
