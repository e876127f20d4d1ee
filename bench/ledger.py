"""Webhooks made durable, on three real nodes beside three of etcd's; and how fast a follower catches up.

    clients ──signed webhook, HTTP keep-alive──▶ coordinator ──W = 2 fsynced copies──▶ 200
    clients ──Put, gRPC───────────────────────▶ leader       ──2 of 3 fsynced copies──▶ answer

Same disk, same run, in turns of some seconds; same number of clients, each with one request under way; same bytes of
content; the same client (`bench.load`), whose share of a core is told: it is not the limit. A webhook costs what a put
does not: the provider's signature, a key against duplicates, a chained and signed entry that can be proved. What HTTP,
the mailbox and the copies cost is seen beside the bare writer of one node. Numbers of two programs on one machine with
few cores are as much about CPU as about the disk: `fdatasync` tells which.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from bench import ours
from bench.debian import NoPeer
from bench.etcd import Etcd
from bench.load import Loaded, Put, Webhook, load, numbered, put
from bench.report import Report, main, quantile
from piclusterd.cluster import identity
from piclusterd.config import Ledger as Limits
from piclusterd.demo.cluster import Cluster, Member
from piclusterd.events import Record
from piclusterd.ledger import store
from piclusterd.ledger.database import open_reader
from piclusterd.ledger.writer import LedgerWriter
from piclusterd.wire import Hook, Span
from piclusterd.workflows.journal import hook_record

BUDGET_CLIENTS = 64
"""Where the budget stands: enough to fill a group commit, and as many as a provider's burst brings."""
PER_SECOND_MAX = 15_000
"""Requests made ready for a turn; a faster server is told so."""
CLIENT_MAX = 0.8
"""Of a core; past it the client might be the limit."""
FSYNCS = 200
EQUAL_S = 300.0
SPAN = 256
"""Entries read at a time when they are summed up."""
CATCH_UP_RATIO_MAX = 1.25
"""Bytes on the wire over the bytes of the entries: frames, TLS and gossip may cost so much."""


@dataclass(frozen=True, slots=True)
class Size:
    clients: tuple[int, ...]
    turns: int
    turn_s: float
    missed: int
    """Entries that the follower lacks."""


QUICK = Size((1, 64), 2, 3.0, 10_000)
WHOLE = Size((1, 16, 64, 256), 4, 5.0, 50_000)


@dataclass(frozen=True, slots=True)
class Turns:
    """One load, on each side so many times."""

    clients: int
    many: int
    seconds: float


WARM = Turns(64, 1, 3.0)
"""Not told. SQLite's WAL reaches the size that it keeps (growing costs more: `_fsyncs`); etcd's is made whole."""


@dataclass(slots=True)
class Sides:
    """Both clusters and what is known to differ between requests."""

    cluster: Cluster
    etcd: Etcd | None
    why_not: str = ""
    sent: int = 0
    fastest_client: float = 0.0
    counted: dict[int, tuple[Loaded, Loaded]] = field(default_factory=dict)


def measure(report: Report, quick: bool) -> None:
    asyncio.run(_measure(report, QUICK if quick else WHOLE))


async def _measure(report: Report, size: Size) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-ledger-", dir=os.environ.get("BENCH_DISK")) as room:
        for how, took in _fsyncs(Path(room)).items():
            report.add(f"fdatasync of one page {how}, p50", quantile(took, 0.5) * 1000, "ms")
        await _bare(report, Path(room), size)
        async with _both(Path(room)) as sides:
            await _turns(sides, WARM)
            for clients in size.clients:
                await _turns(sides, Turns(clients, size.turns, size.turn_s))
                _tell(report, sides, clients)
            report.add("the client's share of a core, at most", sides.fastest_client, "of a core", at_most=CLIENT_MAX)
            if sides.etcd is not None:
                await sides.etcd.close()
            await _catch_up(report, sides.cluster, size)


def _fsyncs(room: Path) -> dict[str, list[float]]:
    """Seconds each: a file that grows costs a commit of the filesystem's journal on top (SQLite's WAL until it is as
    large as it gets; etcd makes its files beforehand)."""
    took: dict[str, list[float]] = {"at the end of a file": [], "in the middle of a file": []}
    with (room / "fsync").open("w+b", buffering=0) as file:
        for times in took.values():
            file.seek(0)
            for _ in range(FSYNCS):
                file.write(b"." * 4096)
                began = time.perf_counter()
                os.fdatasync(file.fileno())
                times.append(time.perf_counter() - began)
    return took


# throughput --------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def _both(room: Path) -> AsyncIterator[Sides]:
    sides = Sides(ours.make(room), Etcd(room))
    assert sides.etcd is not None
    etcd = sides.etcd
    try:
        try:
            await etcd.start()
        except NoPeer as fault:
            sides.etcd, sides.why_not = None, f" (no etcd: {fault})"
        await sides.cluster.found()
        yield sides
    finally:
        await etcd.close()
        await sides.cluster.close()


async def _turns(sides: Sides, turns: Turns) -> None:
    clients, seconds = turns.clients, turns.seconds
    mine, theirs = sides.counted[clients] = (Loaded(), Loaded())
    for _ in range(turns.many):
        many = int(min(PER_SECOND_MAX, clients * 3000) * seconds)
        first, sides.sent = sides.sent, sides.sent + many
        leader = await ours.until_led(sides.cluster)
        mine.add(await load(Webhook, ours.door(leader), numbered(ours.hook, many, first), clients, seconds))
        if sides.etcd is not None:
            at = (await sides.etcd.until_led()).client
            theirs.add(await load(Put, at, numbered(_put, many, first), clients, seconds))
    sides.fastest_client = max(sides.fastest_client, mine.client_cpu, theirs.client_cpu)


