"""The client of Linear against the double: real HTTP on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from piclusterd import config, ids
from piclusterd.demo.linear_double import Fault, FaultKind, LinearDouble, public_schema
from piclusterd.demo.linear_workspace import Issue
from piclusterd.errors import UserError
from piclusterd.integrations import linear_answers
from piclusterd.integrations.linear import PAGE_ISSUES, LinearClient
from piclusterd.integrations.linear_documents import DOCUMENTS
from piclusterd.integrations.outcome import CallFailed
from piclusterd.wire import Hook
from piclusterd.workflows.triage import Triage

LABELS = ["Bug", "Feature", "Question", "Chore"]
COMMENT = ids.uuid4_of("run", "comment")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def double() -> AsyncIterator[LinearDouble]:
    async with LinearDouble() as double:
        yield double
        assert double.violations == []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(double: LinearDouble, clock: Clock) -> AsyncIterator[LinearClient]:
    client = LinearClient(double.url, double.key, clock=clock)
    yield client
    await client.close()


def made(double: LinearDouble, **fields: Any) -> Issue:
    payload = double.create_issue("Crash on start", **fields)
    return double.issue(payload["data"]["id"])


async def update(client: LinearClient, issue: Issue, **change: Any) -> Any:
    return await client.perform("issue_update", {"issue": issue.id, **change}, "key")


async def comment(client: LinearClient, issue: Issue, body: str = "hello", key: str = COMMENT) -> Any:
    return await client.perform("comment_create", {"issue": issue.id, "id": key, "body": body}, key)


async def failure(client: LinearClient, operation: str, arguments: dict[str, Any]) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await client.perform(operation, arguments, "key")
    return caught.value


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda text: text.split("(")[0].split()[-1])
def test_every_document_is_valid_for_the_public_schema(document: str) -> None:
    graphql = pytest.importorskip("graphql")
    schema = public_schema()
    if schema is None:
        pytest.skip("Linear's public schema is not on this machine")
    assert graphql.validate(schema, graphql.parse(document)) == []


# issue_context -------------------------------------------------------------------------------------------------------
async def test_the_context_is_the_issue_with_the_labels_that_were_asked_for(
    double: LinearDouble, client: LinearClient
) -> None:
    issue = made(double, description="It crashes.", priority=2, labels=["Chore"])
    context = await client.perform("issue_context", {"issue": issue.id, "labels": ["bug"]}, "key")
    assert context["title"] == "Crash on start"
    assert context["description"] == "It crashes."
    assert (context["identifier"], context["priority"], context["state"]) == ("LIN-1", 2, "triage")
    assert [label["name"] for label in context["labels"]] == ["Chore"]
    assert context["team_labels"] == [{"id": ids.uuid4_of("label", "Bug"), "name": "Bug"}]
    assert context["updated_at"] == issue.updated_at


async def test_an_identifier_names_an_issue_too(double: LinearDouble, client: LinearClient) -> None:
    made(double)
    assert (await client.perform("issue_context", {"issue": "LIN-1"}, "key"))["team_labels"] == []


@pytest.mark.parametrize("trashed", [True, False])
@pytest.mark.parametrize("operation", ["issue_context", "issue_update"])
async def test_a_deleted_issue_is_missing(
    double: LinearDouble, client: LinearClient, operation: str, trashed: bool
) -> None:
    issue = made(double)
    if trashed:
        double.edit(issue.id, trashed=True)
    else:
        double.delete(issue.id)
    assert await client.perform(operation, {"issue": issue.id}, "key") == {"missing": True}


# issues_since --------------------------------------------------------------------------------------------------------
async def test_what_was_created_since_comes_page_by_page_newest_first(
    double: LinearDouble, client: LinearClient
) -> None:
    made_ = [made(double, labels=["Bug"] if n == 0 else []) for n in range(PAGE_ISSUES + 3)]
    double.edit(made_[0].id, title="Edited")
    found, after, pages = [], "", 0
    while pages == 0 or after:
        page = await client.perform("issues_since", {"since_ms": 0, "after": after}, "key")
        found += page["issues"]
        after, pages = page["more"], pages + 1
    assert pages == 2
    assert {issue["id"] for issue in found} == {issue.id for issue in made_}
    oldest = found[-1]
    assert (oldest["title"], oldest["state"], oldest["priority"]) == ("Edited", {"type": "triage"}, 0)
    assert [label["name"] for label in oldest["labels"]] == ["Bug"]


async def test_nothing_created_since_is_an_empty_page(double: LinearDouble, client: LinearClient) -> None:
    made(double)
    later = int(time.time() * 1000) + 60_000
    page = await client.perform("issues_since", {"since_ms": later}, "key")
    assert (page["issues"], page["more"]) == ([], "")


async def test_an_issue_that_was_asked_for_is_what_its_webhook_would_have_said(
    double: LinearDouble, client: LinearClient
) -> None:
    """As far as triage reads it."""
    payload = double.create_issue("Crash on start", labels=["Bug"], priority=2)
    page = await client.perform("issues_since", {"since_ms": 0}, "key")
    (told,) = page["issues"]
    triage = Triage(config.Triage(), "m", "")
    hooks = [
        Hook("linear", "k", "Issue", json.dumps({"action": "create", "type": "Issue", "data": data}).encode())
        for data in (payload["data"], told)
    ]
    assert len({triage.wants(hook) for hook in hooks}) == 1
    for field in ("id", "identifier", "title", "priority", "creatorId"):
        assert told[field] == payload["data"][field]


# issue_update --------------------------------------------------------------------------------------------------------
async def test_an_update_sets_what_is_unset(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    bug = ids.uuid4_of("label", "Bug")
    done = await update(client, issue, priority=2, add=[{"id": bug, "unless": LABELS}])
    assert done == {"changed": ["priority", "label"], "priority": 2, "label_ids": [bug]}
    assert (issue.priority, issue.label_ids) == (2, [bug])
    assert [effect.change for effect in double.effects] == [{"priority": 2, "added_labels": ["Bug"]}]


async def test_what_a_person_set_in_the_last_moment_stays(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    await client.perform("issue_context", {"issue": issue.id, "labels": LABELS}, "key")
    double.edit(issue.id, priority=4, labels=["Feature"])
    bug = ids.uuid4_of("label", "Bug")
    done = await update(client, issue, priority=1, add=[{"id": bug, "unless": LABELS}])
    assert (done["changed"], done["priority"]) == ([], 4)
    assert (issue.priority, len(issue.label_ids), double.effects) == (4, 1, [])


async def test_an_update_whose_answer_was_lost_is_one_effect(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    arguments = {"issue": issue.id, "priority": 2}
    double.faults.extend([None, Fault("lost")])  # the look is answered, the answer to the mutation is lost
    assert (await failure(client, "issue_update", arguments)).retryable
    assert issue.priority == 2
    again = await client.perform("issue_update", arguments, "key")
    assert again == {"changed": [], "priority": 2, "label_ids": []}
    assert len(double.effects) == 1


async def test_what_we_wrote_is_replaced_and_taken_back_and_what_people_wrote_is_not(
    double: LinearDouble, client: LinearClient
) -> None:
    issue = made(double, priority=2, labels=["Bug"])
    bug, feature = (ids.uuid4_of("label", name) for name in ("Bug", "Feature"))
    others = [name for name in LABELS if name != "Bug"]
    swap = {"add": [{"id": feature, "unless": others}], "removed_label_ids": [bug]}
    done = await update(client, issue, priority=1, instead_of=[2], **swap)
    assert done == {"changed": ["priority", "label"], "priority": 1, "label_ids": [feature]}
    double.edit(issue.id, priority=3, labels=["Chore"])
    done = await update(client, issue, priority=0, instead_of=[1], removed_label_ids=[feature])
    assert (done["changed"], issue.priority) == ([], 3)
    done = await update(client, issue, priority=0, instead_of=[3])
    assert (done["changed"], issue.priority) == (["priority"], 0)


async def test_more_writes_than_its_owner_allows_wait_for_the_hour_to_pass(double: LinearDouble, clock: Clock) -> None:
    client = LinearClient(double.url, double.key, writes_per_hour=2, clock=clock)
    for _ in range(2):
        await update(client, made(double), priority=2)
    fault = await failure(client, "issue_update", {"issue": made(double).id, "priority": 2})
    assert (fault.retryable, fault.retry_after_s) == (True, 3600.0)
    assert "linear.writes_per_hour" in str(fault)
    clock.now += 3600
    assert (await update(client, made(double), priority=2))["changed"] == ["priority"]
    assert len(double.effects) == 3
    await client.close()


@pytest.mark.parametrize("operation", ["issue_context", "issue_update", "comment_create"])
async def test_an_answer_about_something_else_is_noticed_and_what_to_do_is_said(
    double: LinearDouble, client: LinearClient, operation: str
) -> None:
    issue = made(double)
    arguments = {"issue": issue.id}
    arguments |= {"id": COMMENT, "body": "x"} if operation == "comment_create" else {}
    double.faults.append(Fault("wrong-id"))
    fault = await failure(client, operation, arguments)
    assert fault.retryable
    assert "something else" in str(fault)
    assert "by hand" in str(fault)
    await client.perform(operation, arguments, "key")


async def test_a_success_that_is_none_is_tried_again(double: LinearDouble, client: LinearClient) -> None:
    double.faults.append(Fault("unsuccessful"))
    issue = made(double)
    fault = await failure(client, "comment_create", {"issue": issue.id, "id": COMMENT, "body": "x"})
    assert (fault.retryable, "did not succeed" in str(fault)) == (True, True)


async def test_a_label_that_is_gone_does_not_look_like_an_issue_that_is_gone(
    double: LinearDouble, client: LinearClient
) -> None:
    issue = made(double)
    fault = await failure(client, "issue_update", {"issue": issue.id, "add": [{"id": "gone"}]})
    assert "IssueLabel" in str(fault)
    assert not fault.retryable


# comment_create ------------------------------------------------------------------------------------------------------
async def test_a_comment_is_made_once_however_often_it_is_asked_for(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    assert await comment(client, issue) == {"comment": COMMENT, "repeated": False}
    assert await comment(client, issue) == {"comment": COMMENT, "repeated": True}
    assert [effect.key for effect in double.effects] == [COMMENT]


async def test_a_comment_whose_answer_was_lost_is_found_again(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    double.faults.append(Fault("lost"))
    with pytest.raises(CallFailed) as caught:
        await comment(client, issue)
    assert caught.value.retryable
    assert (await comment(client, issue))["repeated"]
    assert len(issue.comments) == 1


async def test_an_id_that_is_on_another_issue_is_no_success(double: LinearDouble, client: LinearClient) -> None:
    await comment(client, made(double))
    with pytest.raises(CallFailed, match="already exists") as caught:
        await comment(client, made(double))
    assert not caught.value.retryable


async def test_a_comment_that_people_deleted_is_not_made_again(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    await comment(client, issue)
    double.delete_comment(COMMENT)
    assert (await comment(client, issue))["repeated"]
    assert issue.comments == []


async def test_a_comment_is_edited_where_it_is_there_and_written_once(
    double: LinearDouble, client: LinearClient
) -> None:
    issue = made(double)

    async def put(body: str) -> Any:
        return await client.perform("comment_put", {"issue": issue.id, "id": COMMENT, "body": body}, COMMENT)

    assert await put("one") == {"comment": COMMENT, "repeated": False, "edited": False}
    assert await put("one") == {"comment": COMMENT, "repeated": True, "edited": False}
    double.faults.extend([None, None, Fault("lost")])
    with pytest.raises(CallFailed):
        await put("two")
    assert await put("two") == {"comment": COMMENT, "repeated": True, "edited": False}
    assert [effect.kind for effect in double.effects] == ["comment-create", "comment-update"]
    assert [one["body"] for one in issue.comments] == ["two"]
    double.delete_comment(COMMENT)
    await put("three")
    assert issue.comments == []


async def test_a_comment_on_a_deleted_issue_is_missing(double: LinearDouble, client: LinearClient) -> None:
    issue = made(double)
    double.delete(issue.id)
    assert await comment(client, issue) == {"missing": True}


# what may be asked ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("issue_delete", {"issue": "i"}),
        ("issue_update", {"issue": "i", "priority": -1}),
        ("issue_update", {"issue": "i", "priority": 5}),
        ("issue_update", {"issue": "i", "state": "done"}),
        ("issue_update", {"issue": "i", "add": [{"id": "a b"}]}),
        ("issue_context", {"issue": 'x") { id } #'}),
        ("comment_create", {"issue": "i", "id": COMMENT, "body": ""}),
        ("comment_create", {"issue": "i", "id": COMMENT, "body": "x" * 5000}),
        ("comment_create", {}),
    ],
)
async def test_what_is_not_on_the_list_never_reaches_linear(
    double: LinearDouble, client: LinearClient, operation: str, arguments: dict[str, Any]
) -> None:
    fault = await failure(client, operation, arguments)
    assert not fault.retryable
    assert double.requests == 0


def test_a_token_of_two_lines_is_refused_without_being_shown() -> None:
    with pytest.raises(UserError) as caught:
        LinearClient("http://localhost", "secret\nother")
    assert "secret" not in str(caught.value)


# faults --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "retryable"), [("internal", True), ("malformed", True), ("partial", True), ("oversized", False)]
)
async def test_a_fault_says_whether_to_try_again(
    double: LinearDouble, client: LinearClient, kind: FaultKind, retryable: bool
) -> None:
    issue = made(double)
    double.faults.append(Fault(kind))
    fault = await failure(client, "issue_context", {"issue": issue.id})
    assert fault.retryable is retryable
    assert fault.retry_after_s is None
    assert (await client.perform("issue_context", {"issue": issue.id}, "key"))["identifier"] == "LIN-1"


async def test_a_hanging_answer_is_retryable_after_the_timeout(double: LinearDouble) -> None:
    issue = made(double)
    client = LinearClient(double.url, double.key, timeout_s=0.05)
    double.faults.append(Fault("hang"))
    assert (await failure(client, "issue_context", {"issue": issue.id})).retryable
    await client.close()


async def test_nobody_there_is_retryable() -> None:
    async with LinearDouble() as double:
        url = double.url
    client = LinearClient(url, "key")
    assert (await failure(client, "issue_context", {"issue": "LIN-1"})).retryable
    await client.close()


async def test_rate_limited_means_quiet_until_linear_said(
    double: LinearDouble, client: LinearClient, clock: Clock
) -> None:
    made(double)
    double.faults.append(Fault("ratelimited", seconds=30))
    fault = await failure(client, "issue_context", {"issue": "LIN-1"})
    assert fault.retryable
    assert fault.retry_after_s == pytest.approx(30, abs=2)
    fault = await failure(client, "issue_context", {"issue": "LIN-1"})
    assert fault.retryable
    assert double.requests == 1
    clock.now += 33
    assert (await client.perform("issue_context", {"issue": "LIN-1"}, "key"))["identifier"] == "LIN-1"


async def test_an_empty_bucket_is_respected_before_linear_complains(
    double: LinearDouble, client: LinearClient, clock: Clock
) -> None:
    made(double)
    double.faults.append(Fault("quota-spent", seconds=600))
    await client.perform("issue_context", {"issue": "LIN-1"}, "key")
    fault = await failure(client, "issue_context", {"issue": "LIN-1"})
    assert fault.retry_after_s == pytest.approx(600, abs=2)
    assert double.requests == 1


async def test_a_wrong_key_is_not_retried_and_not_shown(double: LinearDouble) -> None:
    client = LinearClient(double.url, "lin_api_wrong")
    fault = await failure(client, "issue_context", {"issue": "LIN-1"})
    assert not fault.retryable
    assert "lin_api_wrong" not in str(fault)
    await client.close()


async def test_an_oauth_token_is_sent_as_it_stands() -> None:
    async with LinearDouble(key="Bearer abc") as double, aiohttp.ClientSession() as session:
        made(double)
        client = LinearClient(double.url, "Bearer abc\n", session)
        assert (await client.perform("issue_context", {"issue": "LIN-1"}, "key"))["priority"] == 0
        await client.close()
        assert not session.closed


async def test_a_redirect_is_not_followed_with_the_token() -> None:
    async def away(request: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    app = web.Application()
    app.router.add_post("/graphql", away)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = LinearClient(f"http://127.0.0.1:{runner.addresses[0][1]}/graphql", "key")
    try:
        assert not (await failure(client, "issue_context", {"issue": "LIN-1"})).retryable
    finally:
        await client.close()
        await runner.cleanup()


# answers -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("status", "extensions", "retryable"),
    [
        (400, '{"code": "RATELIMITED"}', True),
        (200, '{"type": "lock timeout"}', True),
        (200, '{"type": "internal error", "code": "INTERNAL_SERVER_ERROR"}', True),
        (200, "{}", True),
        (500, "{}", True),
        (400, "{}", False),
        (200, '{"type": "forbidden", "code": "FORBIDDEN"}', False),
        (200, '{"type": "invalid input", "code": "INPUT_ERROR", "userError": true}', False),
        (401, '{"type": "authentication error"}', False),
        (200, '{"type": "usage limit exceeded"}', False),
        (200, '{"type": "something new", "userError": true}', False),
    ],
)
def test_errors_are_told_apart_by_whether_they_pass(status: int, extensions: str, retryable: bool) -> None:
    body = f'{{"data": {{"issue": null}}, "errors": [{{"message": "no", "extensions": {extensions}}}]}}'
    with pytest.raises(CallFailed) as caught:
        linear_answers.data_of(status, body.encode(), None)
    assert caught.value.retryable is retryable


@pytest.mark.parametrize("body", [b"[]", b'{"data": 1}', b'{"errors": "x"}', b'"' + b"\xff", b"[" * 100_000, b"{}"])
def test_answers_of_another_shape_are_faults_and_no_crash(body: bytes) -> None:
    with pytest.raises(CallFailed):
        linear_answers.data_of(200, body, None)


@pytest.mark.parametrize(
    ("headers", "pause_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "999999"}, 3600),
        ({"x-ratelimit-requests-remaining": "12", "x-ratelimit-requests-reset": "1767225690000"}, None),
        ({"x-ratelimit-requests-remaining": "0", "x-ratelimit-requests-reset": "1767225690000"}, 90),
        ({"x-ratelimit-complexity-remaining": "0", "x-ratelimit-complexity-reset": "0"}, 1),
        ({"x-ratelimit-complexity-remaining": "0"}, 60),
    ],
)
def test_pauses_are_read_by_linears_clock_not_ours(headers: dict[str, str], pause_s: float | None) -> None:
    assert linear_answers.pause_of({"Date": "Thu, 01 Jan 2026 00:00:00 GMT", **headers}) == pause_s


def test_an_empty_bucket_without_a_date_means_the_default_pause() -> None:
    headers = {"x-ratelimit-requests-remaining": "0", "x-ratelimit-requests-reset": "1767225690000"}
    assert linear_answers.pause_of(headers) == linear_answers.PAUSE_DEFAULT_S
    assert linear_answers.pause_of(headers | {"Date": "junk"}) == linear_answers.PAUSE_DEFAULT_S
