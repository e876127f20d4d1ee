"""One reading of the cluster for probes, programs and people."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from piclusterd.errors import Unavailable
from piclusterd.views import ServiceView, View
from piclusterd.web import health

from .house import Node, member, node, relay, serving, view

EDGE = {"url": "https://hub.example", "connected": True, "last_seq": 117}
DARK = {"url": "https://hub.example", "connected": False, "last_seq": 117}


def judged(picture: View, edge: dict[str, object] = EDGE) -> health.Verdict:
    return health.verdict(picture, health.findings(picture, edge))


def whats(picture: View, edge: dict[str, object] = EDGE) -> list[str]:
    return [finding.what for finding in health.findings(picture, edge)]


def test_a_calm_cluster_has_no_findings_and_says_so() -> None:
    assert health.findings(view(), EDGE) == []
    assert judged(view()) == health.Verdict("ok", "All is well. 4 nodes are up and pi-1 coordinates.")


def test_one_node_alone_is_well() -> None:
    assert judged(view(member(1), voters=(node(1),))).sentence == "All is well. pi-1 works alone."


def test_a_suspect_node_is_named_with_cause_and_fix() -> None:
    slow = dataclasses.replace(member(3, "suspect"), why="3 probes unanswered")
    picture = view(member(1), member(2), slow, member(4), voters=(node(1), node(2), node(4)))
    (finding,) = health.findings(picture, EDGE)
    assert (finding.node, finding.what, finding.why) == ("pi-3", "pi-3 may be down", "3 probes unanswered")
    assert finding.fix
    assert judged(picture) == health.Verdict("degraded", "Working, with one thing to look at: pi-3 may be down.")


def test_a_bare_majority_is_a_warning_and_less_is_down() -> None:
    bare = view(member(1), member(2), member(3, "failed"))
    assert whats(bare) == ["No voter to spare", "pi-3 is not answering"]
    assert judged(bare).status == "degraded"
    lost = view(member(1), member(2, "failed"), member(3, "failed"), leader=None)
    assert judged(lost) == health.Verdict("down", "No coordinator: only 1 of 3 voters answer and 2 must agree.")
    assert "pi-2 or pi-3" in health.findings(lost, EDGE)[0].fix


def test_an_open_election_is_down_for_as_long_as_it_lasts() -> None:
    assert judged(view(leader=None)).sentence == "No coordinator: an election is open."


def test_heat_memory_and_supply_are_told_of_living_nodes_only() -> None:
    ill: dict[str, Any] = {
        "temperature_c": 83.0,
        "memory_used": 7_900,
        "memory_total": 8_000,
        "flags": ("undervolt", "hot"),
    }
    picture = view(member(1), member(2, **ill), member(3, "left", **ill), relay())
    told = ["pi-2 is hot", "pi-2 is short of memory", "pi-2 has too little voltage"]
    assert [what for what in whats(picture) if "pi-" in what] == told


def test_disk_trouble_and_a_hand_over_are_told_with_their_reason() -> None:
    ill = member(2, flags=("disk",), trouble="the disk is full", handed_over="the disk is full")
    found = [finding for finding in health.findings(view(member(1), ill), EDGE) if finding.node == "pi-2"]
    assert [(f.severity, f.what, f.why) for f in found] == [
        ("warning", "pi-2 has disk trouble", "the disk is full"),
        ("note", "pi-2 handed over", "the disk is full"),
    ]


def test_what_is_wrong_with_a_nodes_disk_is_told_on_every_node_and_a_mended_one_is_a_note() -> None:
    flags = ("ledger-lost", "ledger-rot", "votes-lost")
    told = health.findings(view(member(1), member(2, flags=flags), member(3, flags=("ledger-mended",))), EDGE)
    assert [(finding.severity, finding.node) for finding in told] == [("warning", "pi-2")] * 3 + [("note", "pi-3")]
    assert all(finding.why and finding.fix for finding in told)


def test_the_hub_matters_to_the_coordinator_only() -> None:
    assert whats(view(), DARK) == ["The hub is not connected"]
    assert whats(view(leader=node(2)), DARK) == []
    assert whats(view(), dict(health.NO_EDGE)) == []


def test_missing_models_and_mixed_releases_are_notes() -> None:
    picture = view(member(1, models=()), member(2, models=(), release="0.2.0"), voters=(node(1), node(2)))
    notes = [finding for finding in health.findings(picture, EDGE) if finding.severity == "note"]
    assert [note.what for note in notes] == ["No model is served", "Nodes run different releases"]
    assert judged(picture).status == "ok"


def test_nodes_that_share_a_name_are_told_apart() -> None:
    told = health.names(view(member(1), member(2, name="pi-1")))
    assert len(set(told.values())) == 2


@pytest.mark.parametrize(("seconds", "said"), [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (7200, "2 h"), (2e5, "2 d")])
def test_durations_are_told_in_the_one_unit_that_matters(seconds: float, said: str) -> None:
    assert health.ago(seconds) == said


async def test_the_unified_document_has_every_tier() -> None:
    async with serving(Node().doors()) as client, client.get("/health") as answer:
        body = await answer.json()
        assert answer.status == 200
    assert body["coordinator"] == "pi-1"
    assert body["time"] == "2027-01-15T08:00:00+00:00"
    assert list(body["pi_cluster"]) == ["192.168.1.11:7946", "192.168.1.12:7946", "192.168.1.13:7946"]
    assert body["pi_cluster"]["192.168.1.12:7946"] == {
        "name": "pi-2", "state": "alive", "role": "voter", "load": 24.0,
        "memory": {"used": 3 * 2**30, "total": 8 * 2**30}, "temperature": 50.0, "models": ["qwen2.5-1.5b"],
        "ledger_entries": 18422, "seen_s": 0.4,
    }  # fmt: skip
    assert (body["backup"]["name"], body["backup"]["address"]) == ("vps-1", "203.0.113.9:7946")
    assert body["edge"] == EDGE
    assert body["ai_providers"] == {
        "local": {"configured": True, "models": {"qwen2.5-1.5b": ["pi-1", "pi-2", "pi-3"]}},
        "workers_ai": {"configured": False},
        "huggingface": {"configured": False},
        "openai_compatible": {"configured": False},
    }
    assert body["ledger"]["heads"][1] == {"node": "pi-2", "epoch": 1, "seq": 422}


async def test_health_answers_503_when_the_cluster_is_down() -> None:
    async with serving(Node(view(leader=None)).doors()) as client, client.get("/health") as answer:
        assert answer.status == 503
        assert (await answer.json())["status"] == "down"


async def test_the_node_lives_even_when_it_cannot_answer() -> None:
    cluster = Node()
    cluster.picture = Unavailable("no answer in time")
    async with serving(cluster.doors()) as client:
        async with client.get("/livez") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with client.get("/readyz?verbose") as answer:
            assert answer.status == 503
            assert "[-] node no answer in time" in await answer.text()


async def test_readiness_lists_its_checks_when_asked() -> None:
    cluster = Node()
    async with serving(cluster.doors()) as client:
        for path in ("/readyz", "/healthz"):
            async with client.get(path) as answer:
                assert (answer.status, await answer.text()) == (200, "ready\n")
        cluster.picture = view(leader=None)
        cluster.ledger_fault = "disk full"
        async with client.get("/readyz?verbose") as answer:
            assert answer.status == 503
            assert (await answer.text()).splitlines() == [
                "[+] node ok", "[-] ledger disk full", "[-] coordinator an election is open", "not ready",
            ]  # fmt: skip


async def test_a_node_alone_is_ready_without_a_coordinator() -> None:
    async with serving(Node(view(member(1), leader=None)).doors()) as client, client.get("/readyz") as answer:
        assert answer.status == 200


# runs --------------------------------------------------------------------------------------------------------------
def told(seen: View) -> dict[str, str]:
    return {finding.what: finding.why for finding in health.findings(seen)}


def test_dead_letters_and_questions_are_told_with_what_to_do() -> None:
    assert "1 run was given up" in told(view(dead=1))
    assert "3 runs were given up" in told(view(dead=3))
    assert "1 run waits for your word" in told(view(asking=1))
    assert "2 runs wait for your word" in told(view(asking=2))


def test_a_service_that_is_left_alone_is_told_by_the_coordinator_with_its_reason_and_by_others_without() -> None:
    ailing = ServiceView("linear", 7, 31.0, "Linear did not answer: TimeoutError")
    here = told(view(member(1, flags=("service-linear",)), services=(ailing,)))
    assert (
        here["linear is left alone"] == "7 calls in a row failed, the last one so: Linear did not answer: TimeoutError"
    )
    there = told(view(member(1), member(2, flags=("service-linear",))))
    assert there["linear is left alone"] == "calls of pi-2 failed in a row"


def test_runs_that_wait_for_a_copy_or_for_the_time_are_told_of_their_coordinator() -> None:
    seen = told(view(member(1), member(2, flags=("copy-waits", "clock-unset"))))
    assert "pi-2 keeps urgent runs open" in seen
    assert "pi-2 does not know the time" in seen
