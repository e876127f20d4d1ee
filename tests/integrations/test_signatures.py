"""Signatures and dedupe keys: our own round trip, and the edges. The providers' SDKs: test_provider_sdks.py."""

import hashlib
import hmac
import json
from typing import Any

import pytest
from multidict import CIMultiDict

from piclusterd.demo.signing import sign
from piclusterd.integrations.signatures import (
    Verdict,
    body_object,
    dedupe_key,
    delivery_id,
    event_key,
    strict_object,
    verify,
)

SOURCES = ("linear", "github", "notion")
BODY = b'{"id":"event-1"}'
BODY_OBJECT = b'{"zen":"Keep it logically awesome."}'
HEADER = {"linear": "Linear-Signature", "github": "X-Hub-Signature-256", "notion": "X-Notion-Signature"}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_signed_verifies_with_any_active_secret_and_no_other(source: str) -> None:
    headers = sign(source, BODY, "s1")
    for secrets in (["s1"], ["s0", "s1"], ["s1", "s2"], ["", "s1"]):
        assert verify(source, headers, BODY, secrets) is Verdict.OK
    assert verify(source, headers, BODY, ["s2", "s3"]) is Verdict.MISMATCH
    assert verify(source, headers, BODY + b" ", ["s1"]) is Verdict.MISMATCH


def test_linear_signs_with_bare_hex_and_the_others_with_a_prefix() -> None:
    digest = hmac.new(b"s", BODY, hashlib.sha256).hexdigest()
    assert sign("linear", BODY, "s")["Linear-Signature"] == digest
    assert sign("github", BODY, "s")["X-Hub-Signature-256"] == f"sha256={digest}"
    assert sign("notion", BODY, "s")["X-Notion-Signature"] == f"sha256={digest}"


def test_githubs_published_example_verifies() -> None:
    signature = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    headers = {"X-Hub-Signature-256": f"sha256={signature}"}
    assert verify("github", headers, b"Hello, World!", ["It's a Secret to Everybody"]).ok


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("secrets", [[], [""], ["", ""]])
def test_an_empty_secret_is_no_secret(source: str, secrets: list[str]) -> None:
    assert verify(source, sign(source, BODY, ""), BODY, secrets) is Verdict.NO_SECRET


@pytest.mark.parametrize("source", SOURCES)
def test_missing_and_malformed_signatures_are_told_apart(source: str) -> None:
    good = sign(source, BODY, "s")
    value = good[HEADER[source]]
    without = {name: kept for name, kept in good.items() if name != HEADER[source]}
    assert verify(source, without, BODY, ["s"]) is Verdict.MISSING
    for bad in ("", value[:-1], value + "0", value[:-1] + "g", " " + value, value + "\n", "sha1=" + value, "é" * 64):
        assert verify(source, without | {HEADER[source]: bad}, BODY, ["s"]) is Verdict.MALFORMED


def test_a_prefix_that_is_missing_or_not_due_is_malformed() -> None:
    digest = hmac.new(b"s", BODY, hashlib.sha256).hexdigest()
    for source, value in {"linear": f"sha256={digest}", "github": digest, "notion": digest}.items():
        assert verify(source, {HEADER[source]: value}, BODY, ["s"]) is Verdict.MALFORMED


def test_only_ok_is_ok_and_an_unknown_source_never_is() -> None:
    assert [verdict for verdict in Verdict if verdict.ok] == [Verdict.OK]
    assert verify("gitlab", sign("github", BODY, "s"), BODY, ["s"]) is Verdict.UNKNOWN_SOURCE


@pytest.mark.parametrize("source", SOURCES)
def test_header_names_match_in_any_case(source: str) -> None:
    headers = sign(source, BODY, "s")
    for kind in (
        CIMultiDict(headers),
        {k.lower(): v for k, v in headers.items()},
        {k.upper(): v for k, v in headers.items()},
    ):
        assert verify(source, kind, BODY, ["s"]).ok
        assert dedupe_key(source, kind, BODY) == dedupe_key(source, headers, BODY)


def test_the_age_of_a_hook_is_none_of_its_business() -> None:
    body = b'{"webhookTimestamp":1}'
    assert verify("linear", sign("linear", body, "s"), body, ["s"]).ok


