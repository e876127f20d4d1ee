"""One protocol, two hubs: forwarder/worker.js in real workerd, and piclusterd.demo.hub_double. Neither may differ here.

Each test runs twice, against a process of its own with real sockets on loopback and storage in a temporary directory.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from piclusterd.demo.doubles import Fault
from piclusterd.demo.signing import sign
from piclusterd.demo.workers_ai_double import MODEL, WorkersAIDouble
from piclusterd.integrations.hub_frames import HookFrame, parse
from piclusterd.integrations.signatures import selftest_secret
from tests.integrations.rig import ENV, SECRETS, TOKEN, Rig, body_of, fresh

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024
SOURCES = ("linear", "github", "notion")


def error_of(answer: Any) -> str:
    """What/why/fix are all there; returns the what."""
    error = answer["error"]
    assert set(error) == {"what", "why", "fix"}
    assert all(isinstance(text, str) and text for text in error.values())
    return str(error["what"])


# --- who may speak


@pytest.mark.parametrize("source", SOURCES)
async def test_a_hook_is_taken_only_with_a_good_signature(hub: Rig, source: str) -> None:
    body = fresh(id="one")
    good = sign(source, body, SECRETS[source])
    [name] = [name for name in good if "Signature" in name]
    bare = {key: value for key, value in good.items() if key != name}
    bad = [bare, bare | {name: good[name][:-1]}, bare | {name: "é" * 64}, sign(source, body, "wrong")]
    for headers in bad:
        status, answer = await hub.send_hook(source, body, headers)
        assert (status, error_of(answer)) == (401, "signature refused")
    status, answer = await hub.send_hook(source, body + b" ", good)
    assert status == 401
    assert (await hub.health())["depth"] == 0
    assert await hub.send_hook(source, body, good) == (200, {"seq": 1, "duplicate": False})


@pytest.mark.parametrize("source", SOURCES)
async def test_two_secrets_are_good_during_a_rotation(any_rig: Rig, source: str) -> None:
    await any_rig.start(ENV | {f"{source.upper()}_SECRET_NEXT": "next"})
    for number, secret in enumerate((SECRETS[source], "next")):
        assert (await any_rig.post(source, fresh(id=f"n{number}"), secret=secret))[0] == 200
    assert (await any_rig.post(source, fresh(id="n3"), secret="third"))[0] == 401


async def test_an_unconfigured_source_says_so_and_takes_nothing(any_rig: Rig) -> None:
    await any_rig.start({"HUB_TOKEN": TOKEN, "LINEAR_SECRET": ""})
    for source in SOURCES:
        status, answer = await any_rig.post(source, fresh(id="x"), secret="anything")
        assert (status, error_of(answer)) == (503, "source not configured")


async def test_unknown_sources_paths_and_methods_are_refused(hub: Rig) -> None:
    assert (await hub.send_hook("gitlab", b"{}", {}))[0] == 404
    for method, path, status in [("GET", "/", 404), ("GET", "/hooks/linear", 405), ("POST", "/health", 405)]:
        found, answer = await hub.call(method, path)
        assert found == status
        assert error_of(answer)


PRIVATE = [
    *(("GET", "/connect"), ("GET", "/pull?term=1&node=a"), ("POST", "/ack"), ("POST", "/nack")),
    *(("GET", "/dead"), ("POST", "/dead/1/replay"), ("DELETE", "/dead/1")),
    *(("GET", "/notion/token"), ("DELETE", "/notion/token")),
    *(("POST", "/sources/linear/pause"), ("POST", "/sources/linear/resume")),
]


@pytest.mark.parametrize("token", [None, "wrong", TOKEN + "x", ""])
async def test_everything_but_hooks_and_health_wants_the_bearer_token(hub: Rig, token: str | None) -> None:
    for method, path in PRIVATE:
        status, answer = await hub.call(method, path, token=token)
        assert (path, status, error_of(answer)) == (path, 401, "not authorised")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await hub.open(token=token or "none")
    assert refused.value.status == 401


async def test_two_bearer_tokens_are_good_during_a_rotation_and_none_without_one(any_rig: Rig) -> None:
    await any_rig.start(HUB_TOKEN_NEXT="next")
    for token in (TOKEN, "next"):
        assert (await any_rig.call("GET", "/dead", token=token))[0] == 200
    await any_rig.kill()
    await any_rig.start({})
    assert (await any_rig.call("GET", "/dead", token=""))[0] == 503


# --- what is stored


async def test_a_hook_arrives_byte_for_byte_with_the_headers_that_prove_it(hub: Rig) -> None:
    body = fresh(text="naïve \u2028 \U0001f600") + b"\n\x00\xff tail"
    headers = sign("github", body, SECRETS["github"], event="push", delivery="guid-1")
    await hub.send_hook("github", body, headers | {"X-Other": "no", "Authorization": "no"})
    line = await hub.dial()
    [hook] = await line.hooks(1)
    assert body_of(hook) == body
    assert (hook["source"], hook["delivery"], hook["stale"]) == ("github", "guid-1", False)
    assert hook["headers"] == {name.lower(): value for name, value in headers.items()}
    assert hook["received_ms"] == (await hub.health())["last"]["github"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff\xfe", b"{", b"[" * 200_000, b'{"id": "\\ud800"}'])
async def test_a_signed_body_is_stored_whatever_it_says(hub: Rig, body: bytes) -> None:
    for number, source in enumerate(SOURCES, 1):
        assert await hub.post(source, body) == (200, {"seq": number, "duplicate": False})
    line = await hub.dial()
    assert [body_of(hook) for hook in await line.hooks(3)] == [body] * 3


async def test_linear_hooks_outside_the_window_are_kept_and_marked_stale(hub: Rig) -> None:
    day_ms, now_ms = 86_400_000, int(time.time() * 1000)
    stamps = [{"webhookTimestamp": stamp} for stamp in (now_ms - 6 * day_ms, now_ms + day_ms, "now", "1", True)]
    for stamp in stamps:
        assert (await hub.post("linear", stamp))[0] == 200
    await hub.post("linear", fresh())
    await hub.post("github", {"webhookTimestamp": 1})
    line = await hub.dial()
    assert [hook["stale"] for hook in await line.hooks(7)] == [True, True, True, True, True, False, False]


async def test_a_redelivery_is_answered_and_not_stored_even_after_the_ack(hub: Rig) -> None:
    body = fresh(a=1)
    assert await hub.post("linear", body, delivery="d1") == (200, {"seq": 1, "duplicate": False})
    assert await hub.post("linear", body, delivery="d2") == (200, {"seq": 1, "duplicate": True})
    line = await hub.dial()
    assert await line.seqs(1) == [1]
    await line.send(type="ack", seq=1)
    await hub.until(depth=0)
    assert await hub.post("linear", body) == (200, {"seq": 1, "duplicate": True})
    await line.nothing_more()


async def test_each_source_has_its_own_idea_of_the_same_event(hub: Rig) -> None:
    same = b'{"id": "event-1"}'
    answers = [
        await hub.post("github", same, delivery="g1"),
        await hub.post("github", same, delivery="g1"),
        await hub.post("github", same, delivery="g2"),
        await hub.post("notion", {"id": "event-1", "attempt_number": 1}),
        await hub.post("notion", {"id": "event-1", "attempt_number": 2}),
        await hub.post("linear", same),
    ]
    assert [(answer["seq"], answer["duplicate"]) for _, answer in answers] == [
        (1, False), (1, True), (2, False), (3, False), (3, True), (4, False)]  # fmt: skip


async def test_a_body_may_have_one_mebibyte_and_not_a_byte_more(hub: Rig) -> None:
    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b"x" * (MIB // 16)

    largest = b"x" * MIB
    assert await hub.post("github", largest) == (200, {"seq": 1, "duplicate": False})
    for body in (largest + b"x", in_pieces()):
        status, answer = await hub.send_hook("github", body, sign("github", largest, SECRETS["github"]))
        assert (status, error_of(answer)) == (413, "body too large")
    assert (await hub.health())["depth"] == 1
    line = await hub.dial()
    assert body_of((await line.hooks(1))[0]) == largest


# --- Notion's handshake


async def test_the_handshake_sets_the_key_once(any_rig: Rig) -> None:
    await any_rig.start({"HUB_TOKEN": TOKEN})
    first, second = {"verification_token": "secret_first"}, {"verification_token": "secret_second"}
    assert (await any_rig.post("notion", {"id": "early"}, secret="secret_first"))[0] == 503
    assert await any_rig.send_hook("notion", json.dumps(first), {}) == (200, {"stored": True})
    for token in (second, first):
        status, answer = await any_rig.send_hook("notion", json.dumps(token), {})
        assert (status, error_of(answer)) == (409, "handshake refused")
    assert await any_rig.call("GET", "/notion/token") == (200, {"token": "secret_first"})
    assert (await any_rig.post("notion", {"id": "e1"}, secret="secret_second"))[0] == 401
    await any_rig.kill()
    await any_rig.start({"HUB_TOKEN": TOKEN})
    assert (await any_rig.post("notion", {"id": "e1"}, secret="secret_first"))[0] == 200
    assert await any_rig.call("DELETE", "/notion/token") == (200, {"dropped": True})
    assert (await any_rig.send_hook("notion", json.dumps(second), {}))[0] == 200


async def test_no_handshake_is_accepted_while_a_secret_is_configured(hub: Rig) -> None:
    assert (await hub.send_hook("notion", b'{"verification_token": "secret_x"}', {}))[0] == 409
    assert await hub.call("GET", "/notion/token") == (200, {"token": None})
    assert (await hub.send_hook("notion", b'{"verification_token": "secret_x", "id": "e"}', {}))[0] == 401


# --- the socket: order, window, acks


async def test_hooks_come_in_order_and_new_ones_follow_at_once(hub: Rig) -> None:
    assert await hub.accept(3) == [1, 2, 3]
    line = await hub.dial()
    assert line.welcome["pending"] == 3
    assert (line.welcome["proto"], line.welcome["window"]) == (1, 32)
    assert await line.seqs(3) == [1, 2, 3]
    assert await hub.accept(2, start=3) == [4, 5]
    assert await line.seqs(2) == [4, 5]


async def test_what_was_not_acked_comes_again_after_a_reconnect(hub: Rig) -> None:
    await hub.accept(4)
    line = await hub.dial()
    await line.seqs(4)
    await line.send(type="ack", seq=2)
    await hub.until(depth=2)
    await line.ws.close()
    await hub.until(connected=None)
    again = await hub.dial()
    assert again.welcome["pending"] == 2
    assert await again.seqs(2) == [3, 4]


async def test_the_window_is_32_and_a_cumulative_ack_moves_it(hub: Rig) -> None:
    await hub.accept(40)
    line = await hub.dial()
    assert await line.seqs(32) == list(range(1, 33))
    await line.nothing_more()
    await line.send(type="ack", seq=5)
    assert await line.seqs(5) == list(range(33, 38))
    await line.nothing_more()
    await line.send(type="ack", seq=37)
    assert await line.seqs(3) == [38, 39, 40]
    await line.send(type="ack", seq=40)
    await hub.until(depth=0)


async def test_large_bodies_narrow_the_window(hub: Rig) -> None:
    for number in range(10):
        await hub.post("github", str(number).encode() * MIB)
    line = await hub.dial()
    assert await line.seqs(8) == list(range(1, 9))
    await line.nothing_more()
    assert len((await hub.call("GET", "/pull?term=1&node=a"))[1]["hooks"]) == 8
    await line.send(type="ack", seq=8)
    assert await line.seqs(2) == [9, 10]


async def test_an_ack_never_passes_what_was_handed_out(hub: Rig) -> None:
    await hub.accept(34)
    line = await hub.dial()
    await line.seqs(32)
    for seq in (33, 10**9, -1, 1.5, "1", None):
        await line.send(type="ack", seq=seq)
        assert (await line.receive())["type"] == "error"
    assert (await hub.health())["depth"] == 34
    status, answer = await hub.call("POST", "/ack", json={"seq": 1, "term": 1, "node": "a"})
    assert (status, error_of(answer)) == (400, "ack refused")


async def test_acked_in_hello_counts_only_for_the_outbox_it_names(hub: Rig) -> None:
    await hub.accept(3)
    for more in ({"acked": 2}, {"acked": 2, "hub": "another"}):
        line = await hub.dial(**more)
        assert await line.seqs(3) == [1, 2, 3]
    line = await hub.dial(acked=2, hub=line.welcome["hub"])
    assert line.welcome["pending"] == 1
    assert await line.seqs(1) == [3]


async def test_ping_is_answered(hub: Rig) -> None:
    line = await hub.dial()
    await line.ws.send_str("ping")
    assert (await line.ws.receive()).data == "pong"


async def test_junk_does_not_break_the_link_and_a_flood_does(hub: Rig) -> None:
    line = await hub.dial()
    for junk in ("", "{", "[]", "null", '{"type": 7}', '{"type": "ack"}'):
        await line.ws.send_str(junk)
        assert (await line.receive())["type"] == "error"
    await line.ws.send_str("x" * 5000)
    assert await line.closed() == 1009


# --- terms


async def test_a_stale_term_is_refused_also_after_a_restart(hub: Rig) -> None:
    await hub.dial(term=7)
    for _ in range(2):
        old = await hub.open()
        assert await old.hello(term=6) == {"type": "refused", "why": "stale term", "term": 7}
        assert await old.closed() == 4001
        await hub.kill()
        await hub.start()
    assert (await hub.health())["term"] == 7


async def test_a_newer_hello_supersedes_the_older_socket(hub: Rig) -> None:
    await hub.accept(2)
    old = await hub.dial(node="a", term=1)
    await old.seqs(2)
    new = await hub.dial(node="b", term=2)
    assert await new.seqs(2) == [1, 2]
    assert await old.closed() == 4000
    assert (await hub.health())["connected"] == "b"
    same_term = await hub.dial(node="b", term=2)
    assert await same_term.seqs(2) == [1, 2]
    assert await new.closed() == 4000


async def test_a_socket_without_hello_has_no_say_and_gets_nothing(hub: Rig) -> None:
    await hub.accept(1)
    mute = await hub.open()
    await mute.send(type="ack", seq=1)
    await mute.send(type="no such type")
    await mute.ws.send_str("ping")
    assert (await mute.ws.receive()).data == "pong"
    assert (await hub.health())["depth"] == 1
    assert (await hub.health())["connected"] is None


@pytest.mark.parametrize(
    "wrong", [{"proto": 2}, {"node": ""}, {"node": 5}, {"term": -1}, {"term": "1"}, {"term": None}, {"term": True}]
)
async def test_a_malformed_hello_is_refused(hub: Rig, wrong: dict[str, Any]) -> None:
    line = await hub.open()
    await line.send(**{"type": "hello", "proto": 1, "node": "a", "term": 1, "acked": None, **wrong})
    assert (await line.receive())["type"] == "refused"
    assert await line.closed() == 4002


# --- nacks and dead letters


async def nack(line: Any, seq: int, after_s: float = 0.0) -> None:
    await line.send(type="nack", seq=seq, retry_after_s=after_s, why="disk full")


async def test_a_nacked_hook_comes_again_and_the_others_are_not_held_up(hub: Rig) -> None:
    await hub.accept(2)
    line = await hub.dial()
    await line.seqs(2)
    await nack(line, 1, after_s=0.05)
    assert await line.seqs(1) == [1]
    await nack(line, 1, after_s=3000)
    await nack(line, 1, after_s=0)  # one sending counts one nack: this one is too many
    await hub.accept(1, start=2)
    assert await line.seqs(1) == [3]
    await line.nothing_more()
    again = await hub.dial()
    assert await again.seqs(3) == [1, 2, 3]  # a hello is a new start: in order, none skipped, none waiting
    await nack(again, 1)
    assert await again.seqs(1) == [1]


async def test_after_the_limit_a_hook_is_a_dead_letter(any_rig: Rig) -> None:
    await any_rig.start(HUB_NACK_LIMIT="3")
    body = fresh(poison=True)
    await any_rig.post("linear", body, delivery="d1")
    await any_rig.accept(1)
    line = await any_rig.dial()
    await line.seqs(2)
    for _ in range(2):
        await nack(line, 1)
        assert await line.seqs(1) == [1]
    await nack(line, 1)
    assert await line.receive() == {"type": "dead", "seq": 1}
    status, page = await any_rig.call("GET", "/dead")
    assert (status, page["total"]) == (200, 1)
    [letter] = page["dead"]
    expected = {"seq": 1, "source": "linear", "delivery": "d1", "nacks": 3, "why": "disk full", "bytes": len(body)}
    assert expected.items() <= letter.items()
    assert await any_rig.post("linear", body) == (200, {"seq": 1, "duplicate": True})
    found = await any_rig.health()
    assert (found["dead"], found["depth"]) == (1, 1)


async def test_a_dead_letter_is_replayed_under_a_new_seq_or_dropped_for_good(any_rig: Rig) -> None:
    await any_rig.start(HUB_NACK_LIMIT="1")
    body = fresh()
    await any_rig.post("linear", body)
    await any_rig.accept(1)
    line = await any_rig.dial()
    await line.seqs(2)
    await nack(line, 1)
    assert (await line.receive())["type"] == "dead"
    assert await any_rig.call("POST", "/dead/1/replay") == (200, {"seq": 3, "replayed": 1})
    [hook] = await line.hooks(1)
    assert (hook["seq"], body_of(hook)) == (3, body)
    await nack(line, 3)
    assert await line.receive() == {"type": "dead", "seq": 3}
    assert await any_rig.call("DELETE", "/dead/3") == (200, {"dropped": 3})
    for method, path in (("DELETE", "/dead/3"), ("POST", "/dead/3/replay")):
        status, answer = await any_rig.call(method, path)
        assert (status, error_of(answer)) == (404, "no such dead letter")
    assert await any_rig.post("linear", body) == (200, {"seq": 3, "duplicate": True})


async def test_what_nobody_fetched_in_time_is_a_dead_letter(any_rig: Rig) -> None:
    await any_rig.start(HUB_TTL_DAYS="1e-9")
    await any_rig.accept(2)
    line = await any_rig.dial()
    await line.seqs(2)
    await nack(line, 1)  # wakes the alarm, which also sweeps
    assert [await line.receive(), await line.receive()] == [{"type": "dead", "seq": 1}, {"type": "dead", "seq": 2}]
    _, page = await any_rig.call("GET", "/dead")
    assert [letter["why"].split(":")[0] for letter in page["dead"]] == ["expired", "expired"]


# --- pause


async def test_a_paused_source_is_stored_and_kept_back_until_it_is_resumed(hub: Rig) -> None:
    await hub.accept(1)
    line = await hub.dial()
    assert await line.seqs(1) == [1]
    assert await hub.call("POST", "/sources/linear/pause") == (
        200,
        {"source": "linear", "paused": True, "moved": 0},  # what was handed out is left to its ack
    )
    waiting = [fresh(n=n) for n in range(3)]
    for body in waiting:
        assert (await hub.post("linear", body))[0] == 200
    await hub.post("github", b"{}")
    assert [hook["source"] for hook in await line.hooks(1)] == ["github"]
    assert (await hub.post("linear", waiting[0]))[1]["duplicate"] is True
    found = await hub.health()
    assert (found["depth"], found["parked"], found["paused"]) == (2, 3, ["linear"])
    await line.send(type="ack", seq=5)  # of everything handed out: the parked ones are not meant
    await hub.until(depth=0, parked=3)
    await hub.kill()
    await hub.start()
    line = await hub.dial()
    assert line.welcome["pending"] == 0
    assert (await hub.call("POST", "/sources/linear/resume"))[1]["moved"] == 3
    hooks = await line.hooks(3)
    assert [body_of(hook) for hook in hooks] == waiting
    assert [hook["seq"] for hook in hooks] == [6, 7, 8]
    assert (await hub.health())["paused"] == []


async def test_a_pause_also_keeps_back_what_nobody_was_handed_yet(hub: Rig) -> None:
    await hub.accept(2)
    await hub.post("github", b"{}")
    assert (await hub.call("POST", "/sources/linear/pause"))[1]["moved"] == 2
    line = await hub.dial()
    assert await line.seqs(1) == [3]
    status, answer = await hub.call("POST", "/sources/gitlab/pause")
    assert (status, error_of(answer)) == (404, "unknown source")


async def test_what_a_pause_kept_too_long_is_a_dead_letter(any_rig: Rig) -> None:
    await any_rig.start(HUB_TTL_DAYS="1e-9")
    await any_rig.call("POST", "/sources/linear/pause")
    await any_rig.accept(1)
    await any_rig.post("github", b"{}")
    line = await any_rig.dial()
    await line.seqs(1)
    await nack(line, 2)  # wakes the alarm, which also sweeps
    await any_rig.until(parked=0)
    _, page = await any_rig.call("GET", "/dead")
    assert page["dead"][0]["why"] == "expired: its source was paused for HUB_TTL_DAYS"


# --- the selftest's own source


async def test_only_who_knows_the_hubs_token_can_send_a_selftest(hub: Rig) -> None:
    body = b'{"id": "t1"}'
    for secret in (TOKEN, selftest_secret("another")):
        assert (await hub.post("selftest", body, secret=secret))[0] == 401
    assert await hub.post("selftest", body) == (200, {"seq": 1, "duplicate": False})
    line = await hub.dial()
    [hook] = await line.hooks(1)
    assert (hook["source"], hook["delivery"]) == ("selftest", "t1")
    assert list(hook["headers"]) == ["x-picluster-signature", "content-type", "user-agent"]


# --- hints of a model at the edge


async def test_rows_get_a_hint_once_the_cluster_has_been_away_for_long(any_rig: Rig) -> None:
    async with WorkersAIDouble() as model:
        await any_rig.start(
            HUB_AI_MODEL=MODEL, HUB_AI_AFTER_S="1e-3", HUB_AI_URL=model.account_url, HUB_AI_TOKEN=model.key
        )
        asked = asyncio.Event()
        model.answer = lambda prompt: (asked.set(), "P1")[1]  # type: ignore[func-returns-value]
        await any_rig.post("linear", fresh(data={"title": "Checkout is down", "description": "for all"}))
        await any_rig.post("github", b"{}")
        async with asyncio.timeout(20):
            await asked.wait()
            while not (page := (await any_rig.call("GET", "/pull?term=1&node=a"))[1]["hooks"])[0].get("hint"):
                pass
        assert [hook.get("hint") for hook in page] == ["P1", None]
        handed = parse(json.dumps(page[0]))
        assert isinstance(handed, HookFrame)
        assert handed.hook().hint == "P1"
        assert model.prompts == ["Checkout is down\nfor all"]
        assert model.violations == []


async def test_without_a_model_named_nothing_is_asked_and_no_frame_has_a_hint(any_rig: Rig) -> None:
    async with WorkersAIDouble() as model:
        await any_rig.start(HUB_AI_AFTER_S="1e-3", HUB_AI_URL=model.account_url, HUB_AI_TOKEN=model.key)
        await any_rig.accept(2)
        line = await any_rig.dial()
        assert ["hint" in hook for hook in await line.hooks(2)] == [False, False]
        assert model.requests == 0


async def test_a_model_that_fails_costs_the_hint_and_nothing_else(any_rig: Rig) -> None:
    async with WorkersAIDouble() as model:
        model.faults.extend([Fault("spent")] * 9)
        await any_rig.start(
            HUB_AI_MODEL=MODEL, HUB_AI_AFTER_S="1e-3", HUB_AI_URL=model.account_url, HUB_AI_TOKEN=model.key
        )
        await any_rig.accept(2)
        async with asyncio.timeout(20):
            while not model.requests:
                await any_rig.health()
        line = await any_rig.dial()
        assert await line.seqs(2) == [1, 2]
        assert model.requests == 1  # the day is spent: it is left alone


# --- plain HTTP


async def test_pull_and_ack_serve_the_same_outbox(hub: Rig) -> None:
    await hub.accept(40)
    status, first = await hub.call("GET", "/pull?max=2&term=1&node=a")
    assert status == 200
    assert [hook["seq"] for hook in first["hooks"]] == [1, 2]
    assert (first["pending"], first["term"]) == (40, 1)
    assert await hub.call("POST", "/ack", json={"seq": 1, "term": 1, "node": "a"}) == (200, {"acked": 1})
    _, rest = await hub.call("GET", "/pull?max=1000&term=1&node=a")
    assert [hook["seq"] for hook in rest["hooks"]] == list(range(2, 34))
    line = await hub.dial()
    assert (await line.hooks(32))[0] == rest["hooks"][0]
    assert line.welcome["hub"] == first["hub"]


async def test_pull_is_fenced_by_terms_and_fences_sockets(hub: Rig) -> None:
    await hub.accept(1)
    line = await hub.dial(term=3)
    await line.seqs(1)
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/pull?term=2&node=a", {}),
        ("POST", "/ack", {"json": {"seq": 1, "term": 2, "node": "a"}}),
        ("POST", "/nack", {"json": {"seq": 1, "term": 2, "node": "a"}}),
    ]
    for method, path, options in calls:
        status, answer = await hub.call(method, path, **options)
        assert (status, error_of(answer), answer["term"]) == (409, "stale term", 3)
    assert (await hub.call("GET", "/pull?term=4&node=b"))[0] == 200
    assert await line.closed() == 4000
    assert (await hub.health())["term"] == 4


async def test_http_nacks_lead_to_the_dead_letters_too(any_rig: Rig) -> None:
    await any_rig.start(HUB_NACK_LIMIT="2")
    await any_rig.accept(1)
    claim = {"seq": 1, "term": 1, "node": "a", "why": "no quorum"}
    assert (await any_rig.call("POST", "/nack", json=claim))[0] == 404  # never handed out
    await any_rig.call("GET", "/pull?term=1&node=a")
    assert await any_rig.call("POST", "/nack", json=claim) == (200, {"nacks": 1, "dead": False})
    assert await any_rig.call("POST", "/nack", json=claim) == (200, {"nacks": 2, "dead": True})
    assert (await any_rig.call("POST", "/nack", json=claim))[0] == 404


@pytest.mark.parametrize("query", ["", "term=1", "node=a", "term=x&node=a", "term=-1&node=a", "term=1&node=a&max=x"])
async def test_a_malformed_pull_is_refused(hub: Rig, query: str) -> None:
    status, answer = await hub.call("GET", f"/pull?{query}")
    assert (status, error_of(answer)) == (400, "bad request")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"seq":1,"term":1}', b'{"seq":-1,"term":1,"node":"a"}'])
async def test_a_malformed_ack_is_refused(hub: Rig, body: bytes) -> None:
    for path in ("/ack", "/nack"):
        status, answer = await hub.call("POST", path, data=body or None)
        assert (status, error_of(answer)) == (400, "bad request")


# --- health, crashes


async def test_health_tells_without_a_token_and_without_secrets(hub: Rig) -> None:
    nothing: dict[str, Any] = {
        "depth": 0,
        "oldest_unacked_s": None,
        "connected": None,
        "term": 0,
        "last": {},
        "dead": 0,
        "parked": 0,
        "paused": [],
    }
    quota = (first := await hub.health()).pop("quota")
    assert first == {"ok": True, **nothing}
    assert set(quota) == {"day", "requests", "rows_written", "requests_max", "rows_max"}
    await hub.accept(2)
    line = await hub.dial(node="pi-2", term=5)
    found = await hub.health()
    assert 0 <= found.pop("oldest_unacked_s") < 60
    assert list(found.pop("last")) == ["linear"]
    used = found.pop("quota")
    assert (used["requests"] > quota["requests"], used["rows_written"] > quota["rows_written"]) == (True, True)
    assert found == {"ok": True, "depth": 2, "connected": "pi-2", "term": 5, "dead": 0, "parked": 0, "paused": []}
    await line.ws.close()
    await hub.until(connected=None)


async def test_kill_9_loses_nothing_that_was_answered_with_200(hub: Rig) -> None:
    answered: dict[int, bytes] = {}

    async def sender(name: int) -> None:
        for number in range(200):
            body = fresh(sender=name, number=number)
            try:
                status, answer = await hub.post("linear", body)
            except aiohttp.ClientError:
                return  # killed: this one was promised nothing
            assert status == 200
            answered[answer["seq"]] = body
            if len(answered) == 60:
                await hub.kill()

    async with asyncio.timeout(120), asyncio.TaskGroup() as senders:
        for name in range(4):
            senders.create_task(sender(name))
    assert 60 <= len(answered) < 800
    await hub.start()
    stored: dict[int, bytes] = {}
    while len(page := (await hub.call("GET", "/pull?term=1&node=a"))[1]["hooks"]) > 0:
        stored |= {hook["seq"]: body_of(hook) for hook in page}
        await hub.call("POST", "/ack", json={"seq": page[-1]["seq"], "term": 1, "node": "a"})
    assert answered.items() <= stored.items()
    assert len(set(stored.values())) == len(stored)


async def test_seqs_do_not_start_again_when_the_outbox_was_empty(hub: Rig) -> None:
    body = fresh(n="first")
    await hub.post("linear", body)
    await hub.accept(2)
    line = await hub.dial()
    await line.seqs(3)
    await line.send(type="ack", seq=3)
    await hub.until(depth=0)
    identity = line.welcome["hub"]
    await hub.kill()
    await hub.start()
    assert await hub.accept(1, start=9) == [4]
    assert await hub.post("linear", body) == (200, {"seq": 1, "duplicate": True})
    line = await hub.dial()
    assert line.welcome["hub"] == identity
    assert await line.seqs(1) == [4]


async def test_sigterm_stops_it_cleanly_with_a_socket_open(hub: Rig) -> None:
    await hub.accept(1)
    line = await hub.dial()
    await line.seqs(1)
    status = await hub.stop()
    assert status == 0 or hub.kind == "workerd"  # workerd waits for its sockets to end, and is then killed
    await hub.start()
    assert (await hub.health())["depth"] == 1
