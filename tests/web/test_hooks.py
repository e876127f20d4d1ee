"""Webhooks straight from the provider: 200 means durable, and nothing unsigned gets in."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from piclusterd.errors import NotFound, Refused, Unavailable
from piclusterd.events import HookTaken
from piclusterd.web.hooks import BODY_BYTES_MAX, hook_of

from .house import Node, ring, serving

SECRETS = {"linear": ("old", "new"), "github": ("gh",), "notion": ("nt",)}
BODY = json.dumps({"type": "Issue", "action": "create", "webhookTimestamp": 1}).encode()


def mac(secret: str, body: bytes) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def linear(body: bytes, secret: str = "new") -> dict[str, str]:
    return {"Linear-Signature": mac(secret, body), "Linear-Event": "Issue"}


async def send(cluster: Node, source: str, body: bytes, headers: dict[str, str], **doors: Any) -> tuple[int, Any, Any]:
    told = {"secrets": SECRETS, **doors}
    async with (
        serving(cluster.doors(**told)) as client,
        client.post(f"/hooks/{source}", data=io.BytesIO(body), headers=headers) as answer,
    ):
        return answer.status, await answer.json(), answer.headers


async def test_a_signed_webhook_is_stored_and_the_sender_told_so() -> None:
    cluster = Node()
    status, answer, _ = await send(cluster, "linear", BODY, linear(BODY, "old"))
    assert (status, answer) == (200, {"stored": True, "run": "0" * 32, "duplicate": False})
    (hook,) = cluster.taken
    assert (hook.source, hook.event, hook.body) == ("linear", "Issue", BODY)
    assert hook.key.startswith("linear:")


async def test_a_repeated_webhook_is_told_as_duplicate() -> None:
    cluster = Node()
    cluster.hook_answer = HookTaken(None, True)
    status, answer, _ = await send(cluster, "linear", BODY, linear(BODY))
    assert (status, answer) == (200, {"stored": True, "run": None, "duplicate": True})


@pytest.mark.parametrize("headers", [{}, {"Linear-Signature": "00" * 32}, {"Linear-Signature": "zz"}, linear(b"other")])
async def test_a_wrong_signature_is_401_and_nothing_is_stored(headers: dict[str, str]) -> None:
    cluster = Node()
    status, answer, _ = await send(cluster, "linear", BODY, headers)
    assert (status, answer["error"]["code"]) == (401, "invalid_signature")
    assert cluster.taken == []


async def test_a_source_without_secrets_is_503_and_says_what_to_set() -> None:
    status, answer, headers = await send(Node(), "linear", BODY, linear(BODY), secrets={"linear": ("",)})
    assert status == 503
    assert "linear_secret_file" in answer["error"]["fix"]
    assert int(headers["Retry-After"]) > 0


async def test_an_unknown_source_is_404() -> None:
    status, _, _ = await send(Node(), "evil", BODY, {})
    assert status == 404


async def test_without_a_coordinator_the_sender_is_asked_to_come_back() -> None:
    cluster = Node()
    cluster.hook_answer = Unavailable("no coordinator", "an election is open", retry_after_s=3)
    status, _, headers = await send(cluster, "linear", BODY, linear(BODY))
    assert (status, headers["Retry-After"]) == (503, "3")


async def test_a_body_of_one_mebibyte_is_the_largest() -> None:
    cluster = Node()
    largest = b'{"x":"' + b"x" * (BODY_BYTES_MAX - 8) + b'"}'
    status, _, _ = await send(cluster, "linear", largest, linear(largest))
    assert status == 200
    for size in (1, 200_000):
        body = b"x" * (BODY_BYTES_MAX + size)
        status, answer, _ = await send(cluster, "linear", body, linear(body))
        assert (status, answer["error"]["code"]) == (413, "too_large")
    assert len(cluster.taken) == 1


async def test_an_endless_body_is_cut_off() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    cluster = Node()
    async with (
        serving(cluster.doors(secrets=SECRETS)) as client,
        client.post("/hooks/linear", data=endless()) as answer,
    ):
        assert answer.status == 413
    assert cluster.taken == []


async def test_keys_of_the_api_are_not_asked_of_providers() -> None:
    status, _, _ = await send(Node(), "linear", BODY, linear(BODY), keys=ring("k"))
    assert status == 200


def test_each_provider_names_its_event() -> None:
    notion = json.dumps({"id": "e1", "type": "page.created"}).encode()
    told = {
        "linear": hook_of("linear", linear(BODY), BODY, ["new"]).event,
        "github": hook_of(
            "github", {"X-Hub-Signature-256": "sha256=" + mac("gh", BODY), "X-GitHub-Event": "issues"}, BODY, ["gh"]
        ).event,
        "notion": hook_of("notion", {"X-Notion-Signature": "sha256=" + mac("nt", notion)}, notion, ["nt"]).event,
    }
    assert told == {"linear": "Issue", "github": "issues", "notion": "page.created"}


def test_a_signed_event_name_beats_an_unsigned_header() -> None:
    headers = {**linear(BODY), "Linear-Event": "Comment"}
    assert hook_of("linear", headers, BODY, ["new"]).event == "Issue"


def test_an_event_name_is_short_and_printable() -> None:
    for name, kept in (("x" * 500, "x" * 64), ("a\x1b[31m", "")):
        body = json.dumps({"type": name}).encode()
        assert hook_of("linear", linear(body), body, ["new"]).event == kept


def test_the_hubs_path_refuses_the_same_things() -> None:
    with pytest.raises(Refused, match="does not hold"):
        hook_of("linear", {}, BODY, ["new"])
    with pytest.raises(Refused, match="too large"):
        hook_of("linear", linear(BODY), b"x" * (BODY_BYTES_MAX + 1), ["new"])
    with pytest.raises(NotFound):
        hook_of("evil", {}, BODY, ["new"])
    with pytest.raises(Unavailable):
        hook_of("linear", linear(BODY), BODY, [])
