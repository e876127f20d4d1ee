"""The numbers parse, mean what they say, and stay bounded."""

from __future__ import annotations

from collections import Counter

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from piclusterd.web.metrics import NODES_MAX, Meters

from .house import HOSTILE, Node, member, serving, view

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(client: aiohttp.ClientSession) -> Samples:
    async with client.get("/metrics") as answer:
        assert answer.status == 200
        return parse(await answer.text())


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_the_view_becomes_gauges() -> None:
    cluster = Node(
        view(member(1), member(2, flags=("undervolt",), ledger_entries=18_400, trouble="full"), member(3, "failed"))
    )
    async with serving(cluster.doors()) as client:
        got = await scrape(client)
    node2 = (("node", "pi-2"),)
    assert got["piclusterd_leader_term", ()] == 12
    assert got["piclusterd_is_leader", ()] == 1
    assert got["piclusterd_gossip_members", (("state", "alive"),)] == 2
    assert got["piclusterd_gossip_members", (("state", "failed"),)] == 1
    assert got["piclusterd_pi_temperature_celsius", node2] == 50
    assert got["piclusterd_pi_undervoltage", node2] == 1
    assert (got["piclusterd_disk_trouble", node2], got["piclusterd_handed_over", node2]) == (1, 0)
    assert got["piclusterd_ledger_lag_entries", node2] == 22
    assert got["piclusterd_model_queued", (("model", "qwen2.5-1.5b"), ("node", "pi-1"))] == 2
    assert got["piclusterd_runs", (("state", "open"), ("workflow", "triage"))] == 1


async def test_a_failed_node_is_down_and_shows_no_old_measurements() -> None:
    async with serving(Node(view(member(1), member(2, "failed"))).doors()) as client:
        got = await scrape(client)
    node2 = (("node", "pi-2"),)
    assert got["piclusterd_node_up", node2] == 0
    assert ("piclusterd_pi_temperature_celsius", node2) not in got


async def test_requests_are_counted_by_route_template_not_by_path() -> None:
    async with serving(Node().doors()) as client:
        for path in ("/hooks/one", "/hooks/two"):
            async with client.post(path) as answer:
                assert answer.status == 404
        async with client.get("/nowhere/at/all") as answer:
            assert answer.status == 404
        got = await scrape(client)
    assert got["piclusterd_requests_total", (("code", "404"), ("route", "/hooks/{source}"))] == 2
    assert got["piclusterd_requests_total", (("code", "404"), ("route", "unmatched"))] == 1
    assert got["piclusterd_webhook_deliveries_total", (("result", "refused"), ("source", "unknown"))] == 2


def test_hostile_and_equal_names_still_parse() -> None:
    twins = view(member(1, name=HOSTILE + '\n"'), member(2, name=HOSTILE + '\n"'))
    got = parse(Meters().exposition(twins).decode())
    assert sum(name == "piclusterd_node_up" for name, _ in got) == 2


def test_a_node_that_left_the_view_is_gone_from_the_next_scrape() -> None:
    meters = Meters()
    meters.exposition(view(member(1), member(2)))
    got = parse(meters.exposition(view(member(1))).decode())
    assert ("piclusterd_node_up", (("node", "pi-2"),)) not in got


def test_series_are_bounded_however_many_nodes_there_are() -> None:
    many = view(*(member(number) for number in range(1, NODES_MAX + 40)))
    got = parse(Meters().exposition(many).decode())
    assert sum(name == "piclusterd_node_info" for name, _ in got) == NODES_MAX


def test_two_nodes_may_count_in_one_process() -> None:
    one, two = Meters(), Meters()
    one.loop_lag.set(0.5)
    assert parse(two.exposition(None).decode())["piclusterd_event_loop_lag_seconds", ()] == 0


def test_guesses_are_counted_by_what_became_of_them() -> None:
    meters, guessed = Meters(), Counter({"accepted": 3})
    meters.count_drafts(guessed)
    guessed["rejected"] += 2
    got = parse(meters.exposition(None).decode())
    assert got["piclusterd_draft_tokens", (("result", "accepted"),)] == 3
    assert got["piclusterd_draft_tokens", (("result", "rejected"),)] == 2


def test_beginnings_on_disk_are_counted_by_what_became_of_them() -> None:
    meters, told = Meters(), Counter({"saved": 1})
    meters.count_depot(told)
    told["loaded"] += 2
    got = parse(meters.exposition(None).decode())
    assert [got["piclusterd_disk_states", (("result", one),)] for one in ("saved", "loaded", "spoiled")] == [1, 2, 0]
