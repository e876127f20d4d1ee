"""What a running node does unasked: look for rot, say that it lives, tell the owner what a start found missing.

    every SCRUB_EVERY_S ─▶ ledger.scrub_slice ─▶ Damaged (where it changed) ─▶ node: `ledger.care`
    every quarter of WatchdogSec, once the ledger's writer answered ─▶ WATCHDOG=1
    every CLOCK_EVERY_S until the clock was set ─▶ certificates have dates from then on
    every REACH_EVERY_S ─▶ members without a link ─▶ dialled at the addresses they tell, sought through neighbours
    start ─▶ recall (a vote record that is gone is a loss) ─▶ losses ─▶ alarms
    started ─▶ calm_collector: what start-up made is not looked through for garbage again
    now ─▶ ledger_flags ─▶ this node's facts ─▶ the health list of every node

It decides nothing: what is to be done about rot and losses is `ledger.care`'s, and the owner's.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .board.private import write_private
from .board.sd_notify import Notifier
from .board.survey import clock_synced
from .cluster import hardstate, identity
from .cluster.discovery import ADDRESSES_MAX
from .cluster.links import Links
from .errors import Broken, PiclusterError
from .events import Damaged, HardState
from .ids import NodeId
from .ledger.archive import VOTES_LOST
from .ledger.connection import is_corrupt
from .ledger.writer import LedgerWriter
from .mailbox import Mailbox
from .node import Node
from .wire import Member

log = logging.getLogger("piclusterd")

VOTES = "votes"
"""Folder of the vote record, in the state directory."""
GC_THRESHOLDS = (10_000, 50, 100)
"""Objects, then rounds, between two searches for cycles. Nearly all garbage here has none and goes at once; 10,000
small objects are some 2 MB that may lie about."""
SCRUB_EVERY_S = 5.0
"""Between two slices of 256 entries: 100,000 are looked at in half an hour, at a hundredth of the disk's time."""
SCRUB_REST_S = 6 * 3600.0
"""After the whole ledger was looked at."""


REACH_EVERY_S = 0.5
CLOCK_EVERY_S = 10.0
"""Between two looks at whether the clock was set."""
TIMESYNC = Path("/run/systemd/timesync/synchronized")
COPY_TOLD_S = 60.0
"""An urgent run that waits so long for the relay's copy is worth a line in the health list."""


def calm_collector() -> None:
    """Once all is up. Looking for cycles every 700 objects cost a fifth of a webhook, and pauses of tens of ms."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def keep_linked(me: NodeId, members: Callable[[], Iterable[Member]], links: Links) -> None:
    """Have a link with every member that is here, whatever it takes, until cancelled."""
    while True:
        await asyncio.sleep(REACH_EVERY_S)
        linked = links.peers()
        here = [member for member in members() if member.node != me]
        for member in here:
            if member.node not in linked or linked[member.node].relayed:
                for address in member.facts.addresses[:ADDRESSES_MAX]:
                    links.dial(address, hint=True)
        links.reach(member.node for member in here)


def synced() -> bool:
    """Was the clock set by a time server since the start of the board? A Pi has no battery and may live in 1970.

    The kernel knows whoever keeps the time; where a service may not ask it, systemd-timesyncd leaves a file behind.
    """
    return TIMESYNC.exists() or clock_synced()


async def trust_clock(links: Links, is_synced: Callable[[], bool] = synced, every_s: float = CLOCK_EVERY_S) -> None:
    """Check the dates of certificates as soon as the clock was set: until then chain and pin must do."""
    trusted = False
    while True:
        if not trusted and await asyncio.to_thread(is_synced):
            trusted = True
            links.check_dates(time.time())
        await asyncio.sleep(every_s)


async def scrub(ledger: LedgerWriter, mailbox: Mailbox, every_s: float = SCRUB_EVERY_S) -> None:
    """Look for rot, slice by slice, until cancelled. Raises Broken where SQLite itself cannot read a page."""
    while True:
        await asyncio.sleep(every_s)
        before = ledger.damaged
        try:
            end = (await ledger.scrub_slice()).cursor == 0
        except PiclusterError as fault:
            if is_corrupt(fault):
                raise  # the daemon stops; its next start moves the file aside and takes over what is sound (`rescue`)
            log.error("the ledger cannot be checked for rot: %s", fault)
            continue
        if ledger.damaged != before:
            await mailbox.post(Damaged(ledger.damaged))
        if end:
            await asyncio.sleep(SCRUB_REST_S)


async def stroke_watchdog(notifier: Notifier, ledger: LedgerWriter) -> None:
    """Tell systemd that this node lives, as long as the loop turns and the ledger's writing thread answers.

    A disk that is full or fails is an answer too: a restart would not mend it, and the node is still of use. A thread
    that does not come back holds the stroke up, and systemd starts a whole daemon.
    """
    if notifier.watchdog_s is None:
        return
    while True:
        try:
            await ledger.apply(())  # a transaction of nothing, in its turn behind all others
            notifier.watchdog()
        except Broken:
            notifier.watchdog()
        except PiclusterError as fault:
            log.warning("the ledger's writer does not answer the watchdog: %s", fault)
        await asyncio.sleep(notifier.watchdog_s / 2)


def recall(state: Path, me: NodeId) -> tuple[HardState | None, str]:
    """The vote record, None where there is none, and why this node may have voted and does not know for whom.

    The latter stays on disk until the owner removes it: the next start finds a record, which must not be voted by.
    Blocking. Raises Broken where the record is there and cannot be read.
    """
    hard, marker = hardstate.load(state / VOTES), state / VOTES_LOST
    if hard is None and hardstate.has_voted(state / identity.DIRECTORY, me) and not marker.exists():
        write_private(marker, f"both copies are gone from {state / VOTES}".encode())
    return hard, marker.read_text(errors="replace") or "no reason is noted" if marker.exists() else ""


def ledger_flags(ledger: LedgerWriter, votes: str) -> tuple[str, ...]:
    """What this node's disk lost, for all to see (`web.health` has the words). `votes`: see `losses`."""
    signs = {
        "ledger-lost": bool(ledger.lost),
        "ledger-rot": bool(ledger.damaged),
        "ledger-mended": ledger.mended and not ledger.lost and not ledger.damaged,
        "votes-lost": bool(votes),
    }
    return tuple(flag for flag, holds in signs.items() if holds)


def run_flags(node: Node, now: float) -> tuple[str, ...]:
    """What keeps the runs of this coordinator waiting, for all to see."""
    signs = {
        "copy-waits": max(node.runs.copying_s(now), default=0.0) >= COPY_TOLD_S,
        "clock-unset": node.schedule.clockless,
    }
    ailing = (f"service-{service.name}" for service in node.runs.services(now))
    return (*(flag for flag, holds in signs.items() if holds), *ailing)


def losses(name: str, state: Path, ledger: str, votes: str) -> list[str]:
    """What the owner is told: node `name` lost part of its ledger, or its votes (why; "" where it did not)."""
    told = []
    if ledger:
        told.append(f"{ledger}. This node votes again once it holds what the others hold; there is nothing to do.")
    if votes:
        told.append(
            f"the vote record is lost: {votes}. This node does not vote. Take its vote away on another node"
            f" (`picluster voter remove {name}`), delete {state / VOTES_LOST}, restart it, and give the vote back"
            f" (`picluster voter add {name}`)."
        )
    return told
