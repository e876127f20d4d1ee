"""Upgrades as the daemon sees them: draining, wishes that are asked twice, order, majorities, and coming back."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from piclusterd import config
from piclusterd.errors import NotFound, PiclusterError, Unavailable, UserError
from piclusterd.events import HookTaken
from piclusterd.ids import NodeId, RunId
from piclusterd.integrations.outcome import CallFailed
from piclusterd.upgrade import TOLD, Told, Wish, read_wish
from piclusterd.upgrade_desk import Upgrades, installed_at
from piclusterd.views import MemberView, View
from piclusterd.web.admin import MoveWish
from piclusterd.wire import Hook, ModelFacts
from piclusterd.workflows.deploy import OwnersWish
from tests.web.house import member, node, relay, view

ID = "0b7c5a4e-0000-4000-8000-000000000001"
WISH = Wish(ID, "install", "0.2.0", "b" * 64)


class Peer:
    """Another node: tells the states of `tells` one after another, the last for ever. A fault among them is raised."""

    def __init__(self, *tells: Told | Exception) -> None:
        self.tells = list(tells)
        self.asked: list[tuple[NodeId, Wish]] = []

    async def ask(self, node: NodeId, wish: Wish) -> Told:
        self.asked.append((node, wish))
        told = self.tells.pop(0) if len(self.tells) > 1 else self.tells[0]
        if isinstance(told, Exception):
            raise told
        return told


class House:
    def __init__(self, root: Path, picture: View | None = None, source: str = "", **policy: Any) -> None:
        self.prefix, self.state = root / "opt", root / "state"
        self.prefix.mkdir()
        self.state.mkdir()
        self.picture = picture or view()
        self.peer = Peer(Told(ID, "done", "0.2.0"))
        self.busy = 0
        self.moves = 0
        self.hooks: list[Hook] = []
        policy = {"source": source, "drain_s": 5.0, **policy}
        settings = config.Config(node=config.Node(state_dir=str(self.state)), upgrade=config.Upgrade(**policy))
        self.upgrades = Upgrades(
            NodeId(node(1)), settings, self.view, lambda name, wish, at: self.peer.ask(at, wish), self.move,
            lambda: (ModelFacts("small", busy=self.busy),), self.take, self.prefix,
        )  # fmt: skip

    async def view(self) -> View:
        return self.picture

    async def move(self, wish: MoveWish) -> None:
        self.moves += 1

    async def take(self, hook: Hook) -> HookTaken:
        self.hooks.append(hook)
        return HookTaken(RunId("r" * 32), False)

    def tell(self, told: Told) -> None:
        (self.prefix / TOLD).write_bytes(msgspec.json.encode(told))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.get_running_loop().run_in_executor(None, lambda: None)


async def failure(work: Awaitable[Any]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        async with asyncio.timeout(20):
            await work
    return caught.value


def arguments(number: int = 2, **changes: Any) -> dict[str, Any]:
    told = {"node": node(number), "name": f"pi-{number}", "models": [], "action": "install", "version": "0.2.0",
            "sha256": "b" * 64}  # fmt: skip
    return told | changes


def upgraded(number: int, release: str = "0.2.0", **facts: Any) -> View:
    def now(one: MemberView) -> MemberView:
        new = msgspec.structs.replace(one.facts, release=release, **facts)
        return dataclasses.replace(one, facts=new) if one.node == node(number) else one

    return dataclasses.replace(view(), members=tuple(map(now, view().members)))


# this node -----------------------------------------------------------------------------------------------------------
async def test_it_drains_until_it_is_idle_and_then_leaves_its_wish(house: House) -> None:
    changes: list[tuple[str, ...]] = []
    house.upgrades.changed = lambda: changes.append(house.upgrades.flags)
    house.busy = 1
    assert (await house.upgrades.begin(WISH)).state == "draining"
    assert house.upgrades.flags == ("draining",)
    assert (await house.upgrades.begin(WISH)).state == "draining"
    assert read_wish(house.state) is None, "there is an answer under way"
    house.busy = 0
    await until(lambda: read_wish(house.state) == WISH)
    house.tell(Told(ID, "failed", "0.2.0", "no room"))
    await until(lambda: house.upgrades.flags == ())
    assert changes == [("draining",), ()]
    assert (await house.upgrades.begin(WISH)).state == "failed", "asked again it tells the end"
    await house.upgrades.close()


async def test_answers_that_do_not_end_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    house = House(tmp_path, drain_s=0.1)
    house.busy = 1
    await house.upgrades.begin(WISH)
    await until(lambda: read_wish(house.state) == WISH)
    await house.upgrades.close()


async def test_one_upgrade_at_a_time(house: House) -> None:
    await house.upgrades.begin(WISH)
    with pytest.raises(Unavailable, match="under way"):
        await house.upgrades.begin(Wish(ID[:-1] + "2", "install", "0.3.0", "c" * 64))
    house.tell(Told(ID, "done", "0.2.0"))
    assert (await house.upgrades.begin(WISH)).state == "done"
    assert house.upgrades.flags == ()
    await house.upgrades.close()


async def test_a_checkout_is_not_upgraded_from_afar(house: House) -> None:
    assert installed_at("/opt/piclusterd/releases/0.1.0-aa") == Path("/opt/piclusterd")
    assert installed_at("/srv/checkout/.venv") is None
    house.upgrades._prefix = None
    with pytest.raises(UserError, match="systemd/install"):
        await house.upgrades.begin(WISH)
    await house.upgrades.close()


# the coordinator -----------------------------------------------------------------------------------------------------
def source(root: Path) -> str:
    (root / "SHA256SUMS").write_text(f"{'b' * 64}  piclusterd-0.2.0-py3-none-any.whl\n")
    return str(root)


async def test_a_look_names_the_newest_release_and_the_coordinator_last(tmp_path: Path) -> None:
    house = House(tmp_path, view(member(1), member(2), member(3, "failed"), relay()), source(tmp_path))
    seen = await house.upgrades.perform("look", {"version": "", "action": "install"}, "k")
    assert (seen["version"], seen["sha256"]) == ("0.2.0", "b" * 64)
    assert [one["name"] for one in seen["nodes"]] == ["vps-1", "pi-2", "pi-1"]
    assert seen["away"] == ["pi-3"]
    assert not (await failure(house.upgrades.perform("look", {"version": "../x", "action": "install"}, "k"))).retryable
    assert not (await failure(house.upgrades.perform("look", {"version": "0.9.0", "action": "install"}, "k"))).retryable


async def test_a_rollback_is_for_those_that_run_the_newest(tmp_path: Path) -> None:
    house = House(tmp_path, upgraded(2))
    seen = await house.upgrades.perform("look", {"version": "", "action": "rollback"}, "k")
    assert [one["name"] for one in seen["nodes"]] == ["pi-2"]
    assert seen["version"] == ""


async def test_a_coordinator_hands_over_before_its_own_turn_and_nobody_else_does(house: House) -> None:
    assert await house.upgrades.perform("leave", {"node": node(2)}, "k") == {"moved": False}
    assert await house.upgrades.perform("leave", {"node": node(1)}, "k") == {"moved": True}
    house.picture = view(member(1), member(2, "failed"), member(3, "failed"))
    assert await house.upgrades.perform("leave", {"node": node(1)}, "k") == {"moved": False}
    assert house.moves == 1


async def test_a_node_is_asked_until_it_is_done_alive_and_has_its_models_again(house: House) -> None:
    house.peer = Peer(Told(ID, "draining"), Unavailable("it restarts"), OSError("gone"), Told(ID, "done", "0.2.0"))
    house.picture = upgraded(2, release="0.1.0")
    work = asyncio.create_task(house.upgrades.perform("node", arguments(models=["small"]), ID))
    await until(lambda: len(house.peer.asked) >= 4)
    assert not work.done()
    house.picture = upgraded(2, models=())
    await asyncio.gather(*[asyncio.to_thread(lambda: None) for _ in range(3)])
    assert not work.done()
    house.picture = view()
    small = house.picture.members[1].facts.models[0].name
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    house.picture = upgraded(2)
    end = await house.upgrades.perform("node", arguments(models=[small]), ID)
    assert end == {"state": "done", "why": "", "release": "0.2.0"}
    assert set(house.peer.asked) == {(NodeId(node(2)), WISH)}


async def test_a_node_that_went_back_is_told_as_such(house: House) -> None:
    house.peer = Peer(Told(ID, "rolled-back", "0.1.0", "0.2.0 was not ready"))
    house.picture = upgraded(2, release="0.1.0")
    end = await house.upgrades.perform("node", arguments(), ID)
    assert (end["state"], end["why"], end["release"]) == ("rolled-back", "0.2.0 was not ready", "0.1.0")
    house.peer = Peer(Told(ID, "failed", "0.2.0", "no room"))
    assert (await house.upgrades.perform("node", arguments(), ID))["state"] == "failed"


async def test_no_node_is_taken_while_another_voter_is_away(house: House) -> None:
    house.picture = view(member(1), member(2), member(3, "suspect"))
    fault = await failure(house.upgrades.perform("node", arguments(), ID))
    assert fault.retryable
    assert "pi-3 is away" in str(fault)
    assert house.peer.asked == []
    itself = asyncio.create_task(house.upgrades.perform("node", arguments(3), ID))
    await until(lambda: house.peer.asked != [])  # it may be away itself: it may just restart
    itself.cancel()
    await asyncio.gather(itself, return_exceptions=True)


async def test_what_stays_is_given_up_and_what_passes_is_not(house: House) -> None:
    house.peer = Peer(NotFound("unknown request"))
    assert not (await failure(house.upgrades.perform("node", arguments(), ID))).retryable
    house.peer = Peer(UserError("this node cannot be upgraded from afar"))
    assert not (await failure(house.upgrades.perform("node", arguments(), ID))).retryable
    assert not (await failure(house.upgrades.perform("reboot", {}, ID))).retryable


async def test_the_only_node_upgrades_itself(house: House) -> None:
    house.picture = dataclasses.replace(upgraded(1), members=upgraded(1).members[:1])
    house.tell(Told(ID, "done", "0.2.0"))
    assert (await house.upgrades.perform("node", arguments(1), ID))["state"] == "done"


async def test_the_owner_s_word_is_an_event_like_any_other(house: House) -> None:
    assert await house.upgrades.begin_run(OwnersWish("install", "0.2.0")) == "r" * 32
    (hook,) = house.hooks
    assert (hook.source, hook.event) == ("cluster", "upgrade")
    with pytest.raises(PiclusterError, match="no version"):
        await house.upgrades.begin_run(OwnersWish("install", "latest"))
