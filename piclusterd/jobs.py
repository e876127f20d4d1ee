"""Runs for people: shown from this node's ledger, changed by whoever coordinates.

picluster jobs retry ─▶ admin door ─▶ Jobs.change ─┬ we coordinate ─▶ mailbox: ChangeRun ─▶ RunView
                                                   └ else: request `change-run` to the coordinator
picluster jobs show ──▶ admin door ─▶ Jobs.show ─▶ what the ledger here says of the run, in order
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from .cluster.links import Links
from .errors import NotFound
from .events import ChangeRun, Fact
from .ids import NodeId, RunId, run_id
from .ledger import trail
from .mailbox import Mailbox
from .views import RunView, View
from .web.admin import JobLine, JobShown, JobWish

CHANGE_RUN = "change-run"
"""Request between peers; its body is a `JobWish`, its answer a `RunView`."""
CHANGE_S = 15.0
"""A record on W ledgers, or the refusal of it."""
SAID_CHARS_MAX = 2000
"""Of one step's result on its line."""


class Jobs:
    def __init__(
        self, me: NodeId, name: str, mailbox: Mailbox, links: Links, view: Callable[[], Awaitable[View]], ledger: Path
    ) -> None:
        """`view()` is this node's picture, `ledger` its file."""
        self._me = me
        self._name = name
        self._mailbox = mailbox
        self._links = links
        self._view = view
        self._ledger = ledger

    async def change(self, wish: JobWish) -> RunView:
        """By the coordinator, which may be another node. Raises what it objects."""
        leader = (await self._view()).leader
        if leader is None or leader == self._me:
            return await self._change_here(wish, self._name)
        async with aclosing(self._links.request(leader, CHANGE_RUN, msgspec.json.encode(wish), CHANGE_S)) as chunks:
            return msgspec.json.decode(b"".join([chunk async for chunk in chunks]), type=RunView)

    async def serve_peer(self, body: bytes, peer: str) -> bytes:
        """A member asks on behalf of its owner. `peer`: its name."""
        return msgspec.json.encode(await self._change_here(msgspec.json.decode(body, type=JobWish), peer))

    async def _change_here(self, wish: JobWish, by: str) -> RunView:
        ask = partial(ChangeRun, what=wish.what, run=RunId(wish.run), by=f"the owner, on {by}")
        changed: RunView = await self._mailbox.ask(ask, CHANGE_S)
        return changed

    async def show(self, run: str) -> JobShown:
        """Raises `NotFound` where this node's ledger does not know it."""
        facts = await asyncio.to_thread(trail.speaking_of, self._ledger, (run,))
        seen = await self._view()
        names = {member.node: member.facts.name for member in seen.members}
        view = next((one for one in seen.runs if one.run == run), None)
        mine = [fact for fact in facts if fact.body.get("run") == run]
        hook = await asyncio.to_thread(self._event_of, run, view)
        told = [fact for fact in (hook, *mine) if fact is not None]
        if not told:
            raise NotFound(f"there is no run {run[:64]}", "it never was, or it ended and the ledger let it go")
        return JobShown(run, view, tuple(_line(fact, names) for fact in told))

    def _event_of(self, run: str, view: RunView | None) -> Fact | None:
        """The event that began it: its entry knows the run only by the key that both are made of."""
        word = view.title if view is not None else ""
        found = trail.speaking_of(self._ledger, (word,)) if word else []
        return next((fact for fact in found if fact.kind == "hook" and _began(fact) == run), None)


def _began(hook: Fact) -> str:
    return run_id(str(hook.body.get("workflow", "")), str(hook.body.get("key", "")))


def _line(fact: Fact, names: Mapping[NodeId, str]) -> JobLine:
    node = names.get(fact.log.origin) or str(fact.log.origin)
    return JobLine(fact.hlc >> 16, node, fact.term, fact.kind, str(fact.body.get("step", "")), _said(fact))


def _said(fact: Fact) -> str:
    body: Mapping[str, Any] = fact.body
    match fact.kind:
        case "hook":
            text = f"{body['source']} {body['event']}: {body.get('title', '')}"
        case "run.intent":
            text = str(body.get("asks") or f"try {body.get('attempt', 1)}")
        case "run.result":
            text = json.dumps(body.get("value"), default=repr, ensure_ascii=False)
        case "run.done":
            text = f"{body.get('outcome')}: {body.get('detail', '')}".rstrip(": ")
        case _:
            text = ""
    return text if len(text) <= SAID_CHARS_MAX else text[: SAID_CHARS_MAX - 1] + "…"
