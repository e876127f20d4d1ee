"""GitHub's deliveries over real HTTP: which never arrived, and asking for them again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from piclusterd.demo.doubles import Fault, FaultKind
from piclusterd.demo.github_double import HOOK_ID, REPOSITORY, Delivery, GitHubDouble
from piclusterd.integrations.github import PAGE_DELIVERIES, PAUSE_DEFAULT_S, GithubClient
from piclusterd.integrations.outcome import CallFailed

HOOK = f"{REPOSITORY}/{HOOK_ID}"
TOKEN = "ghp_test"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
async def double() -> AsyncIterator[GitHubDouble]:
    async with GitHubDouble(TOKEN) as double:
        double.hook_url = NOWHERE
        yield double
        assert double.violations == []


@pytest.fixture
async def client(double: GitHubDouble) -> AsyncIterator[GithubClient]:
    client = GithubClient(double.url, TOKEN, HOOK)
    yield client
    await client.close()


def sent(double: GitHubDouble, guid: str, status: int, ago_s: float = 0.0) -> int:
    """A delivery of the past; its number."""
    number = 1000 + len(double.deliveries)
    double.deliveries.append(Delivery(number, guid, "push", b"{}", time.time() - ago_s, status))
    return number


async def failure(client: GithubClient, operation: str, **arguments: object) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await client.perform(operation, arguments, "key")
    return caught.value


async def test_failed_and_arrived_deliveries_are_told_apart(double: GitHubDouble, client: GithubClient) -> None:
    lost = sent(double, "lost", 502)
    late = sent(double, "late", 0)
    sent(double, "late", 200)
    sent(double, "fine", 200)
    page = await client.perform("deliveries_since", {"since_ms": 0}, "key")
    assert page["failed"] == {"lost": lost, "late": late}
    assert page["arrived"] == ["fine", "late"]
    assert page["more"] == ""
    assert abs(page["now_ms"] - time.time() * 1000) < 5000


async def test_pages_follow_the_link_and_stop_at_what_is_old(double: GitHubDouble, client: GithubClient) -> None:
    for n in range(2 * PAGE_DELIVERIES + 1):
        sent(double, f"g{n}", 500, ago_s=3600.0 if n < PAGE_DELIVERIES else 0.0)
    since = int((time.time() - 600) * 1000)
    found: dict[str, int] = {}
    after, pages = "", 0
    while pages == 0 or after:
        page = await client.perform("deliveries_since", {"since_ms": since, "after": after}, "key")
        found |= page["failed"]
        after, pages = page["more"], pages + 1
    assert len(found) == PAGE_DELIVERIES + 1
    assert pages == 2


async def test_a_delivery_is_asked_for_again(double: GitHubDouble, client: GithubClient) -> None:
    number = sent(double, "lost", 502)
    assert await client.perform("redeliver", {"delivery": number}, "key") == {"accepted": True}
    again = double.deliveries[-1]
    assert (again.guid, again.redelivery) == ("lost", True)
    assert again.id != number
    assert await client.perform("redeliver", {"delivery": 1}, "key") == {"missing": True}
    double.violations.clear()


@pytest.mark.parametrize(
    ("kind", "pause"), [("spent", (110.0, 120.0)), ("ratelimited", (30.0, 30.0)), ("internal", None), ("lost", None),
                        ("malformed", None)],
)  # fmt: skip
async def test_what_passes_is_retryable_and_says_when(
    double: GitHubDouble, client: GithubClient, kind: FaultKind, pause: tuple[float, float] | None
) -> None:
    fault = Fault(kind, 120 if kind == "spent" else 30)
    double.faults.extend([fault, fault])  # aiohttp itself repeats a GET whose connection was dropped
    found = await failure(client, "deliveries_since", since_ms=0)
    assert found.retryable
    if pause is None:
        assert found.retry_after_s is None
    else:
        assert found.retry_after_s is not None
        assert pause[0] <= found.retry_after_s <= pause[1] <= PAUSE_DEFAULT_S * 2


async def test_a_wrong_token_or_hook_stays_wrong_and_the_token_is_not_told(double: GitHubDouble) -> None:
    for token, hook in (("ghp_wrong", HOOK), (TOKEN, "ann/other/1")):
        client = GithubClient(double.url, token, hook)
        fault = await failure(client, "deliveries_since", since_ms=0)
        await client.close()
        assert not fault.retryable
        assert token not in str(fault)
    double.violations.clear()


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [("delete_hook", {}), ("redeliver", {"delivery": "../1"}), ("deliveries_since", {"since_ms": -1}),
     ("deliveries_since", {"since_ms": 0, "url": "http://evil.example"})],
)  # fmt: skip
async def test_nothing_else_is_sent(client: GithubClient, operation: str, arguments: dict[str, object]) -> None:
    assert not (await failure(client, operation, **arguments)).retryable


async def test_a_server_that_does_not_answer_is_retryable() -> None:
    client = GithubClient("http://127.0.0.1:9", TOKEN, HOOK)
    assert (await failure(client, "deliveries_since", since_ms=0)).retryable
    await client.close()
