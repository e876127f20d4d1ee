"""The doubles of outside services: strict where the providers are, and each planned fault told in their words."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from piclusterd.demo.cloudflare_double import CloudflareDouble
from piclusterd.demo.doubles import Double, Fault, FaultKind
from piclusterd.demo.github_double import HOOK_ID, REPOSITORY, GitHubDouble
from piclusterd.demo.huggingface_double import HuggingFaceDouble
from piclusterd.demo.linear_double import LinearDouble
from piclusterd.demo.notion_double import VERSION, NotionDouble
from piclusterd.demo.workers_ai_double import MODEL, NEURONS_A_DAY, PAID_ONLY, WorkersAIDouble
from piclusterd.integrations.github import GithubClient
from piclusterd.integrations.linear import LinearClient
from piclusterd.integrations.outcome import CallFailed
from piclusterd.integrations.signatures import verify

Answer = tuple[int, Mapping[str, str], Any]
DELIVERIES = f"/repos/{REPOSITORY}/hooks/{HOOK_ID}/deliveries"
GITHUB = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28", "User-Agent": "piclusterd"}


async def call(double: Double, method: str, path: str, *, body: Any = None, **headers: str) -> Answer:
    """Status, headers and JSON (None where it is none)."""
    told = {"Authorization": f"Bearer {double.key}", **headers}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http,
        http.request(method, double.url + path, json=body, headers=told) as answer,
    ):
        try:
            return answer.status, answer.headers, await answer.json(content_type=None)
        except ValueError:
            return answer.status, answer.headers, None


async def github(double: GitHubDouble, method: str, path: str, **more: str) -> Answer:
    return await call(double, method, path, **{**GITHUB, **more})


async def notion(double: NotionDouble, method: str, path: str, body: Any = None) -> Answer:
    return await call(double, method, path, body=body, **{"Notion-Version": VERSION})


# the plan of faults ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "double", [GitHubDouble(), NotionDouble(), HuggingFaceDouble(), WorkersAIDouble(), CloudflareDouble()]
)
async def test_each_double_has_two_kinds_of_too_many_that_differ(double: Double) -> None:
    async with double:
        told = []
        for kind in ("ratelimited", "spent"):
            double.faults.append(Fault(kind, 7))
            status, headers, body = await call(double, "GET", "/")
            told.append((status, headers.get("Retry-After"), str(body)))
        assert all(status in (402, 403, 429) for status, _, _ in told)
        assert told[0] != told[1] or isinstance(double, CloudflareDouble)  # whose API has one limit only


@pytest.mark.parametrize(
    ("kind", "status"), [("internal", 500), ("unavailable", 503), ("malformed", 200), ("oversized", 200)]
)
async def test_a_fault_is_used_up_by_one_request(kind: FaultKind, status: int) -> None:
    async with GitHubDouble() as double:
        double.faults.extend([None, Fault(kind)])
        answers = [(await github(double, "GET", DELIVERIES))[0] for _ in range(3)]
        assert answers == [200, status, 200]


async def test_what_is_lost_was_performed_and_what_hangs_was_not() -> None:
    async with NotionDouble() as double:
        page = {"parent": {"data_source_id": double.data_source}, "markdown": "# Spec"}
        double.faults.append(Fault("lost"))
        with pytest.raises(aiohttp.ClientError):
            await notion(double, "POST", "/v1/pages", page)
        assert len(double.pages) == 1
        double.faults.append(Fault("hang"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await notion(double, "POST", "/v1/pages", page)
        assert len(double.pages) == 1
        double.faults.extend([Fault("partial"), Fault("slow", 0.01)])
        assert (await notion(double, "POST", "/v1/pages", page))[2] is None
        assert (await notion(double, "POST", "/v1/pages", page))[0] == 200
        assert len(double.pages) == 3


@pytest.mark.parametrize("double", [GitHubDouble(), NotionDouble(), WorkersAIDouble(), CloudflareDouble()])
async def test_a_wrong_token_and_an_unknown_path_are_refused_and_remembered(double: Double) -> None:
    async with double:
        assert (await call(double, "GET", "/", Authorization="Bearer no"))[0] == 401
        right = {**GITHUB, "Notion-Version": VERSION}
        assert (await call(double, "GET", "/no/such/path", **right))[0] == 404
        assert len(double.violations) == 2


# GitHub ----------------------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def receiver(statuses: list[int]) -> AsyncIterator[tuple[str, list[tuple[Mapping[str, str], bytes]]]]:
    """A URL that answers with the next status, and what came."""
    came: list[tuple[Mapping[str, str], bytes]] = []

    async def take(request: web.Request) -> web.Response:
        came.append((request.headers.copy(), await request.read()))
        return web.Response(status=statuses.pop(0))

    app = web.Application()
    app.router.add_post("/hooks/github", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hooks/github", came
    finally:
        await runner.cleanup()


async def test_a_delivery_that_failed_is_listed_and_sent_again_under_its_guid() -> None:
    now = [1_000_000.0]
    double = GitHubDouble(secret="gh", clock=lambda: now[0])
    async with double, receiver([503, 200, 200]) as (url, came):
        double.hook_url = url
        failed = await double.deliver("push", {"ref": "refs/heads/main"})
        await double.deliver("ping", {"zen": "Keep it logically awesome."})
        _, headers, listed = await github(double, "GET", f"{DELIVERIES}?per_page=1")
        assert ([one["event"] for one in listed], 'rel="next"' in headers["Link"]) == (["ping"], True)
        cursor = headers["Link"].split("cursor=")[1].split(">")[0]
        _, headers, listed = await github(double, "GET", f"{DELIVERIES}?per_page=1&cursor={cursor}")
        assert ([one["status_code"] for one in listed], "Link" in headers) == ([503], False)
        _, _, bad = await github(double, "GET", f"{DELIVERIES}?status=failure")
        assert [one["id"] for one in bad] == [failed.id]
        assert (await github(double, "POST", f"{DELIVERIES}/{failed.id}/attempts"))[0] == 202
        assert [headers["X-GitHub-Delivery"] == failed.guid for headers, _ in came] == [True, False, True]
        assert all(verify("github", headers, body, ["gh"]).ok for headers, body in came)
        assert came[0][1] == came[2][1]
        now[0] += 3 * 86_400 + 1
        assert (await github(double, "POST", f"{DELIVERIES}/{failed.id}/attempts"))[0] == 422
        assert (await github(double, "POST", f"{DELIVERIES}/1/attempts"))[0] == 404


async def test_the_cluster_finds_what_github_could_not_deliver_and_has_it_sent_again() -> None:
    double = GitHubDouble(secret="gh")
    async with double, receiver([200, 503, 200]) as (url, came):
        client = GithubClient(double.url, double.key, f"{REPOSITORY}/{HOOK_ID}")
        double.hook_url = url
        fine = await double.deliver("ping", {"zen": "Keep it logically awesome."})
        lost = await double.deliver("push", {"ref": "refs/heads/main"})
        page = await client.perform("deliveries_since", {"since_ms": 0}, "key")
        assert (page["failed"], page["arrived"]) == ({lost.guid: lost.id}, [fine.guid])
        assert await client.perform("redeliver", {"delivery": lost.id}, "key") == {"accepted": True}
        assert came[-1][0]["X-GitHub-Delivery"] == lost.guid
        page = await client.perform("deliveries_since", {"since_ms": 0}, "key")
        assert lost.guid in page["arrived"]
        double.faults.append(Fault("ratelimited", 30))
        with pytest.raises(CallFailed) as limited:
            await client.perform("deliveries_since", {"since_ms": 0}, "key")
        assert limited.value.retry_after_s == 30
        await client.close()
    assert double.violations == []


async def test_githubs_api_wants_its_headers_and_its_own_parameters() -> None:
    async with GitHubDouble() as double:
        assert (await github(double, "GET", DELIVERIES, Accept="application/json"))[0] == 415
        for query in ("per_page=101", "per_page=0", "status=bad", "page=2", "cursor=x"):
            assert (await github(double, "GET", f"{DELIVERIES}?{query}"))[0] == 422
        double.runs[7] = {"id": 7, "conclusion": "success"}
        assert (await github(double, "GET", f"/repos/{REPOSITORY}/actions/runs/7"))[2]["conclusion"] == "success"
        assert (await github(double, "GET", f"/repos/{REPOSITORY}/releases/tags/v1"))[0] == 404


# Notion ----------------------------------------------------------------------------------------------------------
def text(content: str) -> list[dict[str, Any]]:
    return [{"text": {"content": content}}]


async def test_a_page_is_made_of_markdown_and_found_by_its_linear_id() -> None:
    async with NotionDouble() as double:
        properties = {"Name": {"title": text("Spec")}, "Linear ID": {"rich_text": text("LIN-1")}}
        page = {"parent": {"data_source_id": double.data_source}, "properties": properties, "markdown": "# Spec"}
        status, _, made = await notion(double, "POST", "/v1/pages", page)
        assert (status, made["url"].startswith("https://www.notion.so/")) == (200, True)
        wanted = {"filter": {"property": "Linear ID", "rich_text": {"equals": "LIN-1"}}}
        query = f"/v1/data_sources/{double.data_source}/query"
        assert [one["id"] for one in (await notion(double, "POST", query, wanted))[2]["results"]] == [made["id"]]
        wanted["filter"]["rich_text"] = {"equals": "LIN-2"}
        assert (await notion(double, "POST", query, wanted))[2]["results"] == []
        change = {"type": "replace_content", "replace_content": {"new_str": "# New"}}
        await notion(double, "PATCH", f"/v1/pages/{made['id']}/markdown", change)
        assert (await notion(double, "GET", f"/v1/pages/{made['id']}/markdown"))[2]["markdown"] == "# New"
        assert double.violations == []


async def test_notion_refuses_what_its_limits_forbid() -> None:
    async with NotionDouble() as double:
        parent = {"data_source_id": double.data_source}
        for wrong in (
            {"parent": parent, "markdown": "x", "children": []},
            {"parent": parent, "markdown": "x", "colour": "red"},
            {"parent": parent, "children": [{}] * 101},
            {"parent": parent, "properties": {"Name": {"title": text("x" * 2001)}}},
            {"parent": parent, "properties": {"Nobody": {"title": text("x")}}},
            {"parent": parent, "properties": {"Name": {"rich_text": text("x")}}},
        ):
            status, _, told = await notion(double, "POST", "/v1/pages", wrong)
            assert (status, told["code"]) == (400, "validation_error")
        assert (await call(double, "GET", "/v1/pages/x"))[0] == 400  # no Notion-Version
        assert (await notion(double, "POST", "/v1/pages", {"parent": parent, "markdown": "x" * 600_000}))[0] == 413
        assert (await notion(double, "POST", "/v1/pages", {"parent": {"data_source_id": "no"}}))[0] == 404
        double.full = True
        assert "block limit" in (await notion(double, "POST", "/v1/pages", {"parent": parent}))[2]["message"]
        assert double.pages == {}


# Workers AI ------------------------------------------------------------------------------------------------------
async def test_workers_ai_answers_until_the_days_neurons_are_spent() -> None:
    async with WorkersAIDouble() as double:
        path = double.account_url.removeprefix(double.url) + "/ai"
        body = {"messages": [{"role": "user", "content": "x"}]}
        assert (await call(double, "POST", f"{path}/run/{MODEL}", body=body))[2]["result"]["response"] == "P2"
        chat = await call(double, "POST", f"{path}/v1/chat/completions", body={"model": MODEL, **body})
        assert chat[2]["choices"][0]["message"]["content"] == "P2"
        for model, code in (("@cf/meta/llama-3.1-8b-instruct", 3042), (sorted(PAID_ONLY)[0], 5035)):
            assert (await call(double, "POST", f"{path}/run/{model}", body=body))[2]["errors"][0]["code"] == code
        assert (await call(double, "POST", f"{path}/run/{MODEL}", body={**body, "seedling": 1}))[0] == 400
        double.neurons = NEURONS_A_DAY
        status, _, told = await call(double, "POST", f"{path}/run/{MODEL}", body=body)
        assert (status, told["errors"][0]["code"]) == (429, 3036)


# HuggingFace -----------------------------------------------------------------------------------------------------
async def test_the_hub_serves_a_file_its_digest_and_a_part_of_it_and_may_lie() -> None:
    async with HuggingFaceDouble() as double:
        body = b"GGUF" + bytes(range(100))
        double.files["org/small-GGUF"] = {"small.Q4_0.gguf": body}
        told = (await call(double, "GET", "/api/models/org/small-GGUF?blobs=true"))[2]
        digest = hashlib.sha256(body).hexdigest()
        assert told["siblings"][0]["lfs"]["sha256"] == digest
        path = f"{double.url}/org/small-GGUF/resolve/main/small.Q4_0.gguf"
        async with aiohttp.ClientSession() as http:
            async with http.head(path) as answer:
                assert (answer.headers["X-Linked-Etag"], answer.headers["X-Linked-Size"]) == (f'"{digest}"', "104")
            async with http.get(path, headers={"Range": "bytes=50-"}) as answer:
                assert (answer.status, await answer.read()) == (206, body[50:])
            double.corrupt.add("small.Q4_0.gguf")
            async with http.get(path) as answer:
                lie = await answer.read()
            assert (len(lie), lie == body) == (len(body), False)
            async with http.get(f"{double.url}/org/other/resolve/main/x") as answer:
                assert answer.status == 401


async def test_the_router_answers_its_models_for_a_token() -> None:
    async with HuggingFaceDouble() as double:
        [model] = double.models
        body = {"model": f"{model}:groq", "messages": [{"role": "user", "content": "x"}]}
        assert (await call(double, "POST", "/v1/chat/completions", body=body))[0] == 200
        for wrong in ({"model": "no/such"}, {"model": f"{model}:nobody"}, {"colour": "red"}):
            assert (await call(double, "POST", "/v1/chat/completions", body=body | wrong))[0] == 400
        assert (await call(double, "POST", "/v1/chat/completions", body=body, Authorization="Bearer no"))[0] == 401


# Linear ----------------------------------------------------------------------------------------------------------
async def test_linears_client_is_told_each_fault_of_the_plan_in_linears_words() -> None:
    async with LinearDouble() as double:
        client = LinearClient(double.url, double.key, timeout_s=0.5)
        issue = double.create_issue("Crash on start")["data"]["id"]
        ask = {"issue": issue, "labels": ["Bug"]}
        try:
            for kind in ("internal", "unavailable", "malformed", "partial", "lost", "hang"):
                double.faults.append(Fault(kind))
                with pytest.raises(CallFailed) as failed:
                    await client.perform("issue_context", ask, "key")
                assert (kind, failed.value.retryable) == (kind, True)
            double.faults.append(Fault("slow", 0.01))
            assert (await client.perform("issue_context", ask, "key"))["id"] == issue
            double.faults.append(Fault("slow", 5))
            with pytest.raises(CallFailed):
                await client.perform("issue_context", ask, "key")
            double.faults.append(Fault("spent", 7))  # 429 by a proxy; Linear's own limit is a 400
            with pytest.raises(CallFailed) as limited:
                await client.perform("issue_context", ask, "key")
            assert limited.value.retry_after_s == 7
            assert double.violations == []
        finally:
            await client.close()
