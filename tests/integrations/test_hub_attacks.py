"""Attacks on the way in, on both hubs: each ends as it should, and the hub is alive afterwards.

The numbers are those of the project's list of attacks on webhooks. Those that end at the cluster are tested there: a
stolen hub that forges (C4) in tests/e2e/test_bad_input.py, unwanted events (C5) in tests/workflows/test_intake.py. C3
is about a relay that signs with a timestamp and a nonce. This one signs nothing, and the cluster believes the
provider's signature alone: the nonce is the key made of signed content, and what was signed longer ago than keys are
remembered is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time

import pytest

from piclusterd.demo.signing import sign
from tests.integrations.rig import SECRETS, Rig, fresh

pytestmark = pytest.mark.e2e

TIMELESS = 2
"""Of the bodies below: its time is that of no webhook."""
STRANGE = [
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"webhookTimestamp": 1e308, "data": {"n": -1e308, "m": 1e999}}',
    b'{"id": "\\ud800", "type": "\\udfff"}',
    b'{"id": "one", "id": "two", "action": "create", "action": "remove"}',
]


async def test_c1_nothing_but_the_providers_signature_over_these_very_bytes_is_believed(hub: Rig) -> None:
    body = b'{"action": "opened",  "n": 1.0}'
    good = sign("github", body, SECRETS["github"])
    sha1 = hmac.new(SECRETS["github"].encode(), body, hashlib.sha1).hexdigest()
    bare = {name: value for name, value in good.items() if name != "X-Hub-Signature-256"}
    again = json.dumps(json.loads(body)).encode()
    assert again != body
    for sent, headers in [
        (body, bare),
        (body, bare | {"X-Hub-Signature": f"sha1={sha1}"}),
        (body, bare | {"X-Hub-Signature-256": f"sha1={sha1}"}),
        (body, good | {"X-Hub-Signature-256": good["X-Hub-Signature-256"][:-2]}),
        (body, sign("github", body, "guess")),
        (again, good),
        (body, sign("linear", body, SECRETS["linear"])),
    ]:
        assert (await hub.send_hook("github", sent, headers))[0] == 401
    assert (await hub.health())["depth"] == 0


async def test_c2_one_event_is_stored_once_however_often_it_is_sent(hub: Rig) -> None:
    body = fresh(n=1)
    assert (await hub.post("linear", body, delivery="d1"))[1] == {"seq": 1, "duplicate": False}
    for delivery in ("d1", "d2", ""):
        assert (await hub.post("linear", body, delivery=delivery))[1] == {"seq": 1, "duplicate": True}
    assert (await hub.post("github", body, delivery="g1"))[1] == {"seq": 2, "duplicate": False}
    assert (await hub.post("github", body, delivery="g1"))[1] == {"seq": 2, "duplicate": True}
    same = fresh(n=2)
    together = await asyncio.gather(*(hub.post("linear", same) for _ in range(8)))
    assert sorted(answer["duplicate"] for _, answer in together) == [False] + [True] * 7
    assert (await hub.health())["depth"] == 3


@pytest.mark.parametrize("days", [-8, 8, -20_000])
async def test_c3_what_was_signed_before_anybody_remembers_is_refused(hub: Rig, days: int) -> None:
    body = {"id": "old", "webhookTimestamp": int((time.time() + days * 86_400) * 1000)}
    assert (await hub.post("linear", body))[0] == 401
    assert (await hub.post("linear", fresh(id="new")))[0] == 200


async def test_c6_a_flood_meets_a_bounded_queue_that_keeps_what_it_took_and_stays_alive(any_rig: Rig) -> None:
    await any_rig.start(HUB_OUTBOX_MAX="20")
    answers = await asyncio.gather(*(any_rig.post("linear", fresh(n=n)) for n in range(60)))
    taken = [answer["seq"] for status, answer in answers if status == 200]
    assert (len(taken), {status for status, _ in answers}) == (20, {200, 503})
    assert (await any_rig.health())["depth"] == 20
    line = await any_rig.dial()
    assert await line.seqs(20) == sorted(taken), "the oldest first"
    await line.send(type="ack", seq=5)
    await any_rig.until(depth=15)
    assert (await any_rig.post("linear", fresh(n=99)))[0] == 200


@pytest.mark.parametrize("number", range(len(STRANGE)))
async def test_c7_no_signed_body_makes_it_fall(hub: Rig, number: int) -> None:
    """Stored as it came, but for one that Linear can't have sent: what it means is the cluster's to say."""
    sources = ("linear", "github", "notion", "selftest")
    taken = [(await hub.post(source, STRANGE[number]))[0] for source in sources]
    assert taken == [401 if number == TIMELESS else 200, 200, 200, 200]
    assert (await hub.health())["depth"] == taken.count(200)
    unsigned = await hub.send_hook("notion", STRANGE[number], {})
    assert unsigned[0] == 401
