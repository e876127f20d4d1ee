"""`piclusterd`: the only place that starts things. One loop moves the node; the hands do what it says.

    mailbox.next(deadline) ─▶ node.handle(event, now) ─▶ hands.perform(effect) …

Start: configuration, identity, vote record, ledger (replayed into the node), links, models (in the background), API,
mDNS, READY. Stop (SIGTERM): hand leadership over, say goodbye, close the doors, end the children, close the ledger.
Every resource is entered on one exit stack, so that a start that fails half-way leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import uvloop

from . import __version__
from .board import listen_fds, logs
from .board.facts import describe_node
from .board.private import hold
from .board.sd_notify import Notifier
from .cluster import denylist, hardstate, identity
from .cluster.discovery import Advert, Discovery, Sighting, lan_addresses
from .cluster.join import Founding, JoinDesk
from .cluster.link import TIMINGS
from .cluster.links import Links
from .cluster.timings import PRESETS
from .cluster.tokens import Tokens
from .config import Config
from .config_file import DEFAULT_PATH, load, read_secret
from .desk import Desk
from .errors import Broken, PiclusterError, UserError
from .events import FactsChanged, HardState, LedgerAlarm, LoopLagged, Note, Sealed, Shutdown
from .hands import Hands
from .ids import NodeId
from .inference.models import ModelSpec, resolve_all
from .inference.pool import Pool
from .ledger.ballast import BALLAST_BYTES
from .ledger.pruning import Retention
from .ledger.writer import LedgerWriter
from .mailbox import Mailbox
from .node import Node, Setup
from .services import make_agenda, make_crier, make_library, make_patience, make_services, make_workflows, tell_clock
from .upkeep import (
    VOTES,
    calm_collector,
    keep_linked,
    ledger_flags,
    losses,
    recall,
    run_flags,
    scrub,
    stroke_watchdog,
    synced,
    trust_clock,
)
from .web.app import make_app
from .web.listener import Served, serve
from .web.stream import EventBus
from .wire import Facts, ModelFacts, Voters

log = logging.getLogger("piclusterd")

FACTS_EVERY_S = 5.0
"""Between two looks at the board; a change of the models is told at once."""
LAG_TICK_S = 0.1
LAG_TOLD_S = 0.5
"""A loop that was this late tells the node, which then distrusts its own silence."""
STOP_S = 4.0
"""systemd is told 90 s; a drained daemon has no reason to take more than this."""
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: systemd should not restart what a person must mend."""


