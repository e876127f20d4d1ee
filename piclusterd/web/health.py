"""How is the cluster? One pure reading of a `View`, shared by /health, the status page and the metrics.

    View ──▶ findings() ──▶ verdict() ──▶ ok | degraded | down, in one sentence
      └────▶ health()   ──▶ the unified JSON, the same on every node and for every tier

Owns the words of every warning: each names the node, the cause and the fix. Refuses to average: one bad node shows.

    GET /livez    200 while the loop runs; asks nobody
    GET /readyz   200 when the ledger takes writes and a coordinator is known, else 503; `?verbose` lists the checks
    GET /healthz  the same as /readyz
    GET /health   200 (ok, degraded) or 503 (down) with:

        status        "ok" | "degraded" | "down"
        verdict       that in one sentence
        version       release of the answering node
        time          ISO 8601, UTC, by the answering node's clock
        cluster       name of the cluster
        coordinator   name of the coordinator, null while there is none
        term          election term
        edge          connection to the hub: url, connected, last_seq, depth where the hub told it
        backup        null, or the relay: its address beside the fields of `pi_cluster`
        pi_cluster    {"<host:port>": {name, state, role, load, memory, temperature, models, ledger_entries, seen_s}}
                      state alive|suspect|failed|left; role leader|voter|learner; load in percent or null; memory
                      {"used", "total"} in bytes; temperature in °C or null; seen_s seconds since it was heard
        ai_providers  {"local": {configured, models: {name: [nodes]}}, "workers_ai": {configured, providers}, …}
        ledger        {entries, digest, heads: [{node, epoch, seq}]}
        findings      [{severity, node, what, why, fix}]

Fields are only ever added. Source: the deployment guide's health document; Kubernetes' livez/readyz convention.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web

from ..board.sensors import HOT_C
from ..errors import PiclusterError
from ..ids import NodeId
from ..views import MemberView, View

FULL_SHARE = 0.92
"""Of memory: past it a Pi begins to swap to its card, and everything on it crawls."""
PROVIDERS = {"workers_ai": "workers-ai", "huggingface": "huggingface", "openai_compatible": "openai"}
"""What /health calls each kind."""
SERVICE_FLAG = "service-"
NO_EDGE: Mapping[str, Any] = {"url": None, "connected": False, "last_seq": None}

Severity = Literal["fault", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the health list. A fault stops work, a warning wants a person, a note is only good to know."""

    severity: Severity
    node: str
    what: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Literal["ok", "degraded", "down"]
    sentence: str


FLAGS: Mapping[str, tuple[Severity, str, str, str]] = {
    "undervolt": ("warning", "has too little voltage", "its supply or cable sags under load",
                  "Use the official supply (27 W for a Pi 5) and a short cable."),
    "throttled": ("warning", "is throttled", "its firmware holds the clock down", "Check its cooling and its supply."),
    "ledger-lost": ("warning", "lost part of its ledger", "its disk was damaged, emptied or put back to an older state",
                    "It fetches what is missing from the other nodes and votes again then; keep those up."),
    "ledger-rot": ("warning", "has rotten entries in its ledger", "its disk gave back other bytes than were written",
                   "It fetches them from the other nodes; keep those up, and plan for a new disk."),
    "ledger-mended": ("note", "mended its ledger", "its disk had lost or spoiled entries; other nodes gave them back",
                      "Replace its disk should this be told again after a restart."),
    "copy-waits": ("warning", "keeps urgent runs open", "the relay outside holds no copy of them yet",
                   "Bring the relay back, or remove it; the runs end by themselves then."),
    "clock-unset": ("warning", "does not know the time", "its clock was never synchronised, so its schedule waits",
                    "Let it reach an NTP server (timedatectl says more)."),
    "votes-lost": ("warning", "does not vote", "its vote record is lost", "Its log says how to give it back."),
}  # fmt: skip
"""What a node flags of itself (`board.sensors`, `upkeep`), in words: what, why, fix. Heat is told from its figure."""


