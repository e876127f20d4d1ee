"""Live events: in order, resumable, and never at the price of the others."""

from __future__ import annotations

import asyncio
import json
from typing import Any, get_args

import aiohttp
import pytest

from piclusterd import events
from piclusterd.errors import Unavailable
from piclusterd.ids import LogId, NodeId
from piclusterd.web.stream import CLIENTS_MAX, QUEUE_MAX, RING_MAX, EventBus, describe

from .house import WALL, Node, node, run, serving


async def block(answer: aiohttp.ClientResponse) -> str:
    """The next SSE block, without its blank line."""
    async with asyncio.timeout(10):
        return (await answer.content.readuntil(b"\n\n")).decode().strip()


def data_of(text: str) -> Any:
    return json.loads(text.partition("data: ")[2])


async def test_an_event_reaches_a_follower_with_its_id() -> None:
    cluster = Node()
    async with serving(cluster.doors()) as client, client.get("/events") as answer:
        assert answer.content_type == "text/event-stream"
        assert await block(answer) == "retry: 2000"
        cluster.bus.publish("run", {"text": "two\nlines"})
        got = await block(answer)
        assert got.startswith("id: 1\ndata: ")
        assert data_of(got) == {"id": 1, "at": WALL, "kind": "run", "data": {"text": "two\nlines"}}


async def test_a_returning_client_gets_what_it_missed_and_no_more() -> None:
    cluster = Node()
    for number in range(5):
        cluster.bus.publish("run", {"n": number})
    async with (
        serving(cluster.doors()) as client,
        client.get("/events", headers={"Last-Event-ID": "3"}) as answer,
    ):
        await block(answer)
        assert [data_of(await block(answer))["id"] for _ in range(2)] == [4, 5]
        cluster.bus.publish("run", {})
        assert data_of(await block(answer))["id"] == 6


async def test_an_id_from_the_future_gets_the_whole_ring_and_nonsense_gets_none() -> None:
    bus = EventBus()
    bus.publish("run", {})
    with bus.follow(10**12) as follower:
        assert follower.queue.qsize() == 1
    with bus.follow(None) as follower:
        assert follower.queue.qsize() == 0


async def test_the_ring_keeps_the_last_events_and_no_ledger_growth() -> None:
    bus = EventBus()
    for _ in range(RING_MAX + 10):
        bus.publish("run", {})
    bus.publish("ledger", {}, keep=False)
    assert [event.id for event in bus.recent(2)] == [RING_MAX + 10, RING_MAX + 9]
    with bus.follow(0) as follower:
        assert follower.queue.qsize() == RING_MAX


async def test_silence_is_filled_with_comments() -> None:
    cluster = Node()
    cluster.bus.heartbeat_s = 0.01
    async with serving(cluster.doors()) as client, client.get("/events") as answer:
        await block(answer)
        assert await block(answer) == ": still here"


async def test_a_slow_client_is_dropped_with_a_last_word_and_the_others_stay() -> None:
    cluster = Node()
    async with serving(cluster.doors()) as client, client.get("/events") as slow:
        await block(slow)
        with cluster.bus.follow(None) as quick:
            for _ in range(QUEUE_MAX + 1):
                cluster.bus.publish("run", {})
                quick.queue.get_nowait()
            assert cluster.bus.clients == 1
            assert not quick.lost
        async with asyncio.timeout(10):
            rest = (await slow.content.read()).decode()
        assert rest.endswith(": dropped: too slow, reconnect to resume\n\n")


async def test_the_number_of_clients_is_capped_and_a_place_is_free_again_after() -> None:
    cluster = Node()
    async with serving(cluster.doors()) as client:
        followers = [cluster.bus.follow(None) for _ in range(CLIENTS_MAX)]
        for follower in followers:
            follower.__enter__()
        async with client.get("/events") as answer:
            assert answer.status == 503
        followers[0].__exit__(None, None, None)
        async with client.get("/events") as answer:
            assert answer.status == 200
            await block(answer)
        for follower in followers[1:]:
            follower.__exit__(None, None, None)


async def test_streams_end_when_the_node_stops() -> None:
    cluster = Node()
    async with serving(cluster.doors()) as client, client.get("/events") as answer:
        await block(answer)
        cluster.bus.close()
        assert await block(answer) == ": this node is stopping"
        with pytest.raises(Unavailable), cluster.bus.follow(None):
            pass


async def test_a_command_line_gets_one_object_a_line() -> None:
    cluster = Node()
    cluster.bus.publish("run", {"text": "x"})
    async with serving(cluster.doors()) as client, client.get("/events?format=jsonl&after=0") as answer:
        assert answer.content_type == "application/x-ndjson"
        async with asyncio.timeout(10):
            lines = [await answer.content.readline() for _ in range(2)]
        assert lines[0] == b"\n"
        assert json.loads(lines[1])["kind"] == "run"


NOTES: tuple[events.Note, ...] = (
    events.MemberUp(node(2), "pi-2"),
    events.MemberDown(node(2), "", "failed", "3 probes unanswered"),
    events.LeaderChanged(13, node(2)),
    events.LeaderChanged(13, None),
    events.Elected(13, ()),
    events.Deposed(13, "a newer term"),
    events.HandedOver(13, node(2), "disk full"),
    events.Activated(13),
    events.LedgerGrew((events.Fact(LogId(node(1), 1), 1, 1, "hook", {}),)),
    events.Durable(1, (), 2),
    events.RunMoved(run(1).run, "triage", "classify", "done"),
    events.LedgerAlarm("two branches of one log"),
)


def test_every_note_is_told_in_words_or_left_out_on_purpose() -> None:
    assert {type(note) for note in NOTES} == set(get_args(events.Note))
    said = [describe(note, lambda _node: "pi-2") for note in NOTES]
    assert [told[1] for told in said if told is not None] == [
        "pi-2 is up",
        "pi-2 is failed: 3 probes unanswered",
        "pi-2 coordinates term 13",
        "No coordinator in term 13: an election is open",
        "This node won term 13 and is recovering",
        "This node no longer leads term 13: a newer term",
        "Handed over to pi-2: disk full",
        "This node serves as coordinator of term 13",
        "1 new ledger entry",
        "triage 00000000: classify done",
        "two branches of one log",
    ]


def test_a_note_is_published_with_its_sentence() -> None:
    bus = EventBus(first_id=1000)
    bus.note(NOTES[0], lambda node: str(node))
    bus.note(NOTES[8], lambda node: NodeId(node))
    (event,) = bus.recent(10)
    assert (event.id, event.kind, event.data) == (1000, "member-up", {"text": "pi-2 is up", "node": "pi-2"})