class Daemon:
    """One running node, from `start` to `stop`."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ
        self.rng = random.Random()
        self.clock = time.monotonic
        self.mailbox = Mailbox(self.clock)
        self.bus = EventBus(first_id=_wall_ms())  # ids keep growing over restarts, so a page can resume
        self.notifier = Notifier(environ)
        self.facts_moved = asyncio.Event()
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[Any]] = []
        self._names: dict[NodeId, str] = {}
        self._served: Served | None = None

    # starting ------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Everything up and READY said. Raises `PiclusterError`; what was opened is closed again by `stop`."""
        config, state = self.config, self.config.state_dir
        me = await asyncio.to_thread(identity.load, state)
        if me is None:
            raise UserError(
                f"this node belongs to no cluster: {state} holds no identity",
                fix="Run `picluster init --cluster NAME` on the first node, `picluster join TOKEN` on the others.",
            )
        self.me = me
        self._stack.callback(os.close, await asyncio.to_thread(hold, state))
        told = await asyncio.to_thread(identity.joined, me.directory)
        self.told = told or identity.Told()
        self.models = self._resolve_models()
        hard, no_votes = await asyncio.to_thread(recall, state, me.node)
        self.ledger = await LedgerWriter.start(
            state / "ledger.db", me.signer, identity.verify, me.name, _wall_ms, config.ledger,
            ran_before=hard is not None or bool(no_votes), ballast_bytes=BALLAST_BYTES,
        )  # fmt: skip
        self._stack.push_async_callback(self.ledger.close)
        self.links = Links(
            me, self.mailbox.post, lambda *request: self.desk.serve_peer(*request), self.rng,
            check_time=synced(), timing=TIMINGS[config.cluster.preset],
        )  # fmt: skip
        self._stack.push_async_callback(self.links.close)
        self.pool = Pool.of(config, self.facts_moved.set)
        self._stack.push_async_callback(self.pool.close)
        self.library = make_library(config, self.pool, self._secret, self.environ, self.facts_moved.set)
        await self.library.start()
        self._stack.push_async_callback(self.library.close)
        self.desk = Desk(
            config, me, self.mailbox, self.links, self.pool, self.bus, self._secret, self.rng, self._default_model(),
            self.library, lambda: self.node.journal,
        )  # fmt: skip
        self.desk.upgrades.changed = self.facts_moved.set
        self.hands = Hands(
            self.mailbox, self.links, self.ledger, self.desk.serving,
            make_services(config, me.name, self._secret, self._stack, self.desk),
            self._votes_dir(), self.desk.hub.run if config.hub.url else None, self._on_note, me.directory,
        )  # fmt: skip
        self._stack.push_async_callback(self.hands.close)
        self.crier = make_crier(config, me.name, self.desk.take_hook, lambda: self.node, self._stack)
        self.node = await self._make_node(hard or HardState(), no_votes)
        self.links.deny({*self.node.removals.denied, *await asyncio.to_thread(denylist.load, me.directory)})
        await self._open_doors()
        self._task(self._move(), "node")
        self._task(self._watch_loop(), "loop lag")
        self._task(self._tell_facts(), "facts")
        self._task(scrub(self.ledger, self.mailbox), "scrub")
        self._task(self.desk.renewal.run(), "certificate")
        self._task(trust_clock(self.links), "clock")
        self._task(keep_linked(me.node, self.node.membership.alive, self.links), "reach")
        if config.schedule:
            self._task(tell_clock(self.mailbox, synced), "schedule")
        self._task(stroke_watchdog(self.notifier, self.ledger), "watchdog")
        await self.pool.start(self.models)
        self._task(self.library.run(), "store")
        self._task(self.desk.shelf.run(), "files")
        self._dial_known()
        calm_collector()
        self.notifier.ready(f"node {me.name} of {me.cluster}")
        log.info("ready: node %s (%s) of %s, API on port %s", me.name, me.node, me.cluster, self.api_port)

    def _resolve_models(self) -> list[ModelSpec]:
        """The models whose files can be served; a file that cannot is told and left out: the node is still of use."""
        specs = []
        for model in self.config.models:
            try:
                specs += resolve_all(model)
            except PiclusterError as fault:
                log.error("model %s is not served: %s", model.name, fault)
                self.bus.publish("alarm", {"text": f"model {model.name} is not served: {fault}"})
        return specs

    async def _make_node(self, hard: HardState, no_votes: str) -> Node:
        hard = replace(hard, incarnation=hard.incarnation + 1)
        await asyncio.to_thread(hardstate.save, self._votes_dir(), hard)
        await asyncio.to_thread(hardstate.note_voted, self.me.directory, self.me.node)
        self.no_votes = no_votes
        heads, facts = await self.ledger.heads(), await self.ledger.replay()
        for loss in losses(self.me.name, self.config.state_dir, self.ledger.lost, self.no_votes):
            log.error("%s", loss)
            self.bus.publish("alarm", {"text": loss})
        setup = Setup(
            me=self.me.node,
            cluster=self.me.cluster,
            facts=Facts(name=self.me.name, role=self.config.node.role, release=__version__),
            timings=PRESETS[self.config.cluster.preset],
            hard=hard,
            heads=heads,
            ledger=facts,
            workflows=make_workflows(self.config, self._default_model() or "default"),
            patience=make_patience(self.config),
            agenda=make_agenda(self.config),
            retention=Retention.of(self.config.ledger),
            log=self.ledger.log,
            lost=self.ledger.lost,
            votes_lost=self.no_votes,
            damaged=self.ledger.damaged,
        )
        return Node(setup, self.rng, self.clock())

    def _default_model(self) -> str:
        return self.config.inference.default_model or next((model.name for model in self.config.models), "")

    def _votes_dir(self) -> Path:
        return self.config.state_dir / VOTES

    def _secret(self, file: str) -> tuple[str, ...]:
        return read_secret(file, self.environ)

    # doors ---------------------------------------------------------------------------------------------------
    async def _open_doors(self) -> None:
        config, me = self.config, self.me
        sealed, desk = await self._join_desk()
        try:
            self.peer_port = await self.links.start(config.peers.host, config.peers.port, desk)
        except OSError as fault:
            where = f"{config.peers.host}:{config.peers.port}"
            raise UserError(
                f"cannot listen on {where} for peers", str(fault), "Is another piclusterd running? Else change [peers]."
            ) from fault
        self.links.addresses = self.desk.addresses = self._addresses()
        doors = self.desk.doors(lambda: str(self.ledger.fault or ""))
        api, passed = config.api, listen_fds.take("api", self.environ)
        self._served = await serve(make_app(doors), api.host, api.port, Path(api.socket), passed)
        self.api_port = self._served.port
        if config.discovery.enabled:
            advert = Advert(me.node, me.cluster_id, me.name, self.peer_port, me.can_issue, config.peers.advertise)
            discovery = Discovery(advert, self._on_seen, config.discovery.interfaces)
            discovery.start()
            self._stack.push_async_callback(discovery.close)
        if sealed is not None:
            await self.mailbox.post(Sealed(sealed))

    async def _join_desk(self) -> tuple[Voters | None, list[Any]]:
        """The voters this node knows of from its founding or joining, and the desk's routes where it admits others."""
        if not self.me.can_issue:
            return self.told.voters, []
        founding = await asyncio.to_thread(Founding, self.me.directory)
        tokens = Tokens(self.me.directory, self.me.ca_pin)
        desk = JoinDesk(self.me, tokens, founding, self._peer_addresses, self._on_sealed, lambda: self.links.denied)
        return founding.voters, desk.routes()

    async def _on_sealed(self, voters: Voters) -> None:
        await self.mailbox.post(Sealed(voters))

    def _peer_addresses(self) -> list[str]:
        return [*self.links.addresses, *(a for info in self.links.peers().values() for a in info.addresses)]

    def _addresses(self) -> tuple[str, ...]:
        """Where peers may reach us just now: as configured, else what we listen on, else every LAN address there is."""
        peers, hosts = self.config.peers, self.config.peers.advertise
        if not hosts:
            everywhere = peers.host in ("0.0.0.0", "::", "")
            hosts = lan_addresses(self.config.discovery.interfaces) if everywhere else (peers.host,)
        return tuple(f"{host}:{self.peer_port}" for host in hosts)

    def _dial_known(self) -> None:
        """Seeds, and what was told at the join; mDNS and gossip add to them."""
        for address in (*self.config.peers.seeds, *self.told.peers):
            self.links.dial(address)

    def _on_seen(self, sighting: Sighting) -> None:
        """A hint: the handshake decides who it is."""
        if sighting.cluster_id != self.me.cluster_id:
            return
        if sighting.node not in self._names:
            self._names[sighting.node] = sighting.name
            where = ", ".join(sighting.addresses)
            log.info("mDNS names %s (%s) at %s", sighting.name, sighting.node, where)
            self.bus.publish("seen", {"text": f"mDNS: {sighting.name} at {where}", "node": sighting.name})
        if sighting.node not in self.links.peers():
            for address in sighting.addresses:
                self.links.dial(address, hint=True)

    # running -------------------------------------------------------------------------------------------------
    async def _move(self) -> None:
        """The one loop."""
        while True:
            event = await self.mailbox.next(self.node.deadline())
            for effect in self.node.handle(event, self.clock()):
                self.hands.perform(effect)

    def _on_note(self, note: Note) -> None:
        log.debug("%s", note)
        if isinstance(note, LedgerAlarm):
            self.facts_moved.set()  # the others' health lists hear of it at once
        self.bus.note(note, self._name_of)
        self.crier.hear(note)

    def _name_of(self, node: NodeId) -> str:
        facts, link = self.node.membership.facts(node), self.links.peers().get(node)
        return (facts.name if facts else "") or (link.name if link else "") or self._names.get(node, node)

    async def _tell_facts(self) -> None:
        """Say what this node is, when it changed and every few seconds."""
        while True:
            flags = (*run_flags(self.node, self.clock()), *self.desk.upgrades.flags)
            models, entries = self.pool.facts(), sum(head.seq for head in self.node.reconcile.heads())
            await self.mailbox.post(FactsChanged(await asyncio.to_thread(self._facts, models, entries, flags)))
            try:
                async with asyncio.timeout(FACTS_EVERY_S):
                    await self.facts_moved.wait()
                await asyncio.sleep(LAG_TICK_S)  # several changes make one message
            except TimeoutError:
                pass
            self.facts_moved.clear()

    def _facts(self, models: tuple[ModelFacts, ...], entries: int, flags: tuple[str, ...]) -> Facts:
        """Asks the system, which takes its time: not for the loop."""
        self.links.addresses = self.desk.addresses = self._addresses()  # DHCP may come late, and cards are replugged
        return describe_node(
            self.config, self.me.name, self.links.addresses, self.api_port, models,
            entries, (*ledger_flags(self.ledger, self.no_votes), *flags),
        )  # fmt: skip

    async def _watch_loop(self) -> None:
        """Tell the node when it was stalled."""
        while True:
            before = self.clock()
            await asyncio.sleep(LAG_TICK_S)
            now = self.clock()
            if now - before - LAG_TICK_S > LAG_TOLD_S:
                await self.mailbox.post(LoopLagged(now - before - LAG_TICK_S))

    def _task(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._on_task_end)
        self._tasks.append(task)

    def _on_task_end(self, task: asyncio.Task[Any]) -> None:
        """None of them ends by itself: one that does takes the daemon with it, and systemd starts a whole one."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.critical("%s failed", task.get_name(), exc_info=fault)
            self.hands.stopped.set()

    # stopping ------------------------------------------------------------------------------------------------
    def heed_signals(self) -> None:
        """From before the start on: a stop that comes in the middle of it waits in the mailbox."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lambda: self.mailbox.post_now(Shutdown()))

    async def run_until_stopped(self) -> None:
        await self.hands.stopped.wait()
        self.notifier.stopping()

    async def stop(self) -> None:
        """Answer what was asked, then close everything, newest first. What takes too long is left to the end."""
        if self._served is not None:
            await self.desk.serving.drain()
            await self._served.close()  # first: the node answers until its doors are shut
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(STOP_S):
                await self._stack.aclose()
        except TimeoutError:
            log.warning("not everything closed within %s s", STOP_S)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


async def _run(config: Config) -> None:
    daemon = Daemon(config, os.environ)
    daemon.heed_signals()
    try:
        await daemon.start()
        await daemon.run_until_stopped()
    finally:
        await daemon.stop()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="piclusterd")
@click.option("--config", "path", type=click.Path(path_type=Path), help=f"Default: {DEFAULT_PATH}, where it exists.")
def main(path: Path | None) -> None:
    """Run this node of the cluster until SIGTERM."""
    chosen = path or (DEFAULT_PATH if DEFAULT_PATH.exists() else None)
    try:
        config = load(chosen, os.environ)
        logs.setup(config.log.level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config))
    except (UserError, Broken) as fault:
        click.echo(f"piclusterd: {fault}", err=True)
        sys.exit(EXIT_CONFIG if isinstance(fault, UserError) else 1)


if __name__ == "__main__":
    main()
