"""Attacks on the second way in: each ends as it should (numbers as in users-ops-security, 4.5, Webhook)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import itertools
import json
from random import Random

import pytest

from piclusterd.errors import Overloaded, Refused
from piclusterd.events import Answer, Append, HookArrived, HookTaken
from piclusterd.ids import NodeId, RunId
from piclusterd.web.hooks import Lists, hook_of
from piclusterd.wire import Hook
from piclusterd.workflows.intake import WAITING_MAX, Intake
from piclusterd.workflows.journal import Journal
from piclusterd.workflows.workflow import Workflow

from .house import WALL, Node, serving
from .test_hooks import SECRETS, mac, send

EVENT = {
    "type": "Issue",
    "action": "create",
    "id": "e1",
    "data": {"id": "i1"},
    "repository": {"full_name": "ann/house"},
}
BODY = json.dumps(EVENT).encode()
SECRET = {"linear": "new", "github": "gh", "notion": "nt"}
SOURCES = list(SECRET)
DAY_S = 86_400.0


def signed(source: str, body: bytes, guid: str = "g1") -> dict[str, str]:
    digest = mac(SECRET[source], body)
    return {
        "linear": {"Linear-Signature": digest, "Linear-Delivery": guid},
        "github": {"X-Hub-Signature-256": f"sha256={digest}", "X-GitHub-Event": "push", "X-GitHub-Delivery": guid},
        "notion": {"X-Notion-Signature": f"sha256={digest}"},
    }[source]


@pytest.mark.parametrize("source", SOURCES)
async def test_each_source_comes_in_by_the_same_checks(source: str) -> None:
    cluster = Node()
    status, answer, _ = await send(cluster, source, BODY, signed(source, BODY))
    assert (status, answer["stored"], cluster.taken[0].source) == (200, True, source)
    cluster.hook_answer = HookTaken(RunId("0" * 32), True)
    status, answer, _ = await send(cluster, source, BODY, signed(source, BODY))
    assert (status, answer["duplicate"]) == (200, True)


# C1
@pytest.mark.parametrize("source", SOURCES)
async def test_c1_no_signature_that_does_not_hold_gets_in(source: str) -> None:
    cluster = Node()
    good = signed(source, BODY)
    (name, value) = next((n, v) for n, v in good.items() if "Signature" in n)
    prefix, digest = ("sha256=", value[7:]) if value.startswith("sha256=") else ("", value)
    sha1 = hmac.new(SECRET[source].encode(), BODY, hashlib.sha1).hexdigest()
    bad = [None, "", value[:-2], prefix + "0" * 64, prefix + sha1, "sha1=" + sha1, prefix + digest + "00"]
    bad += [prefix + base64.b64encode(bytes.fromhex(digest)).decode(), "sha1=" + digest]
    for forged in bad:
        headers = {**good, "X-Hub-Signature": "sha1=" + sha1} | ({} if forged is None else {name: forged})
        if forged is None:
            del headers[name]
        status, _, _ = await send(cluster, source, BODY, headers)
        assert status == 401, forged
    reencoded = json.dumps(EVENT, indent=1).encode()
    status, _, _ = await send(cluster, source, reencoded, good)
    assert status == 401
    assert cluster.taken == []


# C2
@pytest.mark.parametrize("source", SOURCES)
def test_c2_the_same_body_is_one_event_under_whatever_delivery_id(source: str) -> None:
    keys = {hook_of(source, signed(source, BODY, guid), BODY, [SECRET[source]]).key for guid in ("g1", "g1", "g2")}
    assert len(keys) == 1


# C3
async def test_c3_what_was_signed_before_anybody_remembers_is_refused_by_a_board_that_knows_the_time() -> None:
    def body(age_s: float) -> bytes:
        return json.dumps(EVENT | {"webhookTimestamp": int((WALL - age_s) * 1000)}).encode()

    cluster = Node()
    for age_s, synced, expected in [(8 * DAY_S, True, 401), (-8 * DAY_S, True, 401), (6 * DAY_S, True, 200),
                                    (8 * DAY_S, False, 200)]:  # fmt: skip
        old = body(age_s)
        status, _, _ = await send(cluster, "linear", old, signed("linear", old), clock_synced=lambda to=synced: to)
        assert status == expected, (age_s, synced)
    assert len(cluster.taken) == 2


# C4
async def test_c4_the_hubs_word_is_not_enough() -> None:
    """A stolen hub hands over what nobody signed: `hook_of` is the one way in, whoever carries the event."""
    with pytest.raises(Refused):
        hook_of("github", {"X-GitHub-Event": "push", "X-Hub-Token": "the hub's own"}, BODY, SECRETS["github"])


# C5
@pytest.mark.parametrize(
    ("lists", "taken"),
    [
        (Lists(), True),
        (Lists(repos=("ann/house",), events=("push",)), True),
        (Lists(repos=("ann/other",)), False),
        (Lists(events=("workflow_run",)), False),
    ],
)
async def test_c5_what_is_not_on_the_lists_is_ignored_with_202(
    lists: Lists, taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cluster = Node()
    status, answer, _ = await send(cluster, "github", BODY, signed("github", BODY), lists=lists)
    assert (status, answer["stored"], bool(cluster.taken)) == ((200, True, True) if taken else (202, False, False))
    assert ("ignored" in caplog.text) is not taken


async def test_c5_the_lists_say_nothing_about_other_sources() -> None:
    cluster = Node()
    status, _, _ = await send(cluster, "linear", BODY, signed("linear", BODY), lists=Lists(repos=("ann/other",)))
    assert (status, len(cluster.taken)) == (200, 1)


# C6
def test_c6_ten_thousand_at_once_wait_in_a_bounded_queue_and_the_rest_is_told_to_come_again() -> None:
    me, journal, none = NodeId("a" * 16), Journal(), dict[str, Workflow]()
    intake = Intake(
        me, journal, none, itertools.count(1), lambda: (me, 1, True), lambda log, seq: False, lambda log: False
    )
    outputs = [
        out for n in range(10_000) for out in intake.handle(HookArrived(n, Hook("linear", f"k{n}", "", b"{}")), 0)
    ]
    appended = [out for out in outputs if isinstance(out, Append)]
    refused = [out.value for out in outputs if isinstance(out, Answer)]
    assert (len(appended), intake.waiting) == (WAITING_MAX, WAITING_MAX)
    assert len(refused) == 10_000 - WAITING_MAX
    assert all(isinstance(value, Overloaded) for value in refused)


async def test_c6_the_api_answers_while_webhooks_pour_in() -> None:
    cluster = Node()
    order = Random(3)
    async with serving(cluster.doors(secrets=SECRETS)) as client:

        async def deliver() -> int:
            body = json.dumps({**EVENT, "n": order.random()}).encode()
            async with client.post("/hooks/linear", data=body, headers=signed("linear", body)) as answer:
                return answer.status

        pouring = [asyncio.create_task(deliver()) for _ in range(500)]
        async with asyncio.timeout(60), client.get("/livez") as alive:
            assert alive.status == 200
        assert set(await asyncio.gather(*pouring)) == {200}


# C7
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"n":1e308}',
        b'{"n":1e400}',
        b'{"n":NaN}',
        b'{"title":"\\ud800"}',
        b'{"action":"create","action":"remove"}',
        b'{"x":"\xff"}',
        b"",
    ],
    ids=["deep array", "deep object", "1e308", "1e400", "NaN", "lone surrogate", "twice", "not UTF-8", "empty"],
)
async def test_c7_a_body_that_is_no_plain_json_is_400_and_nothing_falls_over(source: str, body: bytes) -> None:
    cluster = Node()
    status, _, _ = await send(cluster, source, body, signed(source, body))
    assert (status, cluster.taken) == (400, [])