# --- the same event again?


def key(source: str, body: bytes, delivery: str = "d1") -> str:
    return dedupe_key(source, sign(source, body, "s", delivery=delivery), body)


def test_linears_unsigned_delivery_id_does_not_matter() -> None:
    assert key("linear", BODY, "d1") == key("linear", BODY, "d2")
    assert key("linear", BODY) != key("linear", BODY + b" ")


def test_githubs_guid_tells_equal_bodies_of_two_events_apart() -> None:
    assert key("github", BODY, "d1") == key("github", BODY, "d1")
    assert key("github", BODY, "d1") != key("github", BODY, "d2")
    assert key("github", BODY, "d1") != key("github", b"{}", "d1")


def test_notions_retries_are_one_event_by_their_signed_id() -> None:
    first, second = (json.dumps({"id": "e1", "attempt_number": n}).encode() for n in (1, 2))
    assert key("notion", first) == key("notion", second) == "notion:e1"
    assert key("notion", b'{"attempt_number":1}') != key("notion", b'{"attempt_number":2}')


def test_sources_do_not_share_keys() -> None:
    assert len({key(source, b"{}") for source in SOURCES}) == 3


@pytest.mark.parametrize("strange", ["", "x" * 201, "a\nb", "é", "\ud800", None, 7, ["e"]])
def test_an_id_that_cannot_be_a_key_is_passed_over(strange: Any) -> None:
    body = json.dumps({"id": strange}).encode()
    assert delivery_id("notion", {}, body) == ""
    assert dedupe_key("notion", {}, body) == f"notion:{hashlib.sha256(body).hexdigest()}"


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b'{"a":NaN}', b"[" * 200_000, b'{"a":' * 100_000])
def test_a_body_that_is_no_object_reads_as_an_empty_one(body: bytes) -> None:
    assert body_object(body) == {}


def test_a_body_in_broken_utf8_is_still_read() -> None:
    assert body_object(b'\xef\xbb\xbf{"id":"e1","x":"\xff"}')["id"] == "e1"


def event(source: str, body: bytes, delivery: str = "d1") -> str:
    return event_key(source, sign(source, body, "s", delivery=delivery), strict_object(body), body)


def test_a_creation_at_linear_is_one_event_however_the_news_is_worded() -> None:
    first, retry = (
        json.dumps({"type": "Issue", "action": "create", "data": {"id": "i1"}, "webhookTimestamp": n}).encode()
        for n in (1, 2)
    )
    assert event("linear", first) == event("linear", retry) == "linear:create:Issue:i1"
    update = first.replace(b"create", b"update")
    assert event("linear", update) == dedupe_key("linear", {}, update)


@pytest.mark.parametrize("data", [None, "i1", {}, {"id": 7}, {"id": ""}, {"id": "x" * 201}, {"id": "a\nb"}])
def test_a_creation_of_nothing_that_has_a_name_is_known_by_its_body(data: Any) -> None:
    body = json.dumps({"type": "Issue", "action": "create", "data": data}).encode()
    assert event("linear", body) == dedupe_key("linear", {}, body)


def test_a_github_body_is_worked_on_once_under_whatever_unsigned_guid_it_comes() -> None:
    assert event("github", BODY_OBJECT, "d1") == event("github", BODY_OBJECT, "d2")
    assert event("github", BODY_OBJECT) != event("github", b'{"zen":"other"}')


def test_notions_event_is_known_by_its_signed_id() -> None:
    assert event("notion", b'{"id":"e1"}') == "notion:e1"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"1", b"{", b'{"a":NaN}', b"[" * 200_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b'{"a":1e308}', b'{"a":-1e999}', b'{"a":"\\ud800"}', b'{"\xff":1}',
    ],
)  # fmt: skip
def test_a_body_that_two_readers_may_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (any reason)
        strict_object(body)


def test_a_plain_body_is_read_with_its_emoji_and_its_numbers() -> None:
    body = '{"a":"😀 \\ud83d\\ude00","n":[1,2.5,-1e10]}'.encode()
    assert strict_object(body) == {"a": "😀 😀", "n": [1, 2.5, -1e10]}
