"""What specs, moderation and notices do at Linear, against the double: real HTTP on loopback."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from piclusterd import ids
from piclusterd.demo.linear_double import Fault, public_schema
from piclusterd.demo.linear_flows_double import LinearFlowsDouble
from piclusterd.demo.linear_workspace import TEAM
from piclusterd.integrations.linear_flows import DOCUMENTS, LinearFlows
from piclusterd.integrations.outcome import CallFailed

URL = "https://www.notion.so/abc"
NEW = ids.uuid4_of("run", "notice")


@pytest.fixture(params=[True, False], ids=["schema", "by name"])
async def double(request: pytest.FixtureRequest) -> AsyncIterator[LinearFlowsDouble]:
    double = LinearFlowsDouble()
    async with double:
        if not request.param:
            double._schema = None
        double.create_issue("Crash", "It crashes.")
        yield double
        assert double.violations == []


@pytest.fixture
async def client(double: LinearFlowsDouble) -> AsyncIterator[LinearFlows]:
    client = LinearFlows(double.url, double.key)
    yield client
    await client.close()


async def failure(client: LinearFlows, operation: str, arguments: dict[str, Any]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await client.perform(operation, arguments, "key")
    return caught.value


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda text: text.split("(")[0].split()[-1])
def test_every_document_is_valid_for_the_public_schema(document: str) -> None:
    graphql = pytest.importorskip("graphql")
    schema = public_schema()
    if schema is None:
        pytest.skip("Linear's public schema is not on this machine")
    assert graphql.validate(schema, graphql.parse(document)) == []


async def test_an_issue_is_told_with_what_people_said_of_it(double: LinearFlowsDouble, client: LinearFlows) -> None:
    double.say("LIN-1", "We restart it.")
    double.complete("LIN-1")
    issue = double.issue("LIN-1").id
    await client.perform("comment_create", {"issue": issue, "id": NEW, "body": "a bot's"}, "key")
    told = await client.perform("issue_told", {"issue": issue}, "key")
    assert (told["identifier"], told["state"], told["team"], told["project"]) == (
        "LIN-1",
        "completed",
        "LIN",
        "Cupboard",
    )
    assert told["comments"] == [{"by": "Bob", "body": "We restart it."}]
    assert told["url"].startswith("https://linear.app/")
    double.edit("LIN-1", trashed=True)
    assert await client.perform("issue_told", {"issue": issue}, "key") == {"missing": True}
    assert await client.perform("issue_told", {"issue": "gone"}, "key") == {"missing": True}


async def test_an_attachment_is_one_a_url(double: LinearFlowsDouble, client: LinearFlows) -> None:
    wish = {"issue": double.issue("LIN-1").id, "url": URL, "title": "Spec"}
    double.faults.append(Fault("lost"))
    assert (await failure(client, "attachment_create", wish)).retryable
    first = await client.perform("attachment_create", wish, "key")
    assert await client.perform("attachment_create", wish, "key") == first
    assert list(double.attachments) == [URL]
    assert [effect.kind for effect in double.effects] == ["attachment-create"]
    assert await client.perform("attachment_create", {**wish, "issue": "gone"}, "key") == {"missing": True}


async def test_a_comment_is_deleted_only_as_it_was_judged(double: LinearFlowsDouble, client: LinearFlows) -> None:
    comment = double.say("LIN-1", "you fool")["data"]["id"]
    seen = await client.perform("comment_context", {"comment": comment}, "key")
    assert (seen["body"], seen["identifier"]) == ("you fool", "LIN-1")
    double.resay(comment, "sorry")
    wish = {"comment": comment, "sha256": digest("you fool")}
    assert await client.perform("comment_delete", wish, "key") == {"deleted": False}
    assert double.effects == []
    wish = {"comment": comment, "sha256": digest("sorry")}
    assert await client.perform("comment_delete", wish, "key") == {"deleted": True}
    assert await client.perform("comment_delete", wish, "key") == {"missing": True}
    assert await client.perform("comment_context", {"comment": comment}, "key") == {"missing": True}
    assert [effect.kind for effect in double.effects] == ["comment-delete"]


async def test_an_issue_is_made_once_per_id(double: LinearFlowsDouble, client: LinearFlows) -> None:
    wish = {"id": NEW, "team": TEAM["id"], "title": "A run was given up", "body": "spec of LIN-1"}
    double.faults.append(Fault("lost"))
    assert (await failure(client, "issue_create", wish)).retryable
    assert await client.perform("issue_create", wish, "key") == {"issue": NEW, "repeated": True}
    assert [effect.kind for effect in double.effects] == ["issue-create"]
    other = {**wish, "id": ids.uuid4_of("another")}
    assert (await client.perform("issue_create", other, "key"))["repeated"] is False


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("issue_delete", {"issue": "i"}),
        ("issue_told", {"issue": "../i"}),
        ("attachment_create", {"issue": "i", "url": "http://www.notion.so/x", "title": "t"}),
        ("attachment_create", {"issue": "i", "url": "javascript:alert(1)", "title": "t"}),
        ("comment_delete", {"comment": "c"}),
        ("issue_create", {"id": NEW, "team": "t", "title": ""}),
    ],
)
async def test_nothing_else_is_sent(
    double: LinearFlowsDouble, client: LinearFlows, operation: str, arguments: dict[str, Any]
) -> None:
    assert not (await failure(client, operation, arguments)).retryable
    assert double.requests == 0
