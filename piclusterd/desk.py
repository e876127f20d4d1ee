"""The desk between the node and whoever asks it something: pages, API, peers, the operator; the hub has its own.

    web, peers ──▶ desk ──ask──▶ mailbox ──▶ node ──Answer──▶ desk ──▶ caller

It only translates: a question into an event with a ticket, an answer into what the caller understands.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from . import __version__
from .batches import Batches
from .cluster import renewal, succession
from .cluster.identity import Identity
from .cluster.links import Links
from .config import Config
from .errors import Unavailable, UserError
from .events import (
    ChangeVoters,
    Choice,
    HookArrived,
    HookTaken,
    LeaderChanged,
    MoveLeadership,
    RemoveNode,
    Snapshot,
    WhoServes,
)
from .hub_desk import HubDesk
from .ids import NodeId
from .inference import ferry, lan, providers, splits
from .inference.depot import Depot
from .inference.echoes import Echoes
from .inference.ferry import Ferry
from .inference.lan import Lan
from .inference.library import Library
from .inference.pool import Pool
from .inference.providers import Fallback
from .inference.serving import Serving
from .inference.spending import Spending
from .inference.splits import Splits
from .integrations.signatures import selftest_secret
from .jobs import CHANGE_RUN, Jobs
from .ledger.replicate import copies_needed
from .lessons import Lessons
from .mailbox import Mailbox
from .settling import Settling
from .shelf import NAMES as SHELF
from .shelf import Company, Shelf
from .stock import MODELS, Stock
from .token_desk import TokenDesk
from .upgrade_desk import Upgrades
from .uploads import Uploads
from .views import View
from .web import admin, files, models, moderations, ollama, openai, triage, why
from .web.app import Doors
from .web.hooks import Lists
from .web.keys import Keyring, visible
from .web.metered import Metered
from .web.metrics import Meters
from .web.stream import EventBus
from .web.visitors import Marked
from .why import WHY, Whys
from .wire import Facts, Hook, Voters
from .workflows.journal import Journal

log = logging.getLogger("piclusterd")

ANSWER_S = 5.0
"""The node answers questions about itself in microseconds; this long means that its loop is stuck."""
HOOK_ANSWER_S = 15.0
"""Longer than a forwarded webhook may take (`workflows.intake.FORWARD_TIMEOUT_S`)."""
RELAY_SILENCE_S = 120.0
"""A relayed stream may be silent this long: a Pi 4 prefilling a long prompt."""
CHANGE_VOTERS = "change-voters"
"""Request between peers: the owner spoke to a node that is not the coordinator."""
CHANGE_S = 75.0
"""Longer than a change may wait to become possible (`cluster.reconfigure.CHANGE_PATIENCE_S`)."""
MOVE_LEADERSHIP = "move-leadership"
"""Likewise. Its request carries a `MoveWish`, its answer a `LeaderChanged`."""
MOVE_S = 25.0
"""Longer than an heir is given (`cluster.handover.MOVE_FACTOR`)."""
REMOVE_NODE = "remove-node"
"""Likewise. The coordinator's own entries are pushed to all: a removal is known everywhere one commit later."""
RECOVERY_TRIES = 5
"""Two seconds apart: longer than a new coordinator needs to recover."""
SOURCES = ("linear", "github", "notion")

Secret = Callable[[str], tuple[str, ...]]
"""File name → its non-empty lines."""
Errand = tuple[type[msgspec.Struct], Callable[[Any], Awaitable[Any]], Any, float]
"""Wish, how it is granted here, the answer's type, how long another node may take for it (seconds)."""


