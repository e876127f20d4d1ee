"""Upgrades as the daemon sees them: a node drains and asks for its own, the coordinator asks one node after another.

    coordinator, a run of `deploy` ─▶ perform ─┬ look    what the source has, who runs what, in which order
                                               ├ leave   a node that coordinates hands over first
                                               └ node ──"upgrade"──▶ begin: drain ─▶ wish ─▶ (upgrade.py) ─▶ told
                                                    asked again until it is done, alive again, and serves what it served

A node is only taken while every other voter is there, so that there is always a majority, and copies on W disks. While
it drains it is asked last (its flag says so) and finishes what it was asked. A wish has an id made of the run: asked
twice it is one upgrade, and the answer to the second is how far the first one is.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .config import Config
from .errors import NotFound, PiclusterError, Unavailable, UserError
from .events import HookTaken
from .ids import NodeId
from .integrations.outcome import CallFailed
from .upgrade import FINAL, Told, Wish, read_told, write_wish
from .upgrade_source import VERSION, find, order
from .views import MemberView, View
from .web.admin import MoveWish
from .wire import DRAINING, Hook, ModelFacts
from .workflows.deploy import EVENT, OwnersWish

log = logging.getLogger("piclusterd")

REQUEST = "upgrade"
"""Between peers: a `Wish` for a `Told`."""
ASK_S = 10.0
LOOK_S = 0.5
STEP_S = 240.0
"""One step of a run waits so long and is then tried again; less than `workflows.run.ACT_TIMEOUT_S`."""
QUIET_S = 1.0
"""A draining node must have had nothing to do for so long: by then its flag is everywhere."""
STALE_S = 3600.0
"""A wish that nobody took up by then was never seen: no program waits for it on this machine."""


def installed_at(prefix: str = sys.prefix) -> Path | None:
    """Where releases lie side by side, as systemd/install lays them; None where this one runs from elsewhere."""
    path = Path(prefix)
    return path.parent.parent if path.parent.name == "releases" else None


class Upgrades:
    def __init__(
        self,
        me: NodeId,
        config: Config,
        view: Callable[[], Awaitable[View]],
        errand: Callable[[str, Wish, NodeId], Awaitable[Told]],
        move: Callable[[MoveWish], Awaitable[Any]],
        models: Callable[[], Sequence[ModelFacts]],
        take_hook: Callable[[Hook], Awaitable[HookTaken]],
        prefix: Path | None = None,
    ) -> None:
        """`errand(REQUEST, wish, node)`: another node's `begin`. `models()`: what this node's have to do."""
        self._me = me
        self._state = config.state_dir
        self._policy = config.upgrade
        self._view = view
        self._errand = errand
        self._move = move
        self._models = models
        self._take_hook = take_hook
        self.changed: Callable[[], None] = lambda: None
        """Hears of a new flag."""
        self._prefix = prefix or installed_at()
        self._wish: Wish | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        return (DRAINING,) if self._wish is not None else ()

    @property
    def errands(self) -> dict[str, tuple[type[Wish], Callable[[Wish], Awaitable[Told]], type[Told], float]]:
        """What other nodes may ask of this one (`desk.Errand`)."""
        return {REQUEST: (Wish, self.begin, Told, ASK_S)}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # this node -----------------------------------------------------------------------------------------------
    async def begin(self, wish: Wish) -> Told:
        """Drain, and have the upgrade done; asked again, how far it is. Raises `PiclusterError`."""
        if self._prefix is None:
            raise UserError(
                "this node cannot be upgraded from afar", f"it runs from {sys.prefix}, not from releases side by side",
                "Install it with systemd/install.",
            )  # fmt: skip
        told = await asyncio.to_thread(read_told, self._prefix)
        if told.id == wish.id:
            if told.state in FINAL:
                self._rest()
            return told
        if self._wish is not None and self._wish.id != wish.id:
            raise Unavailable("another upgrade of this node is under way", "", "Wait for its end.", LOOK_S)
        if self._wish is None:
            self._wish = wish
            self.changed()
            self._task = asyncio.create_task(self._drain(wish, self._prefix), name="upgrade")
        return Told(wish.id, "draining", wish.version)

    async def _drain(self, wish: Wish, prefix: Path) -> None:
        """Until nothing is asked of this node any more, or for as long as is granted; then the wish, and its end."""
        quiet = 0.0
        try:
            async with asyncio.timeout(self._policy.drain_s):
                while quiet < QUIET_S:
                    await asyncio.sleep(LOOK_S / 2)
                    quiet = quiet + LOOK_S / 2 if not self._busy else 0.0
        except TimeoutError:
            log.warning("still at work after %g s of draining; upgraded all the same", self._policy.drain_s)
        await asyncio.to_thread(write_wish, self._state, wish)
        try:
            async with asyncio.timeout(STALE_S):
                await self._ended(wish, prefix)
        except TimeoutError:
            log.error("nobody took the upgrade up; is piclusterd-upgrade.path enabled?")
        self._rest()

    async def _ended(self, wish: Wish, prefix: Path) -> None:
        while True:
            told = await asyncio.to_thread(read_told, prefix)
            if told.id == wish.id and told.state in FINAL:
                return
            await asyncio.sleep(LOOK_S)

    @property
    def _busy(self) -> int:
        """Requests that this node's models answer, or will."""
        return sum(model.busy + model.queued for model in self._models())

    def _rest(self) -> None:
        """The old release runs on: it serves as before."""
        if self._wish is not None:
            self._wish = None
            self.changed()

    # the owner -----------------------------------------------------------------------------------------------
    async def begin_run(self, wish: OwnersWish) -> str:
        """The id of the run that does it, whoever coordinates. Raises `PiclusterError`."""
        if wish.version and not VERSION.fullmatch(wish.version):
            raise UserError(f"{wish.version!r} is no version", "", "Write 0.2.0.")
        key = f"upgrade:{secrets.token_hex(8)}"
        taken = await self._take_hook(Hook("cluster", key, EVENT, msgspec.json.encode(wish)))
        return str(taken.run)

    # the coordinator -----------------------------------------------------------------------------------------
    async def perform(self, operation: str, arguments: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The service `upgrades`. Raises `CallFailed` for what other nodes and the source did."""
        try:
            match operation:
                case "look":
                    return await self.look(str(arguments["version"]), str(arguments["action"]))
                case "leave":
                    return await self._leave(NodeId(str(arguments["node"])))
                case "node":
                    wish = Wish(key, arguments["action"], str(arguments["version"]), str(arguments["sha256"]))
                    return await self._upgrade(NodeId(str(arguments["node"])), wish, arguments)
                case _:
                    raise CallFailed(f"upgrades have no operation {operation!r}", retryable=False)
        except CallFailed:
            raise
        except PiclusterError as fault:
            passes = isinstance(fault, Unavailable)
            raise CallFailed(fault.what, fault.why, fault.fix, retryable=passes) from fault

    async def look(self, version: str = "", action: str = "install") -> dict[str, Any]:
        """`{version, sha256, nodes: [{node, name, release, models}], away}`; the coordinator is the last of `nodes`."""
        if version and not VERSION.fullmatch(version):
            raise UserError(f"{version[:40]!r} is no version", "", "Write 0.2.0.")
        view = await self._view()
        here = [member for member in view.members if member.state == "alive"]
        here.sort(key=lambda member: (member.node == view.leader, member.facts.role != "relay", member.facts.name))
        told: dict[str, Any] = {"nodes": [_line(member) for member in here], "version": "", "sha256": ""}
        told["away"] = [m.facts.name or m.node for m in view.members if m.state in ("suspect", "failed")]
        if action == "rollback":  # those that run the newest go back
            newest = max((order(member.facts.release) for member in here), default=None)
            told["nodes"] = [_line(member) for member in here if order(member.facts.release) == newest]
        else:
            release = await asyncio.to_thread(find, self._policy.source, version)
            told |= {"version": release.version, "sha256": release.sha256}
        return told

    async def _leave(self, node: NodeId) -> Mapping[str, Any]:
        view = await self._view()
        others = [m for m in view.members if m.voter and m.node != node and m.state == "alive"]
        if node != self._me or not others:
            return {"moved": False}
        await self._move(MoveWish())
        return {"moved": True}

    async def _upgrade(self, node: NodeId, wish: Wish, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """`{state, why, release}` of the node, once it is at its end and, where that is well, back at work."""
        await self._check_majority(node)
        try:
            async with asyncio.timeout(STEP_S):
                told = await self._until_final(node, wish)
                release = await self._until_back(node, told, arguments)
        except TimeoutError:
            why = f"not at its end after {STEP_S:g} s"
            raise CallFailed(f"{arguments['name']} is still at it", why, retryable=True) from None
        return {"state": told.state, "why": told.why, "release": release}

    async def _check_majority(self, node: NodeId) -> None:
        missing = [m.facts.name or m.node for m in (await self._view()).members
                   if m.voter and m.node != node and m.state != "alive"]  # fmt: skip
        if missing:
            why = f"{', '.join(missing)} is away, and another voter's restart could leave no majority"
            raise CallFailed("not now:", why, "Bring it back, then retry the run.", retryable=True, retry_after_s=5.0)

    async def _until_final(self, node: NodeId, wish: Wish) -> Told:
        while True:
            try:
                told = await (self.begin(wish) if node == self._me else self._errand(REQUEST, wish, node))
                if told.state in FINAL:
                    return told
            except (Unavailable, OSError, TimeoutError):
                pass  # it restarts
            except NotFound as fault:
                raise CallFailed(fault.what, fault.why, "That node's release is too old.", retryable=False) from fault
            await asyncio.sleep(LOOK_S)

    async def _until_back(self, node: NodeId, told: Told, arguments: Mapping[str, Any]) -> str:
        """Its release, once it is alive with that and has what it had before."""
        wanted = set(arguments.get("models", ()))
        while True:
            for member in (await self._view()).members:
                there = {model.name for model in member.facts.models}
                fits = told.state == "failed" or member.facts.release == told.version
                if member.node == node and member.state == "alive" and fits and wanted <= there and not _drains(member):
                    return member.facts.release
            await asyncio.sleep(LOOK_S)


def _drains(member: MemberView) -> bool:
    return DRAINING in member.facts.flags


def _line(member: MemberView) -> dict[str, Any]:
    facts = member.facts
    models = sorted(model.name for model in facts.models)
    return {"node": member.node, "name": facts.name or member.node, "release": facts.release, "models": models}