def names(view: View) -> dict[NodeId, str]:
    """What to call each node: its name, made unique by its id where two nodes share one."""
    told = {member.node: member.facts.name or str(member.node) for member in view.members}
    told.setdefault(view.me, view.name)
    uses = Counter(told.values())
    return {node: name if uses[name] == 1 else f"{name}-{node}" for node, name in told.items()}


def role_of(view: View, member: MemberView) -> str:
    if member.node == view.leader:
        return "leader"
    return "voter" if member.voter else "learner"


def findings(view: View, edge: Mapping[str, Any] = NO_EDGE) -> list[Finding]:
    """Everything worth a person's eye, worst first."""
    called = names(view)
    found = list(_of_cluster(view, called, edge))
    found += _of_runs(view)
    for member in view.members:
        found += _of_member(member, called[member.node])
        if member.node != view.me and member.state == "alive":
            found += _of_services(member, called[member.node])
    rank: dict[Severity, int] = {"fault": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: rank[finding.severity])


def _of_cluster(view: View, called: Mapping[NodeId, str], edge: Mapping[str, Any]) -> Iterator[Finding]:
    up = {member.node for member in view.members if member.state == "alive"} | {view.me}
    missing = [called.get(voter, str(voter)) for voter in view.voters if voter not in up]
    majority = len(view.voters) // 2 + 1
    alive = len(view.voters) - len(missing)
    if view.leader is None and alive < majority:
        yield Finding(
            "fault", "", "No coordinator",
            f"only {alive} of {len(view.voters)} voters answer and {majority} must agree",
            f"Bring back {' or '.join(missing)}; webhooks wait at the hub until then.",
        )  # fmt: skip
    elif view.leader is None:
        yield Finding("fault", "", "No coordinator", "an election is open", "It settles by itself within seconds.")
    elif missing and alive == majority:
        yield Finding(
            "warning", "", "No voter to spare", f"{alive} of {len(view.voters)} voters answer, just the majority",
            "One more loss stops webhooks and runs, so bring a voter back soon.",
        )  # fmt: skip
    if edge.get("url") and not edge.get("connected") and view.leader == view.me:
        yield Finding(
            "warning", view.name, "The hub is not connected", str(edge.get("why") or "the coordinator cannot reach it"),
            "Webhooks are kept at the hub. Check this node's internet access and [hub] token_file.",
        )  # fmt: skip
    if not any(member.facts.models for member in view.members if member.state == "alive"):
        yield Finding("note", "", "No model is served", "no node lists one", "Run `picluster pull` on a node.")
    releases = sorted({member.facts.release for member in view.members if member.state == "alive"} - {""})
    if len(releases) > 1:
        yield Finding("note", "", "Nodes run different releases", ", ".join(releases), "Upgrade the older nodes.")


def _of_runs(view: View) -> Iterator[Finding]:
    if view.dead:
        runs = "1 run was" if view.dead == 1 else f"{view.dead} runs were"
        yield Finding(
            "warning", "", f"{runs} given up", "each has its reason in `picluster jobs ls --state failed`",
            "Mend the cause, then `picluster jobs retry RUN`, or `cancel` it.",
        )  # fmt: skip
    if view.asking:
        runs = "1 run waits" if view.asking == 1 else f"{view.asking} runs wait"
        yield Finding(
            "note", "", f"{runs} for your word", "what it would do is not done without a person",
            "See `picluster jobs ls`, then `picluster jobs approve|reject RUN`.",
        )  # fmt: skip
    for service in view.services:
        yield Finding(
            "warning", view.name, f"{service.name} is left alone",
            f"{service.failures} calls in a row failed, the last one so: {service.why}",
            f"Runs wait and lose nothing; the next try is in {ago(service.waits_s)}.",
        )  # fmt: skip


