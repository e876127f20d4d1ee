"""`picluster status`, `models` and `events`: one line a node, a health list, and an exit code for scripts.

    GET /status.json ──▶ Picture ──▶ lines ──▶ exit code 0 healthy | 1 degraded | 2 no quorum | 3 unreachable (client)

The daemon judges (web/health.py), this module only draws; every node shows, the worst one too, and failed ones stay.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ..errors import Unavailable
from .client import Target, connect
from .terminal import STYLES, ago, clean, columns, console, plural, size
from .voter import chosen

if TYPE_CHECKING:
    from rich.console import Console

HEALTHY, DEGRADED, NO_QUORUM = 0, 1, 2
WATCH_S = 2.0
REPLAY_S = 1.0
"""`events` without -f: the kept events come at once; a second of silence ends them."""
TITLES = ("NODE", "STATE", "ROLE", "MODELS", "TOK/S", "QUEUE", "CPU", "MEM", "TEMP", "FLAGS", "SEEN")


class ModelLine(msgspec.Struct, frozen=True):
    name: str
    busy: int = 0
    queued: int = 0
    decode_tps: float = 0.0
    gb_s: float = 0.0
    roofline: float = 0.0
    load_s: float = 0.0
    """Above 0: it is on the node's disk, and loaded at its first request."""


class FactsLine(msgspec.Struct, frozen=True):
    name: str = ""
    role: str = "worker"
    cpu_percent: float = 0.0
    memory_used: int = 0
    memory_total: int = 0
    temperature_c: float | None = None
    flags: tuple[str, ...] = ()
    models: tuple[ModelLine, ...] = ()


class MemberLine(msgspec.Struct, frozen=True):
    node: str
    state: str
    facts: FactsLine
    heard_s: float | None = None
    voter: bool = False
    why: str = ""
    """What its probes met, oldest first, divided by `; `: the answer to "why was it called dead?"."""


class FindingLine(msgspec.Struct, frozen=True):
    severity: str
    node: str
    what: str
    why: str
    fix: str


class Picture(msgspec.Struct, frozen=True):
    """What of /status.json is drawn; `status` is ok, degraded or down."""

    me: str
    cluster: str
    term: int
    leader: str | None
    voters: tuple[str, ...]
    quorum: int
    members: tuple[MemberLine, ...]
    entries: int
    status: str
    verdict: str
    findings: tuple[FindingLine, ...] = ()

    @property
    def has_quorum(self) -> bool:
        return self.leader is not None and self.quorum > len(self.voters) // 2

    @property
    def exit_code(self) -> int:
        if not self.has_quorum:
            return NO_QUORUM
        return HEALTHY if self.status == "ok" else DEGRADED

    def name_of(self, node: str | None) -> str:
        return next((m.facts.name for m in self.members if m.node == node and m.facts.name), node or "none")


def decode(body: bytes) -> Picture:
    """Raises `Unavailable` where the answer is not a status."""
    try:
        return msgspec.json.decode(body, type=Picture)
    except msgspec.DecodeError as error:
        raise Unavailable("the answer is not a node's status", str(error), "Is this a piclusterd node?") from None


