"""Numbers for Prometheus: what this node counts itself, and what the latest `View` says of everybody.

    handlers ──inc()──▶ Meters ─┐
                                ├──▶ GET /metrics   (text exposition, base units, prefix `piclusterd_`)
    node ──────View──▶ gauges ──┘

Owns a registry of its own (none global, so that two nodes may live in one process). Labels are bounded: node, model,
route template, source, outcome; never a prompt, an issue, a key or a raw path. Gauges are made at each scrape, so a
node that left is gone from the next one. Others may register more collectors with `Meters.registry`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterator
from functools import cache, partial

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..views import View
from . import health

NODES_MAX = 64
"""Nodes with series of their own; far above a home cluster, far below what would trouble a scraper."""
MODELS_MAX = 16
"""Models of one node with series of their own."""
STATES = ("alive", "suspect", "failed", "left")
SECONDS_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0, 900.0)
"""From a health check to a Pi 4 that answers a long prompt."""


class Meters:
    """What this process counts. `view` is set before each exposition."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.view: View | None = None
        self.requests = Counter(
            "piclusterd_requests", "HTTP requests answered.", ["route", "code"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "piclusterd_request_seconds", "Time to answer, streams to their end.", ["route"],
            buckets=SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.webhooks = Counter(
            "piclusterd_webhook_deliveries", "Webhooks that came in by /hooks.", ["source", "result"],
            registry=self.registry,
        )  # fmt: skip
        self.request, self.request_took = cache(self.requests.labels), cache(self.request_seconds.labels)
        self.webhook = cache(self.webhooks.labels)
        """As `labels`, which takes locks to find what is there: labels are few."""
        self.loop_lag = Gauge(
            "piclusterd_event_loop_lag_seconds", "How late the loop woke, last measured.", registry=self.registry
        )
        self.relayed_links = Gauge(
            "piclusterd_relayed_links", "Links of others that this node relays.", registry=self.registry
        )
        self.relayed_bytes = Gauge(
            "piclusterd_relayed_bytes", "Relayed for others since the start.", registry=self.registry
        )
        self.registry.register(_ViewCollector(self))

    def count_answers(self, told: Counts[str]) -> None:
        """`told`: how many answers were remembered, joined or neither; it counts on by itself."""
        counted = Gauge(
            "piclusterd_cache_answers", "Repeatable answers since the start.", ["cache"], registry=self.registry
        )
        for how in ("hit", "joined", "miss"):
            counted.labels(how).set_function(partial(told.__getitem__, how))

    def count_drafts(self, guessed: Counts[str]) -> None:
        """`guessed`: tokens of drafts that were accepted or rejected; it counts on by itself."""
        counted = Gauge(
            "piclusterd_draft_tokens", "Tokens guessed since the start.", ["result"], registry=self.registry
        )
        for result in ("accepted", "rejected"):
            counted.labels(result).set_function(partial(guessed.__getitem__, result))

    def count_depot(self, told: Counts[str]) -> None:
        """`told`: states of prompts' beginnings by what became of them on disk; it counts on by itself."""
        counted = Gauge(
            "piclusterd_disk_states", "Prompts' beginnings on disk since the start.", ["result"], registry=self.registry
        )
        for result in ("saved", "loaded", "spoiled"):
            counted.labels(result).set_function(partial(told.__getitem__, result))

    def exposition(self, view: View | None) -> bytes:
        """The text format; without a view only the counters."""
        self.view = view
        return generate_latest(self.registry)


class _ViewCollector(Collector):
    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    def collect(self) -> Iterator[Metric]:
        view = self._meters.view
        if view is None:
            return
        yield from _of_cluster(view)
        yield from _of_nodes(view)
        yield from _of_models(view)


def _of_cluster(view: View) -> Iterator[Metric]:
    yield GaugeMetricFamily("piclusterd_leader_term", "Election term.", view.term)
    yield GaugeMetricFamily("piclusterd_is_leader", "1 where this node coordinates.", float(view.role == "leader"))
    yield GaugeMetricFamily("piclusterd_has_leader", "1 while a coordinator is known.", float(view.leader is not None))
    yield GaugeMetricFamily("piclusterd_quorum", "Voters heard, this one included.", view.quorum)
    yield GaugeMetricFamily("piclusterd_voters", "Voters there are.", len(view.voters))
    yield GaugeMetricFamily("piclusterd_ledger_entries", "Entries durable on this node.", view.entries)
    yield GaugeMetricFamily("piclusterd_ledger_webhooks", "Webhooks in the ledger.", view.hooks)
    yield CounterMetricFamily("piclusterd_handovers", "Times this node handed leadership over.", view.handovers)
    yield GaugeMetricFamily(
        "piclusterd_disk_slowest_write_seconds", "Slowest write of late, decaying.", view.slowest_write_s
    )
    yield GaugeMetricFamily(
        "piclusterd_election_timeout_stretch", "What a slow disk multiplies this node's timeout by.", view.stretch
    )
    members = GaugeMetricFamily("piclusterd_gossip_members", "Members by state.", labels=["state"])
    for state in STATES:
        members.add_metric([state], sum(member.state == state for member in view.members))
    yield members
    runs = GaugeMetricFamily("piclusterd_runs", "Latest runs by state.", labels=["workflow", "state"])
    counted: dict[tuple[str, str], int] = {}
    for run in view.runs:
        counted[run.workflow, run.state] = counted.get((run.workflow, run.state), 0) + 1
    for (workflow, state), count in counted.items():
        runs.add_metric([workflow, state], count)
    yield runs


def _of_nodes(view: View) -> Iterator[Metric]:
    called = health.names(view)

    def gauge(name: str, help_text: str, labels: tuple[str, ...] = ()) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"piclusterd_{name}", help_text, labels=["node", *labels])

    info = gauge("node_info", "1; what the node is.", ("board", "version", "role"))
    up = gauge("node_up", "1 while the node is alive.")
    cpu = gauge("cpu_ratio", "Share of all cores in use, 0 to 1.")
    used = gauge("memory_used_bytes", "Memory in use.")
    total = gauge("memory_total_bytes", "Memory there is.")
    heat = gauge("pi_temperature_celsius", "Temperature of the processor.")
    volts = gauge("pi_undervoltage", "1 while the supply is too weak.")
    slow = gauge("pi_throttled", "1 while the firmware holds the clock down.")
    disk = gauge("disk_trouble", "1 while its disk refuses writes or hangs.")
    gave_up = gauge("handed_over", "1 for half an hour after it gave up leadership of its own accord.")
    lag = gauge("ledger_lag_entries", "Entries this node has beyond the other's last word.")
    for member in view.members[:NODES_MAX]:
        name, facts = called[member.node], member.facts
        info.add_metric([name, facts.board, facts.release, health.role_of(view, member)], 1)
        up.add_metric([name], float(member.state == "alive"))
        if member.state != "alive":
            continue  # its last numbers are history, not measurements
        cpu.add_metric([name], facts.cpu_percent / 100)
        used.add_metric([name], facts.memory_used)
        total.add_metric([name], facts.memory_total)
        if facts.temperature_c is not None:
            heat.add_metric([name], facts.temperature_c)
        volts.add_metric([name], float("undervolt" in facts.flags))
        slow.add_metric([name], float("throttled" in facts.flags))
        disk.add_metric([name], float(bool(facts.trouble)))
        gave_up.add_metric([name], float(bool(facts.handed_over)))
        lag.add_metric([name], 0 if member.node == view.me else max(0, view.entries - facts.ledger_entries))
    yield from (info, up, cpu, used, total, heat, volts, slow, disk, gave_up, lag)


def _of_models(view: View) -> Iterator[Metric]:
    called = health.names(view)
    labels = ["node", "model"]
    busy = GaugeMetricFamily("piclusterd_model_busy", "Requests in the making.", labels=labels)
    queued = GaugeMetricFamily("piclusterd_model_queued", "Requests waiting.", labels=labels)
    prefill = GaugeMetricFamily("piclusterd_model_prefill_tokens_per_second", "Measured.", labels=labels)
    decode = GaugeMetricFamily("piclusterd_model_decode_tokens_per_second", "Measured.", labels=labels)
    for member in view.members[:NODES_MAX]:
        if member.state != "alive":
            continue
        served = {model.name: model for model in member.facts.models[:MODELS_MAX]}
        for name, model in served.items():
            values = [called[member.node], name]
            busy.add_metric(values, model.busy)
            queued.add_metric(values, model.queued)
            prefill.add_metric(values, model.prefill_tps)
            decode.add_metric(values, model.decode_tps)
    yield from (busy, queued, prefill, decode)


def routes(view: Callable[[], Awaitable[View]], meters: Meters) -> list[web.RouteDef]:
    async def metrics(_request: web.Request) -> web.Response:
        body = meters.exposition(await view())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [web.get("/metrics", metrics)]