def _of_services(member: MemberView, name: str) -> Iterator[Finding]:
    """What another node, which coordinates, says of the services outside."""
    for flag in member.facts.flags:
        if flag.startswith(SERVICE_FLAG):
            service = flag.removeprefix(SERVICE_FLAG)[:32]
            yield Finding(
                "warning", name, f"{service} is left alone", f"calls of {name} failed in a row",
                f"Runs wait and lose nothing. {name}'s own page says why.",
            )  # fmt: skip


def _of_member(member: MemberView, name: str) -> Iterator[Finding]:
    if member.state in ("suspect", "failed"):
        what = "may be down" if member.state == "suspect" else "is not answering"
        yield Finding(
            "warning", name, f"{name} {what}", member.why or f"{member.state} for {ago(member.since_s)}",
            "Check its power and network; it rejoins by itself.",
        )  # fmt: skip
    if member.state != "alive":
        return  # its facts are history
    facts = member.facts
    if facts.temperature_c is not None and facts.temperature_c >= HOT_C:
        yield Finding(
            "warning", name, f"{name} is hot", f"{facts.temperature_c:.0f} °C; it slows down from {HOT_C:.0f} °C",
            "Give it air: a fan, a heat sink, or a cooler place.",
        )  # fmt: skip
    if facts.memory_total and facts.memory_used > FULL_SHARE * facts.memory_total:
        yield Finding(
            "warning", name, f"{name} is short of memory", f"{facts.memory_used / facts.memory_total:.0%} in use",
            "Serve a smaller model or a shorter context there.",
        )  # fmt: skip
    for flag in facts.flags:
        if flag in FLAGS:
            severity, what, why, fix = FLAGS[flag]
            yield Finding(severity, name, f"{name} {what}", why, fix)
    if facts.trouble:
        yield Finding(
            "warning", name, f"{name} has disk trouble", facts.trouble,
            "Free space or replace the card. It leads again once writes succeed; meanwhile it still votes if it can.",
        )  # fmt: skip
    if facts.handed_over:
        yield Finding(
            "note", name, f"{name} handed over", facts.handed_over,
            "Nothing, once its cause is mended: picluster coordinator move brings leadership back.",
        )  # fmt: skip


def verdict(view: View, found: list[Finding]) -> Verdict:
    """The state of the cluster in one sentence, for a person across the room."""
    faults = [finding for finding in found if finding.severity == "fault"]
    warnings = [finding for finding in found if finding.severity == "warning"]
    if faults:
        return Verdict("down", f"{faults[0].what}: {faults[0].why}.")
    if len(warnings) == 1:
        return Verdict("degraded", f"Working, with one thing to look at: {warnings[0].what}.")
    if warnings:
        return Verdict("degraded", f"Working, with {len(warnings)} things to look at.")
    leader = names(view).get(view.leader, str(view.leader)) if view.leader else ""
    up = sum(member.state == "alive" for member in view.members)
    if up <= 1:
        return Verdict("ok", f"All is well. {leader} works alone.")
    return Verdict("ok", f"All is well. {up} nodes are up and {leader} coordinates.")


def finite(number: float | None) -> float | None:
    """`number`, or None where a peer sent one that is none (NaN, infinity), which JSON cannot say."""
    return number if number is not None and math.isfinite(number) else None