def _put(number: int) -> bytes:
    return put(ours.delivery(number).encode(), ours.body(number))


def _tell(report: Report, sides: Sides, clients: int) -> None:
    mine, theirs = sides.counted[clients]
    who = f"{clients} client{'s' if clients > 1 else ''}"
    peer = "etcd, 3 nodes, puts" if sides.etcd else None
    assert mine.took_s, f"no webhook was acknowledged: {mine.why}"
    report.add(
        f"{who}: webhooks durable on 2 of 3{sides.why_not}",
        mine.rate,
        "acks/s",
        peer=peer,
        peer_value=theirs.rate if peer else None,
        larger_is_better=True,
        ratio_at_least=1.0 if peer and clients == BUDGET_CLIENTS else None,
    )
    for part in (0.5, 0.99):
        of_peer = quantile(theirs.took_s, part) * 1000 if peer else None
        report.add(f"{who}: p{part * 100:.0f}", quantile(mine.took_s, part) * 1000, "ms", peer=peer, peer_value=of_peer)
    report.add(f"{who}: not acknowledged{': ' + mine.why if mine.why else ''}", mine.failed, "webhooks", at_most=0)


async def _bare(report: Report, room: Path, size: Size) -> None:
    """One node's writer with nobody asking: what chain, signature, SQLite and fsync allow."""
    me = identity.create_cluster(room / "bare", "bench", "bare")
    writer = await LedgerWriter.start(room / "bare.db", me.signer, identity.verify, me.name, _wall_ms)
    ends = time.monotonic() + size.turn_s
    done = 0

    async def append() -> None:
        nonlocal done
        while time.monotonic() < ends:
            await writer.append([_record(done)])
            done += 1

    try:
        await asyncio.gather(*(append() for _ in range(BUDGET_CLIENTS)))
    finally:
        await writer.close()
    report.add(f"the bare writer of one node, {BUDGET_CLIENTS} callers", done / size.turn_s, "appends/s")


def _record(number: int) -> Record:
    return hook_record(Hook("github", ours.delivery(number), "push", ours.body(number)), "", "", 1)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


# catching up -------------------------------------------------------------------------------------------------------
async def _catch_up(report: Report, cluster: Cluster, size: Size) -> None:
    """One node sleeps, another's log grows by `missed`; how long the sleeper takes, from its start, to hold it all."""
    await ours.until_equal(cluster, EQUAL_S)
    leader = await ours.until_led(cluster)
    sleeper = next(member for member in cluster.members if member is not leader)
    await cluster.stop(sleeper)
    await cluster.stop(leader)
    bound = await _grow(leader, size.missed)
    await cluster.start(leader)
    await ours.until_equal(cluster, EQUAL_S)  # the third node holds it all before the sleeper wakes
    began = time.monotonic()
    await cluster.start(sleeper)
    ready_s = time.monotonic() - began
    await ours.until_equal(cluster, EQUAL_S)
    took_s = time.monotonic() - began
    what = f"{size.missed} entries that one node missed, from its start on ({ready_s:.1f} s of it until it answered)"
    report.add(what, size.missed / took_s, "entries/s")
    heard = _received(sleeper)
    if heard is None:
        report.add("bytes it received: unknown, as `ss` (iproute2) is not installed", 0.0, "MB")
        return
    report.add(
        "bytes it received over those of the entries",
        heard / bound,
        "x",
        peer="the entries themselves",
        peer_value=1.0,
        at_most=CATCH_UP_RATIO_MAX,
    )


async def _grow(member: Member, entries: int) -> int:
    """Append to the log of a node that is down, as itself; the encoded bytes of what was appended."""
    me = identity.load(member.state)
    assert me is not None
    path = member.state / "ledger.db"
    writer = await LedgerWriter.start(path, me.signer, identity.verify, me.name, _wall_ms, Limits(), ran_before=True)
    before = {head.log: head.seq for head in await writer.heads()}[writer.log]
    try:
        for first in range(0, entries, SPAN):
            await writer.append([_record(-n - 1) for n in range(first, min(first + SPAN, entries))])
    finally:
        await writer.close()
    with closing(open_reader(path)) as conn:
        return sum(
            _bytes(conn, Span(*writer.log, at, at + SPAN - 1)) for at in range(before + 1, before + entries, SPAN)
        )


def _bytes(conn: object, span: Span) -> int:
    entries = store.read(conn, (span,), 1 << 30, SPAN)  # type: ignore[arg-type]
    return sum(len(entry.header) + len(entry.payload) + len(entry.signature) for entry in entries)


def _received(member: Member) -> int | None:
    """Bytes that the node's links have received since they were made, by the kernel; None where nobody tells."""
    if shutil.which("ss") is None or member.process is None:
        return None
    said = subprocess.run(["ss", "-tinpHO", "state", "established"], check=True, capture_output=True, text=True).stdout
    mine = [line for line in said.splitlines() if f"pid={member.process.pid}," in line]
    return sum(int(found[1]) for line in mine if (found := re.search(r"bytes_received:(\d+)", line)))


if __name__ == "__main__":
    main("ledger", measure)