class Desk:
    def __init__(
        self,
        config: Config,
        me: Identity,
        mailbox: Mailbox,
        links: Links,
        pool: Pool,
        bus: EventBus,
        secret: Secret,
        rng: random.Random,
        default_model: str,
        library: Library,
        journal: Callable[[], Journal],
    ) -> None:
        """`journal()`: this node's fold of the ledger; there is one once the node moves."""
        self.journal = journal
        self._config = config
        self._me = me
        self._mailbox = mailbox
        self._links = links
        self._bus = bus
        self._settling = Settling()
        self.renewal = renewal.Renewal(links, self._members)
        self.meters = Meters()
        self.meters.relayed_links.set_function(lambda: links.relaying[0])
        self.meters.relayed_bytes.set_function(lambda: links.relaying[1])
        self.addresses: tuple[str, ...] = ()
        """`host:port` of our peer listener, once it is bound; none while the board has no address."""
        files = {source: getattr(config.webhooks, f"{source}_secret_file") for source in SOURCES}
        self._secrets = {source: secret(file) for source, file in files.items() if file}
        hub_tokens = secret(config.hub.token_file) if config.hub.url else ()
        self._secrets["selftest"] = tuple(map(selftest_secret, hub_tokens))
        self._lists = Lists(config.webhooks.github_repos, config.webhooks.github_events)
        hub_token = hub_tokens[0] if hub_tokens else ""
        self.hub = HubDesk(me.node, config.hub.url, hub_token, self._secrets, self._lists, self.take_hook, bus, rng)
        self._jobs = Jobs(me.node, me.name, mailbox, links, self.view, config.state_dir / "ledger.db")
        self._lessons = Lessons(config.state_dir / "ledger.db")
        self._keys = Keyring(partial(secret, config.api.keys_file)) if config.api.keys_file else None
        self._errands: dict[str, Errand] = {
            CHANGE_VOTERS: (admin.VoterWish, self._change_voters_here, Voters, CHANGE_S),
            MOVE_LEADERSHIP: (admin.MoveWish, self._move_leadership_here, LeaderChanged, MOVE_S),
            REMOVE_NODE: (admin.RemoveWish, self._remove_node_here, NodeId, ANSWER_S),
        }
        library.lan = Lan(me.node, library.store, links.request, lambda: _names(links), rng)
        self._lan = library.lan
        self.upgrades = Upgrades(
            me.node, config, self.view, self._errand, self._move_leadership_here, pool.facts, self.take_hook
        )
        self._errands |= self.upgrades.errands
        self.splits = Splits(me.node, me.name, config.inference, library, pool, links.request, links.peers)
        self.stock = Stock(me.node, library, links.request, self.view, self.splits, config.store.client_pulls)
        kept = config.inference
        echoes = Echoes(pool, kept.cache_bytes, 60 * kept.cache_minutes, kept.cache_shared)
        self.meters.count_answers(echoes.told)
        self.ferry = Ferry(pool, self._others, links.request, kept.kv_ship_bytes)
        depot = Depot(pool, config.state_dir / "prefixes", kept.kv_disk_bytes, self.ferry.key)
        self.meters.count_depot(depot.told)
        self.meters.count_drafts(pool.guessed)
        self.serving = Serving(me.node, pool, self._who, self._relay, default_model, echoes=echoes)
        self.fallback = Fallback(
            self.serving,
            providers.made(config.providers, secret),
            config.inference.outside,
            spending=Spending(config.state_dir / "spending.json"),
        )
        self.shelf = Shelf(config.state_dir / "shelf", links.request, self._company)
        self.batches = Batches(self.shelf, self.serving, self.take_hook, self._jobs.change, self._served, journal)
        self._whys = Whys(me.name, self.serving.decisions, links)

    def doors(self, ledger_fault: Callable[[], str]) -> Doors:
        """What the client listener is made of."""
        tokens = TokenDesk(self._me, lambda: self.addresses)
        answering = Metered(Marked(self.fallback))
        return Doors(
            name=self._me.name,
            release=__version__,
            view=self.view,
            take_hook=self.take_hook,
            bus=self._bus,
            admin=admin.AdminDoors(
                tokens.create,
                tokens.list,
                tokens.revoke,
                self._change_voters,
                self._move_leadership,
                self._remove_node,
                self.renewal.rotate,
                self._jobs.show,
                self._jobs.change,
                self.upgrades.look,
                self.upgrades.begin_run,
            ),
            meters=self.meters,
            edge=self.hub.edge,
            providers=self.fallback.told,
            ledger_fault=ledger_fault,
            secrets=self._secrets,
            lists=self._lists,
            keys=self._keys,
            allowed_hosts=self._config.api.allowed_hosts,
            extra_routes=[
                *openai.routes(answering, self._list_models),
                *ollama.routes(answering, self.stock.cards, self.stock.running, self.stock.client_pull),
                *moderations.routes(answering, self._classifiers),
                *models.routes(self.stock.ask, self.stock.take),
                *files.routes(Uploads(self.shelf), self.batches),
                *why.routes(self._whys.find),
                *triage.routes(self._lessons.report, self._lessons.why),
            ],
        )

    # questions to the node -----------------------------------------------------------------------------------
    async def view(self) -> View:
        view: View = await self._mailbox.ask(Snapshot, ANSWER_S)
        return view

    async def _members(self) -> list[NodeId]:
        return [member.node for member in (await self.view()).members]

    async def take_hook(self, hook: Hook) -> HookTaken:
        """Durable on W ledgers, or a `PiclusterError`."""
        taken: HookTaken = await self._mailbox.ask(partial(HookArrived, hook=hook), HOOK_ANSWER_S)
        return taken

    async def _who(self, asked: WhoServes) -> Choice:
        async def ask() -> Choice:
            choice: Choice = await self._mailbox.ask(lambda ticket: replace(asked, ticket=ticket), ANSWER_S)
            return choice

        return await (ask() if asked.exclude else self._settling.ask(ask))

    async def _company(self) -> Company:
        """The others that hold files and are within reach, and how many are to hold one."""
        linked, view = self._links.peers(), await self.view()
        workers = [one for one in view.members if one.facts.role == "worker" and one.state not in ("left", "removed")]
        up = [one.node for one in workers if one.state == "alive" and one.node in linked]
        return Company(up, min(copies_needed(len(view.voters)), len(workers)))

    async def _others(self) -> list[tuple[NodeId, Facts]]:
        linked, view = self._links.peers(), await self.view()
        return [(one.node, one.facts) for one in view.members if one.state == "alive" and one.node in linked]

    async def _served(self) -> Mapping[str, int]:
        alive = [one for one in (await self.view()).members if one.state == "alive"]
        return Counter(model.name for one in alive for model in one.facts.models)

    async def _list_models(self) -> list[dict[str, Any]]:
        return [{"id": name} for name in sorted(filter(visible, await self._served()))]

    async def _classifiers(self) -> list[str]:
        """Models that classify texts, those in memory first."""
        alive = [member for member in (await self.view()).members if member.state == "alive"]
        found = {
            (facts.load_s, facts.name) for member in alive for facts in member.facts.models if facts.does("classify")
        }
        return [name for _, name in sorted(found) if visible(name)]

    # peers ---------------------------------------------------------------------------------------------------
    def _relay(self, peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        return self._links.request(peer, name, body, RELAY_SILENCE_S)

    async def serve_peer(self, peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        if name in self._errands:
            shape, here, _, _ = self._errands[name]
            yield msgspec.json.encode(await here(msgspec.json.decode(body, type=shape)))
            return
        if name in SHELF:
            async with aclosing(self.shelf.serve_peer(peer, name, body)) as told:
                async for chunk in told:
                    yield chunk
            return
        if name == CHANGE_RUN:
            yield await self._jobs.serve_peer(body, self._links.peers()[peer].name)
            return
        if name == WHY:
            yield self._whys.answer(body)
            return
        if name == renewal.REQUEST:
            yield await self.renewal.issue(peer, self._links.peers()[peer].name, body)
            return
        if name == succession.REQUEST:
            yield await self.renewal.answer(peer, body)
            return
        async with aclosing(self._streamed(peer, name, body)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _streamed(self, peer: NodeId, name: str, body: bytes) -> AsyncGenerator[bytes, None]:
        if name == lan.REQUEST:
            return self._lan.serve(body)
        if name == ferry.REQUEST:
            return self.ferry.serve(body)
        if name == splits.REQUEST:
            return self.splits.serve(peer, body)
        return self.stock.serve_peer(body) if name == MODELS else self.serving.answer_peer(peer, name, body)

    # operator ------------------------------------------------------------------------------------------------
    async def _change_voters(self, wish: admin.VoterWish) -> Voters:
        voters: Voters = await self._errand(CHANGE_VOTERS, wish, (await self.view()).leader)
        return voters

    async def _move_leadership(self, wish: admin.MoveWish) -> LeaderChanged:
        moved: LeaderChanged = await self._errand(MOVE_LEADERSHIP, wish, (await self.view()).leader)
        return moved

    async def _remove_node(self, wish: admin.RemoveWish) -> NodeId:
        """Its office first, then its vote, then itself: each by whoever coordinates at the time."""
        view, node = await self.view(), NodeId(wish.node)
        at = view.leader
        if node == self._me.node:
            raise UserError("a node cannot remove itself", "nobody would tell the others.", "Ask on another node.")
        if at == node:
            at = (await self._move_leadership(admin.MoveWish())).leader
        if node in view.voters:
            await self._take_vote(node, at)
        removed: NodeId = await self._errand(REMOVE_NODE, wish, at)
        return removed

    async def _take_vote(self, node: NodeId, at: NodeId | None) -> None:
        """A coordinator that was elected just now changes no voters before its recovery is over."""
        for _ in range(RECOVERY_TRIES):
            try:
                await self._errand(CHANGE_VOTERS, admin.VoterWish("remove", node), at)
                return
            except Unavailable as fault:
                refused = fault
                await asyncio.sleep(refused.retry_after_s)
        why = f"it votes, and its vote cannot be taken away: {refused}"
        raise Unavailable(f"{node} was not removed", why, "Bring back the other voters, then ask again.")

    async def _errand(self, name: str, wish: msgspec.Struct, at: NodeId | None) -> Any:
        """`wish`, granted by the coordinator `at`, which may be another node; here where there is none."""
        _, here, answer, patience_s = self._errands[name]
        if at is None or at == self._me.node:
            return await here(wish)
        async with aclosing(self._links.request(at, name, msgspec.json.encode(wish), patience_s)) as chunks:
            return msgspec.json.decode(b"".join([chunk async for chunk in chunks]), type=answer)

    async def _change_voters_here(self, wish: admin.VoterWish) -> Voters:
        ask = partial(ChangeVoters, what=wish.what, node=NodeId(wish.node))
        voters: Voters = await self._mailbox.ask(ask, CHANGE_S)
        log.info("voters changed by hand: %s %s", wish.what, wish.node)
        return voters

    async def _move_leadership_here(self, wish: admin.MoveWish) -> LeaderChanged:
        ask = partial(MoveLeadership, to=NodeId(wish.node) if wish.node else None)
        now: LeaderChanged = await self._mailbox.ask(ask, MOVE_S)
        log.info("leadership moved by hand: %s leads term %d", now.leader, now.term)
        return now

    async def _remove_node_here(self, wish: admin.RemoveWish) -> NodeId:
        removed: NodeId = await self._mailbox.ask(partial(RemoveNode, node=NodeId(wish.node)), ANSWER_S)
        log.warning("node %s was removed by hand", removed)
        return removed


def _names(links: Links) -> dict[NodeId, str]:
    return {node: info.name for node, info in links.peers().items()}