def ago(seconds: float) -> str:
    """A duration in the one unit that matters: 4 s, 3 min, 2 h, 5 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def health(
    view: View, edge: Mapping[str, Any], release: str, wall: float, providers: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The unified document of the module header. `wall` in seconds since 1970."""
    found = findings(view, edge)
    judged = verdict(view, found)
    called = names(view)
    relay = _backup(view)
    return {
        "status": judged.status,
        "verdict": judged.sentence,
        "version": release,
        "time": datetime.fromtimestamp(wall, UTC).isoformat(timespec="seconds"),
        "cluster": view.cluster,
        "coordinator": called.get(view.leader, str(view.leader)) if view.leader else None,
        "term": view.term,
        "edge": dict(edge),
        "backup": None if relay is None else {"address": address_of(relay), **_line(view, relay, called)},
        "pi_cluster": {address_of(m): _line(view, m, called) for m in view.members if m is not relay},
        "ai_providers": {
            "local": _local_models(view, called),
            **{name: _providers(kind, providers) for name, kind in PROVIDERS.items()},
        },
        "ledger": {
            "entries": view.entries,
            "digest": view.digest,
            "heads": [
                {"node": called.get(h.origin, str(h.origin)), "epoch": h.epoch, "seq": h.seq} for h in view.heads
            ],
        },
        "findings": [asdict(finding) for finding in found],
    }


def _backup(view: View) -> MemberView | None:
    """The relay outside the house; of several, one that is up."""
    relays = [member for member in view.members if member.facts.role == "relay"]
    return min(relays, key=lambda member: (member.state != "alive", member.node), default=None)


def address_of(member: MemberView) -> str:
    return member.facts.addresses[0] if member.facts.addresses else str(member.node)


def _line(view: View, member: MemberView, called: Mapping[NodeId, str]) -> dict[str, Any]:
    facts = member.facts
    return {
        "name": called[member.node],
        "state": member.state,
        "role": role_of(view, member),
        "load": finite(facts.cpu_percent),
        "memory": {"used": facts.memory_used, "total": facts.memory_total},
        "temperature": finite(facts.temperature_c),
        "models": [model.name for model in facts.models],
        "ledger_entries": facts.ledger_entries,
        "seen_s": round(member.heard_s or 0.0, 1),
    }


def _local_models(view: View, called: Mapping[NodeId, str]) -> dict[str, Any]:
    served: dict[str, list[str]] = {}
    for member in view.members:
        if member.state == "alive":
            for model in member.facts.models:
                served.setdefault(model.name, []).append(called[member.node])
    return {"configured": bool(served), "models": served}


def _providers(kind: str, providers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of one kind; nothing but that there is none, where there is none."""
    found = [{key: value for key, value in one.items() if key != "kind"} for one in providers if one["kind"] == kind]
    return {"configured": True, "providers": found} if found else {"configured": False}


# the doors -------------------------------------------------------------------------------------------------------
def routes(
    view: Callable[[], Awaitable[View]],
    edge: Callable[[], Mapping[str, Any]],
    ledger_fault: Callable[[], str],
    release: str,
    wall: Callable[[], float],
    providers: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
) -> list[web.RouteDef]:
    """`ledger_fault` says why the ledger takes no writes, "" while it does."""

    async def livez(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(request: web.Request) -> web.Response:
        checks = await _checks(view, ledger_fault)
        ready = not any(checks.values())
        lines = [f"[{'-' if fault else '+'}] {name} {fault or 'ok'}" for name, fault in checks.items()]
        text = "\n".join([*(lines if "verbose" in request.query else []), "ready" if ready else "not ready"])
        return web.Response(text=text + "\n", status=200 if ready else 503)

    async def whole(_request: web.Request) -> web.Response:
        document = health(await view(), edge(), release, wall(), providers())
        return web.json_response(document, status=503 if document["status"] == "down" else 200)

    return [
        web.get("/livez", livez),
        web.get("/readyz", readyz),
        web.get("/healthz", readyz),
        web.get("/health", whole),
    ]


async def _checks(view: Callable[[], Awaitable[View]], ledger_fault: Callable[[], str]) -> dict[str, str]:
    """Check → what is wrong with it, "" where nothing is."""
    try:
        seen = await view()
    except PiclusterError as fault:
        return {"node": str(fault), "ledger": ledger_fault()}
    alone = len(seen.members) <= 1
    return {
        "node": "",
        "ledger": ledger_fault(),
        "coordinator": "" if seen.leader is not None or alone else "an election is open",
    }
