"""Files and batches by openai-python, unchanged: real doors, real disk, a real model; the run is walked by the test."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from piclusterd import batches
from piclusterd.batches import Batches
from piclusterd.errors import NotFound, Unavailable, UserError
from piclusterd.events import Fact, HookTaken
from piclusterd.ids import LogId, NodeId, RunId, Term, run_id
from piclusterd.inference import unhurried
from piclusterd.inference.protocol import GenerateRequest
from piclusterd.integrations.outcome import CallFailed
from piclusterd.shelf import Company, Shelf
from piclusterd.uploads import Uploads
from piclusterd.views import RunView
from piclusterd.web import batch_lines, files
from piclusterd.web.admin import JobWish
from piclusterd.web.key_file import Grant, digest_of
from piclusterd.web.keys import Keyring
from piclusterd.wire import Hook
from piclusterd.workflows.batch import Batch
from piclusterd.workflows.journal import Journal, hook_record, view_of
from piclusterd.workflows.workflow import Call, Finish
from tests.inference.rig import NAME
from tests.web.house import Node, serving
from tests.web.test_openai import Api, running

LOG = LogId(NodeId("1" * 16), 1)
NOW = 1_800_000_000


@dataclass
class Ledger:
    """What a coordinator would have written, and the walk of a run through its steps."""

    journal: Journal = field(default_factory=Journal)
    seq: int = 0

    def write(self, kind: str, body: dict[str, Any]) -> None:
        self.seq += 1
        self.journal.grow([Fact(LOG, self.seq, Term(1), kind, body)])

    async def take(self, hook: Hook) -> HookTaken:
        title = Batch().wants(hook)
        assert title is not None
        self.write("hook", dict(hook_record(hook, "batch", title, Term(1)).body))
        return HookTaken(run_id("batch", hook.key), False)

    async def change(self, wish: JobWish) -> RunView:
        run = self.journal.runs[RunId(wish.run)]
        if run.final:
            raise UserError("this run has ended")
        self.write("run.done", {"run": run.run, "outcome": "cancelled", "detail": ""})
        return view_of(run)

    async def step(self, service: Batches, id: str) -> str:
        """The next step of the run of batch `id`, done and written down; its name."""
        run = self.journal.runs[run_id("batch", id)]
        assert run.hook is not None
        step = Batch().next(run.run, run.hook, run.values())
        if isinstance(step, Finish):
            self.write("run.done", {"run": run.run, "outcome": step.outcome, "detail": step.detail})
            return step.outcome
        assert isinstance(step, Call)
        self.write("run.intent", {"run": run.run, "step": step.name, "attempt": 1})
        value = await service.perform(step.operation, step.arguments, step.key)
        self.write("run.result", {"run": run.run, "step": step.name, "value": dict(value)})
        return step.name

    async def walk(self, service: Batches, id: str) -> list[str]:
        steps = [await self.step(service, id)]
        while steps[-1] not in ("done", "failed"):
            steps.append(await self.step(service, id))
        return steps


@dataclass
class Bench:
    client: openai.AsyncOpenAI
    service: Batches
    ledger: Ledger
    shelf: Shelf
    api: Api
    url: str
    wall: list[float]

    async def upload(self, *lines: dict[str, Any]) -> str:
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        made = await self.client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
        return made.id

    async def begin(self, *lines: dict[str, Any], endpoint: Any = "/v1/chat/completions") -> str:
        file = await self.upload(*lines)
        made = await self.client.batches.create(input_file_id=file, endpoint=endpoint, completion_window="24h")
        return made.id

    async def content(self, file: str | None) -> list[dict[str, Any]]:
        assert file is not None
        text = (await self.client.files.content(file)).text
        return [json.loads(line) for line in text.splitlines()]


@asynccontextmanager
async def bench(root: Path, keys: Keyring | None = None, key: str = "none") -> AsyncIterator[Bench]:
    async def alone() -> Company:
        return Company((), 1)

    async def models() -> Mapping[str, int]:
        return {NAME: 1}

    ledger, wall = Ledger(), [float(NOW)]
    shelf = Shelf(root, lambda *_: _no_peer(), alone, lambda: wall[0])
    async with running(slots=2, queue_max=32) as api:
        service = Batches(
            shelf, api.serving, ledger.take, ledger.change, models, lambda: ledger.journal, lambda: wall[0]
        )
        doors = Node().doors(keys=keys, extra_routes=files.routes(Uploads(shelf, lambda: wall[0]), service))
        async with serving(doors) as http:
            url = str(http._base_url).rstrip("/")
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                yield Bench(client, service, ledger, shelf, api, url, wall)


async def _no_peer() -> Any:
    nothing: tuple[bytes, ...] = ()
    for one in nothing:
        yield one


def chat(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": NAME, "messages": [{"role": "user", "content": f"Title: {number}"}], "max_tokens": 3} | more
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


async def test_a_file_is_uploaded_listed_read_and_deleted(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        data = b"x" * 3_000_000  # larger than any other body may be
        made = await at.client.files.create(file=("big.txt", io.BytesIO(data)), purpose="user_data")
        assert (made.bytes, made.filename, made.purpose, made.created_at) == (len(data), "big.txt", "user_data", NOW)
        assert (await at.client.files.content(made.id)).content == data
        assert (await at.client.files.retrieve(made.id)).id == made.id
        second = await at.upload(chat(1))
        assert {file.id async for file in at.client.files.list()} == {made.id, second}
        assert [file.id async for file in at.client.files.list(purpose="batch", limit=1)] != []
        assert (await at.client.files.delete(made.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await at.client.files.retrieve(made.id)
        for after in ({"file": b"f", "purpose": "user_data"}, {"purpose": "user_data", "file": b"p"}):
            form = aiohttp.FormData()  # in either order
            for name, text in after.items():
                form.add_field(name, text, filename="x" if name == "file" else None)
            async with at.api.http.post(f"{at.url}/v1/files", data=form) as answer:
                assert (answer.status, (await answer.json())["bytes"]) == (200, 1)
        for gone, why in (("purpose", "file"), ("file", "purpose")):
            form = aiohttp.FormData()
            form.add_field(why, "user_data", content_type="text/plain")
            async with at.api.http.post(f"{at.url}/v1/files", data=form) as answer:
                assert (answer.status, (await answer.json())["error"]["param"]) == (400, gone)
        for bad in ({"purpose": "fine-tune"}, {"purpose": "vision"}):
            with pytest.raises(openai.BadRequestError, match="purpose"):
                await at.client.files.create(file=("x", b"x"), **bad)  # type: ignore[arg-type]


async def test_files_are_kept_as_long_as_their_client_says(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        line = json.dumps(chat(1)).encode()
        made = await at.client.files.create(
            file=("x", line), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
        assert made.expires_at == NOW + 7200
        begun = await at.client.batches.create(
            input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h",
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )  # fmt: skip
        await at.ledger.walk(at.service, begun.id)
        ended = await at.client.batches.retrieve(begun.id)
        assert ended.output_file_id is not None
        assert (await at.client.files.retrieve(ended.output_file_id)).expires_at == NOW + 3600
        for seconds in (5, 10**9):
            with pytest.raises(openai.BadRequestError, match="expires_after"):
                await at.client.files.create(
                    file=("x", line), purpose="batch", expires_after={"anchor": "created_at", "seconds": seconds}
                )
        at.wall[0] += 3600
        with pytest.raises(openai.NotFoundError):
            await at.client.files.content(ended.output_file_id)


async def test_a_batch_is_answered_line_by_line_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STEP_LINES_MAX", 4)
    async with bench(tmp_path) as at:
        id = await at.begin(*(chat(number) for number in range(10)))
        begun = await at.client.batches.retrieve(id)
        assert (begun.status, begun.request_counts.total if begun.request_counts else 0) == ("in_progress", 10)
        assert await at.ledger.step(at.service, id) == "lines-0"
        halfway = await at.client.batches.retrieve(id)
        assert halfway.request_counts is not None
        assert halfway.request_counts.completed == 4
        assert await at.ledger.walk(at.service, id) == ["lines-4", "lines-8", "finish", "done"]
        ended = await at.client.batches.retrieve(id)
        assert (ended.status, ended.error_file_id, ended.completed_at) == ("completed", None, NOW)
        answers = await at.content(ended.output_file_id)
        assert [batch.id async for batch in at.client.batches.list()] == [id]
        kept = {record.purpose for record in (at.shelf._held or {}).values()}
        assert kept == {"batch", "batch-object", "batch_output"}, "the parts are forgotten"
    assert [line["custom_id"] for line in answers] == [f"line-{number}" for number in range(10)]
    assert all(line["response"]["body"]["choices"][0]["message"]["content"] for line in answers)
    assert all(line["error"] is None for line in answers)


async def test_lines_that_cannot_be_answered_are_in_the_error_file(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        id = await at.begin(chat(0), chat(1, temperature=9), chat(2, max_tokens=2))
        await at.ledger.walk(at.service, id)
        ended = await at.client.batches.retrieve(id)
        good, bad = await at.content(ended.output_file_id), await at.content(ended.error_file_id)
    assert ended.request_counts is not None
    assert (ended.request_counts.completed, ended.request_counts.failed) == (2, 1)
    assert [line["custom_id"] for line in good] == ["line-0", "line-2"]
    assert [line["custom_id"] for line in bad] == ["line-1"]
    assert bad[0]["response"]["status_code"] == 400
    assert bad[0]["response"]["body"]["error"]["param"] == "temperature"


async def test_embeddings_and_completions_can_be_batched(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        for url, body, field_ in (
            ("/v1/embeddings", {"model": NAME, "input": ["a", "b"]}, "data"),
            ("/v1/completions", {"model": NAME, "prompt": "Title:", "max_tokens": 2, "n": 2}, "choices"),
        ):
            id = await at.begin({"custom_id": "x", "method": "POST", "url": url, "body": body}, endpoint=url)
            await at.ledger.walk(at.service, id)
            (answer,) = await at.content((await at.client.batches.retrieve(id)).output_file_id)
            assert len(answer["response"]["body"][field_]) == 2


GOOD = json.dumps(chat(0)).encode()
BAD: list[tuple[bytes, str]] = [
    (b"\n", "no lines"),
    (GOOD + b"\nno JSON\n", "line 2 of the file is no request"),
    (GOOD + b"\n" + json.dumps(chat(1)).encode()[:-1], "line 2"),
    (GOOD + b"\n\n" + GOOD, "line 2 .*'line-0' is an earlier line's"),
    (json.dumps(chat(1) | {"url": "/v1/images"}).encode(), "its url is '/v1/images', none of"),
    (GOOD + b"\n" + json.dumps(chat(1) | {"url": "/v1/embeddings"}).encode(), "line 2 .* endpoint /v1/chat"),
    (json.dumps(chat(1) | {"method": "GET"}).encode(), "method"),
    (b'{"custom_id": "x"}', "line 1 .*`url`"),
    (json.dumps(chat(1) | {"custom_id": ""}).encode(), "custom_id has 0 characters"),
    (GOOD + b"\n" + b'"' + 2 * 1024 * 1024 * b"x" + b'"', "line 2 .*over 1048576 bytes"),
]


async def test_a_file_that_is_no_batch_is_refused_by_its_line_and_not_kept(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        for data, why in BAD:
            with pytest.raises(openai.BadRequestError, match=why) as caught:
                await at.client.files.create(file=("in.jsonl", data), purpose="batch")
            assert caught.value.param == "input_file_id"
        assert [path.name for path in (tmp_path / "blobs").iterdir()] == []
        assert [one async for one in at.client.files.list()] == []


async def test_a_file_with_too_many_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LINES_MAX", 2)
    async with bench(tmp_path) as at:
        await at.upload(chat(1), chat(2))
        with pytest.raises(openai.BadRequestError, match="too many lines"):
            await at.upload(chat(1), chat(2), chat(3))


async def test_a_batch_that_cannot_begin_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        text = await at.client.files.create(file=("notes.txt", b"notes"), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="line 1"):
            await at.client.batches.create(
                input_file_id=text.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError, match="the batch's endpoint"):
            await at.begin(chat(1), endpoint="/v1/embeddings")
        with pytest.raises(openai.NotFoundError, match="no node serves"):
            await at.begin(chat(1, model="gone"))
        with pytest.raises(openai.NotFoundError):
            await at.client.batches.create(
                input_file_id="file-none", endpoint="/v1/completions", completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            await at.begin(chat(1), endpoint="/v1/images")
        with pytest.raises(openai.NotFoundError):
            await at.client.batches.retrieve("batch_none")
        assert not at.ledger.journal.runs


async def test_only_so_many_batches_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "OPEN_MAX", 2)
    async with bench(tmp_path) as at:
        for _ in range(2):
            await at.begin(chat(1))
        with pytest.raises(openai.RateLimitError, match="under way"):
            await at.begin(chat(1))


async def test_lines_are_asked_for_as_what_nobody_waits_for_a_few_of_the_droplet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []
    async with bench(tmp_path) as at:
        generate = at.api.serving.generate

        async def heard(request: GenerateRequest, prefer: str = "") -> Any:
            asked.append((request.priority, request.tenant, prefer))
            async for item in generate(request):
                yield item

        monkeypatch.setattr(unhurried, "DROPLET_WIDTH", 2)
        monkeypatch.setattr(at.api.serving, "generate", heard)
        at.service._droplet = unhurried.droplet_places()
        id = await at.begin(*(chat(number) for number in range(4)))
        await at.ledger.step(at.service, id)
    assert {told[:2] for told in asked} == {("batch", "batches")}
    assert [told[2] for told in asked] == ["relay", "relay", "", ""], "four side by side, on one node that serves"


async def test_nothing_more_is_asked_for_a_step_that_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    async with bench(tmp_path) as at:
        id = await at.begin(*(chat(number) for number in range(30)))
        generate = at.api.serving.generate

        async def heard(request: GenerateRequest, prefer: str = "") -> Any:
            nonlocal asked
            asked += 1
            if asked == 1:
                await at.client.batches.cancel(id)
            async for item in generate(request):
                yield item

        monkeypatch.setattr(at.api.serving, "generate", heard)
        await at.ledger.step(at.service, id)
        ended = await at.client.batches.retrieve(id)
    assert ended.status == "cancelled"
    assert asked < 20, "those that were under way end, and a few began while the word spread"


async def test_a_batch_whose_beginning_was_refused_ends_if_it_began_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as at:
        take = at.ledger.take

        async def takes_and_falls(hook: Hook) -> HookTaken:
            await take(hook)
            raise Unavailable("the coordinator did not answer")

        monkeypatch.setattr(at.service, "_take", takes_and_falls)
        with pytest.raises(openai.InternalServerError):
            await at.begin(chat(1))
        assert [one async for one in at.client.batches.list()] == []
        (run,) = at.ledger.journal.runs.values()
        with pytest.raises(CallFailed) as caught:
            await at.ledger.step(at.service, run.key)
        assert not caught.value.retryable


async def test_what_is_not_on_enough_disks_is_not_there(tmp_path: Path) -> None:
    async def too_few() -> Company:
        return Company((), 2)

    async with bench(tmp_path) as at:
        file = await at.upload(chat(1))
        at.shelf._company = too_few
        with pytest.raises(openai.InternalServerError, match="not safe yet"):
            await at.upload(chat(2))
        with pytest.raises(openai.InternalServerError, match="not safe yet"):
            await at.client.batches.create(input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")
        assert [one.id async for one in at.client.files.list()] == [file]
        assert [one async for one in at.client.batches.list()] == []
        assert not at.ledger.journal.runs


async def test_a_batch_that_the_ledger_has_let_go_of_is_not_under_way_for_ever(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        id = await at.begin(chat(1))
        at.ledger.journal.runs.clear()
        assert (await at.client.batches.retrieve(id)).status == "in_progress"
        at.wall[0] += 3 * 24 * 3600
        assert (await at.client.batches.retrieve(id)).status == "failed"


async def test_a_cancelled_batch_has_the_answers_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "STEP_LINES_MAX", 2)
    async with bench(tmp_path) as at:
        id = await at.begin(*(chat(number) for number in range(6)))
        await at.ledger.step(at.service, id)
        ended = await at.client.batches.cancel(id)
        assert (ended.status, ended.cancelled_at) == ("cancelled", NOW)
        assert len(await at.content(ended.output_file_id)) == 2
        assert (await at.client.batches.cancel(id)).status == "cancelled"


async def test_a_batch_past_its_window_says_so_of_each_line_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEP_LINES_MAX", 2)
    async with bench(tmp_path) as at:
        id = await at.begin(*(chat(number) for number in range(5)))
        await at.ledger.step(at.service, id)
        at.wall[0] += 24 * 3600
        assert await at.ledger.walk(at.service, id) == ["lines-2", "finish", "done"]
        ended = await at.client.batches.retrieve(id)
        assert (ended.status, len(await at.content(ended.output_file_id))) == ("expired", 2)
        left = await at.content(ended.error_file_id)
    assert [line["custom_id"] for line in left] == ["line-2", "line-3", "line-4"]
    assert {line["error"]["code"] for line in left} == {"batch_expired"}
    assert ended.request_counts is not None
    assert ended.request_counts.failed == 3


async def test_what_no_result_tells_of_is_answered_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEP_LINES_MAX", 3)
    asked: list[str] = []
    async with bench(tmp_path) as at:
        generate = at.api.serving.generate

        async def heard(request: GenerateRequest, prefer: str = "") -> Any:
            asked.append(request.messages[0].content)
            async for item in generate(request):
                yield item

        monkeypatch.setattr(at.api.serving, "generate", heard)
        id = await at.begin(*(chat(number) for number in range(9)))
        await at.ledger.step(at.service, id)
        run = at.ledger.journal.runs[run_id("batch", id)]
        assert run.hook is not None
        step = Batch().next(run.run, run.hook, run.values())
        assert isinstance(step, Call)
        await at.service.perform(step.operation, step.arguments, step.key)  # and the coordinator falls
        assert await at.ledger.walk(at.service, id) == ["lines-3", "lines-6", "finish", "done"]
        ended = await at.client.batches.retrieve(id)
        answers = await at.content(ended.output_file_id)
    assert [line["custom_id"] for line in answers] == [f"line-{number}" for number in range(9)]
    twice = [f"Title: {number}" for number in range(3, 6)]
    assert sorted(asked) == sorted([f"Title: {number}" for number in range(9)] + twice), "what is recorded is not asked"


async def test_finishing_again_changes_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        id = await at.begin(chat(1))
        await at.ledger.step(at.service, id)
        run = at.ledger.journal.runs[run_id("batch", id)]
        assert run.hook is not None
        step = Batch().next(run.run, run.hook, run.values())
        assert isinstance(step, Call)
        await at.service.perform("finish", step.arguments, step.key)
        first = await at.client.batches.retrieve(id)
        at.wall[0] += 10
        await at.service.perform("finish", step.arguments, step.key)
        assert await at.client.batches.retrieve(id) == first


async def test_when_no_node_can_answer_the_step_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STEP_S", 0.0)
    async with bench(tmp_path) as at:
        id = await at.begin(chat(1))
        with pytest.raises(CallFailed) as caught:
            await at.ledger.step(at.service, id)
        assert caught.value.retryable
        monkeypatch.setattr(batches, "STEP_S", 60.0)

        async def nobody(request: GenerateRequest, prefer: str = "") -> Any:
            if request:
                raise (NotFound if request.max_tokens == 3 else Unavailable)("nobody serves it now")
            yield

        monkeypatch.setattr(batches, "STEP_S", 1.0)
        monkeypatch.setattr(at.api.serving, "generate", nobody)
        for tokens in (3, 4):
            id = await at.begin(chat(1, max_tokens=tokens))
            with pytest.raises(CallFailed) as caught:
                await at.ledger.step(at.service, id)
            assert caught.value.retryable, "the node that has the model may come back"


async def test_a_batch_whose_file_was_deleted_is_given_up(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        file = await at.upload(chat(1))
        made = await at.client.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        await at.client.files.delete(file)
        with pytest.raises(CallFailed) as caught:
            await at.ledger.step(at.service, made.id)
        assert not caught.value.retryable
        at.ledger.write("run.done", {"run": run_id("batch", made.id), "outcome": "failed", "detail": "gone"})
        told = await at.client.batches.retrieve(made.id)
    assert told.status == "failed"
    assert told.errors is not None
    assert told.errors.data is not None
    assert told.errors.data[0].message == "gone"


async def test_files_and_batches_are_the_keys_own_and_its_models_too(tmp_path: Path) -> None:
    lines = [Grant(digest_of(key.encode()), key, models).line() for key, models in (("ann", (NAME,)), ("bob", ("x",)))]
    async with bench(tmp_path, Keyring(lambda: lines), "ann") as at:
        id = await at.begin(chat(1))
        file = (await at.client.batches.retrieve(id)).input_file_id
        async with openai.AsyncOpenAI(base_url=f"{at.url}/v1", api_key="bob", max_retries=0) as other:
            assert [one async for one in other.files.list()] == []
            assert [one async for one in other.batches.list()] == []
            with pytest.raises(openai.NotFoundError):
                await other.files.content(file)
            with pytest.raises(openai.NotFoundError):
                await other.batches.cancel(id)
            with pytest.raises(openai.NotFoundError):
                await other.batches.create(input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")
            mine = await other.files.create(file=("x", json.dumps(chat(1)).encode()), purpose="batch")
            with pytest.raises(openai.PermissionDeniedError):
                await other.batches.create(
                    input_file_id=mine.id, endpoint="/v1/chat/completions", completion_window="24h"
                )
