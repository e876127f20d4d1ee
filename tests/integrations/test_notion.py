"""The client of Notion against the double: one page an issue, whatever Notion does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from piclusterd.demo.doubles import Fault, FaultKind
from piclusterd.demo.notion_double import VERSION, NotionDouble
from piclusterd.errors import UserError
from piclusterd.integrations.notion import PAUSE_MAX_S, NotionClient
from piclusterd.integrations.outcome import CallFailed

ISSUE = "0b7c5a4e-0000-4000-8000-000000000001"


@pytest.fixture
async def double() -> AsyncIterator[NotionDouble]:
    async with NotionDouble() as double:
        yield double


@pytest.fixture
async def client(double: NotionDouble) -> AsyncIterator[NotionClient]:
    client = NotionClient(double.url, double.key, VERSION)
    yield client
    await client.close()


def wish(double: NotionDouble, **changes: Any) -> dict[str, Any]:
    told = {
        "data_source": double.data_source, "id_property": "Linear ID", "title_property": "Name", "issue": ISSUE,
        "title": "LIN-1 Crash", "markdown": "It crashed.\n\n## Behaviour\n\n- It no longer does.",
    }  # fmt: skip
    return told | changes


async def failure(client: NotionClient, operation: str, arguments: dict[str, Any]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await client.perform(operation, arguments, "key")
    return caught.value


async def test_a_page_is_made_once_with_title_id_and_text(double: NotionDouble, client: NotionClient) -> None:
    made = await client.perform("spec_page", wish(double), "key")
    (page,) = double.pages.values()
    assert made == {"page": page.id, "url": page.told()["url"], "repeated": False}
    assert page.markdown == wish(double)["markdown"]
    assert page.properties["Name"]["title"][0]["text"]["content"] == "LIN-1 Crash"
    assert page.properties["Linear ID"]["rich_text"][0]["text"]["content"] == ISSUE
    assert double.violations == []


async def test_the_second_of_two_finds_the_page_and_leaves_what_people_wrote(double: NotionDouble) -> None:
    for life in range(2):  # the second is another coordinator's, which remembers nothing
        client = NotionClient(double.url, double.key, VERSION)
        made = await client.perform("spec_page", wish(double, markdown=f"version {life}"), "key")
        again = await client.perform("spec_page", wish(double, markdown="another"), "key")
        await client.close()
        assert (made["repeated"], again["repeated"]) == (life == 1, True)
        double.edit(made["page"], "people wrote this")
    (page,) = double.pages.values()
    assert page.markdown == "people wrote this"


async def test_a_page_whose_making_was_not_answered_is_found_and_not_made_again(
    double: NotionDouble, client: NotionClient
) -> None:
    double.faults.extend([None, Fault("lost")])  # the search; the making
    fault = await failure(client, "spec_page", wish(double))
    assert fault.retryable
    assert fault.retry_after_s is not None
    assert len(double.pages) == 1
    assert (await client.perform("spec_page", wish(double), "key"))["repeated"]
    assert len(double.pages) == 1


async def test_two_at_once_for_one_issue_make_one_page(double: NotionDouble, client: NotionClient) -> None:
    told = await asyncio.gather(*(client.perform("spec_page", wish(double), "key") for _ in range(3)))
    assert len({one["url"] for one in told}) == 1
    assert len(double.pages) == 1


class Behind(NotionDouble):
    """Its search does not know what was made since, for the first `blind` queries."""

    blind = 0

    async def _query(self, request: Any) -> Any:
        if self.blind > 0:
            self.blind -= 1
            pages, self.pages = self.pages, {}
            try:
                return await super()._query(request)
            finally:
                self.pages = pages
        return await super()._query(request)


async def test_of_two_pages_by_two_coordinators_the_older_stays() -> None:
    async with Behind() as double:
        first, second = (NotionClient(double.url, double.key, VERSION) for _ in range(2))
        one = await first.perform("spec_page", wish(double), "key")
        double.blind = 1
        two = await second.perform("spec_page", wish(double), "key")
        await first.close()
        await second.close()
        assert two == {**one, "repeated": True}
        assert [page.in_trash for page in double.pages.values()] == [False, True]


async def test_a_page_that_people_threw_away_is_made_anew(double: NotionDouble, client: NotionClient) -> None:
    one = await client.perform("spec_page", wish(double), "key")
    double.pages[one["page"]].in_trash = True
    two = await client.perform("spec_page", wish(double), "key")
    assert (two["repeated"], two["page"] != one["page"]) == (False, True)


@pytest.mark.parametrize(
    ("kind", "pause"),
    [("ratelimited", 30.0), ("spent", 30.0), ("unavailable", 30.0), ("internal", 5.0), ("malformed", 5.0),
     ("partial", 5.0), ("lost", 5.0), ("hang", 5.0)],
)  # fmt: skip
async def test_what_passes_is_retryable_and_says_when(double: NotionDouble, kind: FaultKind, pause: float) -> None:
    client = NotionClient(double.url, double.key, VERSION, timeout_s=0.5)
    double.faults.extend([Fault(kind), Fault(kind)])
    fault = await failure(client, "spec_page", wish(double))
    await client.close()
    assert (fault.retryable, fault.retry_after_s) == (True, pause)


async def test_what_stays_says_what_to_do(double: NotionDouble, client: NotionClient) -> None:
    double.full = True
    assert "upgrade it" in str(await failure(client, "spec_page", wish(double)))
    double.full = False
    for change, fix in (
        ({"data_source": "11111111-0000-4000-8000-000000000001"}, "Share the data source"),
        ({"title_property": "Nobody"}, "title_property"),
    ):
        fault = await failure(client, "spec_page", wish(double, **change))
        assert not fault.retryable
        assert fix in str(fault)
    wrong = NotionClient(double.url, "ntn_wrong", VERSION)
    fault = await failure(wrong, "spec_page", wish(double))
    await wrong.close()
    assert not fault.retryable
    assert "token_file" in str(fault)
    assert "ntn_wrong" not in str(fault)


async def test_a_long_pause_is_not_believed(double: NotionDouble, client: NotionClient) -> None:
    double.faults.append(Fault("ratelimited", seconds=90_000))
    assert (await failure(client, "spec_page", wish(double))).retry_after_s == PAUSE_MAX_S


class Liar(NotionDouble):
    """Answers of pages are changed by `lie` before they leave."""

    lie: Any = staticmethod(lambda told: told)

    async def _create(self, request: Any) -> Any:
        answer = await super()._create(request)
        return web.json_response(self.lie(json.loads(str(answer.text))))


@pytest.mark.parametrize(
    "lie",
    [
        lambda told: told | {"url": "javascript:alert(1)"},
        lambda told: told | {"url": "https://notion.so.evil.example/x"},
        lambda told: told | {"url": "http://www.notion.so/x"},
        lambda told: told | {"properties": {}},
        lambda told: told | {"id": "../../etc"},
        lambda told: {"object": "page"},
        lambda told: [],
    ],
)
async def test_a_lie_about_the_page_is_not_believed_and_makes_no_second_page(lie: Any) -> None:
    async with Liar() as double:
        double.lie = lie
        client = NotionClient(double.url, double.key, VERSION)
        assert (await failure(client, "spec_page", wish(double))).retryable
        assert (await client.perform("spec_page", wish(double), "key"))["url"].startswith("https://www.notion.so/")
        await client.close()
        assert len(double.pages) == 1


async def test_other_pages_that_a_search_tells_are_not_ours(double: NotionDouble, client: NotionClient) -> None:
    await client.perform("spec_page", wish(double, issue="other"), "key")

    async def all_of_them(request: Any) -> Any:
        return web.json_response({"results": [page.told() for page in double.pages.values()]})

    double._query = all_of_them  # type: ignore[method-assign]
    await double.stop()
    await double.start()
    other = NotionClient(double.url, double.key, VERSION)
    assert not (await other.perform("spec_page", wish(double), "key"))["repeated"]
    await other.close()
    assert len(double.pages) == 2


async def test_a_look_tells_whose_page_it_is(double: NotionDouble, client: NotionClient) -> None:
    made = await client.perform("spec_page", wish(double), "key")
    ask = {"page": made["page"], "id_property": "Linear ID"}
    told = await client.perform("page_look", ask, "key")
    assert (told["issue"], told["title"], told["in_trash"]) == (ISSUE, "LIN-1 Crash", False)
    assert (await client.perform("page_look", {**ask, "id_property": "Name of none"}, "key"))["issue"] == ""
    assert await client.perform("page_look", {**ask, "page": "gone"}, "key") == {"missing": True}


@pytest.mark.parametrize(
    ("operation", "change"),
    [("page_delete", {}), ("spec_page", {"issue": "../x"}), ("spec_page", {"data_source": "a/b"}),
     ("spec_page", {"url": "http://evil.example"}), ("spec_page", {"markdown": "x" * 400_001}),
     ("spec_page", {"markdown": ""})],
)  # fmt: skip
async def test_nothing_else_is_sent(
    double: NotionDouble, client: NotionClient, operation: str, change: dict[str, Any]
) -> None:
    assert not (await failure(client, operation, wish(double, **change))).retryable
    assert double.requests == 0


def test_a_token_of_two_lines_is_refused() -> None:
    with pytest.raises(UserError, match="one line"):
        NotionClient("http://127.0.0.1:9", "a\nb", VERSION)
