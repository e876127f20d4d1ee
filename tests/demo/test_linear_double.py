"""The double of Linear: it refuses what Linear refuses, and counts what was really changed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from piclusterd import config, ids
from piclusterd.demo import linear_double
from piclusterd.demo.linear_double import SCHEMA_VARIABLE, Fault, LinearDouble, public_schema
from piclusterd.demo.linear_workspace import Refusal
from piclusterd.integrations import linear_documents
from piclusterd.integrations.linear import LinearClient
from piclusterd.integrations.outcome import CallFailed
from piclusterd.wire import Hook
from piclusterd.workflows.triage import Triage
from piclusterd.workflows.workflow import AskModel, Call, Finish

UPDATE = "mutation($id: String!, $input: IssueUpdateInput!) {\n  issueUpdate(id: $id, input: $input) { success }\n}"
CREATE = "mutation($input: CommentCreateInput!) {\n  commentCreate(input: $input) { comment { id body } }\n}"
BUG = ids.uuid4_of("label", "Bug")

needs_schema = pytest.mark.skipif(public_schema() is None, reason="Linear's public schema or graphql-core is absent")


@pytest.fixture(params=["by schema", "by name"])
def double(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LinearDouble:
    """A double that is not listening, with the public schema and as on a machine without it."""
    if request.param == "by name":
        monkeypatch.setenv(SCHEMA_VARIABLE, "/nonexistent/schema.graphql")
    elif public_schema() is None:
        pytest.skip("Linear's public schema or graphql-core is absent")
    return LinearDouble()


def answer(double: LinearDouble, document: str, **variables: Any) -> dict[str, Any]:
    return double.answer(document, variables)[1]


def message(reply: Mapping[str, Any]) -> str:
    return str(reply["errors"][0]["message"])


# effects -------------------------------------------------------------------------------------------------------------
def test_an_update_that_changes_nothing_is_no_effect(double: LinearDouble) -> None:
    issue = double.create_issue("A")["data"]["id"]
    for _ in range(3):
        reply = answer(double, UPDATE, id=issue, input={"priority": 2, "addedLabelIds": [BUG]})
        assert reply["data"]["issueUpdate"]["success"] is True
    assert [(effect.kind, effect.issue, effect.change) for effect in double.effects] == [
        ("issue-update", "LIN-1", {"priority": 2, "added_labels": ["Bug"]})
    ]


def test_a_second_comment_with_an_id_is_refused_in_linears_words(double: LinearDouble) -> None:
    issue = double.create_issue("A")["data"]["id"]
    key = ids.uuid4_of("x")
    fields = {"id": key, "issueId": issue, "body": "hello"}
    assert "errors" not in answer(double, CREATE, input=fields)
    reply = answer(double, CREATE, input=fields)
    assert message(reply) == "conflict on insert of Comment"
    extensions = reply["errors"][0]["extensions"]
    assert extensions["code"] == "INPUT_ERROR"
    assert extensions["userPresentableMessage"] == f"Entity Comment with id {key} already exists."
    assert [effect.key for effect in double.effects] == [key]


def test_what_people_do_is_no_effect(double: LinearDouble) -> None:
    issue = double.create_issue("A")["data"]["id"]
    double.edit(issue, priority=1, labels=["Chore"], title="B")
    assert (double.issue("LIN-1").title, double.issue("LIN-1").priority) == ("B", 1)
    double.delete(issue)
    with pytest.raises(Refusal, match="Entity not found: Issue"):
        double.issue(issue)
    assert double.effects == []


@pytest.mark.parametrize(
    ("document", "variables"),
    [
        (UPDATE, {"id": "LIN-9", "input": {"priority": 1}}),
        (UPDATE, {"id": "LIN-1", "input": {"priority": 9}}),
        (UPDATE, {"id": "LIN-1", "input": {"addedLabelIds": ["unknown"]}}),
        (UPDATE, {"id": "LIN-1", "input": {"title": "unsupported here"}}),
        (CREATE, {"input": {"id": "not-a-uuid", "issueId": "LIN-1", "body": "x"}}),
        (CREATE, {"input": {"issueId": "LIN-9", "body": "x"}}),
        ("query($id: String!) {\n  comment(id: $id) { id }\n}", {"id": "nothing"}),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    double: LinearDouble, document: str, variables: dict[str, Any]
) -> None:
    double.create_issue("A")
    reply = answer(double, document, **variables)
    assert reply["data"] is None
    assert reply["errors"][0]["extensions"]["userError"] is True
    assert double.effects == []


# the public schema ---------------------------------------------------------------------------------------------------
@needs_schema
@pytest.mark.parametrize(
    ("document", "variables"),
    [
        ("query {", {}),
        ("query { issue(id: 1) { id } }", {}),
        ('query { issue(id: "a") { colour } }', {}),
        (UPDATE, {"id": "a", "input": {"nope": 1}}),
        (UPDATE, {"id": "a", "input": {"priority": "high"}}),
        (UPDATE, {"id": "a"}),
    ],
)
def test_what_the_schema_forbids_is_refused_and_kept(document: str, variables: dict[str, Any]) -> None:
    double = LinearDouble()
    status, reply = double.answer(document, variables)
    assert status == 400
    assert reply["errors"][0]["extensions"]["type"] == "graphql error"
    assert len(double.violations) == 1


@needs_schema
def test_the_webhook_has_the_shape_of_the_public_schema() -> None:
    double = LinearDouble()
    payload = double.create_issue("A", "text", priority=1, labels=["Bug"])
    schema = public_schema()
    assert schema is not None
    fits(
        schema.type_map["EntityWebhookPayload"], {key: value for key, value in payload.items() if key != "data"}, "data"
    )
    fits(schema.type_map["IssueWebhookPayload"], payload["data"])
    fits(schema.type_map["UserActorWebhookPayload"], payload["actor"])
    fits(schema.type_map["IssueLabelChildWebhookPayload"], payload["data"]["labels"][0])
    fits(schema.type_map["WorkflowStateChildWebhookPayload"], payload["data"]["state"])
    fits(schema.type_map["TeamChildWebhookPayload"], payload["data"]["team"])


def fits(kind: Any, value: Mapping[str, Any], *elsewhere: str) -> None:
    """Only fields of the type, and all of those that are never null."""
    required = {name for name, field in kind.fields.items() if str(field.type).endswith("!")}
    assert set(value) <= set(kind.fields)
    assert required <= {*value, *elsewhere}


def test_without_a_schema_a_document_of_somebody_else_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCHEMA_VARIABLE, "/nonexistent")
    double = LinearDouble()
    assert double.answer("query { viewer { id } }", {})[0] == 400
    assert len(double.violations) == 1


# over HTTP -----------------------------------------------------------------------------------------------------------
async def test_the_demo_makes_issues_and_reads_effects_over_http() -> None:
    async with LinearDouble() as double, aiohttp.ClientSession() as session:
        root = double.url.removesuffix("/graphql")
        async with session.post(f"{root}/issues", json={"title": "A", "description": "b"}) as response:
            payload = await response.json()
        assert (payload["action"], payload["type"], payload["data"]["identifier"]) == ("create", "Issue", "LIN-1")
        body = {"query": UPDATE, "variables": {"id": "LIN-1", "input": {"priority": 3}}}
        async with session.post(double.url, json=body) as response:
            assert response.status == 401
        async with session.post(double.url, json=body, headers={"Authorization": double.key}) as response:
            assert (await response.json())["data"]["issueUpdate"]["success"]
        async with session.get(f"{root}/effects") as response:
            assert await response.json() == [
                {"kind": "issue-update", "issue": "LIN-1", "key": "", "change": {"priority": 3}}
            ]


async def test_as_a_program_it_prints_each_effect_as_a_line_of_json() -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", linear_double.__name__, "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    try:
        async with asyncio.timeout(30):
            listening = json.loads(await program.stdout.readline())
            client = LinearClient(listening["listening"], listening["key"])
            root = listening["listening"].removesuffix("/graphql")
            async with aiohttp.ClientSession() as session, session.post(f"{root}/issues", json={"title": "A"}):
                pass
            await client.perform("issue_update", {"issue": "LIN-1", "priority": 2}, "key")
            await client.close()
            effect = json.loads(await program.stdout.readline())
        assert effect["change"] == {"priority": 2}
    finally:
        program.terminate()
        await program.wait()


# the whole workflow against it ---------------------------------------------------------------------------------------
async def run_to_its_end(double: LinearDouble, client: LinearClient, hook: Hook) -> Finish:
    """The runner of workflows in five lines: a step that fails retryably is simply taken again."""
    workflow = Triage(config.Triage(), "small", "us")
    results: dict[str, Mapping[str, Any]] = {}
    while not isinstance(step := workflow.next(ids.run_id("triage", hook.key), hook, results), Finish):
        if isinstance(step, AskModel) or step.service == "memory":  # type: ignore[union-attr]
            text = '{"type": "bug", "priority": "P0", "reason": "it is down"}'
            results[step.name] = {"text": text, "model": "small", "node": "pi-1"}
            continue
        assert isinstance(step, Call)
        try:
            results[step.name] = await client.perform(step.operation, step.arguments, step.key)
        except CallFailed as fault:
            if not fault.retryable:
                raise
    return step


@pytest.mark.parametrize("schema", ["by schema", "by name"])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        [Fault("lost")] * 5,
        [None, Fault("lost")] * 5,
        [None, None, Fault("lost")] * 4,
        [Fault("internal"), Fault("malformed"), Fault("partial")] * 4,
        [None, None, None, Fault("partial"), None, Fault("partial"), Fault("partial")],
    ],
)
async def test_a_triage_leaves_one_update_and_one_comment_whatever_answers_are_lost(
    faults: list[Fault | None], schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if schema == "by name":
        monkeypatch.setenv(SCHEMA_VARIABLE, "/nonexistent")
    async with LinearDouble() as double:
        payload = double.create_issue("Server down", "Nothing answers.")
        client = LinearClient(double.url, double.key)
        double.faults.extend(faults)
        finish = await run_to_its_end(double, client, Hook("linear", "k", "Issue", json.dumps(payload).encode()))
        await client.close()
        assert (finish.outcome, finish.detail, finish.urgent) == ("done", "bug P0: it is down", True)
        assert [effect.kind for effect in double.effects] == ["issue-update", "comment-create"]
        assert double.effects[0].change == {"priority": 1, "added_labels": ["Bug"]}
        assert double.violations == []


def test_the_client_is_bound_to_the_documents_that_are_validated() -> None:
    sent = {value for name, value in vars(linear_documents).items() if name.isupper() and isinstance(value, str)}
    assert {text for text in sent if "(" in text and "{" in text} == set(linear_documents.DOCUMENTS)
