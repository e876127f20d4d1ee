"""`picluster selftest`: one synthetic webhook through the whole path, each hop timed, red or green.

    we ──signed POST──▶ hub ──▶ coordinator ──▶ W ledgers ──▶ run (echo) ──▶ closed ──▶ this node's ledger
        stored 200          "hook" event, hub acked      "run" events              /status.json

Signed with a key derived from the hub's token, so nobody else can send one. Times are from the sending on, by this
machine's clock alone: what the coordinator tells is timed when it arrives here. A hop that does not happen in time is
red and named, with what to look at; those behind it are not waited for.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import click

from ..errors import NotFound, PiclusterError
from ..integrations.signatures import digest, selftest_secret
from .client import Client, Target, connect
from .hub import hub_target
from .setup import _config_option, load_config
from .terminal import clean

POLL_S = 0.05
RED = 1


@dataclass(slots=True)
class Trip:
    """What is known of one selftest. `events` are the coordinator's, in the order in which they came."""

    id: str
    began: float = 0.0
    seq: int = 0
    run: str = ""
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """Each with the moment at which it arrived here."""


Reached = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Hop:
    """One station. `reached` says how it was, "" while it was not, and when (monotonic)."""

    name: str
    fix: str
    reached: Callable[[], Awaitable[Reached]]


@click.command()
@click.option(
    "--timeout", "patience_s", default=30.0, show_default=True, type=click.FloatRange(min=1), help="For each hop."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_config_option
@click.pass_obj
def selftest(options: Any, patience_s: float, as_json: bool, config_path: str | None) -> int:
    """Send a synthetic webhook through hub, coordinator, ledgers and a run. Exit code 0: green, 1: red."""
    hub = hub_target(load_config(config_path))
    return asyncio.run(_selftest(options.target, hub, patience_s, as_json))


async def _selftest(here: Target, hub: Target, patience_s: float, as_json: bool) -> int:
    trip = Trip(uuid.uuid4().hex)
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(connect(here))
        leader = await stack.enter_async_context(connect(await _coordinator(node, here)))
        stack.push_async_callback(_cancelled, asyncio.create_task(_follow(leader, trip)))
        await _until(lambda: _listening(trip), patience_s)
        edge = await stack.enter_async_context(connect(replace(hub, key="")))
        trip.began = time.monotonic()
        found = []
        for hop in _hops(trip, edge, hub.key, leader, node):
            found.append(await _pass(hop, trip, patience_s))
            if not as_json:
                click.echo(_line(*found[-1]))
            if not found[-1][1]:
                break
    green = all(ms is not None for _, ms, _ in found)
    if as_json:
        hops = [{"hop": hop.name, "ms": ms, "detail": said} for hop, ms, said in found]
        click.echo(json.dumps({"green": green, "hops": hops}))
    else:
        click.echo("green" if green else "RED: the hops after this one were not tried")
    return 0 if green else RED


def _hops(trip: Trip, edge: Client, token: str, leader: Client, node: Client) -> list[Hop]:
    async def stored() -> Reached:
        body = json.dumps({"id": trip.id}).encode()
        headers = {"X-Picluster-Signature": f"sha256={_signed(token, body)}", "Content-Type": "application/json"}
        answer = json.loads(await edge.post_raw("/hooks/selftest", body, headers))
        trip.seq = answer["seq"]
        return f"stored as {trip.seq}", time.monotonic()

    async def durable() -> Reached:
        trip.run = trip.run or await _run_of(trip, leader)
        return _told(trip, "on enough ledgers", "hook", run=trip.run)

    async def acted() -> Reached:
        return _told(trip, "its step has an outcome", "run", run=trip.run, step="echo", outcome="ok")

    async def closed() -> Reached:
        return _told(trip, "its run ends", "run", run=trip.run, step="finish", outcome="done")

    async def acknowledged() -> Reached:
        last = json.loads(await leader.get("/health"))["edge"]["last_seq"]
        return f"acknowledged up to {last}" if last is not None and last >= trip.seq else "", time.monotonic()

    async def copied() -> Reached:
        status = json.loads(await node.get("/status.json"))
        done = any(run["run"] == trip.run and run["state"] == "done" for run in status["runs"])
        return f"the ledger of {status['name']} has it" if done else "", time.monotonic()

    return [
        Hop("hub", "picluster hub health; is [hub] url right, and the token the hub's?", stored),
        Hop(
            "durable", "picluster status: does a coordinator hear a majority, and is it connected to the hub?", durable
        ),
        Hop("run", "picluster events on the coordinator; its log says what a step waits for", acted),
        Hop("closed", "picluster status: are the other ledgers reached?", closed),
        Hop("acked", "picluster hub health: an older webhook that is not durable holds up the ack", acknowledged),
        Hop("copy", "picluster status: does this node hear the coordinator?", copied),
    ]


def _signed(token: str, body: bytes) -> str:
    return digest(selftest_secret(token), body).hex()


async def _run_of(trip: Trip, leader: Client) -> str:
    """The run that our webhook started, by the title that holds its id."""
    runs = json.loads(await leader.get("/status.json"))["runs"]
    return next((str(run["run"]) for run in runs if run["title"] == f"selftest {trip.id}"), "")


def _told(trip: Trip, said: str, kind: str, **data: Any) -> Reached:
    """`said`, and when the coordinator's event arrived that tells so; "" before."""
    for at, event in trip.events:
        if event["kind"] == kind and data.items() <= event["data"].items():
            return said, at
    return "", 0.0


async def _pass(hop: Hop, trip: Trip, patience_s: float) -> tuple[Hop, float | None, str]:
    """The hop, when it was reached (ms from the sending on; None: not), and how."""
    try:
        said, at = await _until(hop.reached, patience_s)
    except PiclusterError as fault:
        return hop, None, str(fault)
    except TimeoutError:
        return hop, None, f"not within {patience_s:g} s"
    return hop, round((at - trip.began) * 1000, 1), said


async def _until(reached: Callable[[], Awaitable[Reached]], patience_s: float) -> Reached:
    async with asyncio.timeout(patience_s):
        while True:
            if (found := await reached())[0]:
                return found
            await asyncio.sleep(POLL_S)


def _line(hop: Hop, ms: float | None, said: str) -> str:
    if ms is None:
        return f"RED {hop.name:<8} {clean(said)}\n    look at: {hop.fix}"
    return f"ok  {hop.name:<8} {ms:8.1f} ms  {clean(said)}"


async def _coordinator(node: Client, here: Target) -> Target:
    """Where the coordinator answers."""
    status = json.loads(await node.get("/status.json"))
    if status["leader"] is None:
        raise NotFound(
            "no coordinator leads now", "an election is open, or a majority is away", "See picluster status."
        )
    if status["leader"] == status["me"]:
        return here
    url = next((m["facts"]["api"] for m in status["members"] if m["node"] == status["leader"]), "")
    if not url:
        raise NotFound("the coordinator has not said where its API is", fix="Try again, or --host one that knows.")
    return Target(here.socket, url, here.key)


async def _follow(leader: Client, trip: Trip) -> None:
    async for line in leader.lines("GET", "/events?format=jsonl&after=0"):
        trip.events.append((time.monotonic(), json.loads(line)))


async def _listening(trip: Trip) -> Reached:
    return "yes" if trip.events else "", 0.0


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