@click.command()
@click.argument("node", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the daemon's picture as JSON.")
@click.option("--watch", is_flag=True, help="Draw again every two seconds until Ctrl-C.")
@click.pass_obj
def status(options: Any, node: str | None, as_json: bool, watch: bool) -> int:
    """The cluster at a glance: one line a node, then what wants a look.

    With NODE (name or id): that node alone, and what was found when it was probed, so why it was called dead.

    Exit code: 0 healthy, 1 degraded, 2 no quorum, 3 daemon unreachable.
    """
    return asyncio.run(_status(options.target, node, as_json, watch))


async def _status(where: Target, node: str | None, as_json: bool, watch: bool) -> int:
    out = console()
    async with connect(where) as client:
        while True:
            body = await client.get("/status.json")
            picture = decode(body)
            if watch and out.is_terminal:
                out.clear()
            if as_json:
                print(_ascii_json(body))
            elif node is None:
                draw(out, picture)
            else:
                draw_one(out, picture, node)
            if not watch:
                return picture.exit_code
            await asyncio.sleep(WATCH_S)


def _ascii_json(body: bytes) -> str:
    """The same document with everything beyond ASCII escaped: it may end on a terminal."""
    import json

    return json.dumps(msgspec.json.decode(body))


def draw(out: Console, picture: Picture) -> None:
    head = [
        clean(picture.cluster),
        plural(len(picture.members), "node"),
        f"leader {clean(picture.name_of(picture.leader))} (term {picture.term})",
        f"quorum {picture.quorum}/{len(picture.voters)}",
        f"ledger #{picture.entries}",
        picture.status if picture.has_quorum else "no quorum",
    ]
    out.print(" · ".join(head), style="bold" if picture.status == "ok" else STYLES.get(picture.status, "bold"))
    members = sorted(picture.members, key=lambda m: (picture.name_of(m.node), m.node))
    columns(out, TITLES, [_row(picture, member) for member in members])
    out.print(clean(picture.verdict))
    if picture.findings:
        out.print("# Health", style="bold")
    for finding in picture.findings:
        line = f"  {finding.severity}: {finding.what}: {finding.why}. {finding.fix}"
        out.print(clean(line), style=STYLES.get(finding.severity, ""))


def draw_one(out: Console, picture: Picture, node: str) -> None:
    """`node`, a name or an id, as the asked daemon sees it. Raises `NotFound`."""
    wanted = chosen({member.node: member.facts.name for member in picture.members}, node)
    (member,) = (one for one in picture.members if one.node == wanted)
    columns(out, TITLES, [_row(picture, member)])
    out.print(f"# Seen from {clean(picture.name_of(picture.me))}", style="bold")
    for line in member.why.split("; ") if member.why else ["no probe of it ever failed"]:
        out.print(f"  {clean(line)}")


def _row(picture: Picture, member: MemberLine) -> tuple[str, ...]:
    facts, name = member.facts, picture.name_of(member.node)
    rates = [model.decode_tps for model in facts.models if model.decode_tps > 0]
    live = member.state == "alive"
    return (
        f"* {name}" if member.node == picture.me else name,
        member.state,
        _role(picture, member),
        ",".join(model.name for model in facts.models if not model.load_s),
        f"{max(rates):.1f}" if rates and live else "",
        str(sum(model.busy + model.queued for model in facts.models)) if live and facts.models else "",
        f"{facts.cpu_percent:.0f}%" if live else "",
        f"{size(facts.memory_used)}/{size(facts.memory_total)}" if live and facts.memory_total else "",
        f"{facts.temperature_c:.0f}C" if facts.temperature_c is not None else "",
        ",".join(facts.flags).upper(),
        "now" if member.node == picture.me else ago(member.heard_s),
    )


def _role(picture: Picture, member: MemberLine) -> str:
    if member.node == picture.leader:
        return "leader"
    if member.facts.role == "relay":
        return "relay"
    return "voter" if member.voter else "learner"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: model to nodes.")
@click.pass_obj
def models(options: Any, as_json: bool) -> None:
    """The models the cluster serves, and where."""
    picture = decode(asyncio.run(_get(options.target, "/status.json")))
    served: dict[str, list[tuple[str, ModelLine]]] = defaultdict(list)
    for member in picture.members:
        for model in member.facts.models if member.state == "alive" else ():
            served[model.name].append((picture.name_of(member.node), model))
    if as_json:
        print(_ascii_json(msgspec.json.encode({name: [node for node, _ in at] for name, at in served.items()})))
        return
    rows = [
        (
            name,
            node,
            f"on disk ({model.load_s:.0f}s)" if model.load_s else "loaded",
            f"{model.decode_tps:.1f}" if model.decode_tps else "",
            f"{model.gb_s:.1f} GB/s, {model.roofline:.0%}" if model.roofline else "",
            str(model.busy + model.queued),
        )
        for name, at in sorted(served.items())
        for node, model in at
    ]
    if rows:
        columns(console(), ("MODEL", "NODE", "STATE", "TOK/S", "OF MEMORY", "QUEUE"), rows)
    else:
        click.echo("No node serves a model. `picluster pull` proposes some.")


async def _get(where: Target, path: str) -> bytes:
    async with connect(where) as client:
        return await client.get(path)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C; otherwise the recent ones only.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
@click.pass_obj
def events(options: Any, follow: bool, as_json: bool) -> None:
    """What the cluster does, as it happens."""
    asyncio.run(_events(options.target, follow, as_json))


async def _events(where: Target, follow: bool, as_json: bool) -> None:
    async with connect(where) as client, aclosing(client.lines("GET", "/events?format=jsonl&after=0")) as lines:
        while True:
            try:
                async with asyncio.timeout(None if follow else REPLAY_S):
                    line = await anext(lines)
            except (StopAsyncIteration, TimeoutError):
                return
            print(_ascii_json(line) if as_json else _event(msgspec.json.decode(line)), flush=True)


def _event(event: Mapping[str, Any]) -> str:
    data = event.get("data") or {}
    at = datetime.fromtimestamp(float(event.get("at") or 0)).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S}  {clean(event.get('kind', '')):<12}  {clean(data.get('text', ''))}"
